"""AdamW, the average and the copies in one pass, against float64, torch.optim.AdamW and the ops one by one."""

import sys

import numpy as np
import pytest
import torch
from checks import DEVICE, INTERPRET, RUNS_KERNELS, assert_as_accurate_as_eager, no_synchronisation
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_fast.ops import adamw_ema_, ema_update_
from d2v_fast.ops.adamw_ema import adamw_ema_ref

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# scalar, empty, below / at / above a block and a chunk of the GPU and of the interpreter configuration
SHAPES = [(), (0,), (7,), (1024,), (33, 31), (16, 1024), (16385,), (70000,)]
SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.05}
WRITTEN = ("params", "exp_avgs", "exp_avg_sqs", "ema", "param_copies", "ema_copies")


def make(shapes=SHAPES, grad_dtype=F32, copy_dtype=None, step=0.0):
    """Arguments of a call, in the middle of a training if ``step`` is not 0."""
    full = {
        "params": [torch.randn(s, device=DEVICE) for s in shapes],
        "grads": [torch.randn(s).to(DEVICE, grad_dtype) for s in shapes],
        "exp_avgs": [torch.randn(s, device=DEVICE) * (step > 0) for s in shapes],
        "exp_avg_sqs": [torch.rand(s, device=DEVICE) * (step > 0) for s in shapes],
        "step": torch.full((), step, device=DEVICE),
        "ema": [torch.randn(s, device=DEVICE) for s in shapes],
        "ema_decay": 0.3,  # so that the average's step is not hidden by rounding
    }
    if copy_dtype is not None:
        full["param_copies"] = [torch.full(s, float("nan"), dtype=copy_dtype, device=DEVICE) for s in shapes]
        full["ema_copies"] = [torch.full(s, float("nan"), dtype=copy_dtype, device=DEVICE) for s in shapes]
    return full


def clone(full, dtype=None):
    def one(x):
        return x.clone() if dtype is None else x.to(dtype, copy=True)

    return {
        k: [one(x) for x in v] if isinstance(v, list) else v.clone() if isinstance(v, torch.Tensor) else v
        for k, v in full.items()
    }


def by_formula(full, settings, dtype, scale=1.0, eps_mode="torch"):
    """The textbook update in ``dtype``: new parameters, moments and averages of every tensor."""
    (beta1, beta2), t = settings["betas"], full["step"].item() + 1
    c1, c2 = 1 - beta1**t, 1 - beta2**t
    out = []
    for p, g, m, v, e in zip(*(full[k] for k in ("params", "grads", "exp_avgs", "exp_avg_sqs", "ema")), strict=True):
        p, g, m, v, e = (x.to(dtype) for x in (p, g, m, v, e))
        g = g * scale
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        if eps_mode == "torch":
            change = settings["lr"] / c1 * m / (v.sqrt() / c2**0.5 + settings["eps"])
        else:
            change = settings["lr"] * c2**0.5 / c1 * m / (v.sqrt() + settings["eps"])
        p = p * (1 - settings["lr"] * settings["weight_decay"]) - change
        out.append((p, m, v, e + (1 - full["ema_decay"]) * (p - e)))
    return out


def call(full, **more):
    full = {**full, **more}
    lists = [full.pop(k) for k in ("params", "grads", "exp_avgs", "exp_avg_sqs", "step")]
    return adamw_ema_(*lists, **{**SETTINGS, **full})


@pytest.mark.parametrize("step", [0.0, 7.0])
@pytest.mark.parametrize("eps_mode", ["torch", "fairseq"])
@pytest.mark.parametrize("grad_dtype", [F32, BF16, F16])
def test_matches_fp64(grad_dtype, eps_mode, step):
    full = make(grad_dtype=grad_dtype, step=step)
    exact, eager = (by_formula(full, SETTINGS, dtype, eps_mode=eps_mode) for dtype in (F64, F32))
    before = [g.clone() for g in full["grads"]]
    assert call(full, eps_mode=eps_mode) is None
    assert full["step"].item() == step + 1
    for i, (want, rough) in enumerate(zip(exact, eager, strict=True)):
        for name, w, r in zip(("params", "exp_avgs", "exp_avg_sqs", "ema"), want, rough, strict=True):
            assert_as_accurate_as_eager(full[name][i], r, w, floor=1.2e-7)
        assert torch.equal(full["grads"][i], before[i])


def test_change_of_a_parameter_matches_fp64():
    """Where the parameter starts at 0 the change itself is seen, not hidden by the parameter's rounding."""
    for eps_mode in ("torch", "fairseq"):
        full = make(step=3.0)
        full["params"] = [torch.zeros_like(p) for p in full["params"]]
        exact = by_formula(full, SETTINGS, F64, eps_mode=eps_mode)
        call(full, eps_mode=eps_mode)
        for p, (want, *_) in zip(full["params"], exact, strict=True):
            torch.testing.assert_close(p.double(), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("foreach", [False, True])
def test_follows_torch_adamw(foreach):
    """Ten updates with changing learning rates, from the beginning; float32 rounding apart."""
    full = make([(), (7,), (33, 31), (16385,)])
    full["params"] = [0.01 * p for p in full["params"]]
    leaves = [p.clone().requires_grad_() for p in full["params"]]
    optimizer = torch.optim.AdamW(leaves, **SETTINGS, foreach=foreach)
    for update in range(10):
        full["grads"] = [torch.randn_like(g) for g in full["grads"]]
        optimizer.param_groups[0]["lr"] = lr = 1e-3 * (update + 1)
        for leaf, g in zip(leaves, full["grads"], strict=True):
            leaf.grad = g.clone()
        optimizer.step()
        call(full, lr=lr)
    for i, leaf in enumerate(leaves):
        torch.testing.assert_close(full["params"][i], leaf.detach(), rtol=1e-6, atol=1e-7)
        state = optimizer.state[leaf]
        torch.testing.assert_close(full["exp_avgs"][i], state["exp_avg"], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(full["exp_avg_sqs"][i], state["exp_avg_sq"], rtol=1e-6, atol=1e-9)
        assert full["step"].item() == state["step"].item() == 10


@pytest.mark.parametrize("copy_dtype", [BF16, F16, F32])
def test_average_and_copies_follow_the_new_parameters(copy_dtype):
    full = make(grad_dtype=BF16, copy_dtype=copy_dtype)
    want = [e.clone() for e in full["ema"]]
    call(full)
    ema_update_(want, full["params"], full["ema_decay"])
    for i, e in enumerate(full["ema"]):
        torch.testing.assert_close(e, want[i], rtol=2e-7, atol=1e-7)
        assert torch.equal(full["param_copies"][i], full["params"][i].to(copy_dtype))
        assert torch.equal(full["ema_copies"][i], e.to(copy_dtype))


def test_without_averages_and_with_some():
    full = make(copy_dtype=BF16)
    plain = clone(full)
    call(full)
    some = clone(plain)
    for name in ("ema", "ema_copies"):
        some[name] = [x if i % 2 else None for i, x in enumerate(some[name])]
    call(some)
    for name in ("ema", "ema_decay", "ema_copies"):
        del plain[name]
    call(plain)
    for i, p in enumerate(full["params"]):
        assert torch.equal(p, some["params"][i]) and torch.equal(p, plain["params"][i])
        if i % 2:
            assert torch.equal(full["ema"][i], some["ema"][i])
            assert torch.equal(full["ema_copies"][i], some["ema_copies"][i])


def test_weight_decay_and_step_of_every_parameter():
    full = make(step=4.0)
    decays = [0.1 * i for i in range(len(SHAPES))]
    steps = [torch.full((), float(3 * i), device=DEVICE) for i in range(len(SHAPES))]
    exact = [
        by_formula({**full, "step": step}, {**SETTINGS, "weight_decay": decay}, F64)[i]
        for i, (step, decay) in enumerate(zip(steps, decays, strict=True))
    ]
    call({**full, "step": steps}, weight_decay=decays)
    for i, (p, _, _, e) in enumerate(exact):
        torch.testing.assert_close(full["params"][i].double(), p, rtol=2e-7, atol=2e-7)
        torch.testing.assert_close(full["ema"][i].double(), e, rtol=2e-7, atol=2e-7)
        assert steps[i].item() == 3 * i + 1


def test_scalars_on_the_device():
    full = make(step=2.0)
    exact = by_formula(full, SETTINGS, F64, scale=0.125)
    scalars = {"lr": SETTINGS["lr"], "ema_decay": full["ema_decay"], "grad_scale": 0.125, "skip": 0.0}
    for dtype in (F32, F64):
        again = clone(full)
        call(again, **{k: torch.tensor(x, dtype=dtype, device=DEVICE) for k, x in scalars.items()})
        for i, (p, m, _, e) in enumerate(exact):
            torch.testing.assert_close(again["params"][i].double(), p, rtol=2e-7, atol=2e-7)
            torch.testing.assert_close(again["exp_avgs"][i].double(), m, rtol=2e-7, atol=2e-7)
            torch.testing.assert_close(again["ema"][i].double(), e, rtol=5e-7, atol=5e-7)


@pytest.mark.parametrize("flag", [1.0, float("nan")])
def test_skip_changes_nothing(flag):
    full = make(copy_dtype=BF16, step=5.0)
    full["grads"] = [torch.full_like(g, float("nan")) for g in full["grads"]]
    before = clone(full)
    call(full, skip=torch.tensor(flag, device=DEVICE))
    for name in WRITTEN:
        for x, y in zip(full[name], before[name], strict=True):
            assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)), name
    assert full["step"].item() == 5.0


def test_long_after_the_start():
    """Corrections of 1 to float32 precision, and beta = 0, which has none."""
    for betas in ((0.9, 0.999), (0.0, 0.0)):
        full = make([(50,)], step=2.0**22)
        exact = by_formula(full, {**SETTINGS, "betas": betas}, F64)
        call(full, betas=betas)
        torch.testing.assert_close(full["params"][0].double(), exact[0][0], rtol=2e-7, atol=2e-7)


def test_numpy_numbers():
    """Each of them once was taken for 0 or refused."""
    full = make(step=2.0)
    want, again = clone(full), clone(full)
    numbers = {"lr": 0.25, "eps": 0.5, "weight_decay": 0.125, "ema_decay": 0.75}  # exact in float32
    call(want, betas=(0.5, 0.25), **numbers)
    numbers = {name: np.float32(x) for name, x in numbers.items()}
    call(again, betas=(np.float32(0.5), np.float64(0.25)), **numbers)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "ema"):
        assert all(torch.equal(x, y) for x, y in zip(again[name], want[name], strict=True)), name
        assert not torch.equal(again[name][2], full[name][2]), name


@pytest.mark.parametrize("written", ["params", "exp_avgs", "exp_avg_sqs", "ema", "param_copies", "ema_copies", "step"])
def test_mutation_is_visible_to_autograd(monkeypatch, written):
    """By the op itself: PyTorch's operators in the reference would tell autograd as well, a kernel does not."""
    monkeypatch.setattr(sys.modules["d2v_fast.ops.adamw_ema"], "adamw_ema_ref", lambda *args, **more: None)
    full = make([(5,)], copy_dtype=F32)
    x = torch.ones(5, device=DEVICE, requires_grad=True)
    y = (x * (full["step"] if written == "step" else full[written][0])).sum()
    call(full)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_permuted_tensors():
    full = make([(2, 3, 4, 5), (7,)], grad_dtype=BF16, copy_dtype=BF16, step=1.0)
    last = clone(full)
    for name, xs in last.items():
        if isinstance(xs, list):
            last[name] = [xs[0].to(memory_format=torch.channels_last), xs[1]]
    call(full), call(last)
    for name in WRITTEN:
        assert all(torch.equal(x, y) for x, y in zip(full[name], last[name], strict=True)), name


def test_nan_stays_in_its_element():
    full = make([(2000,)])
    full["grads"][0][1500] = float("nan")
    call(full)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "ema"):
        assert full[name][0].isnan().nonzero().tolist() == [[1500]], name


def test_unaligned_tensors():
    full = make([(70003,)], copy_dtype=BF16)
    for name, first in (("params", 1), ("grads", 3), ("ema_copies", 5)):
        parts = {k: [x[0][1:2050], x[0][2051:69990]] for k, x in full.items() if isinstance(x, list)}
        parts[name] = [full[name][0][first : first + 2049], full[name][0][first + 2050 : first + 69989]]
        part = {**full, **parts}
        exact = by_formula(part, SETTINGS, F64)
        outside = full[name][0][2050 + first - 1].clone()
        call(part)
        for p, (want, *_) in zip(part["params"], exact, strict=True):
            torch.testing.assert_close(p.double(), want, rtol=2e-7, atol=2e-7)
        assert torch.equal(full[name][0][2050 + first - 1].nan_to_num(9.0), outside.nan_to_num(9.0))


@pytest.mark.parametrize("shifted", [None, "grads", *WRITTEN])
def test_kernel_is_told_of_tensors_that_are_not_aligned(monkeypatch, shifted):
    """Else a GPU would read vectors from addresses that are no multiple of 16; the interpreter does not care."""
    pytest.importorskip("triton")
    from d2v_fast.kernels import adamw_ema as kernels

    told = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: told.append(options.get("ALIGNED"))

    monkeypatch.setattr(kernels, "_adamw_ema_kernel", Kernel())
    monkeypatch.setattr(kernels, "_coefficients_kernel", Kernel())
    full = make([(72,)], copy_dtype=BF16)
    lists = {name: [full[name][0][int(name == shifted) :][:64]] for name in kernels.Tensors._fields}
    hyper = kernels.Hyper(1e-3, 0.5, 0.9, 0.98, 1e-6, fairseq_eps=False)
    kernels.adamw_ema_(kernels.Tensors(**lists), [full["step"]], [0.1], hyper)
    assert told == [None, shifted is None]


def test_mixed_dtypes_in_one_call():
    full = make(SHAPES * 2)
    full["grads"] = [g.to((F32, BF16, F16)[i % 3]) for i, g in enumerate(full["grads"])]
    full["param_copies"] = [torch.empty_like(p, dtype=(F16, BF16)[i % 2]) for i, p in enumerate(full["params"])]
    exact = by_formula(full, SETTINGS, F64)
    call(full)
    for p, copy, (want, *_) in zip(full["params"], full["param_copies"], exact, strict=True):
        torch.testing.assert_close(p.double(), want, rtol=2e-7, atol=2e-7)
        assert torch.equal(copy, p.to(copy.dtype))


def test_other_tensors_at_the_next_call():
    """Gradients move from call to call; whatever is remembered about one must not be used for another."""
    full = make([(100,), (50,)])
    for _ in range(3):
        full["grads"] = [torch.randn_like(g) for g in full["grads"]]
        exact = by_formula(full, SETTINGS, F64)
        call(full)
        for p, (want, *_) in zip(full["params"], exact, strict=True):
            torch.testing.assert_close(p.double(), want, rtol=2e-7, atol=2e-7)
    full = {k: x[::-1] if isinstance(x, list) else x for k, x in full.items()}
    exact = by_formula(full, SETTINGS, F64)
    call(full)
    torch.testing.assert_close(full["params"][0].double(), exact[0][0], rtol=2e-7, atol=2e-7)


def test_empty_lists():
    step = torch.zeros((), device=DEVICE)
    adamw_ema_([], [], [], [], step, lr=0.1)
    assert step.item() == 0.0
    call({k: x for k, x in make([(0,)]).items()})


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.5, 0.9]),
    st.sampled_from([0.0, 0.3, 0.999]),
    st.floats(0.0, 1.0),
    st.floats(0.0, 0.5),
    st.integers(0, 1000),
)
def test_equals_the_formula(sizes, beta1, beta2, decay, weight_decay, step):
    full = make([(n,) for n in sizes], step=float(step))
    settings = {**SETTINGS, "betas": (beta1, beta2), "weight_decay": weight_decay}
    full["ema_decay"] = decay
    exact = by_formula(full, settings, F64)
    call(full, **settings)
    for i, want in enumerate(exact):
        for name, w in zip(("params", "exp_avgs", "exp_avg_sqs", "ema"), want, strict=True):
            torch.testing.assert_close(full[name][i].double(), w, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not RUNS_KERNELS, reason="needs the Triton kernels")
@pytest.mark.parametrize("chunk,block", [(64, 16), (32, 32)])
def test_every_tile_gives_the_same_answer(monkeypatch, chunk, block):
    from d2v_fast.kernels import chunks

    full = make([(7,), (64,), (130,), (5,), (33,)], BF16, BF16)
    want = clone(full)
    call(want)
    monkeypatch.setattr(chunks, "MAX_TENSORS", 3)
    monkeypatch.setattr(chunks, "config_for", lambda x: chunks.LaunchConfig(chunk, block, num_warps=4))
    call(full)
    for name in WRITTEN:
        assert all(torch.equal(x, y) for x, y in zip(full[name], want[name], strict=True)), name


@pytest.mark.skipif(not RUNS_KERNELS, reason="needs the Triton kernels")
def test_only_the_gradients_table_is_built_again():
    from d2v_fast.kernels import adamw_ema as kernels

    full = make()
    kernels._plan.cache_clear(), kernels._addresses.cache_clear()
    for _ in range(3):
        full["grads"], kept = [g.clone() for g in full["grads"]], full["grads"]
        call(full)
        del kept
    assert kernels._plan.cache_info()[:2] == (2, 1)  # hits, misses
    assert kernels._addresses.cache_info().misses >= 2


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is CPU-only")
def test_float64_masters():
    full = clone(make([(9,), (4, 3)]), F64)
    exact = by_formula(full, SETTINGS, F64)
    call(full)
    for p, (want, *_) in zip(full["params"], exact, strict=True):
        torch.testing.assert_close(p, want, rtol=1e-12, atol=1e-12)


def test_opcheck():
    full = make([(5,), (3, 2)], copy_dtype=BF16)
    lists = [full[k] for k in ("params", "grads", "exp_avgs", "exp_avg_sqs")]
    copies = (full["param_copies"], full["ema_copies"][:1])
    scale = torch.tensor(0.5, device=DEVICE)
    numbers = [1e-3, 0.9, 0.9, 0.98, 1e-6]
    args = (*lists, [full["step"]], full["ema"][:1], *copies, [0], [0.1, 0.0], numbers, None, scale, scale, None)
    torch.library.opcheck(torch.ops.d2v_fast.adamw_ema_.default, (*args, "torch"))


def test_compile_fullgraph():
    full = make([(5,), (3, 2)], copy_dtype=BF16)
    want = clone(full)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(full, scale):
        call(full, grad_scale=scale)
        return full["params"][0] * 2

    scale = torch.tensor(0.25, device=DEVICE)
    doubled = step(full, scale)
    call(want, grad_scale=scale)
    for name in WRITTEN:
        assert all(torch.equal(x, y) for x, y in zip(full[name], want[name], strict=True)), name
    assert torch.equal(doubled, want["params"][0] * 2)


@pytest.mark.parametrize(
    "change,error,match",
    [
        ({"grads": lambda f: f["grads"][:1]}, ValueError, "grads must hold 2 tensors like params, got 1"),
        ({"exp_avgs": lambda f: []}, ValueError, "exp_avgs must hold 2 tensors like params, got 0"),
        ({"param_copies": lambda f: f["ema"][:1]}, ValueError, "param_copies must hold 2 tensors like params, got 1"),
        ({"ema": lambda f: f["ema"][:1]}, ValueError, "ema must hold 2 tensors like params, got 1"),
        ({"ema_copies": lambda f: f["grads"][:1]}, ValueError, "ema_copies must hold 2 tensors like params, got 1"),
        ({"ema_copies": lambda f: [None, f["grads"][1]]}, ValueError, "exactly where ema has them"),
        ({"ema": lambda f: None, "ema_copies": lambda f: f["grads"]}, ValueError, "ema_copies needs ema"),
        ({"ema_decay": lambda f: None}, ValueError, "ema_decay must be given with ema"),
        ({"ema_decay": lambda f: 1.5}, ValueError, r"ema_decay must lie in \[0, 1\], got 1.5"),
        ({"weight_decay": lambda f: [0.1]}, ValueError, "weight_decay must hold 2 .* got 1"),
        ({"weight_decay": lambda f: -0.1}, ValueError, "weight_decay must be a number >= 0, got -0.1"),
        ({"weight_decay": lambda f: [0.1, -0.1]}, ValueError, r"weight_decay\[1\] must be a number >= 0, got -0.1"),
        ({"weight_decay": lambda f: torch.tensor(0.1)}, TypeError, "weight_decay must be a number, got Tensor"),
        ({"lr": lambda f: "1e-3"}, TypeError, "lr must be a number, got str"),
        ({"eps": lambda f: torch.tensor(1e-6)}, TypeError, "eps must be a number, got Tensor"),
        ({"betas": lambda f: (None, 0.9)}, TypeError, r"betas\[0\] must be a number, got NoneType"),
        ({"betas": lambda f: (0.9,)}, ValueError, r"betas must be two numbers in \[0, 1\), got \(0.9,\)"),
        ({"ema": lambda f: None, "ema_decay": lambda f: 2.0}, ValueError, r"ema_decay must lie in \[0, 1\], got 2.0"),
        ({"grads": lambda f: [None, None]}, TypeError, r"grads\[0\] must be a tensor, got NoneType"),
        ({"param_copies": lambda f: [None, None]}, TypeError, r"param_copies\[0\] must be a tensor, got NoneType"),
        ({"ema": lambda f: [None, 1.0]}, TypeError, r"ema\[1\] must be a tensor, got float"),
        ({"step": lambda f: [f["step"], None]}, TypeError, r"step\[1\] must be a tensor, got NoneType"),
        ({"step": lambda f: 3}, TypeError, "step must be a list of tensors, got int"),
        ({"params": lambda f: f["params"][1]}, TypeError, "params must be a list of tensors, got Tensor"),
        ({"skip": lambda f: False}, TypeError, "skip must be a tensor, got bool"),
        ({"lr": lambda f: -1.0}, ValueError, "lr must be a number >= 0, got -1.0"),
        ({"betas": lambda f: (0.9, 1.0)}, ValueError, r"betas\[1\] must lie in \[0, 1\), got 1.0"),
        ({"eps": lambda f: float("nan")}, ValueError, "eps must be a number >= 0, got nan"),
        ({"eps_mode": lambda f: "apex"}, ValueError, "eps_mode must be one of torch, fairseq, got 'apex'"),
        ({"lr": lambda f: torch.ones(1)}, ValueError, r"lr must have shape \[\], got \(1,\)"),
        ({"skip": lambda f: torch.tensor(True)}, TypeError, "skip must be a float32 or float64 tensor, got torch.bool"),
        ({"grad_scale": lambda f: torch.ones((), device="meta")}, ValueError, "grad_scale must be on .* got meta"),
        ({"step": lambda f: f["step"].long()}, TypeError, r"step\[0\] must be float32, got torch.int64"),
        ({"step": lambda f: f["step"][None]}, ValueError, r"step\[0\] must have shape \[\], got \(1,\)"),
        ({"step": lambda f: [f["step"]]}, ValueError, "step must hold 2 tensors like params, got 1"),
        ({"step": lambda f: [f["step"]] * 2}, ValueError, "must not share memory"),
        ({"params": lambda f: [f["params"][0], f["params"][1].half()]}, TypeError, r"params\[1\] must be a float32"),
        ({"exp_avgs": lambda f: [x.bfloat16() for x in f["exp_avgs"]]}, TypeError, r"exp_avgs\[0\] must be a float32"),
        ({"ema": lambda f: [None, f["ema"][1].half()]}, TypeError, r"ema\[0\] must be a float32"),
        ({"grads": lambda f: [f["grads"][0], f["grads"][1].int()]}, TypeError, r"grads\[1\] must be float32.*int32"),
        ({"grads": lambda f: f["grads"][::-1]}, ValueError, r"grads\[0\] must have shape \(4, 6\) .* got \(8,\)"),
        ({"grads": lambda f: [f["grads"][0].t().contiguous().t(), f["grads"][1]]}, ValueError, r"grads\[0\].*strides"),
        ({"exp_avg_sqs": lambda f: f["exp_avgs"]}, ValueError, "must not share memory"),
        ({"ema": lambda f: f["params"]}, ValueError, "must not share memory"),
        ({"grads": lambda f: f["params"]}, ValueError, "must not share memory"),
    ],
)
def test_bad_inputs_raise(change, error, match):
    full = make([(4, 6), (8,)])
    kept = clone(full)
    with pytest.raises(error, match=match):
        call(full, **{name: value(full) for name, value in change.items()})
    for name in ("params", "exp_avgs", "exp_avg_sqs", "ema"):
        assert all(torch.equal(x, y) for x, y in zip(full[name], kept[name], strict=True))
    assert full["step"].item() == 0.0


@pytest.mark.gpu
def test_does_not_wait_for_the_device():
    full = make(grad_dtype=BF16, copy_dtype=BF16)
    call(full)  # compiles
    with no_synchronisation():
        full["grads"] = [g.clone() for g in full["grads"]]
        call(full, grad_scale=full["step"] * 0 + 1, skip=full["step"] * 0)


@pytest.mark.gpu
def test_captured_graph_follows_its_scalars():
    full = make(step=3.0)
    scalars = {k: torch.tensor(x, device=DEVICE) for k, x in {"lr": 0.0, "ema_decay": 1.0, "skip": 1.0}.items()}
    call(full, **scalars)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(full, **scalars)
    for name, value in {"lr": SETTINGS["lr"], "ema_decay": full["ema_decay"], "skip": 0.0}.items():
        scalars[name].fill_(value)
    for _ in range(2):
        exact = by_formula(full, SETTINGS, F64)
        graph.replay()
        for i, (p, _, _, e) in enumerate(exact):
            torch.testing.assert_close(full["params"][i].double(), p, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(full["ema"][i].double(), e, rtol=1e-6, atol=1e-6)
    assert full["step"].item() == 5.0


@pytest.mark.gpu
def test_repeats_bit_for_bit():
    full = make(grad_dtype=BF16, copy_dtype=BF16, step=2.0)
    again = clone(full)
    call(full), call(again)
    for name in WRITTEN:
        assert all(torch.equal(x, y) for x, y in zip(full[name], again[name], strict=True)), name


@pytest.mark.gpu
def test_offsets_beyond_int32():
    if torch.cuda.mem_get_info()[0] < 31 * 2**30:
        pytest.skip("needs 31 GB of GPU memory")
    size = 2**31 + 5
    p, m, v = (torch.zeros(size, device=DEVICE) for _ in range(3))
    g, step = torch.ones(size, dtype=BF16, device=DEVICE), torch.zeros((), device=DEVICE)
    adamw_ema_([p], [g], [m], [v], step, lr=0.5, eps=0.0, weight_decay=0.0)
    torch.testing.assert_close(torch.stack(p.aminmax()), torch.full((2,), -0.5, device=DEVICE))


@pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
def test_interpreter_runs_the_kernel(monkeypatch):
    """Guards the suite itself: the CPU key must not fall back to the reference here."""
    from d2v_fast.ops import adamw_ema

    monkeypatch.setattr(adamw_ema, "adamw_ema_ref", None)
    full = make([(5,)])
    before = full["params"][0].clone()
    call(full)
    assert not torch.equal(full["params"][0], before)


def test_reference_is_the_formula():
    full = make(step=2.0)
    exact = by_formula(full, SETTINGS, F64)
    lists = [full[k] for k in ("params", "grads", "exp_avgs", "exp_avg_sqs")]
    settings = {k: SETTINGS[k] for k in ("lr", "betas", "eps")}
    decays = [SETTINGS["weight_decay"]] * len(SHAPES)
    adamw_ema_ref(*lists, [full["step"]], decays, ema=full["ema"], ema_decay=full["ema_decay"], **settings)
    for i, (p, _, _, e) in enumerate(exact):
        torch.testing.assert_close(full["params"][i].double(), p, rtol=2e-7, atol=2e-7)
        torch.testing.assert_close(full["ema"][i].double(), e, rtol=2e-7, atol=2e-7)

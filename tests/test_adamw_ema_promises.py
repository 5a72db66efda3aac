"""What adamw_ema_ promises beside its numbers: tiles, tables, compiling, graphs, errors."""

import pytest
import torch
from adamw_ema_cases import SETTINGS, WRITTEN, by_formula, call, clone, make
from checks import DEVICE, RUNS_KERNELS, no_synchronisation

from d2v_fast.ops import adamw_ema_

BF16, F64 = torch.bfloat16, torch.float64


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

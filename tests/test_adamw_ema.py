"""AdamW, the average and the copies in one pass, against float64, torch.optim.AdamW and the ops one by one."""

import sys

import numpy as np
import pytest
import torch
from adamw_ema_cases import SETTINGS, SHAPES, WRITTEN, by_formula, call, clone, make
from checks import DEVICE, INTERPRET, assert_as_accurate_as_eager
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_fast.ops import adamw_ema_, ema_update_
from d2v_fast.ops.adamw_ema import adamw_ema_ref

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


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


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is CPU-only")
def test_float64_masters():
    full = clone(make([(9,), (4, 3)]), F64)
    exact = by_formula(full, SETTINGS, F64)
    call(full)
    for p, (want, *_) in zip(full["params"], exact, strict=True):
        torch.testing.assert_close(p, want, rtol=1e-12, atol=1e-12)


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

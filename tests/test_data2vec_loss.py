"""The fused loss against float64, against the two ops that it fuses, and its promises: memory, determinism, ranks."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checks import DEVICE, INTERPRET, RUNS_KERNELS, assert_as_accurate_as_eager, no_synchronisation
from eager_targets import EPS, eager_loss, eager_spread, eager_targets, make_layers, some_positions
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from d2v_fast.ops import data2vec_loss, layer_targets, masked_smooth_l1
from d2v_fast.ops.data2vec_loss import _bwd, _fwd, _spread_over_ranks, data2vec_loss_ref, moments_ref
from d2v_fast.ops.layer_targets import NORMS, POST_NORMS

pytestmark = pytest.mark.usefixtures("poison")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def make_pred(N, C, dtype=F32, mean=0.0):
    """Rows that are wider apart than C."""
    return (mean + 1.5 * torch.randn(N, C + 8)).to(DEVICE, dtype)[:, :C]


def fused(pred, layers, positions, upstream=1.0, **options):
    """(LossOutput, gradient of pred for the given upstream gradient)."""
    pred = pred.detach().requires_grad_()
    out = data2vec_loss(pred, layers, positions, **options)
    (grad,) = torch.autograd.grad(out.loss * upstream, pred)
    return out, grad


def teacher_rows(positions, clones, T):
    """Positions of the student's batch as positions of the teacher's."""
    if clones is None:
        return positions
    return clones[(positions // T).long()] * T + positions % T


def check_against_fp64(pred, layers, positions, *, clones=None, upstream=None, **options):
    upstream = torch.randn(()).item() if upstream is None else upstream
    got, grad = fused(pred, layers, positions, upstream, target_batch_index=clones, **options)
    assert got.loss.dtype == F32 and grad.dtype == pred.dtype and grad.is_contiguous()
    assert not got.target_var.requires_grad and not got.pred_var.requires_grad and got.num_masked == pred.shape[0]

    kept = positions >= 0
    assert not grad[~kept].any()
    pred, positions, grad = pred[kept], positions[kept], grad[kept]
    beta, scale = options.pop("beta", 0.0), options.pop("scale", None)
    scale = 1.0 if scale is None else scale
    options.setdefault("norm", "instance")
    options["positions"] = teacher_rows(positions, clones, layers[0].shape[1])

    def plain(dtype):
        p = pred.detach().to(dtype).requires_grad_()
        target = eager_targets([x.to(dtype) for x in layers], **options)
        loss = eager_loss(p, target, beta, scale)
        (grad,) = torch.autograd.grad(loss, p)
        return loss.detach(), grad, eager_spread(target), eager_spread(p.detach())

    eager, exact = plain(F32), plain(torch.float64)
    rounded = eager[1].to(pred.dtype).float() * upstream  # the gradient is rounded twice, as documented
    assert_as_accurate_as_eager(got.loss, eager[0], exact[0])
    assert_as_accurate_as_eager(grad, rounded.to(pred.dtype), exact[1] * upstream)
    assert_as_accurate_as_eager(got.target_var, eager[2], exact[2])
    assert_as_accurate_as_eager(got.pred_var, eager[3], exact[3])


@pytest.mark.parametrize("post_norm", POST_NORMS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("with_lengths,with_clones", [(False, False), (True, False), (True, True)])
def test_matches_fp64(norm, post_norm, with_lengths, with_clones):
    B, T, C = 3, 70, 33
    lengths = torch.tensor([70, 66, 5], device=DEVICE, dtype=torch.int32) if with_lengths else None
    clones = torch.tensor([0, 0, 2, 1, 2], device=DEVICE) if with_clones else None
    positions = some_positions(B if clones is None else 5, T, torch.int64)
    beta = 0.7 if with_lengths else 0.0
    options = {"norm": norm, "post_norm": post_norm, "lengths": lengths, "beta": beta, "scale": C**-0.5}
    check_against_fp64(make_pred(len(positions), C), make_layers(3, B, T, C), positions, clones=clones, **options)


# one row and column, a real width, the widest, no multiple of 8, more layers than any recipe, several column blocks
@pytest.mark.parametrize("norm", ["instance", "layer"])
@pytest.mark.parametrize(
    "K,B,T,C", [(1, 1, 5, 1), (10, 2, 9, 768), (2, 1, 8, 2048), (24, 2, 5, 7), (2, 3, 65, 600), (3, 2, 9, 24)]
)
def test_shapes(K, B, T, C, norm):
    positions = torch.cat((torch.tensor([0, T - 1]), some_positions(B, T).cpu())).to(DEVICE, torch.int32)
    pred = make_pred(len(positions), C, BF16)
    check_against_fp64(pred, make_layers(K, B, T, C, BF16), positions, norm=norm, upstream=0.37)


@pytest.mark.parametrize("norm", ["instance", "layer"])
@pytest.mark.parametrize("layer_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("pred_dtype", [F32, BF16, F16])
def test_dtypes(pred_dtype, layer_dtype, norm):
    positions = some_positions(2, 40)
    pred, layers = make_pred(len(positions), 64, pred_dtype), make_layers(8, 2, 40, 64, layer_dtype)
    check_against_fp64(pred, layers, positions, norm=norm, beta=0.5, upstream=1.7)


@pytest.mark.parametrize("norm", ["instance", "layer"])
@pytest.mark.parametrize("beta", [0.0, 0.25, 4.0])
def test_beta_and_scale(beta, norm):
    positions = some_positions(2, 70)
    pred, layers = make_pred(len(positions), 96, BF16), make_layers(4, 2, 70, 96, BF16)
    check_against_fp64(pred, layers, positions, norm=norm, beta=beta, scale=0.125, upstream=-3.0)


@pytest.mark.parametrize("norm", ["instance", "layer"])
@pytest.mark.parametrize("mean", [300.0, -1000.0])
def test_means_far_larger_than_the_spread(mean, norm):
    """Sums of squares have no correct digit of the predictions' variance here."""
    positions = some_positions(2, 150)
    pred, layers = make_pred(len(positions), 16, mean=mean), make_layers(2, 2, 150, 16, mean=300.0)
    check_against_fp64(pred, layers, positions, norm=norm)


def test_spread_of_predictions_that_drift():
    """Rows of one sequence far from those of another: what is taken from the first rows must not matter."""
    positions = torch.arange(300, device=DEVICE)
    pred = make_pred(300, 8)
    pred[:5] += 1e4
    check_against_fp64(pred, make_layers(1, 2, 150, 8), positions, norm="none")


@pytest.mark.parametrize("norm", NORMS)
def test_is_the_composition_of_the_two_ops(norm):
    positions = some_positions(3, 40)
    pred, layers = make_pred(len(positions), 24, BF16), make_layers(3, 3, 40, 24, BF16)
    out, grad = fused(pred, layers, positions, norm=norm, beta=0.5, scale=0.2)
    target = layer_targets(layers, norm=norm, positions=positions)
    p = pred.detach().requires_grad_()
    loss = masked_smooth_l1(p, target, beta=0.5, scale=0.2)
    torch.testing.assert_close(out.loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, torch.autograd.grad(loss, p)[0], rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(out.target_var, eager_spread(target), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm", ["instance", "layer"])
def test_layouts_and_strides(norm):
    btc = make_layers(3, 2, 70, 40, BF16)
    positions = some_positions(2, 70)
    pred = make_pred(len(positions), 40)
    want, want_grad = fused(pred, [x.contiguous() for x in btc], positions, norm=norm)
    tbc = [x.transpose(0, 1).contiguous() for x in btc]
    odd = [torch.cat((x, x), dim=2)[:, :, 3:43].copy_(x) for x in btc]  # rows that start off a vector boundary
    mixed = [btc[0].contiguous(), *btc[1:]]
    columns = pred.t().contiguous().t()  # no unit stride
    spread_out = positions.repeat_interleave(2)[::2]
    for p, layers, where, layout in (
        (pred, btc, positions, "BTC"),
        (pred, tbc, positions, "TBC"),
        (pred, odd, positions.long(), "BTC"),
        (columns, tuple(mixed), spread_out, "BTC"),
    ):
        out, grad = fused(p, layers, where, norm=norm, layout=layout)
        assert torch.equal(out.loss, want.loss) and torch.equal(grad, want_grad)
        assert torch.equal(out.target_var, want.target_var) and torch.equal(out.pred_var, want.pred_var)


@pytest.mark.parametrize("norm", ["instance", "layer"])
def test_positions_in_any_order(norm):
    layers = make_layers(2, 4, 50, 20)
    positions = torch.randint(0, 200, (150,), device=DEVICE)  # some of them more than once
    pred = make_pred(150, 20)
    check_against_fp64(pred, layers, positions, norm=norm)
    shuffled = torch.randperm(150, device=DEVICE)
    want, want_grad = fused(pred, layers, positions, norm=norm)
    got, grad = fused(pred[shuffled], layers, positions[shuffled], norm=norm)
    torch.testing.assert_close(got[:3], want[:3], rtol=2e-6, atol=1e-7)
    assert torch.equal(grad, want_grad[shuffled])


def test_clones_read_the_rows_that_repeating_would():
    layers = make_layers(2, 2, 30, 12)
    clones = torch.tensor([0, 0, 1, 0, 1], device=DEVICE, dtype=torch.int32)
    positions = some_positions(5, 30)
    pred = make_pred(len(positions), 12)
    for norm in NORMS:
        lengths = torch.tensor([30, 11], device=DEVICE)
        got, grad = fused(pred, layers, positions, norm=norm, lengths=lengths, target_batch_index=clones)
        rows = teacher_rows(positions, clones, 30)
        want, want_grad = fused(pred, layers, rows, norm=norm, lengths=lengths)
        assert torch.equal(grad, want_grad) and torch.equal(got.loss, want.loss)


@pytest.mark.parametrize("where", ["tail", "front", "scattered", "all but two"])
@pytest.mark.parametrize("norm,dtype,with_clones", [("instance", F32, True), ("layer", BF16, False)])
def test_negative_positions_are_ignored(norm, dtype, with_clones, where):
    """Whatever is in their rows; those that count are far from 0, so that an empty tile must not shift the moments."""
    B, T, C = 2, 90, 24
    clones = torch.tensor([1, 0, 1], device=DEVICE) if with_clones else None
    positions = some_positions(B if clones is None else 3, T, torch.int64)
    n = len(positions)
    places = {"tail": slice(n // 2, n), "front": slice(0, 70), "scattered": slice(1, n, 3), "all but two": slice(2, n)}
    pred = make_pred(n, C, dtype, mean=100.0)
    positions[places[where]] = torch.arange(n, device=DEVICE)[places[where]].neg() - 1
    pred[places[where]] = float("nan")
    lengths = torch.tensor([90, 40], device=DEVICE)
    check_against_fp64(
        pred, make_layers(2, B, T, C, dtype), positions, clones=clones, norm=norm, lengths=lengths, beta=0.5
    )


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 0, 8), (0, 5, 8)])
def test_nothing_counts(shape):
    """All positions are ignored; there need not be any frames then."""
    pred, layers = torch.full((9, 8), float("nan"), device=DEVICE), [torch.randn(shape, device=DEVICE)]
    positions = torch.full((9,), -1, device=DEVICE)
    out, grad = fused(pred, layers, positions, norm="layer", check=True)
    assert [x.item() for x in out[:3]] == [0, 0, 0] and not grad.any()


@pytest.mark.parametrize("post_norm", POST_NORMS)
def test_no_positions_is_zero(post_norm):
    out, grad = fused(make_pred(0, 12), make_layers(2, 2, 5, 12), some_positions(0, 0), 3.0, post_norm=post_norm)
    assert grad.shape == (0, 12)
    assert [x.item() for x in out[:3]] == [0, 0, 0] and out.num_masked == 0


def test_one_row_has_no_spread():
    out, grad = fused(make_pred(1, 12), make_layers(2, 2, 5, 12), torch.tensor([3], device=DEVICE))
    assert out.target_var == 0 and out.pred_var == 0 and out.loss > 0 and grad.all()


def test_empty_layers():
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    for shape in ((0, 5, 4), (2, 0, 4), (2, 5, 0)):
        layers = [torch.empty(shape, device=DEVICE)]
        out, _ = fused(torch.empty(0, shape[2], device=DEVICE), layers, none, norm="layer")
        assert [x.item() for x in out[:3]] == [0, 0, 0]
    out, grad = fused(
        torch.empty(3, 0, device=DEVICE), [torch.empty(2, 5, 0, device=DEVICE)], none.new_tensor([1, 2, 3])
    )
    assert [x.item() for x in out[:3]] == [0, 0, 0] and grad.shape == (3, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("norm", NORMS)
def test_nan_and_inf_are_not_swallowed(norm, beta, bad):
    layers, positions = make_layers(2, 2, 70, 12), torch.arange(1, 140, 2, device=DEVICE)
    pred = make_pred(70, 12)
    pred[40, 3] = bad
    out, grad = fused(pred, layers, positions, norm=norm, beta=beta)
    assert not out.loss.isfinite() and not out.pred_var.isfinite() and out.target_var.isfinite()
    assert grad.isnan().sum() == (1 if bad != bad else 0) and not (beta == 0 and grad[40, 3].isfinite())
    pred[40, 3] = 0.0
    layers[1][1, 67, 5] = bad  # a masked frame of the second sequence
    out, grad = fused(pred, layers, positions, norm=norm, beta=beta)
    assert not out.loss.isfinite() and not out.target_var.isfinite() and out.pred_var.isfinite()
    rows = {"instance": range(35, 70), "batch": range(70)}.get(norm, [68])
    channels = range(12) if norm == "layer" else [5]
    if norm != "none" or bad != bad:  # elsewhere an infinite target has a finite slope for beta > 0
        assert grad.isnan().nonzero().tolist() == [[r, c] for r in rows for c in channels]


def test_frames_that_no_position_asks_for():
    """NaN there reaches the loss through statistics only."""
    layers, positions = make_layers(2, 2, 10, 12), torch.tensor([1, 2, 15], device=DEVICE)
    layers[0][0, 7, 4] = float("nan")
    losses = {norm: fused(make_pred(3, 12), layers, positions, norm=norm)[0].loss for norm in NORMS}
    assert [losses[norm].isnan().item() for norm in ("instance", "batch", "layer", "none")] == [
        True,
        True,
        False,
        False,
    ]


def test_gradient_can_be_taken_again():
    positions = some_positions(2, 30)
    pred = make_pred(len(positions), 12, BF16).clone().requires_grad_()
    loss = data2vec_loss(pred, make_layers(2, 2, 30, 12), positions).loss
    grads = [torch.autograd.grad(loss * w, pred, retain_graph=True)[0] for w in (1.0, 3.0, 1.0)]
    assert torch.equal(grads[0], grads[2]) and torch.equal((grads[0].float() * 3).bfloat16(), grads[1])
    assert grads[0].data_ptr() != grads[2].data_ptr()


def test_upstream_gradient_is_not_rounded_to_the_predictions_dtype():
    positions = some_positions(2, 30)
    pred, layers = make_pred(len(positions), 12, BF16), make_layers(2, 2, 30, 12)
    _, one = fused(pred, layers, positions)
    _, grad = fused(pred, layers, positions, upstream=1.00390625)  # halfway to the next bfloat16
    assert torch.equal(grad, (one.float() * 1.00390625).bfloat16()) and not torch.equal(grad, one)


@pytest.mark.parametrize("shape", [(130, 1031), (1, 7), (64, 1024), (0, 5)])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_backward_scales_every_element(shape, dtype):
    """Sizes below, at and beyond whole blocks of the GPU and of the interpreter."""
    one, factor = torch.randn(shape, device=DEVICE).to(dtype), torch.tensor(-0.3, device=DEVICE)
    assert torch.equal(_bwd(factor, one), (one.float() * factor).to(dtype))


def test_only_pred_gets_a_gradient():
    layers = [x.clone().requires_grad_() for x in make_layers(2, 2, 6, 5)]
    pred, positions = make_pred(3, 5).clone().requires_grad_(), torch.tensor([1, 4, 9], device=DEVICE)
    data2vec_loss(pred, layers, positions).loss.backward()
    assert pred.grad is not None and all(x.grad is None for x in layers)
    assert not data2vec_loss(pred.detach(), layers, positions).loss.requires_grad
    with torch.no_grad():
        out = data2vec_loss(pred, layers, positions)
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, data2vec_loss(pred, layers, positions).loss)


def test_is_deterministic():
    positions = some_positions(3, 140)
    pred, layers = make_pred(len(positions), 300, BF16), make_layers(3, 3, 140, 300, BF16)
    first, second = (fused(pred, layers, positions, upstream=1.3) for _ in range(2))
    assert torch.equal(first[1], second[1]) and first[0] == second[0]


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is CPU-only")
@pytest.mark.parametrize("beta", [0.0, 0.7])
@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(norm, beta):
    layers, positions = make_layers(2, 2, 6, 3, torch.float64), torch.tensor([0, 5, 7, 11])
    pred = make_pred(4, 3, torch.float64).clone().requires_grad_()
    assert data2vec_loss(pred, layers, positions).target_var.dtype == torch.float64

    def loss(p):
        return data2vec_loss(p, layers, positions, norm=norm, beta=beta, scale=0.3).loss

    assert torch.autograd.gradcheck(loss, (pred,))
    assert torch.autograd.gradcheck(lambda p: data2vec_loss_ref(p, layers, positions, norm=norm, beta=beta)[0], (pred,))


def test_opcheck():
    layers, positions = make_layers(2, 2, 6, 5), torch.tensor([1, 4, 9], device=DEVICE)
    lengths, clones = torch.tensor([6, 2], device=DEVICE), torch.tensor([1, 1, 0], device=DEVICE)
    pred = make_pred(3, 5, BF16).clone().requires_grad_()
    torch.library.opcheck(_fwd, (pred, layers, positions, lengths, clones, "instance", "layer", 0.5, 2.0, EPS, True))
    torch.library.opcheck(
        _fwd, (pred.detach(), layers, positions, None, None, "layer", "instance", 0.0, 1.0, EPS, False)
    )
    torch.library.opcheck(_bwd, (torch.tensor(0.3, device=DEVICE), torch.randn(3, 5, device=DEVICE).bfloat16()))


@pytest.mark.parametrize("layout", ["BTC", "TBC"])
def test_compile_fullgraph(layout):
    layers = make_layers(2, 4, 6, 8)
    positions = torch.tensor([1, 5, 17], device=DEVICE)
    pred = make_pred(3, 8).clone().requires_grad_()

    def step(p, xs):
        out = data2vec_loss(p * 2, [x * 2 for x in xs], positions, layout=layout, beta=0.5)
        return out.loss * 3, out.target_var + out.pred_var

    loss, spread = torch.compile(step, fullgraph=True, backend="aot_eager")(pred, layers)
    want, want_spread = step(pred, layers)
    torch.testing.assert_close((loss, spread), (want, want_spread))
    torch.testing.assert_close(torch.autograd.grad(loss, pred), torch.autograd.grad(want, pred))


@settings(
    max_examples=6 if INTERPRET else 40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_options_agree_with_the_unfused_ops(data):
    draw = lambda *choices: data.draw(st.sampled_from(choices))  # noqa: E731
    K, B, T, C = (data.draw(st.integers(low, high)) for low, high in ((1, 4), (1, 4), (2, 40), (1, 70)))
    torch.manual_seed(data.draw(st.integers(0, 999)))
    layers = make_layers(K, B, T, C, draw(F32, BF16, F16), mean=draw(0.0, 1.0, 30.0))
    clones = draw(None, torch.randint(0, B, (data.draw(st.integers(1, 6)),), device=DEVICE))
    students = B if clones is None else len(clones)
    positions = torch.randint(0, students * T, (data.draw(st.integers(0, 150)),), device=DEVICE)
    if draw(True, False):
        positions = positions.sort()[0]
    lengths = draw(None, torch.randint(0, T + 1, (B,), device=DEVICE))
    targets = {"norm": draw(*NORMS), "post_norm": draw(*POST_NORMS), "lengths": lengths}
    loss = {"beta": draw(0.0, 0.3, 5.0), "scale": draw(None, 0.1)}
    pred = make_pred(len(positions), C, draw(F32, BF16, F16))

    got, grad = fused(pred, layers, positions, **targets, **loss, target_batch_index=clones)
    again, grad_again = fused(pred, layers, positions, **targets, **loss, target_batch_index=clones)
    assert got == again and torch.equal(grad, grad_again)
    y = layer_targets(layers, positions=teacher_rows(positions, clones, T), **targets)
    p = pred.detach().requires_grad_()
    want = masked_smooth_l1(p, y, **loss)
    torch.testing.assert_close(got.loss, want.detach(), rtol=3e-6, atol=1e-6)
    (want_grad,) = torch.autograd.grad(want, p)
    tolerance = {F32: 1e-5, BF16: 1e-2, F16: 2e-3}[pred.dtype]
    torch.testing.assert_close(
        grad, want_grad, rtol=tolerance, atol=tolerance * max(1.0, y.abs().amax().item()) if len(y) else 0
    )
    if len(y) > 1:
        torch.testing.assert_close(got.target_var, eager_spread(y), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.pred_var, eager_spread(pred.float()), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not RUNS_KERNELS, reason="needs the Triton kernels")
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("block_n,block_c,tiles", [(4, 16, 1), (4, 8, 3), (16, 16, 50), (1, 32, 7)])
@pytest.mark.parametrize("norm,post_norm", [("instance", "none"), ("layer", "layer")])
def test_every_tile_gives_the_same_answer(norm, post_norm, block_n, block_c, tiles, ignored):
    from d2v_fast.kernels import data2vec_loss as kernels

    layers, positions = make_layers(2, 2, 21, 37, BF16), some_positions(2, 21)
    pred = make_pred(len(positions), 37, BF16)
    if ignored:  # whole programs, and whole tiles of others
        positions[:9] = -1
    block_c = 64 if norm == "layer" else block_c
    config = kernels.LaunchConfig(block_n, block_c, tiles, num_warps=4)
    settings = (positions, None, None, norm, post_norm, 0.5, 2.0, EPS)
    loss, grad, moments, spread = kernels.data2vec_loss_fwd(pred, layers, *settings, True, config)
    p = pred.detach().requires_grad_()
    want, target = data2vec_loss_ref(p, layers, *settings)
    torch.testing.assert_close(loss, want.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(want, p)[0])
    rows = pred[positions >= 0].float()
    torch.testing.assert_close(moments, torch.stack((moments_ref(target), moments_ref(rows))))
    torch.testing.assert_close(spread, torch.stack((eager_spread(target), eager_spread(rows))))


@pytest.mark.skipif(not RUNS_KERNELS, reason="needs the Triton kernels")
@pytest.mark.parametrize("norm", ["instance", "layer"])
def test_kernel_makes_a_position_out_of_range_loud(norm, monkeypatch):
    from d2v_fast.kernels import data2vec_loss as kernels

    monkeypatch.setattr(torch, "empty", torch.zeros)  # the NaN must come from the kernel, not from the poison
    layers, pred = make_layers(2, 2, 6, 5), make_pred(4, 5)

    def run(positions, clones=None):
        args = (None, clones, norm, "none", 0.0, 1.0, EPS, True)
        return kernels.data2vec_loss_fwd(pred, layers, torch.tensor(positions, device=DEVICE), *args)

    for wrong in (12, 10**12):
        loss, grad, _, spread = run([3, wrong, 11, 0])
        assert loss.isnan() and spread[0].isnan() and spread[1].isfinite()
        assert grad.isnan().all(1).tolist() == [False, True, False, False]
    for wrong in (-1, 2):
        loss, grad, *_ = run([3, 20, 11, 0], torch.tensor([0, 1, 1, wrong], device=DEVICE))
        assert loss.isnan() and grad.isnan().all(1).tolist() == [False, True, False, False]
    for fine in ([3, 1, 11, 0], [3, -1, 11, -(10**12)]):
        assert run(fine)[0].isfinite()
    layers, pred = make_layers(2, 2, 0, 5), make_pred(2, 5)
    loss, grad, *_ = run([-1, 0])
    assert loss.isnan() and grad.isnan().all()


class Allocations(TorchDispatchMode):
    """Bytes of every tensor that is made, views and in-place results left out."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for result, x in zip(func._schema.returns, out if isinstance(out, tuple) else (out,), strict=True):
            if result.alias_info is None and isinstance(x, torch.Tensor):
                self.sizes.append(x.nbytes)
        return out


class NoLaunch:
    """Stands in for a kernel."""

    def __getitem__(self, grid):
        return lambda *args, **options: None


def extra_memory(monkeypatch, layers, N, norm, post_norm):
    """Bytes that the launcher allocates on a GPU beside the gradient, for tensors without data; no kernel runs."""
    kernels = pytest.importorskip("d2v_fast.kernels.data2vec_loss")
    for module, name in (
        (kernels, "_data2vec_loss_kernel"),
        (kernels, "_merge_kernel"),
        (kernels.targets, "_column_stats_kernel"),
        (kernels.launch, "_pointer_table_kernel"),
    ):
        monkeypatch.setattr(module, name, NoLaunch())
    pred = torch.empty(N, layers[0].shape[2], dtype=BF16, device="meta")
    positions = torch.empty(N, dtype=torch.int64, device="meta")
    with Allocations() as made:
        kernels.data2vec_loss_fwd(pred, layers, positions, None, None, norm, post_norm, 0.0, 1.0, EPS, True)
    assert made.sizes.count(pred.nbytes) == 1
    return sum(made.sizes) - pred.nbytes


@pytest.mark.parametrize(
    "K,B,T,C,N,norm,post_norm,dtype",
    [
        (8, 15, 780, 768, 5230, "instance", "none", BF16),  # speech base
        (8, 4, 938, 1024, 1838, "instance", "none", BF16),  # speech large
        (10, 16, 512, 768, 1229, "layer", "none", BF16),  # text base
        (6, 128, 196, 768, 15360, "layer", "layer", BF16),  # vision base
        (6, 128, 196, 768, 15360, "layer", "layer", F32),
        (6, 64, 196, 1024, 7680, "layer", "layer", BF16),  # vision large
    ],
)
def test_extra_memory_is_two_percent_of_the_layer_results(K, B, T, C, N, norm, post_norm, dtype, monkeypatch):
    layers = [torch.empty(B, T, C, dtype=dtype, device="meta") for _ in range(K)]
    assert 0 < extra_memory(monkeypatch, layers, N, norm, post_norm) <= 0.02 * sum(x.nbytes for x in layers)


@pytest.mark.parametrize("norm", ["instance", "layer", "none"])
@pytest.mark.parametrize("C", [64, 768, 1024, 2048])
@pytest.mark.parametrize("K,B,T,fraction", [(8, 15, 100, 0.45), (8, 4, 49, 0.6), (3, 4, 49, 0.6), (1, 64, 2000, 1.0)])
def test_extra_memory_where_the_layer_results_are_small(K, B, T, C, fraction, norm, monkeypatch):
    """Statistics and one part per processor may be more than two percent of them, as documented; nothing else is."""
    layers = [torch.empty(B, T, C, dtype=BF16, device="meta") for _ in range(K)]
    statistics = 8 * K * B * C if norm == "instance" else 0
    partial_sums = max(sum(x.nbytes for x in layers) // 64, 132 * 16 * C)
    results = 32 * C + 8 * K + 4 * 132 * 16 + 100  # moments, spread, addresses, losses of the programs
    N = round(fraction * B * T)
    assert extra_memory(monkeypatch, layers, N, norm, "none") <= statistics + partial_sums + results


def test_gpu_tiles_fill_the_processors_once():
    """Where there are rows enough for that, and every program of a wave has rows."""
    kernels = pytest.importorskip("d2v_fast.kernels.data2vec_loss")
    for whole_rows in (False, True):
        for N, C in ((1, 5), (1229, 768), (5230, 768), (15360, 1024), (200, 2048), (100, 10_000)):
            layers = [torch.empty(8, N, C, device="meta")] * 8
            config = kernels.config_for(torch.empty(N, C, device="meta"), layers, whole_rows)
            parts, col_blocks = -(-N // (config.block_n * config.tiles)), -(-C // config.block_c)
            assert parts * col_blocks * config.num_warps <= 132 * 16 or config.tiles == 1
            assert config.tiles == 1 or parts * col_blocks * config.num_warps >= 132 * 8
            assert config.block_c >= C or not whole_rows
            assert config.block_n * config.block_c <= 512 * config.num_warps or config.num_warps == 16


@pytest.mark.parametrize(
    "call,error,match",
    [
        (lambda p, x, i: data2vec_loss(p, [], i), ValueError, "layer_results must hold at least one tensor"),
        (lambda p, x, i: data2vec_loss(p[:, :7], x, i), ValueError, r"pred must have shape \(3, 8\), .* got \(3, 7\)"),
        (lambda p, x, i: data2vec_loss(p[:2], x, i), ValueError, r"pred must have shape \(3, 8\), .* got \(2, 8\)"),
        (lambda p, x, i: data2vec_loss(p[0], x, i), ValueError, r"pred must have shape \(3, 8\), .* got \(8,\)"),
        (lambda p, x, i: data2vec_loss(p.int(), x, i), TypeError, "pred must be float32.*int32"),
        (lambda p, x, i: data2vec_loss(p.to("meta"), x, i), ValueError, "pred must be on .*, got meta"),
        (lambda p, x, i: data2vec_loss(p, [x[0], x[1].half()], i), TypeError, r"\[1\] must be torch.float32 .*float16"),
        (lambda p, x, i: data2vec_loss(p, [y[0] for y in x], i), ValueError, "layer_results must have 3 dims"),
        (lambda p, x, i: data2vec_loss(p, x, i.float()), TypeError, "positions must be int32 or int64, got .*float32"),
        (lambda p, x, i: data2vec_loss(p, x, i[None]), ValueError, r"positions must have shape \[N\], got \(1, 3\)"),
        (lambda p, x, i: data2vec_loss(p, x, i.to("meta")), ValueError, "positions must be on .*, got meta"),
        (lambda p, x, i: data2vec_loss(p, x, i, norm="group"), ValueError, "norm must be one of instance, .*'group'"),
        (lambda p, x, i: data2vec_loss(p, x, i, post_norm="batch"), ValueError, "post_norm must be one of"),
        (lambda p, x, i: data2vec_loss(p, x, i, layout="BCT"), ValueError, "layout must be one of BTC, TBC"),
        (lambda p, x, i: data2vec_loss(p, x, i, beta=-1.0), ValueError, "beta must be finite and >= 0, got -1.0"),
        (lambda p, x, i: data2vec_loss(p, x, i, scale=float("nan")), ValueError, "scale must be finite, got nan"),
        (lambda p, x, i: data2vec_loss(p, x, i, scale=float("inf")), ValueError, "scale must be finite, got inf"),
        (lambda p, x, i: data2vec_loss(None, x, i), TypeError, "pred must be a tensor, got NoneType"),
        (lambda p, x, i: data2vec_loss(p, x, None), TypeError, "positions must be a tensor, got NoneType"),
        (lambda p, x, i: data2vec_loss(p, [None], i), TypeError, r"layer_results\[0\] must be a tensor, got NoneType"),
        (lambda p, x, i: data2vec_loss(p, x, i, lengths=[5] * 4), TypeError, "lengths must be a tensor, got list"),
        (lambda p, x, i: data2vec_loss(p, x, i, target_batch_index=[0]), TypeError, "target_batch_index must be a ten"),
        (
            lambda p, x, i: data2vec_loss(p, x, i, target_batch_index=i[:0]),
            ValueError,
            "target_batch_index must not be empty",
        ),
        (lambda p, x, i: data2vec_loss(p, x, i, eps=0.0), ValueError, "eps must be > 0, got 0.0"),
        (lambda p, x, i: data2vec_loss(p, x, i, lengths=i.int()), ValueError, r"lengths must have shape \(4,\)"),
        (lambda p, x, i: data2vec_loss(p, [y[:, :1] for y in x], i), ValueError, "at least 2 frames, .* T = 1"),
        (
            lambda p, x, i: data2vec_loss(p, x, i, target_batch_index=p),
            TypeError,
            "target_batch_index must be int32 or",
        ),
        (
            lambda p, x, i: data2vec_loss(p, x, i, target_batch_index=i[None]),
            ValueError,
            r"\[B_student\], got \(1, 3\)",
        ),
    ],
)
def test_bad_inputs_raise(call, error, match):
    with pytest.raises(error, match=match):
        call(
            make_pred(3, 8),
            [torch.zeros(4, 5, 8, device=DEVICE) for _ in range(2)],
            torch.tensor([1, 2, 3], device=DEVICE),
        )


OUT_OF_RANGE = [
    ({"positions": [3, 10, 0]}, r"positions must lie in \[0, 9\], got values from 0 to 10"),
    ({"positions": [-1, 10, 3]}, r"positions must lie in \[0, 9\], got values from 3 to 10"),
    ({"positions": [3, 15, 0], "target_batch_index": [0, 1, 1]}, r"positions must lie in \[0, 14\], .* to 15"),
    ({"target_batch_index": [0, 2]}, r"target_batch_index must lie in \[0, 1\], got values from 0 to 2"),
    ({"lengths": [6, 2]}, r"lengths must lie in \[0, 5\], got values from 2 to 6"),
]


def call_out_of_range(wrong, **options):
    wrong = {k: torch.tensor(v, device=DEVICE) for k, v in wrong.items()}
    positions = wrong.pop("positions", torch.tensor([1, 2, 3], device=DEVICE))
    data2vec_loss(make_pred(3, 4), make_layers(1, 2, 5, 4), positions, **wrong, **options)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU cannot check without a synchronisation")
@pytest.mark.parametrize("wrong,match", OUT_OF_RANGE)
def test_indices_out_of_range_raise_on_cpu(wrong, match):
    with pytest.raises(ValueError, match=match):
        call_out_of_range(wrong)


@pytest.mark.parametrize("wrong,match", OUT_OF_RANGE)
def test_check_looks_at_the_ranges_before_the_op_runs(wrong, match, monkeypatch):
    op = importlib.import_module("d2v_fast.ops.data2vec_loss")  # the package holds the function under this name
    monkeypatch.setattr(op, "_fwd", None)
    with pytest.raises(ValueError, match=match):
        call_out_of_range(wrong, check=True)


# rows of rank 0 and of rank 1; the second case leaves one rank without any, the last has too few for a spread
RANKS = [(7, 12), (0, 5), (1, 0)]
IGNORED = 2  # rows in front of each rank's


def rank_inputs(rank: int):
    torch.manual_seed(5)
    both = [
        (300.0 + torch.randn(n + IGNORED, 6), make_layers(2, 2, 10, 6), torch.arange(-IGNORED, n))
        for case in RANKS
        for n in case
    ]
    return both[rank::2]


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = []
    for pred, layers, positions in rank_inputs(rank):
        out = data2vec_loss(pred, layers, positions, norm="layer", all_reduce_variance=True)
        found.append((out.target_var.item(), out.pred_var.item()))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def fairseq_var(ranks: list[torch.Tensor]) -> float:
    """``compute_var`` of fairseq over processes, in float64: from the counts, sums and squares of each."""
    n = sum(len(y) for y in ranks)
    if n < 2:
        return 0.0
    total, squares = (sum(f(y.double()).sum(0) for y in ranks) for f in (lambda y: y, torch.square))
    return (squares / (n - 1) - total**2 / (n * (n - 1)) + 1e-6).sqrt().mean().item()


@pytest.mark.skipif(RUNS_KERNELS or not dist.is_gloo_available(), reason="two processes with gloo, on the reference")
def test_variance_over_two_processes(tmp_path):
    code = "import sys, test_data2vec_loss as t; t.run_rank(int(sys.argv[1]), sys.argv[2])"
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    ranks = [
        subprocess.Popen(  # not spawned by multiprocessing, which hands over whatever sys.path other tests left
            [sys.executable, "-c", code, str(rank), str(tmp_path)],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in ranks:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert found[0] == found[1]
    for index in range(len(RANKS)):
        inputs = [rank_inputs(rank)[index] for rank in range(2)]
        targets = [eager_targets([x.double() for x in xs], "layer", positions=i[IGNORED:]) for _, xs, i in inputs]
        expected = fairseq_var(targets), fairseq_var([p[IGNORED:] for p, _, _ in inputs])
        assert found[0][index] == pytest.approx(expected, rel=1e-5)


def test_one_packed_all_reduce_and_only_when_asked_for(monkeypatch):
    sent = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda x: sent.append(x.shape) or x.mul_(2))  # a twin on every rank
    positions = some_positions(2, 30)
    pred, layers = make_pred(len(positions), 12), make_layers(2, 2, 30, 12)
    data2vec_loss(pred, layers, positions)
    assert not sent
    out = data2vec_loss(pred, layers, positions, all_reduce_variance=True)
    assert sent == [(4 * 12 + 1,)]
    torch.testing.assert_close(out.pred_var, eager_spread(torch.cat((pred, pred)).double()).float())


def test_nan_survives_the_all_reduce(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda x: None)
    moments = torch.ones(2, 2, 3)
    moments[1, 0, 1] = float("nan")
    assert _spread_over_ranks(moments, torch.tensor(5)).isnan().tolist() == [False, True]


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("post_norm", POST_NORMS)
def test_does_not_wait_for_the_device(norm, post_norm):
    positions, lengths = some_positions(2, 50), torch.tensor([50, 30], device=DEVICE)
    clones = torch.tensor([1, 0], device=DEVICE)
    pred, layers = make_pred(len(positions), 768, BF16), make_layers(4, 2, 50, 768, BF16)
    options = {"norm": norm, "post_norm": post_norm, "lengths": lengths, "target_batch_index": clones}
    fused(pred, layers, positions, **options)  # compiles
    with no_synchronisation():
        fused(pred, layers, positions, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["instance", "layer"])
def test_captured_graph_reads_the_tensors_again(norm):
    positions = some_positions(3, 50)
    pred = make_pred(len(positions), 64, BF16).clone().requires_grad_()
    layers = make_layers(3, 3, 50, 64, BF16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.autograd.grad(data2vec_loss(pred, layers, positions, norm=norm).loss, pred)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = data2vec_loss(pred, layers, positions, norm=norm)
        (grad,) = torch.autograd.grad(out.loss, pred)
    for x in (*layers, pred.detach()):
        x.copy_(torch.randn_like(x))
    positions.copy_(positions.flip(0))
    graph.replay()
    want, want_grad = fused(pred, layers, positions, norm=norm)
    assert torch.equal(out.loss, want.loss) and torch.equal(grad, want_grad)
    assert torch.equal(out.target_var, want.target_var) and torch.equal(out.pred_var, want.pred_var)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["instance", "layer"])
def test_is_deterministic_at_a_real_size(norm):
    positions = some_positions(15, 780)
    pred, layers = make_pred(len(positions), 768, BF16), make_layers(8, 15, 780, 768, BF16)
    check_against_fp64(pred, layers, positions, norm=norm, scale=768**-0.5)
    want, want_grad = fused(pred, layers, positions, norm=norm)
    for _ in range(10):
        got, grad = fused(pred, layers, positions, norm=norm)
        assert torch.equal(got.loss, want.loss) and torch.equal(grad, want_grad)
        assert torch.equal(got.target_var, want.target_var) and torch.equal(got.pred_var, want.pred_var)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["instance", "layer"])
def test_offsets_beyond_int32(norm):
    stride = 2**30 + 2**20
    if torch.cuda.mem_get_info()[0] < 8 * stride:
        pytest.skip("needs 9 GB of GPU memory")
    storage = torch.empty(2 * stride + 64 * 9, dtype=BF16, device=DEVICE)
    x = storage.as_strided((3, 8, 64), (stride, 64, 1))
    x.copy_(torch.randn(3, 8, 64))
    pred = storage.as_strided((3, 64), (stride, 1), 512)
    pred.copy_(torch.randn(3, 64))
    check_against_fp64(pred, [x], torch.tensor([2, 11, 23], device=DEVICE), norm=norm)


@pytest.mark.gpu
@pytest.mark.parametrize("wrong,match", OUT_OF_RANGE)
def test_check_raises_on_the_gpu(wrong, match):
    with pytest.raises(ValueError, match=match):
        call_out_of_range(wrong, check=True)


@pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
def test_interpreter_runs_the_kernel(monkeypatch):
    """Guards the suite itself: the CPU key must not fall back to the reference here."""
    monkeypatch.setattr(sys.modules["d2v_fast.ops.data2vec_loss"], "data2vec_loss_ref", None)
    out, grad = fused(make_pred(3, 8), make_layers(1, 2, 5, 8), torch.tensor([1, 2, 3]))
    assert out.loss > 0 and grad.any()

"""The fused loss against float64, and against the two ops that it fuses."""

import sys

import pytest
import torch
from checks import DEVICE, INTERPRET
from eager_targets import eager_spread, make_layers, some_positions
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loss_cases import check_against_fp64, fused, make_pred, teacher_rows

from d2v_fast.ops import layer_targets, masked_smooth_l1
from d2v_fast.ops.layer_targets import NORMS, POST_NORMS

pytestmark = pytest.mark.usefixtures("poison")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


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


@pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
def test_interpreter_runs_the_kernel(monkeypatch):
    """Guards the suite itself: the CPU key must not fall back to the reference here."""
    monkeypatch.setattr(sys.modules["d2v_fast.ops.data2vec_loss"], "data2vec_loss_ref", None)
    out, grad = fused(make_pred(3, 8), make_layers(1, 2, 5, 8), torch.tensor([1, 2, 3]))
    assert out.loss > 0 and grad.any()

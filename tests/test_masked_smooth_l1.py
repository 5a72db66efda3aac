import pytest
import torch
import torch.nn.functional as F
from checks import DEVICE, INTERPRET, RUNS_KERNELS, assert_as_accurate_as_eager, no_synchronisation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2v_fast.ops import masked_smooth_l1
from d2v_fast.ops.masked_smooth_l1 import _bwd, _fwd, masked_smooth_l1_ref

pytestmark = pytest.mark.usefixtures("poison")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# odd sizes, one row, no rows, one column, below / at / above a tile, and a real width
SHAPES = [(7, 5), (1, 768), (0, 64), (3, 1), (64, 64), (65, 130), (70, 768), (9, 1030)]


def make_inputs(N, D, pred_dtype=F32, target_dtype=F32, keep=0.5):
    pred = (3 * torch.randn(N, D + 8)).to(DEVICE, pred_dtype)[:, :D]  # the row stride is not D
    target = torch.randn(N, D + 3).to(DEVICE, target_dtype)[:, :D]
    mask = None if keep is None else (torch.rand(N) < keep).to(DEVICE)
    return pred, target, mask


def eager_loss(pred, target, mask, beta, scale, reduction):
    """Independent of the op's reference: gathers the kept rows and uses torch's losses."""
    keep = torch.ones(pred.shape[0], dtype=torch.bool, device=pred.device) if mask is None else mask
    p, t = pred[keep], target[keep]
    d = F.mse_loss(p, t, reduction="none") if beta == 0 else F.smooth_l1_loss(p, t, reduction="none", beta=beta)
    rows = d.sum(-1) * scale
    if reduction == "none":
        return torch.zeros_like(pred[:, 0]).index_put((keep,), rows)
    return rows.sum() / max(p.numel(), 1) if reduction == "mean" else rows.sum()


def loss_and_grad(function, pred, upstream):
    pred = pred.detach().requires_grad_()
    loss = function(pred)
    return loss.detach(), torch.autograd.grad(loss, pred, upstream.to(loss.dtype))[0]


def check_against_fp64(pred, target, mask, beta, scale, reduction):
    upstream = torch.randn(pred.shape[0] if reduction == "none" else ()).to(DEVICE)
    settings = {"beta": beta, "scale": scale, "reduction": reduction}
    got = loss_and_grad(lambda p: masked_smooth_l1(p, target, mask, **settings), pred, upstream)
    args = (mask, beta, 1.0 if scale is None else scale, reduction)
    eager = loss_and_grad(lambda p: eager_loss(p.float(), target.float(), *args), pred, upstream)
    exact = loss_and_grad(lambda p: eager_loss(p, target.double(), *args), pred.double(), upstream)
    assert got[0].dtype == F32 and got[1].dtype == pred.dtype
    for g, e, x in zip(got, eager, exact, strict=True):
        assert_as_accurate_as_eager(g, e, x)
    if mask is not None:
        assert not got[1][~mask].any()


@pytest.mark.parametrize("beta", [0.0, 0.25, 4.0])
@pytest.mark.parametrize("N,D", SHAPES)
def test_matches_fp64(N, D, beta):
    check_against_fp64(*make_inputs(N, D), beta, 0.37, "sum")


@pytest.mark.parametrize("pred_dtype,target_dtype", [(BF16, F32), (BF16, BF16), (F16, F32), (F32, BF16), (F16, F16)])
@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_dtypes(pred_dtype, target_dtype, beta):
    check_against_fp64(*make_inputs(67, 96, pred_dtype, target_dtype), beta, None, "sum")


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("keep", [None, 0.0, 0.5, 1.0])
def test_reductions_and_masks(reduction, keep):
    check_against_fp64(*make_inputs(67, 33, BF16, F32, keep), 1.0, 0.5, reduction)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("N,D,keep", [(0, 8, 0.5), (0, 8, None), (5, 8, 0.0), (4, 0, 0.5)])
def test_nothing_kept_is_zero(reduction, N, D, keep):
    pred, target, mask = make_inputs(N, D, keep=keep)
    pred.requires_grad_()
    loss = masked_smooth_l1(pred, target, mask, reduction=reduction)
    (grad,) = torch.autograd.grad(loss, pred, torch.full_like(loss, 3.0))
    assert loss.shape == (torch.Size([N]) if reduction == "none" else torch.Size([]))
    assert not loss.any() and not grad.any() and grad.shape == (N, D)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_exactly_one_row_kept(beta):
    pred, target, _ = make_inputs(70, 20)
    mask = torch.zeros(70, dtype=torch.bool, device=DEVICE)
    mask[66] = True
    check_against_fp64(pred, target, mask, beta, None, "mean")


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_dropped_rows_are_not_read_and_kept_nan_propagates(beta):
    pred, target, mask = make_inputs(70, 20)
    clean = masked_smooth_l1(pred, target, mask, beta=beta)
    pred, target = pred.clone(), target.clone()
    pred[~mask], target[~mask] = float("nan"), float("inf")
    loss, grad = loss_and_grad(lambda p: masked_smooth_l1(p, target, mask, beta=beta), pred, torch.tensor(2.0))
    assert loss == clean and grad.isfinite().all() and not grad[~mask].any()

    row = mask.nonzero()[0]
    target[row, 3] = float("nan")
    loss, grad = loss_and_grad(lambda p: masked_smooth_l1(p, target, mask, beta=beta), pred, torch.tensor(2.0))
    assert loss.isnan() and grad[row, 3].isnan().all() and grad.isnan().sum() == 1


def test_infinite_upstream_gradient_leaves_dropped_rows_zero():
    pred, target, mask = make_inputs(70, 20, F16)
    _, grad = loss_and_grad(lambda p: masked_smooth_l1(p, target, mask), pred, torch.tensor(float("inf")))
    assert not grad[~mask].any() and grad[mask].isinf().all()


def test_leading_dims_views_and_strides():
    pred = torch.randn(4, 9, 24, device=DEVICE)[:, 1:]  # rows that no single stride describes
    target = torch.randn(24, 8, 4, device=DEVICE).permute(2, 1, 0)
    mask = (torch.rand(8, 4) < 0.5).t().to(DEVICE)
    rows = masked_smooth_l1(pred, target, mask, beta=0.5, reduction="none")
    exact = eager_loss(pred.reshape(-1, 24).double(), target.reshape(-1, 24).double(), mask.reshape(-1), 0.5, 1, "none")
    torch.testing.assert_close(rows, exact.view(4, 8).float())
    one = masked_smooth_l1(pred[0, 0], target[0, 0])
    torch.testing.assert_close(one, (pred[0, 0] - target[0, 0]).square().sum())
    every_other = mask.reshape(-1).repeat_interleave(2)[::2]
    again = masked_smooth_l1(pred.reshape(-1, 24), target.reshape(-1, 24), every_other, beta=0.5, reduction="none")
    assert torch.equal(again.view(4, 8), rows)


def test_target_gets_no_gradient():
    pred, target, mask = make_inputs(5, 8)
    pred, target = pred.clone().requires_grad_(), target.clone().requires_grad_()
    masked_smooth_l1(pred, target, mask).backward()
    assert target.grad is None and pred.grad is not None
    assert not masked_smooth_l1(pred.detach(), target, mask).requires_grad
    with torch.no_grad():
        assert not masked_smooth_l1(pred, target, mask).requires_grad


def test_is_deterministic():
    pred, target, mask = make_inputs(130, 300)
    runs = [loss_and_grad(lambda p: masked_smooth_l1(p, target, mask), pred, torch.tensor(1.5)) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is CPU-only")
@pytest.mark.parametrize("beta", [0.0, 0.7])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_gradcheck(beta, reduction):
    pred, target, mask = make_inputs(5, 3, torch.float64, torch.float64)
    pred = pred.clone().requires_grad_()
    assert masked_smooth_l1(pred, target, mask).dtype == torch.float64

    def loss(p):
        return masked_smooth_l1(p, target, mask, beta=beta, scale=0.3, reduction=reduction)

    assert torch.autograd.gradcheck(loss, (pred,))


@pytest.mark.parametrize("keep", [None, 0.5])
def test_opcheck(keep):
    pred, target, mask = make_inputs(5, 3, BF16, F32, keep)
    torch.library.opcheck(_fwd, (pred.clone().requires_grad_(), target, mask, 0.5, 2.0))
    torch.library.opcheck(_bwd, (torch.randn(5, device=DEVICE), pred, target, mask, 0.5, 2.0))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_fullgraph(reduction):
    pred, target, mask = make_inputs(17, 24)
    pred = pred.clone().requires_grad_()

    def loss(p):
        return (masked_smooth_l1(p * 2, target, mask, beta=0.5, reduction=reduction) * 3).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(pred)
    (grad,) = torch.autograd.grad(compiled, pred)
    (expected,) = torch.autograd.grad(loss(pred), pred)
    torch.testing.assert_close(grad, expected)


@settings(
    max_examples=20 if INTERPRET else 60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.tuples(st.integers(0, 140), st.integers(1, 300)),
    st.tuples(*[st.sampled_from([F32, BF16, F16])] * 2),
    st.sampled_from([None, 0.0, 0.1, 0.5, 1.0]),
    st.sampled_from([0.0, 0.01, 0.7, 20.0]),
    st.sampled_from([None, 0.03, -2.0]),
    st.sampled_from(["sum", "mean", "none"]),
    st.integers(0, 999),
)
def test_any_options_match_fp64(shape, dtypes, keep, beta, scale, reduction, seed):
    torch.manual_seed(seed)
    check_against_fp64(*make_inputs(*shape, *dtypes, keep), beta, scale, reduction)


@pytest.mark.skipif(not RUNS_KERNELS, reason="needs the Triton kernels")
@pytest.mark.parametrize("block_n,block_d", [(4, 16), (1, 64), (2, 8)])
def test_every_tile_gives_the_same_answer(block_n, block_d):
    from d2v_fast.kernels import masked_smooth_l1 as kernels

    pred, target, mask = make_inputs(7, 37, BF16)
    config = kernels.LaunchConfig(block_n, block_d, num_warps=4)
    upstream = torch.randn(7, device=DEVICE)
    loss = kernels.masked_smooth_l1_fwd(pred, target, mask, 0.5, 2.0, config)
    grad = kernels.masked_smooth_l1_bwd(upstream, pred, target, mask, 0.5, 2.0, config)
    expected, expected_grad = loss_and_grad(lambda p: masked_smooth_l1_ref(p, target, mask, 0.5, 2.0), pred, upstream)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_gpu_tiles_divide_the_width():
    kernels = pytest.importorskip("d2v_fast.kernels.masked_smooth_l1")
    on_gpu = [kernels.config_for(torch.empty(4, D, device="meta")).block_d for D in (768, 1024, 512, 100, 5, 3000, 0)]
    assert on_gpu == [256, 1024, 512, 128, 8, 1024, 1]


@pytest.mark.parametrize(
    "call,error,match",
    [
        (lambda p, t, m: masked_smooth_l1(p, t[:, :-1], m), ValueError, r"same shape .*\(4, 8\) and \(4, 7\)"),
        (lambda p, t, m: masked_smooth_l1(p[0, 0], t[0, 0]), ValueError, "same shape"),
        (lambda p, t, m: masked_smooth_l1(p, t, m.float()), TypeError, "mask must be bool, got torch.float32"),
        (lambda p, t, m: masked_smooth_l1(p, t, m[:-1]), ValueError, r"mask must have shape \(4,\), got \(3,\)"),
        (lambda p, t, m: masked_smooth_l1(p.long(), t, m), TypeError, "pred must be float32.*int64"),
        (lambda p, t, m: masked_smooth_l1(p, t.bool(), m), TypeError, "target must be float32.*bool"),
        (lambda p, t, m: masked_smooth_l1(p, t.to("meta"), m), ValueError, "target must be on .*, got meta"),
        (lambda p, t, m: masked_smooth_l1(p, t, m.to("meta")), ValueError, "mask must be on .*, got meta"),
        (lambda p, t, m: masked_smooth_l1(p, t, m, beta=-0.1), ValueError, "beta must be finite and >= 0, got -0.1"),
        (lambda p, t, m: masked_smooth_l1(p, t, m, beta=float("nan")), ValueError, "beta must be finite"),
        (lambda p, t, m: masked_smooth_l1(p, t, m, scale=float("nan")), ValueError, "scale must be finite, got nan"),
        (lambda p, t, m: masked_smooth_l1(p, t, m, scale=-float("inf")), ValueError, "scale must be finite, got -inf"),
        (lambda p, t, m: masked_smooth_l1(None, t, m), TypeError, "pred must be a tensor, got NoneType"),
        (lambda p, t, m: masked_smooth_l1(p, 0.0, m), TypeError, "target must be a tensor, got float"),
        (lambda p, t, m: masked_smooth_l1(p, t, [True] * 4), TypeError, "mask must be a tensor, got list"),
        (lambda p, t, m: masked_smooth_l1(p, t, m, reduction="max"), ValueError, "reduction must be .*'max'"),
    ],
)
def test_bad_inputs_raise(call, error, match):
    with pytest.raises(error, match=match):
        call(*make_inputs(4, 8))


@pytest.mark.gpu
def test_float64_on_gpu_raises():
    with pytest.raises(TypeError, match="float64 on cuda"):
        masked_smooth_l1(*make_inputs(4, 8, torch.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_does_not_wait_for_the_device(reduction):
    pred, target, mask = make_inputs(64, 768, BF16)
    upstream = torch.ones(64 if reduction == "none" else (), device=DEVICE)
    loss_and_grad(lambda p: masked_smooth_l1(p, target, mask, reduction=reduction), pred, upstream)  # compiles
    with no_synchronisation():
        loss_and_grad(lambda p: masked_smooth_l1(p, target, mask, reduction=reduction), pred, upstream)


@pytest.mark.gpu
def test_offsets_beyond_int32():
    stride = 2**30 + 2**20
    if torch.cuda.mem_get_info()[0] < 8 * stride:
        pytest.skip("needs 9 GB of GPU memory")
    storage = torch.empty(2 * stride + 64, dtype=BF16, device=DEVICE)
    pred = storage.as_strided((3, 64), (stride, 1))
    pred.copy_(torch.randn(3, 64))
    target = torch.randn(3, 64, device=DEVICE)
    check_against_fp64(pred, target, None, 0.5, None, "none")


@pytest.mark.gpu
def test_captured_graph_reads_the_tensors_again():
    pred, target, mask = make_inputs(64, 768, BF16)
    grad = torch.randn(64, device=DEVICE)

    def step():
        return _fwd(pred, target, mask, 0.5, 2.0), _bwd(grad, pred, target, mask, 0.5, 2.0)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    pred.copy_(torch.randn_like(pred)), mask.copy_(~mask)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, step(), strict=True))


def test_interpreter_rounds_to_nearest_even():
    if not INTERPRET:
        pytest.skip("needs TRITON_INTERPRET=1")
    pred, target, _ = make_inputs(40, 64, BF16, F32, keep=None)
    _, grad = loss_and_grad(lambda p: masked_smooth_l1(p, target), pred, torch.tensor(1.0))
    assert torch.equal(grad, (2 * (pred.float() - target)).bfloat16())

import pytest
import torch
import torch.nn.functional as F
from checks import DEVICE, INTERPRET, RUNS_KERNELS, assert_as_accurate_as_eager, no_synchronisation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from d2v_fast.ops import residual_dropout_layer_norm
from d2v_fast.ops.residual_dropout_layer_norm import _bwd, _fwd, residual_dropout_layer_norm_ref

pytestmark = pytest.mark.usefixtures("poison")

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
EPS = 1e-5
# odd sizes, one row, no rows, one column, below / at / above a tile of the interpreter and of a GPU, several programs
SHAPES = [(1, 7, 5), (1, 1, 768), (2, 0, 64), (3, 1, 1), (2, 32, 64), (5, 13, 130), (2, 100, 96), (1, 2, 1030)]


def make_inputs(shape, dtype=F32, residual_dtype=F32, vector_dtype=F32):
    """x, residual, weight, bias, column scale, and a row scale with dropped samples in it."""
    B, T, C = shape
    x = (2 * torch.randn(B, T, C + 8)).to(DEVICE, dtype)[..., :C]  # the row stride is not C
    residual = (1 + torch.randn(B, T, C + 3)).to(DEVICE, residual_dtype)[..., :C]
    vectors = [(1 + 0.5 * torch.randn(C)).to(DEVICE, vector_dtype) for _ in range(3)]
    row_scale = ((torch.arange(B) % 3 != 1) / 0.7).to(DEVICE)
    return x, residual, *vectors, row_scale


def eager(x, residual, weight, bias, column_scale, row_scale, factor=None, eps=EPS, h_dtype=None):
    """Independent of the op's reference: y and h step by step, with the given dropout ``factor``."""
    if factor is not None:
        x = x * factor.to(x.dtype)
    if column_scale is not None:
        x = x * column_scale
    if row_scale is not None:
        x = x * row_scale.to(x.dtype)[:, None, None]
    h = residual + x
    if h_dtype is not None:  # rounded, with the gradient of the sum
        h = h + (h.to(h_dtype).to(h.dtype) - h).detach()
    return F.layer_norm(h, h.shape[-1:], weight, bias, eps), h


def fused(x, residual, weight, bias, column_scale, row_scale, **options):
    return residual_dropout_layer_norm(
        x, residual, weight, bias, column_scale=column_scale, row_scale=row_scale, return_residual=True, **options
    )


def values_and_grads(function, upstream, tensors, **options):
    """y and h, and the gradients in the tensors that are there (not in the row scale, the last one).

    ``upstream``: gradients of y and h; one that is None leaves that output unused.
    """
    inputs = [None if v is None else v.detach().requires_grad_() for v in tensors[:-1]]
    outputs = function(*inputs, tensors[-1], **options)
    used = [(o, g.to(o)) for o, g in zip(outputs, upstream, strict=True) if g is not None]
    grads = torch.autograd.grad([o for o, _ in used], [v for v in inputs if v is not None], [g for _, g in used])
    return [*(o.detach() for o in outputs), *grads]


def dropout_factor(shape, p, seed):
    """The factors of the op's own dropout after ``torch.manual_seed(seed)``: what it makes of ones."""
    torch.manual_seed(seed)
    ones = torch.ones(shape, device=DEVICE)
    _, factor = residual_dropout_layer_norm(ones, torch.zeros_like(ones), p=p, return_residual=True)
    return factor


def check_against_fp64(tensors, p=0.0, upstream_h=True, floor=1e-6):
    x, residual = tensors[:2]
    upstream = torch.randn(x.shape).to(DEVICE, x.dtype), torch.randn(x.shape).to(DEVICE, residual.dtype)
    upstream = upstream if upstream_h else (upstream[0], None)
    factor = dropout_factor(x.shape, p, seed=7) if p > 0 else None
    torch.manual_seed(7)
    got = values_and_grads(fused, upstream, tensors, p=p)
    single, exact = ([None if v is None else v.to(dtype) for v in tensors] for dtype in (F32, F64))
    # y is the norm of the rounded h, as it is in eager mode; the exact answer rounds nowhere
    single = values_and_grads(eager, upstream, single, factor=factor, h_dtype=residual.dtype)
    exact = values_and_grads(eager, upstream, exact, factor=factor)
    likes = [x, residual, *(v for v in tensors[:-1] if v is not None)]
    for g, e, w, like in zip(got, single, exact, likes, strict=True):
        assert g.dtype == like.dtype and g.is_contiguous()
        assert_as_accurate_as_eager(g, e.to(g.dtype), w, floor=floor)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("shape", SHAPES)
def test_post_norm_matches_fp64(shape, p):
    x, residual, weight, bias, *_ = make_inputs(shape)
    check_against_fp64([x, residual, weight, bias, None, None], p, upstream_h=False)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("shape", SHAPES)
def test_pre_norm_with_scales_matches_fp64(shape, p):
    check_against_fp64(make_inputs(shape), p)


@pytest.mark.parametrize("present", [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)])
def test_every_vector_is_optional(present):
    """Of weight, bias, column scale and row scale."""
    x, residual, *vectors = make_inputs((3, 25, 40))
    check_against_fp64([x, residual, *(v if keep else None for v, keep in zip(vectors, present, strict=True))])


@pytest.mark.parametrize(
    "dtype,residual_dtype,vector_dtype",
    [(BF16, F32, F32), (BF16, BF16, F32), (BF16, BF16, BF16), (F16, F16, F32), (F16, F32, F16), (F32, BF16, F32)],
)
@pytest.mark.parametrize("scaled", [True, False])
def test_dtypes(dtype, residual_dtype, vector_dtype, scaled):
    tensors = list(make_inputs((3, 23, 96), dtype, residual_dtype, vector_dtype))
    tensors[4:] = tensors[4:] if scaled else (None, None)
    check_against_fp64(tensors, 0.25, upstream_h=scaled)


def test_large_means():
    """Mean 4096, deviation 1: the variance as a difference of sums would be lost."""
    x, residual, *vectors = make_inputs((2, 17, 300))
    check_against_fp64([x, residual + 4096, *vectors], floor=1e-5)


def test_small_column_scale():
    """LayerScale of 1e-4 on a stream of size 1000: its gradient does not come from the difference of h and residual."""
    x, residual, weight, bias, column_scale, row_scale = make_inputs((3, 25, 40))
    check_against_fp64([x, residual * 1000, weight, bias, column_scale * 1e-4, row_scale], floor=1e-5)


def test_eps():
    tensors = make_inputs((2, 5, 40))
    torch.testing.assert_close(fused(*tensors, eps=0.7), eager(*tensors, eps=0.7))


def test_forms():
    """y alone, or y and h; only h used; nothing but y's norm when the branch is dropped whole."""
    x, residual, weight, bias, *_ = make_inputs((2, 7, 40))
    y = residual_dropout_layer_norm(x, residual, weight, bias)
    assert torch.equal(y, fused(x, residual, weight, bias, None, None)[0])
    upstream = torch.randn(2, 7, 40).to(DEVICE)
    inputs = [v.detach().requires_grad_() for v in (x, residual)]
    _, h = residual_dropout_layer_norm(*inputs, return_residual=True)
    assert all(torch.equal(g, upstream) for g in torch.autograd.grad(h, inputs, upstream))
    nothing = torch.zeros(2, device=DEVICE)
    y, h = fused(x, residual, weight, bias, None, nothing)
    assert torch.equal(h, residual)
    torch.testing.assert_close(y, F.layer_norm(residual, (40,), weight, bias))


@pytest.mark.parametrize("residual_dtype", [BF16, F16])
def test_y_is_the_norm_of_the_rounded_h(residual_dtype):
    x, residual, weight, bias, *scales = make_inputs((3, 25, 40), F32, residual_dtype)
    y, h = fused(x, residual, weight, bias, *scales)
    torch.testing.assert_close(y, F.layer_norm(h.float(), (40,), weight, bias), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("residual_dtype", [F32, BF16])
@pytest.mark.parametrize("dropout", [True, False])
def test_y_alone(residual_dtype, dropout):
    """What nobody reads is not written, and y is the same without it."""
    tensors = make_inputs((3, 25, 40), BF16, residual_dtype)
    seed = torch.tensor(3, device=DEVICE) if dropout else None
    want, *_ = _fwd(*tensors, seed, 0.3, EPS)
    y, *rest = _fwd(*tensors, seed, 0.3, EPS, keep=False)
    assert torch.equal(y, want)
    assert [v.shape for v in rest] == [(0,)] * 3


class SeenKeep(TorchDispatchMode):
    """Collects whether each forward kept h."""

    def __init__(self):
        super().__init__()
        self.keep = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.d2v_fast.residual_dropout_layer_norm_fwd.default:
            self.keep.append(out[1].numel() > 0)
        return out


@pytest.mark.skipif(not RUNS_KERNELS, reason="needs the Triton kernels")
def test_h_is_kept_only_for_a_reader():
    tensors = make_inputs((3, 5, 8))
    names = ("x", "residual", "weight", "bias", "column_scale", "row_scale")

    def keep(return_residual=False, **wanting):
        inputs = {k: v.detach().requires_grad_(k in wanting) for k, v in zip(names, tensors, strict=True)}
        with SeenKeep() as seen:
            residual_dropout_layer_norm(**inputs, return_residual=return_residual)
        return seen.keep

    assert keep() == keep(row_scale=1) == [False]
    assert all(keep(**{name: 1}) == [True] for name in names[:-1])
    with torch.no_grad():
        assert keep(**dict.fromkeys(names, 1)) == [False]
        assert keep(return_residual=True) == [True]


def test_no_samples():
    """A row scale without elements divides nothing."""
    x, residual, *vectors, _ = make_inputs((1, 3, 8))
    tensors = [x[:0], residual[:0], *vectors, torch.zeros(0, device=DEVICE)]
    y, h, grad_x, grad_residual, *grads = values_and_grads(fused, (x[:0], x[:0]), tensors)
    assert all(v.shape == (0, 3, 8) for v in (y, h, grad_x, grad_residual))
    assert len(grads) == 3 and not any(v.any() for v in grads)


def test_backward_keeps_one_copy_of_rows():
    """Of an x that the column scale's gradient needs: what forward copies into rows is what backward reads."""
    x, residual = torch.randn(2, 24, 6, device=DEVICE), torch.randn(2, 6, 24, device=DEVICE)
    scale = torch.ones(24, device=DEVICE, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        residual_dropout_layer_norm(x.mT, residual, column_scale=scale)
    assert any(torch.equal(v, x.mT) for v in saved)
    assert all(v.is_contiguous() for v in saved if v.shape == (2, 6, 24))


def test_row_scale_gets_no_gradient():
    *tensors, row_scale = make_inputs((3, 5, 8))
    y, h = fused(*tensors[:2], None, None, None, row_scale.requires_grad_())
    assert not y.requires_grad and not h.requires_grad
    fused(*(v.detach().requires_grad_() for v in tensors), row_scale)[0].sum().backward()
    assert row_scale.grad is None


def test_frozen_column_scale():
    tensors = make_inputs((3, 5, 8))
    x = tensors[0].detach().requires_grad_()
    y, _ = fused(x, *tensors[1:])
    (grad,) = torch.autograd.grad(y.sum() + y[0, 0, 0], x)
    exact = x.detach().double().requires_grad_()
    y, _ = eager(exact, *(v.double() for v in tensors[1:]))
    torch.testing.assert_close(grad.double(), torch.autograd.grad(y.sum() + y[0, 0, 0], exact)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_rate_and_scale(p):
    factor = dropout_factor((8, 100, 128), p, seed=3)
    kept = factor != 0
    assert torch.equal(factor[kept], torch.full_like(factor[kept], 1 / (1 - p)))
    count, deviation = kept.numel(), (p * (1 - p)) ** 0.5
    assert abs(kept.double().mean().item() - (1 - p)) < 4.5 * deviation / count**0.5
    flat = kept.double().flatten(0, 1) - (1 - p)  # [rows, C]
    for dim in (0, 1):  # no row and no column is kept more often than others
        size = flat.shape[dim]
        assert (flat.mean(dim).abs() * size**0.5 / deviation).max() < 5
    for dim, lag in ((0, 1), (0, 64), (1, 1), (1, 2), (1, 3), (1, 4), (1, 64)):  # nor do neighbours agree
        a, b = flat.narrow(dim, 0, flat.shape[dim] - lag), flat.narrow(dim, lag, flat.shape[dim] - lag)
        assert abs((a * b).mean().item()) * a.numel() ** 0.5 / deviation**2 < 4.5


def test_dropout_follows_the_seed():
    shape = (3, 20, 40)
    first = dropout_factor(shape, 0.3, seed=1)
    assert torch.equal(first, dropout_factor(shape, 0.3, seed=1))
    again = residual_dropout_layer_norm(*torch.ones(2, *shape, device=DEVICE), p=0.3)  # the next draw of the same seed
    assert not torch.equal(again, dropout_factor(shape, 0.3, seed=1))
    other = dropout_factor(shape, 0.3, seed=2)
    agree = ((first != 0) == (other != 0)).double().mean().item()
    assert agree == pytest.approx(0.7**2 + 0.3**2, abs=0.05)


def test_backward_uses_the_mask_of_forward():
    """Of h alone: the gradient of x is upstream times the factor of forward, bit for bit."""
    x, residual, *_ = make_inputs((3, 100, 70))
    upstream = torch.randn(x.shape).to(DEVICE)
    factor = dropout_factor(x.shape, 0.4, seed=11)
    inputs = [v.detach().requires_grad_() for v in (x, residual)]
    torch.manual_seed(11)
    _, h = residual_dropout_layer_norm(*inputs, p=0.4, return_residual=True)
    torch.testing.assert_close(h, residual + x * factor, rtol=1e-6, atol=1e-6)
    for _ in range(2):
        grad_x, grad_residual = torch.autograd.grad(h, inputs, upstream, retain_graph=True)
        assert torch.equal(grad_x, upstream * factor) and torch.equal(grad_residual, upstream)


def test_dropout_off_is_exact():
    tensors = make_inputs((3, 9, 40))
    want = fused(*tensors)
    state = torch.get_rng_state()
    for options in ({"p": 0.0}, {"p": 0.5, "training": False}):
        got = fused(*tensors, **options)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(torch.get_rng_state(), state)  # and draws nothing


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's NumPy
def test_bad_values_stay_in_their_row(bad):
    x, residual, weight, bias, *_ = make_inputs((1, 70, 20))
    x = x.clone()
    x[0, 66] = bad  # dropped or not
    inputs = [v.detach().requires_grad_() for v in (x, residual, weight, bias)]
    y = residual_dropout_layer_norm(*inputs, p=0.5)
    grad_x, grad_residual, *vectors = torch.autograd.grad(y, inputs, torch.randn_like(y))
    rows = torch.arange(70, device=DEVICE) == 66
    for v in (y, grad_x, grad_residual):
        assert v[0, rows].isnan().all() and v[0, ~rows].isfinite().all()
    assert vectors[0].isnan().all() and vectors[1].isfinite().all()


def test_leading_dims_views_and_strides():
    x, residual = torch.randn(2, 4, 9, 24, device=DEVICE)[:, :, 1:]  # rows that no single stride describes
    vectors = [*torch.randn(3, 48, device=DEVICE)[:, ::2], torch.rand(8, device=DEVICE)[::2]]
    torch.testing.assert_close(fused(x, residual, *vectors), eager(x, residual, *vectors))
    tensors = [torch.randn(4, 24, 6, device=DEVICE).mT, torch.randn(4, 24, 6, device=DEVICE).mT, *vectors]
    upstream = torch.randn(4, 24, 6, device=DEVICE).mT, torch.randn((), device=DEVICE).expand(4, 6, 24)
    got = values_and_grads(fused, upstream, tensors)
    assert all(v.is_contiguous() for v in got[:2])
    torch.testing.assert_close(got, values_and_grads(eager, upstream, tensors), rtol=1e-4, atol=1e-5)
    row = residual_dropout_layer_norm(x[0, 0], residual[0, 0])
    torch.testing.assert_close(row, F.layer_norm(x[0, 0] + residual[0, 0], (24,)))
    images = residual_dropout_layer_norm(x[:, None], residual[:, None], row_scale=vectors[3])
    torch.testing.assert_close(images[:, 0], eager(x, residual, None, None, None, vectors[3])[0])


def test_is_deterministic():
    tensors = make_inputs((2, 150, 70))
    upstream = torch.randn(2, 2, 150, 70).to(DEVICE)
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(values_and_grads(fused, upstream, tensors, p=0.3))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(not RUNS_KERNELS, reason="needs the Triton kernels")
@pytest.mark.parametrize("block_n,block_c,programs", [(1, 64, 3), (4, 128, 9), (16, 64, 1)])
def test_every_tile_gives_the_same_answer(block_n, block_c, programs):
    from d2v_fast.kernels import residual_dropout_layer_norm as kernels

    tensors = make_inputs((1, 22, 37), BF16, F32)
    x, residual, weight, bias, column_scale = (v.flatten(0, -2) if v.dim() == 3 else v for v in tensors[:-1])
    vectors = weight, bias, column_scale, torch.tensor([0.5, 2.0], device=DEVICE)
    seed = torch.tensor(2**62 + 12345, device=DEVICE)
    config = kernels.LaunchConfig(block_n, block_c, num_warps=4, max_programs=programs)
    want = kernels.residual_dropout_layer_norm_fwd(x, residual, *vectors, seed, 0.4, EPS)
    got = kernels.residual_dropout_layer_norm_fwd(x, residual, *vectors, seed, 0.4, EPS, config=config)
    torch.testing.assert_close(got, want)
    args = torch.randn_like(x), torch.randn_like(residual), *want[1:], *vectors, seed, x, 0.4, True
    want = kernels.residual_dropout_layer_norm_bwd(*args)
    torch.testing.assert_close(kernels.residual_dropout_layer_norm_bwd(*args, config), want)


def test_gpu_tiles_hold_whole_rows():
    kernels = pytest.importorskip("d2v_fast.kernels.residual_dropout_layer_norm")
    for C in (1, 37, 512, 768, 1024, 5000, 65536):
        for backward in (False, True):
            config = kernels.config_for(torch.empty(2, C, device="meta"), backward)
            assert config.block_c >= C and config.block_c % 4 == 0  # four columns to a draw
    x = torch.empty(2, 768, device="meta")  # eight warps a program, of 80 registers or 120 a thread
    assert [kernels.config_for(x, True, three_sums).max_programs for three_sums in (False, True)] == [3 * 132, 2 * 132]


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is CPU-only")
@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_gradcheck(dropout, scaled):
    *inputs, row_scale = (v.double() for v in make_inputs((3, 2, 5)))
    inputs = [v.requires_grad_() for v in (inputs if scaled else inputs[:4])]
    scales = (row_scale,) if scaled else (None, None)
    seed = torch.tensor(9) if dropout else None
    settings = {"fast_mode": True, "check_undefined_grad": False}
    torch.autograd.gradcheck(lambda *v: _fwd(*v, *scales, seed, 0.3, EPS)[:2], inputs, **settings)
    torch.autograd.gradcheck(lambda *v: residual_dropout_layer_norm_ref(*v, *scales)[:2], inputs, **settings)


@pytest.mark.parametrize("scaled,dropout", [(True, True), (False, True), (False, False)])
def test_opcheck(scaled, dropout):
    x, residual, weight, bias, *scales = make_inputs((2, 3, 8))
    scales = scales if scaled else (None, None)
    seed = torch.tensor(5, device=DEVICE) if dropout else None
    _, h, mean, rstd = _fwd(x, residual, weight, bias, *scales, seed, 0.3, EPS)
    grad = torch.randn(2, 3, 8, device=DEVICE)
    kept = x if scaled else None
    torch.library.opcheck(_bwd, (grad, grad * 2, h, mean, rstd, weight, bias, *scales, seed, kept, 0.3))
    for v in (x, residual, weight, bias):
        v.requires_grad_()
    for keep in (True, False):
        with torch.set_grad_enabled(keep):
            torch.library.opcheck(_fwd, (x, residual, weight, bias, *scales, seed, 0.3, EPS, keep))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compile_fullgraph(p):
    def chain(x, residual, *vectors):
        y, h = fused(2 * x, residual, *vectors, p=p)
        return y + 1, h

    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    tensors, upstream = make_inputs((2, 5, 8)), torch.randn(2, 2, 5, 8).to(DEVICE)
    runs = []
    for function in (compiled, chain):
        torch.manual_seed(4)
        runs.append(values_and_grads(function, upstream, tensors))
    torch.testing.assert_close(*runs)


def test_autocast_keeps_the_dtypes():
    tensors = make_inputs((2, 5, 8), BF16, F32)
    with torch.autocast(DEVICE, BF16):
        assert [v.dtype for v in fused(*tensors)] == [BF16, F32]


@settings(max_examples=15 if INTERPRET else 100, deadline=None, database=None, derandomize=True)
@given(
    B=st.integers(1, 4),
    T=st.integers(1, 20),
    C=st.integers(2, 70),
    p=st.sampled_from([0.0, 0.1, 0.5]),
    scaled=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_are_normalised_and_gradients_add_up(B, T, C, p, scaled, seed):
    torch.manual_seed(seed)
    x, residual, _, _, column_scale, row_scale = make_inputs((B, T, C))
    scales = (column_scale, row_scale) if scaled else (None, None)
    tensors = [x, residual, None, None, *scales]
    y, h, grad_x, grad_residual, *_ = values_and_grads(fused, torch.randn(2, B, T, C), tensors, p=p)
    # h is far from constant, so y has mean 0 and variance 1 in every row
    wide = h.double().var(-1, correction=0) > 0.1
    assert y.double().mean(-1)[wide].abs().sum() <= 1e-5 * wide.sum()
    torch.testing.assert_close(y.double().var(-1, correction=0)[wide], wide[wide].double(), rtol=1e-3, atol=0)
    # x reaches h through a factor per element, which its gradient has as well
    moved = h - residual
    torch.testing.assert_close(grad_x * x, grad_residual * moved, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "call,error,match",
    [
        (lambda x, v: residual_dropout_layer_norm(x, None), TypeError, "residual must be a tensor, got NoneType"),
        (lambda x, v: residual_dropout_layer_norm(0.0, x), TypeError, "x must be a tensor, got float"),
        (lambda x, v: residual_dropout_layer_norm(x, x, v, 0.0), TypeError, "bias must be a tensor, got float"),
        (lambda x, v: residual_dropout_layer_norm(x, x, column_scale=1e-4), TypeError, "column_scale must be a tensor"),
        (lambda x, v: residual_dropout_layer_norm(x, x, row_scale=[1.0] * 4), TypeError, "row_scale must be a tensor"),
        (lambda x, v: residual_dropout_layer_norm(x, x, p=None), TypeError, "p must be a number, got NoneType"),
        (lambda x, v: residual_dropout_layer_norm(x, x, p="0.1"), TypeError, "p must be a number, got str"),
        (lambda x, v: residual_dropout_layer_norm(x, x, eps=None), TypeError, "eps must be a number, got NoneType"),
        (lambda x, v: residual_dropout_layer_norm(x.int(), x), TypeError, "x must be float32, .* got torch.int32"),
        (lambda x, v: residual_dropout_layer_norm(x, x.long()), TypeError, "residual must be float32.* torch.int64"),
        (lambda x, v: residual_dropout_layer_norm(x, x, v.int()), TypeError, "weight must be float32.* torch.int32"),
        (lambda x, v: residual_dropout_layer_norm(x, x[:1]), ValueError, r"shape \(4, 2, 8\) like x, got \(1, 2, 8\)"),
        (lambda x, v: residual_dropout_layer_norm(x, x[0]), ValueError, r"residual must have shape \(4, 2, 8\) like x"),
        (lambda x, v: residual_dropout_layer_norm(x, x.to("meta")), ValueError, "residual must be on .*, got meta"),
        (lambda x, v: residual_dropout_layer_norm(x[..., :0], x), ValueError, r"x must be \[..., C\] .* \(4, 2, 0\)"),
        (lambda x, v: residual_dropout_layer_norm(x, x, v[:3]), ValueError, r"weight must have shape \(8,\), got \(3,"),
        (lambda x, v: residual_dropout_layer_norm(x, x, v, x), ValueError, r"bias must have shape \(8,\), got \(4, 2"),
        (
            lambda x, v: residual_dropout_layer_norm(x, x, column_scale=v[1:]),
            ValueError,
            "column_scale must have shape",
        ),
        (lambda x, v: residual_dropout_layer_norm(x, x, row_scale=v), ValueError, r"row_scale must have shape \(4,\)"),
        (
            lambda x, v: residual_dropout_layer_norm(v, v, row_scale=v),
            ValueError,
            r"x must be \[B, ..., C\] with a row_",
        ),
        (lambda x, v: residual_dropout_layer_norm(x, x, p=1.0), ValueError, r"p must lie in \[0, 1\), got 1.0"),
        (lambda x, v: residual_dropout_layer_norm(x, x, p=-0.1), ValueError, r"p must lie in \[0, 1\), got -0.1"),
        (lambda x, v: residual_dropout_layer_norm(x, x, p=float("nan"), training=False), ValueError, "got nan"),
        (lambda x, v: residual_dropout_layer_norm(x, x, eps=-1e-5), ValueError, "eps must be > 0, got -1e-05"),
    ],
)
def test_bad_inputs_raise(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.zeros(4, 2, 8, device=DEVICE), torch.zeros(8, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_does_not_wait_for_the_device(p):
    tensors = make_inputs((4, 100, 768), BF16, F32)
    upstream = torch.randn_like(tensors[0]), torch.randn_like(tensors[1])
    values_and_grads(fused, upstream, tensors, p=p)  # compiles
    with no_synchronisation():
        values_and_grads(fused, upstream, tensors, p=p)


@pytest.mark.gpu
def test_captured_graph_draws_another_mask_every_time():
    x, residual, weight, bias, *scales = make_inputs((4, 100, 768), BF16, F32)
    grad = torch.randn_like(x)

    def step():
        y, h = fused(x, residual, weight, bias, *scales, p=0.3)
        return y, h, *torch.autograd.grad((y, h), (x,), (grad, grad.float()))

    x.requires_grad_()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append([v.detach().clone() for v in got])
    assert not torch.equal(replays[0][1], replays[1][1])
    for _, h, grad_x in replays:  # forward and backward of a replay agree on what is dropped
        live = (scales[0] != 0) & (scales[1] != 0)[:, None, None] & (x != 0)
        assert torch.equal((h == residual)[live], (grad_x == 0)[live])


@pytest.mark.gpu
@pytest.mark.parametrize("C", [16384, 65536])
def test_widest_rows(C):
    check_against_fp64(make_inputs((3, 1, C)), 0.25)


@pytest.mark.gpu
def test_more_than_2_31_elements():
    if torch.cuda.mem_get_info()[0] < 26 * 2**30:
        pytest.skip("needs 26 GB of GPU memory")
    x = torch.zeros(2, 2**20 + 3, 1024, dtype=BF16, device=DEVICE)
    x[1, -1] = torch.randn(1024)
    seed = torch.tensor(5, device=DEVICE)
    none = (None,) * 4
    y, h, mean, rstd = _fwd(x, x, *none, seed, 0.5, EPS)
    torch.testing.assert_close(y[1, -1].float(), F.layer_norm(h[1, -1].float(), (1024,)), rtol=2e-2, atol=2e-2)
    kept = (h[1, -1] != x[1, -1]).float().mean().item()
    assert kept == pytest.approx(0.5, abs=0.1)
    grad_x, grad_residual, *_ = _bwd(x, None, h, mean, rstd, *none, seed, None, 0.5)
    factor = (h[1, -1].float() - x[1, -1].float()) / x[1, -1].float()
    torch.testing.assert_close(
        grad_x[1, -1].float(), grad_residual[1, -1].float() * factor.round(), rtol=2e-2, atol=1e-2
    )

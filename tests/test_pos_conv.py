"""Grouped convolutions over the frames: PyTorch's path, and the CUDA sources in the emulator, bindings included."""

import copy

import emulator
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import DEVICE, INTERPRET, assert_as_accurate_as_eager, no_synchronisation

from d2v_fast.nn.config import EMAConfig, EncoderConfig
from d2v_fast.nn.positions import ConvPositions
from d2v_fast.nn.teacher import EMATeacher
from d2v_fast.ops import _extension, pos_conv
from d2v_fast.ops import _pos_conv_extension as extension
from d2v_fast.ops.pos_conv import _bwd, _fwd, pos_conv_ref

pytestmark = pytest.mark.usefixtures("poison")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
EMULATES = DEVICE == "cpu" and not INTERPRET
NO_EMULATOR = "kernels are emulated on the CPU, without Triton's interpreter"
needs_emulator = pytest.mark.skipif(not EMULATES, reason=NO_EMULATOR)
RAGGED = [(300, 7), (0, 257), (310, 1), (312, 0), (258, 40), (320, 256)]  # in 2 rows of 300; out of order, with gaps


@pytest.fixture(params=["op", "emulated"])
def registered(request):
    """The registered op: PyTorch's convolution, or the kernels."""
    if request.param == "emulated":
        if not EMULATES:
            pytest.skip(NO_EMULATOR)
        request.getfixturevalue("emulated")
    return request.param


def make_inputs(B, T, C, groups, taps, dtype=F32, bias=True):
    """x, weights and biases; the weights have values that ``dtype`` holds."""
    width = C // groups
    x = torch.randn(B, T, C, device=DEVICE).to(dtype)
    weights = [(torch.randn(C, width, k, device=DEVICE) / (width * k) ** 0.5).to(dtype).float() for k in taps]
    biases = [torch.randn(C, device=DEVICE) if bias else None for _ in taps]
    return x, weights, biases


def by_segment(x, weights, biases, groups, norm=True, segments=None):
    """The definition, in the dtype of ``x``: each segment alone."""
    B, T, C = x.shape
    rows = x.reshape(-1, C)
    out = torch.zeros_like(rows)
    for first, count in [(b * T, T) for b in range(B)] if segments is None else segments.tolist():
        h = rows[first : first + count]
        for weight, bias in zip(weights, biases, strict=True) if count else ():
            z = F.conv1d(h.mT, weight, bias, padding=weight.shape[2] // 2, groups=groups)[:, :count].mT
            h = F.gelu(F.layer_norm(z, (C,)) if norm else z)
        out = out.slice_scatter(h, 0, first, first + count)
    return out.view(x.shape)


def value_and_grads(function, upstream, x, weights, biases, **kwargs):
    x = x.detach().requires_grad_()
    weights = [w.detach().requires_grad_() for w in weights]
    biases = [b if b is None else b.detach().requires_grad_() for b in biases]
    y = function(x, weights, biases, **kwargs)
    grads = torch.autograd.grad(y, [x, *weights, *(b for b in biases if b is not None)], upstream.to(y))
    return [y.detach(), *grads]


def in_dtype(dtype, tensors):
    return [v if v is None else v.to(dtype) for v in tensors]


def check_against_fp64(x, weights, biases, function=pos_conv, segments=None, **kwargs):
    """Largest and mean square error of the value and of every gradient."""
    upstream = torch.randn(x.shape, device=DEVICE).to(x.dtype)
    segments = None if segments is None else torch.tensor(segments, device=DEVICE)
    kwargs["segments"] = segments
    got = value_and_grads(function, upstream, x, weights, biases, **kwargs)
    eager, exact = (
        value_and_grads(by_segment, upstream, x.to(t), in_dtype(t, weights), in_dtype(t, biases), **kwargs)
        for t in (x.dtype, F64)
    )
    likes = [x, x, *weights, *(b for b in biases if b is not None)]
    for g, e, w, like in zip(got, eager, exact, likes, strict=True):
        assert g.dtype == like.dtype
        assert_as_accurate_as_eager(g, e, w)
        squares = [(v.double() - w).square().mean().sqrt() for v in (g, e)]
        assert squares[0] <= 1.5 * squares[1] + 1e-6 * w.abs().max(), f"mean square {squares}"


def op(x, weights, biases, groups, norm=True, segments=None):
    """The registered op itself, which a CPU otherwise goes around."""
    bias = None if biases[0] is None else torch.stack(biases)
    return _fwd(x, weights, bias, groups, norm, 1e-5, segments, True)[0]


@pytest.mark.parametrize("function", [pos_conv, op])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    "B,T,C,groups,taps", [(2, 11, 24, 3, [19, 4]), (1, 1, 16, 16, [3]), (3, 30, 8, 1, [5, 1, 2]), (2, 5, 32, 2, [128])]
)
def test_matches_fp64(B, T, C, groups, taps, norm, function):
    for bias in (True, False):
        check_against_fp64(*make_inputs(B, T, C, groups, taps, bias=bias), function, groups=groups, norm=norm)


@pytest.mark.parametrize("function", [pos_conv, op])
@pytest.mark.parametrize("norm", [True, False])
def test_segments(norm, function):
    check_against_fp64(*make_inputs(2, 300, 16, 2, [4, 19]), function, groups=2, norm=norm, segments=RAGGED)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("segments", [None, RAGGED])
def test_low_precision(dtype, segments):
    check_against_fp64(*make_inputs(2, 300, 40, 2, [19, 3], dtype), groups=2, segments=segments)


# frames: one, below / at / above a warp's 64, the 128 of two and a tile's 256; taps: one, even, several blocks
CASES = [
    (1, 1, 32, 1, [1], BF16),
    (1, 7, 32, 2, [3], F16),
    (3, 65, 32, 3, [4], BF16),
    (1, 127, 48, 2, [3, 19], BF16),
    (2, 128, 48, 1, [128], F16),
    (1, 129, 64, 2, [3, 5], F16),
    (1, 150, 80, 2, [9], BF16),
    (1, 256, 64, 1, [19], BF16),
    (2, 257, 32, 2, [3, 4, 1, 19, 3], BF16),
    (1, 40, 80, 1, [128], F16),
]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("B,T,width,groups,taps,dtype", CASES)
@needs_emulator
def test_kernels_match_fp64(emulated, B, T, width, groups, taps, dtype, norm):
    inputs = make_inputs(B, T, width * groups, groups, taps, dtype, bias=T != 129)
    check_against_fp64(*inputs, groups=groups, norm=norm)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("taps", [[3, 19, 4], [19]])
@needs_emulator
def test_kernels_match_fp64_in_segments(emulated, taps, norm):
    check_against_fp64(*make_inputs(2, 300, 64, 2, taps, BF16), groups=2, norm=norm, segments=RAGGED)


@needs_emulator
def test_gelu_between_layers_is_exact_but_for_rounding(emulated):
    """Identity weights leave the GELU: of values, to the last bit nearly always, and its slope."""
    x = torch.linspace(-2, 6, 64 * 40).view(1, 40, 64).half()
    eye = torch.eye(32).repeat(2, 1)[..., None]
    y, grad, *_ = value_and_grads(pos_conv, torch.ones_like(x), x, [eye, eye], [None, None], groups=2, norm=False)
    exact = x.double().requires_grad_()
    inner = F.gelu(exact)
    F.gelu(inner).sum().backward()
    assert (y == F.gelu(inner.half().double()).half()).double().mean() > 0.99
    # two factors of 16 bits each, and a third rounding of the first layer's value
    torch.testing.assert_close(grad.double(), exact.grad, rtol=2e-3, atol=2e-4)


@needs_emulator
def test_emulated_calls_reach_the_kernels(emulated, monkeypatch):
    """Otherwise the tests above would compare PyTorch with itself."""
    x, weights, biases = make_inputs(1, 9, 64, 2, [3], BF16)
    assert extension.fits(x, weights, 2)
    assert not extension.fits(x.float(), weights, 2) and not extension.fits(x, weights, 4)
    assert extension.fits(x, make_inputs(1, 1, 64, 2, [128])[1], 2)
    assert not extension.fits(x, make_inputs(1, 1, 64, 2, [3, 5000])[1], 2)  # too long for shared memory
    for path in (extension.forward, extension.backward):
        calls = []
        monkeypatch.setattr(extension, path.__name__, lambda *args, p=path, c=calls: c.append(1) or p(*args))
        value_and_grads(pos_conv, torch.randn_like(x), x, weights, biases, groups=2)
        assert calls
    monkeypatch.setattr(_extension, "use_emulated", False)
    assert not extension.fits(x, weights, 2)


@needs_emulator
def test_order_of_threads_does_not_matter(emulated):
    inputs, upstream = make_inputs(2, 130, 96, 2, [3, 5], BF16), torch.randn(2, 130, 96)
    runs = []
    for seed in (1, 2, 3):
        emulator.seed(seed)
        runs.append(value_and_grads(pos_conv, upstream, *inputs, groups=2))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_statistics_with_large_means(registered, offset):
    """Deviations of 1 around 1000: a difference of sums would lose the variance."""
    x, weights, biases = make_inputs(2, 40, 128, 4, [3, 3, 3], F16)
    bias = torch.stack(biases) + offset
    y, z, stats = _fwd(x, weights, bias, 4, True, 1e-5, None, True)
    assert y.isfinite().all() and z.shape == (3, 2, 40, 128) and stats.shape == (3, 2, 80)
    wide = z.double().view(3, 80, 128)
    torch.testing.assert_close(stats[:, 0].double(), wide.mean(2), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(stats[:, 1].double(), (wide.var(2, correction=0) + 1e-5).rsqrt(), rtol=2e-5, atol=0)


def test_constant_rows(registered):
    """Variance 0: the result is that of 0, whatever the constant; the gradient stays finite."""
    x, weights, _ = make_inputs(1, 30, 96, 2, [3, 1], BF16)
    biases = [torch.full((96,), v, device=DEVICE) for v in (7.5, -3.0)]
    y, *grads = value_and_grads(
        pos_conv, torch.randn_like(x), x, [torch.zeros_like(w) for w in weights], biases, groups=2
    )
    assert torch.equal(y, torch.zeros_like(y))
    assert all(g.isfinite().all() for g in grads)


def assert_same(got, want, registered):
    """To the bit from our kernels; PyTorch may choose another algorithm for other sizes."""
    tolerance = 0 if registered == "emulated" else 0.02
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_nan_stays_where_it_is_seen(registered):
    """Two layers of 5 and 4 taps: frames t - 3 ... t + 4 see frame t."""
    x, weights, biases = make_inputs(2, 90, 64, 2, [5, 4], BF16)
    upstream = torch.randn_like(x)
    bad = x.clone()
    bad[1, 30, 40] = float("nan")
    clean, broken = (value_and_grads(pos_conv, upstream, v, weights, biases, groups=2)[:2] for v in (x, bad))
    seen = torch.zeros(2, 90, dtype=torch.bool)
    seen[1, 30 - 3 : 30 + 5] = True
    assert broken[0][seen].isnan().all()
    assert_same(broken[0][~seen], clean[0][~seen], registered)
    seen[1, 30 - 8 : 30 + 9] = True  # of the gradient: whatever those frames see
    assert broken[1][1, 30].isnan().all()
    assert_same(broken[1][~seen], clean[1][~seen], registered)


def test_nan_outside_of_segments_is_not_read(registered):
    x, weights, biases = make_inputs(1, 40, 64, 2, [5, 3], BF16)
    x[0, 20:23] = float("nan")
    segments = torch.tensor([[23, 10], [0, 20]], device=DEVICE, dtype=torch.int32)
    values = value_and_grads(pos_conv, torch.randn_like(x), x, weights, biases, groups=2, segments=segments)
    assert all(v.isfinite().all() for v in values)
    for v in values[:2]:
        assert not v[0, 20:23].any() and not v[0, 33:].any()
        assert v[0, :20].any(1).all() and v[0, 23:33].any(1).all()


def test_packed_is_each_sequence_alone(registered):
    x, weights, biases = make_inputs(1, 60, 64, 2, [19, 3], BF16)
    segments = torch.tensor([[0, 25], [25, 1], [26, 34]], device=DEVICE)
    packed = pos_conv(x, weights, biases, groups=2, segments=segments)
    alone = [pos_conv(x[:, a : a + n], weights, biases, groups=2) for a, n in segments.tolist()]
    assert_same(packed, torch.cat(alone, 1), registered)


@pytest.mark.parametrize("shape", [(0, 5, 64), (2, 6, 64)])
def test_empty(registered, shape):
    """No batch rows; and no segments."""
    x, weights, biases = make_inputs(*shape, 2, [3, 4], BF16)
    segments = torch.empty(0, 2, dtype=torch.int64, device=DEVICE) if len(x) else None
    y, *grads = value_and_grads(pos_conv, torch.randn_like(x), x, weights, biases, groups=2, segments=segments)
    assert y.shape == shape and not y.any()
    assert all(not g.any() for g in grads[:1] + grads[2:3])  # of x, and of weights that only zeros met


def test_views(registered):
    """Any strides, any first byte, an expanded upstream gradient."""
    x, weights, biases = make_inputs(2, 40, 64, 2, [3], BF16)
    want = pos_conv(x, weights, biases, groups=2)
    flat = torch.empty(x.numel() + 1, dtype=BF16, device=DEVICE)
    for view in (x.mT.contiguous().mT, torch.cat([x, x], 2)[:, :, :64], flat[1:].view(x.shape).copy_(x)):
        got = pos_conv(view, [w.mT.contiguous().mT for w in weights], biases, groups=2)
        assert got.is_contiguous()
        assert_same(got, want, registered)
    x.requires_grad_()
    grads = [torch.autograd.grad(f(x, weights, biases, groups=2).sum(), x)[0] for f in (pos_conv, by_segment_low)]
    torch.testing.assert_close(*grads, rtol=0.05, atol=0.05)


def by_segment_low(x, weights, biases, groups):
    return by_segment(x, in_dtype(x.dtype, weights), in_dtype(x.dtype, biases), groups)


def test_without_gradient_nothing_is_kept(registered):
    x, weights, biases = make_inputs(2, 70, 64, 2, [3, 4, 5], BF16)
    bias = torch.stack(biases)
    kept, z, _ = _fwd(x, weights, bias, 2, True, 1e-5, None, True)
    y, none, no_stats = _fwd(x, weights, bias, 2, True, 1e-5, None, False)
    assert torch.equal(y, kept)
    assert z.shape[0] == 3 and none.numel() == 0 and no_stats.numel() == 0


@pytest.mark.parametrize("norm", [True, False])
def test_memory_for_backward_is_what_the_docstring_says(registered, norm):
    x, weights, biases = make_inputs(2, 50, 64, 2, [3] * 5, BF16)
    given = {v.data_ptr() for v in (x, *weights)}
    x.requires_grad_()
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.update({v.data_ptr(): v}) or v, lambda v: v):
        op(x, weights, biases, 2, norm)
    size = sum(v.numel() * v.element_size() for p, v in saved.items() if p not in given)
    assert size == 5 * (2 * 50 * 64 * 2 + (8 * 2 * 50 if norm else 0))


@pytest.mark.parametrize("segments", [RAGGED, [(0, 600)], [(5, 0)], []])
def test_tiles_cover_each_segment_once(segments):
    table = extension.tile_table(torch.tensor(segments, dtype=torch.int32).view(-1, 2), 600)
    rows = []
    for first, begin, last in table.tolist():
        stop = min(first + extension.TILE, last)
        assert first >= stop or ((begin, last - begin) in segments and (first - begin) % extension.TILE == 0)
        rows += range(first, stop)
    assert sorted(rows) == sorted(r for first, count in segments for r in range(first, first + count))


def test_tiles_stay_inside_whatever_the_segments_say():
    table = extension.tile_table(torch.tensor([(590, 100), (-5, 3), (700, 9), (0, -4), (2**40, 2**40)]), 600)
    assert ((table >= 0) & (table <= 600)).all()


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is CPU-only")
@pytest.mark.parametrize("norm,biased", [(True, True), (False, False)])
def test_gradcheck(norm, biased):
    x, weights, biases = make_inputs(2, 5, 4, 2, [3, 4], F64, bias=biased)
    inputs = [v.double().requires_grad_() for v in (x, *weights, *(b for b in biases if b is not None))]
    segments = torch.tensor([[0, 4], [5, 5]])
    for s in (None, segments):
        for function in (pos_conv, op):
            torch.autograd.gradcheck(
                lambda x, w, v, *b, f=function, s=s: f(x, [w, v], b or [None] * 2, groups=2, norm=norm, segments=s),
                inputs,
            )


def test_opcheck(registered):
    x, weights, biases = make_inputs(2, 9, 64, 2, [3, 4], BF16)
    bias = torch.stack(biases)
    segments = torch.tensor([[0, 9], [10, 5]], device=DEVICE)
    for norm, b, s in ((True, bias, None), (False, None, segments)):
        _, z, stats = _fwd(x, weights, b, 2, norm, 1e-5, s, True)
        torch.library.opcheck(_bwd, (torch.randn_like(x), x, z, stats, weights, b is not None, 2, norm, s))
        inputs = [v.detach().requires_grad_() for v in (x, *weights)]
        torch.library.opcheck(_fwd, (inputs[0], inputs[1:], b, 2, norm, 1e-5, s, True))
        torch.library.opcheck(_fwd, (x, weights, b, 2, norm, 1e-5, s, False))


def test_compile_fullgraph(registered):
    def module(x, weights, biases, groups, segments):
        return pos_conv(2 * x, weights, biases, groups=groups, segments=segments) + 1

    inputs = make_inputs(2, 9, 64, 2, [3, 4], BF16)
    segments = torch.tensor([[0, 9], [10, 5]], device=DEVICE)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    upstream = torch.randn_like(inputs[0])
    for s in (None, segments):
        got, want = (value_and_grads(f, upstream, *inputs, groups=2, segments=s) for f in (compiled, module))
        torch.testing.assert_close(got, want)


def test_autocast(registered):
    x, weights, biases = make_inputs(2, 9, 64, 2, [3, 4])
    x = x.bfloat16().float()
    compiled = torch.compile(pos_conv, fullgraph=True, backend="aot_eager")
    upstream = torch.randn_like(x)
    with torch.autocast(DEVICE, BF16):
        got = value_and_grads(pos_conv, upstream, x, weights, biases, groups=2)
        torch.testing.assert_close(value_and_grads(compiled, upstream, x, weights, biases, groups=2), got)
    assert got[0].dtype == BF16 and all(g.dtype == F32 for g in got[1:])
    torch.testing.assert_close(got[0], pos_conv(x.bfloat16(), weights, biases, groups=2), rtol=0, atol=0)


def test_missing_bias():
    x, weights, biases = make_inputs(2, 9, 16, 2, [3, 4])
    got = pos_conv(x, weights, [None, biases[1]], groups=2)
    torch.testing.assert_close(got, by_segment(x, weights, [None, biases[1]], 2))
    torch.testing.assert_close(pos_conv(x, weights, groups=np.int64(2)), by_segment(x, weights, [None, None], 2))


X = torch.zeros(2, 9, 8)
W = torch.zeros(8, 4, 3)


@pytest.mark.parametrize(
    "args,kwargs,error,match",
    [
        ((1.0, [W]), {}, TypeError, "x must be a tensor, got float"),
        ((X.int(), [W]), {}, TypeError, "x must be float32, .* got torch.int32"),
        ((X[0], [W]), {}, ValueError, r"x must be \[B, T, C\] with T >= 1, got shape \(9, 8\)"),
        ((X[:, :0], [W]), {}, ValueError, r"x must be \[B, T, C\] with T >= 1, got shape \(2, 0, 8\)"),
        ((X, W), {}, TypeError, "weights must be a list of tensors, got Tensor"),
        ((X, [W, None]), {}, TypeError, r"weights\[1\] must be a tensor, got NoneType"),
        ((X, []), {}, ValueError, "weights must have at least one entry, got none"),
        ((X, [W.int()]), {}, TypeError, r"weights\[0\] must be float32, .* got torch.int32"),
        ((X, [W[:, :3]]), {}, ValueError, r"weights\[0\] must have shape \(8, 4, k >= 1\), got \(8, 3, 3\)"),
        ((X, [W[:, :, :0]]), {}, ValueError, r"weights\[0\] must have shape .* got \(8, 4, 0\)"),
        ((X, [W, W.to("meta")]), {}, ValueError, r"weights\[1\] must be on cpu, got meta"),
        ((X, [W]), {"groups": 3}, ValueError, "groups must divide the 8 channels of x, got 3"),
        ((X, [W]), {"groups": 0}, ValueError, "groups must divide the 8 channels of x, got 0"),
        ((X, [W]), {"groups": 2.0}, TypeError, "groups must be an integer, got float"),
        ((X, [W]), {"groups": True}, TypeError, "groups must be an integer, got bool"),
        ((X, [W], [None, None]), {}, ValueError, "biases must have one entry for each of the 1 weights, got 2"),
        ((X, [W], [X]), {}, ValueError, r"biases\[0\] must have shape \(8,\), got \(2, 9, 8\)"),
        ((X, [W], [1]), {}, TypeError, r"biases\[0\] must be a tensor, got int"),
        ((X, [W], [X[0, 0].long()]), {}, TypeError, r"biases\[0\] must be float32"),
        ((X, [W]), {"eps": 0}, ValueError, "eps must be > 0, got 0"),
        ((X, [W]), {"eps": "a"}, TypeError, "eps must be a number, got str"),
        ((X, [W]), {"segments": [(0, 1)]}, TypeError, "segments must be a tensor, got list"),
        ((X, [W]), {"segments": torch.ones(1, 2)}, TypeError, "segments must be int32 or int64, got torch.float32"),
        ((X, [W]), {"segments": torch.ones(2).long()}, ValueError, r"segments must have shape \[U, 2\], got \(2,\)"),
        ((X, [W]), {"segments": torch.tensor([[8, 2]])}, ValueError, r"one of 2 rows of 9 frames each, got \(8, 2\)"),
        ((X, [W]), {"segments": torch.tensor([[-1, 2]])}, ValueError, r"segments must lie inside .* got \(-1, 2\)"),
        ((X, [W]), {"segments": torch.tensor([[17, 2]])}, ValueError, r"segments must lie inside .* got \(17, 2\)"),
        ((X, [W]), {"segments": torch.tensor([[0, -1]])}, ValueError, r"segments must lie inside .* got \(0, -1\)"),
        (
            (X, [W]),
            {"segments": torch.tensor([[4, 2], [0, 5]])},
            ValueError,
            r"segments must not overlap, got \(4, 2\) after one that ends at 5",
        ),
    ],
)
def test_bad_inputs_raise(args, kwargs, error, match):
    with pytest.raises(error, match=match):
        pos_conv(*args, **{"groups": 2, **kwargs})


def test_depth_1_is_a_convolution_with_weight_norm():
    """wav2vec 2.0 and HuBERT: initial weights, and the teacher that data2vec makes of them."""
    module = ConvPositions(EncoderConfig(dim=64, heads=2, pos_conv_depth=1, pos_conv_width=16, pos_conv_groups=2))
    (conv,) = module.convs
    magnitude, direction = conv.parametrizations.weight.original0, conv.parametrizations.weight.original1
    assert magnitude.shape == (1, 1, 16) and direction.std().item() == pytest.approx((4 / (16 * 64)) ** 0.5, rel=0.05)
    assert not conv.bias.any()
    x = torch.randn(2, 11, 64)
    weight = magnitude * direction / direction.norm(dim=(0, 1), keepdim=True)
    want = F.gelu(F.conv1d(x.mT, weight, conv.bias, padding=8, groups=2)[..., :-1].mT)
    torch.testing.assert_close(module(x), want)
    module(x).square().sum().backward()
    assert magnitude.grad.any() and direction.grad.any() and conv.bias.grad.any()

    other = ConvPositions(EncoderConfig(dim=64, heads=2, pos_conv_depth=1, pos_conv_width=16, pos_conv_groups=2))
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(x), want)
    torch.testing.assert_close(copy.deepcopy(module)(x), want)
    teacher = EMATeacher(module, EMAConfig(decay=0.5, end_decay=0.5, anneal_updates=1))
    before = magnitude.detach().clone()
    with torch.no_grad():
        magnitude.mul_(2)
    teacher.update_(1)
    got = teacher.module.convs[0].parametrizations.weight.original0
    torch.testing.assert_close(got, 1.5 * before)


def test_on_the_cpu_nothing_is_registered_in_between():
    """ConvPositions is PyTorch's convolution and the norm there: a registered op costs more than a small layer."""
    module = ConvPositions(EncoderConfig(dim=32, heads=2, pos_conv_depth=2, pos_conv_width=6, pos_conv_groups=2))
    x = torch.randn(2, 11, 32)
    with torch.profiler.profile() as profile:
        got = module(x)
    assert torch.equal(got, pos_conv_ref(x, [c.weight for c in module.convs], [c.bias for c in module.convs], 2))
    assert not [event.name for event in profile.events() if "pos_conv" in event.name]


@pytest.fixture
def built():
    if not _extension.available():
        pytest.skip(f"needs the CUDA extension: {_extension.why_not()}")


@pytest.mark.gpu
@pytest.mark.parametrize("norm,dtype", [(True, BF16), (False, F16)])
@pytest.mark.parametrize(
    "B,T,C,groups,taps",
    [
        (2, 300, 768, 16, [19] * 5),
        (1, 300, 1024, 16, [19] * 2),
        (1, 300, 1280, 16, [19]),
        (2, 260, 768, 16, [128]),
        (1, 150, 1024, 16, [128]),
        (1, 300, 512, 16, [3, 4]),
    ],
)
def test_extension_matches_fp64(built, B, T, C, groups, taps, dtype, norm):
    inputs = make_inputs(B, T, C, groups, taps, dtype)
    assert extension.fits(*inputs[:2], groups)
    check_against_fp64(*inputs, groups=groups, norm=norm)


@pytest.mark.gpu
def test_extension_matches_fp64_in_segments(built):
    check_against_fp64(*make_inputs(2, 300, 768, 16, [19, 4, 19], BF16), groups=16, segments=RAGGED)


@pytest.mark.gpu
@pytest.mark.parametrize("segments", [None, RAGGED])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_does_not_wait_for_the_device(dtype, segments):
    torch.use_deterministic_algorithms(False)  # PyTorch's index_copy may wait with them
    inputs = make_inputs(2, 300, 768, 16, [19, 19], dtype)
    segments = None if segments is None else torch.tensor(segments, device=DEVICE)
    upstream = torch.randn_like(inputs[0])
    value_and_grads(pos_conv, upstream, *inputs, groups=16, segments=segments)  # compiles
    with no_synchronisation():
        value_and_grads(pos_conv, upstream, *inputs, groups=16, segments=segments)


@pytest.mark.gpu
def test_captured_graph_reads_the_tensors_again(built):
    x, weights, biases = make_inputs(2, 300, 768, 16, [19, 19], BF16)
    bias, grad = torch.stack(biases), torch.randn_like(x)
    segments = torch.tensor(RAGGED, device=DEVICE)

    def step():
        y, z, stats = _fwd(x, weights, bias, 16, True, 1e-5, segments, True)
        grad_x, grad_weights, grad_bias = _bwd(grad, x, z, stats, weights, True, 16, True, segments)
        return [y, grad_x, *grad_weights, grad_bias]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    x.copy_(torch.randn_like(x))
    segments[0, 1] = 5
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, step(), strict=True))


@pytest.mark.gpu
def test_is_deterministic(built):
    inputs, upstream = make_inputs(3, 780, 768, 16, [19] * 2, BF16), torch.randn(3, 780, 768)
    runs = [value_and_grads(pos_conv, upstream.to(DEVICE), *inputs, groups=16) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
def test_more_than_2_31_elements(built):
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of GPU memory")
    x = torch.zeros(2800, 1000, 768, dtype=BF16, device=DEVICE)
    x[-1] = torch.randn(1000, 768)
    _, weights, biases = make_inputs(1, 1, 768, 16, [19], BF16)
    y = pos_conv(x, weights, biases, groups=16)
    assert torch.equal(y[-1:], pos_conv(x[-1:], weights, biases, groups=16))

"""First convolution with norm and GELU: blocks of PyTorch's operators, and the CUDA sources in the emulator."""

import emulator
import pytest
import torch
import torch.nn.functional as F
from checks import DEVICE, INTERPRET, assert_as_accurate_as_eager, no_synchronisation

from d2v_fast.ops import _conv0_blocks, _conv0_extension, conv0_norm_gelu
from d2v_fast.ops.conv0 import _bwd, _fwd, conv0_norm_gelu_ref

pytestmark = pytest.mark.usefixtures("poison")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# of 170 frames: out of order, one and no frames, across tiles, gaps before, between and after, neighbours
RAGGED = [[85, 70], [170, 0], [3, 10], [20, 0], [20, 41], [80, 0], [160, 1], [61, 19]]


@pytest.fixture
def kernels(request):
    """The CUDA kernels: the extension on a GPU, in the emulator on the CPU."""
    if DEVICE == "cpu":
        if INTERPRET:
            pytest.skip("emulated kernels are tested without Triton's interpreter")
        request.getfixturevalue("emulated")
    elif not _conv0_extension.fits(torch.empty(1, 10, device=DEVICE), torch.empty(64, 1, 10), BF16):
        pytest.skip("needs the CUDA extension")


def make_inputs(B, T, C, k, stride, bias=True, affine=True, offset=0.3):
    """Waveforms for T frames and a few samples more, and parameters; values that bfloat16 does not hold."""
    x = torch.randn(B, (T - 1) * stride + k + stride // 2 + 8)[:, : (T - 1) * stride + k + stride // 2] + offset
    weight = torch.randn(C, 1, k) / k**0.5
    vectors = (torch.randn(C), 1 + 0.3 * torch.randn(C), 0.3 * torch.randn(C))
    wanted = (bias, affine, affine)
    return [v.to(DEVICE) for v in (x, weight)] + [
        v.to(DEVICE) if want else None for v, want in zip(vectors, wanted, strict=True)
    ]


def value_and_grads(function, upstream, x, *parameters):
    """The value, and the gradients of the parameters that are there, None for one without influence."""
    inputs = [None if v is None else v.detach().requires_grad_() for v in parameters]
    y = function(x, *inputs)
    there = [v for v in inputs if v is not None]
    return [y.detach(), *torch.autograd.grad(y, there, upstream.to(y), allow_unused=True)]


def cast(dtype, tensors):
    return [None if v is None else v.to(dtype) for v in tensors]


def eager(stride, norm, segments=None, eps=1e-5):
    """Separate operators of PyTorch, as fairseq has them."""

    def function(x, weight, bias, gamma, beta):
        z = F.conv1d(x[:, None], weight, bias, stride)
        if norm == "layer":
            return F.gelu(F.layer_norm(z.mT, z.shape[1:2], gamma, beta, eps))
        if segments is None:
            return F.gelu(F.group_norm(z, z.shape[1], gamma, beta, eps)).mT
        rows = z.mT.flatten(0, 1)
        y = torch.zeros_like(rows)
        for first, count in segments.tolist():
            if count:
                part = rows[first : first + count].mT[None]
                wide = part.double()  # PyTorch's group norm takes its statistics in float32 at least, too
                rstd = (wide.var(2, keepdim=True, correction=0) + eps).rsqrt()
                part = ((wide - wide.mean(2, True)) * rstd).to(part.dtype)
                part = part if gamma is None else part * gamma[:, None] + beta[:, None]
                y = y.slice_scatter(F.gelu(part)[0].mT, 0, first, first + count)
        return y.view(z.shape[0], z.shape[2], -1)

    return function


def ours(stride, norm, dtype, segments=None, eps=1e-5):
    return lambda *tensors: conv0_norm_gelu(*tensors, stride=stride, norm=norm, eps=eps, segments=segments, dtype=dtype)


def check_against_fp64(tensors, stride, norm, dtype=F32, segments=None, floor=2e-6, eps=1e-5):
    """Value and gradients against float64; the error may be twice that of PyTorch's operators in ``dtype``."""
    x, weight, bias, *_ = tensors
    T = (x.shape[1] - weight.shape[2]) // stride + 1
    upstream = torch.randn(x.shape[0], T, weight.shape[0]).to(DEVICE, dtype)
    got = value_and_grads(ours(stride, norm, dtype, segments, eps), upstream, *tensors)
    low = value_and_grads(eager(stride, norm, segments, eps), upstream, *cast(dtype, tensors))
    exact = value_and_grads(eager(stride, norm, segments, eps), upstream, *cast(F64, tensors))
    assert got[0].dtype == dtype and got[0].is_contiguous()
    for i, (g, e, w) in enumerate(zip(got, low, exact, strict=True)):
        if norm == "group" and bias is not None and i == 2:
            assert torch.count_nonzero(g) == 0  # of the bias, which group norm takes away: exactly
        else:
            assert_as_accurate_as_eager(g, e, w, floor=floor)


SHAPES = [  # B, T, C, k, stride
    (1, 1, 64, 10, 5),
    (2, 15, 64, 10, 5),
    (1, 64, 128, 10, 5),
    (3, 65, 64, 3, 2),
    (2, 150, 64, 16, 8),
    (1, 70, 128, 16, 3),
    (1, 130, 64, 1, 1),
    (1, 40, 512, 10, 5),
    (1, 20, 576, 10, 7),
    (1, 66, 320, 11, 12),
    (1, 700, 64, 10, 5),
]


@pytest.mark.parametrize("bias,affine", [(True, True), (False, False)])
@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("B,T,C,k,stride", [*SHAPES, (2, 33, 7, 4, 3), (1, 700, 600, 10, 5)])
def test_blocks_match_fp64(B, T, C, k, stride, norm, bias, affine):
    if T == 1 and norm == "group":
        pytest.skip("PyTorch refuses a group norm of one frame")
    check_against_fp64(make_inputs(B, T, C, k, stride, bias, affine), stride, norm)


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_blocks_with_results_of_16_bits(dtype, norm):
    check_against_fp64(make_inputs(2, 40, 96, 10, 5), 5, norm, dtype)


@pytest.mark.parametrize("B,T,C,k,stride", SHAPES)
@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("bias,affine", [(True, True), (False, False)])
@pytest.mark.usefixtures("kernels")
def test_kernels_match_fp64(B, T, C, k, stride, norm, dtype, bias, affine):
    if T == 1 and norm == "group":
        pytest.skip("PyTorch refuses a group norm of one frame")
    check_against_fp64(make_inputs(B, T, C, k, stride, bias, affine), stride, norm, dtype, floor=1e-5)


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("B", [1, 2])
def test_segments_in_blocks(B, index_dtype, on_host, monkeypatch):
    monkeypatch.setattr(_conv0_blocks.Problem, "on_host", on_host)
    monkeypatch.setattr(_conv0_blocks, "_CPU_BLOCK", 30 * 32)
    segments = torch.tensor(RAGGED, dtype=index_dtype, device=DEVICE)
    check_against_fp64(make_inputs(B, 170 // B, 32, 10, 5, offset=5.0), 5, "group", F32, fit(segments, B))


def fit(segments, B):
    """Segments of 170 frames cut down to the rows of a batch."""
    if B == 1:
        return segments
    keep = (segments[:, 0] // 85) == (segments.sum(1) - 1).clamp(min=0) // 85
    return segments[keep]


@pytest.mark.parametrize("dtype,C,k", [(BF16, 64, 10), (F16, 128, 10), (BF16, 64, 7)])
@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.usefixtures("kernels")
def test_segments_in_kernels(dtype, C, k, B):
    segments = fit(torch.tensor(RAGGED, device=DEVICE), B)
    check_against_fp64(make_inputs(B, 170 // B, C, k, 5, offset=5.0), 5, "group", dtype, segments, floor=1e-5)


@pytest.mark.parametrize("path", ["blocks", "kernels"])
def test_segment_is_as_if_alone(path, request):
    """Packed at offsets that are multiples of the stride, an utterance gives what it gives alone."""
    if path == "kernels":
        request.getfixturevalue("kernels")
    x, *parameters = make_inputs(1, 170, 64, 10, 5)
    segments = torch.tensor(RAGGED[:3:2], device=DEVICE)
    packed = ours(5, "group", BF16, segments)(x, *parameters)
    for first, count in RAGGED[:3:2]:
        alone = ours(5, "group", BF16)(x[:, 5 * first : 5 * (first + count) + 5], *parameters)
        torch.testing.assert_close(packed[:, first : first + count], alone)
    assert torch.count_nonzero(packed[:, :3]) == 0 and torch.count_nonzero(packed[:, 155:]) == 0


@pytest.mark.usefixtures("kernels")
def test_kernels_cut_segments_to_their_row(monkeypatch):
    """On a GPU nobody looks at the segments before: wrong ones must not read or write what is not there."""
    monkeypatch.setattr("d2v_fast.ops.conv0._check_segments", lambda *_: None)
    x, *parameters = make_inputs(2, 80, 64, 10, 5)
    wrong = torch.tensor([[70, 100], [-5, 4], [1000, 3], [100, -7], [2**40, 1]], device=DEVICE)
    right = torch.tensor([[70, 10]], device=DEVICE)
    got, want = (ours(5, "group", BF16, segments)(x, *parameters) for segments in (wrong, right))
    assert torch.equal(got, want)


@pytest.mark.usefixtures("kernels")
def test_many_segments():
    """More than threads work them out."""
    segments = torch.stack([torch.arange(0, 900, 3), torch.tensor([2, 0, 3]).repeat(100)], 1).to(DEVICE)
    check_against_fp64(make_inputs(1, 900, 64, 3, 1), 1, "group", BF16, segments, floor=1e-5)


@pytest.mark.parametrize("path", ["blocks", "kernels"])
def test_no_segments(path, request):
    if path == "kernels":
        request.getfixturevalue("kernels")
    tensors = make_inputs(1, 20, 64, 10, 5)
    got = value_and_grads(
        ours(5, "group", BF16, torch.empty(0, 2, dtype=torch.long, device=DEVICE)),
        torch.randn(1, 20, 64, device=DEVICE),
        *tensors,
    )
    assert all(torch.count_nonzero(v) == 0 for v in got)


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("path", ["blocks", "kernels"])
def test_offset_and_loudness(path, norm, request):
    """Samples around 300, of deviation 1: bfloat16 has none of it left, the norm takes away what is common."""
    dtype = F32
    if path == "kernels":
        request.getfixturevalue("kernels")
        dtype = F16
    x, weight, *vectors = make_inputs(1, 70, 64, 10, 5, bias=False, offset=0.0)
    weight = weight - weight.mean(2, keepdim=True)  # so that layer norm does not see the offset either
    plain = ours(5, norm, dtype)(x, weight, *vectors)
    moved = ours(5, norm, dtype)(x + 300, weight, *vectors)
    error = (plain - moved).float().abs().max()
    assert error < (0.02 if norm == "layer" else 2e-3), error
    check_against_fp64([1000 * x, weight, *vectors], 5, norm, dtype)


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("constant", ["weight", "zero weight", "row", "waveform"])
@pytest.mark.parametrize("path", ["blocks", "kernels"])
def test_without_variance(path, constant, norm, request):
    """Constant weights over the channels, or samples over time: the deviation is that of eps, nothing is NaN."""
    dtype = F32
    if path == "kernels":
        request.getfixturevalue("kernels")
        dtype = BF16
    x, weight, _, gamma, beta = make_inputs(1, 70, 64, 10, 5)
    if constant == "waveform":
        x = torch.full_like(x, 0.7)
    elif constant == "row":  # of rank one
        weight = weight[:1] * torch.randn(64, 1, 1, device=DEVICE)
    else:
        weight = torch.zeros_like(weight) if constant == "zero weight" else weight[:1].expand(64, 1, 10).contiguous()
    got = value_and_grads(ours(5, norm, dtype), torch.randn(1, 70, 64, device=DEVICE), x, weight, None, gamma, beta)
    assert all(v.isfinite().all() for v in got)
    want = eager(5, norm)(*cast(F64, (x, weight, None, gamma, beta)))
    torch.testing.assert_close(got[0].double(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("path", ["blocks", "kernels"])
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_bad_samples_stay_where_they_are_seen(norm, path, bad, request):
    dtype = F32
    if path == "kernels":
        request.getfixturevalue("kernels")
        dtype = BF16
    x, *parameters = make_inputs(1, 170, 64, 10, 5)
    x[0, 100] = bad  # seen by frames 19 and 20, the last of them in a segment
    segments = torch.tensor([[20, 41], [61, 19], [85, 70]], device=DEVICE) if norm == "group" else None
    upstream = torch.randn(1, 170, 64, device=DEVICE)
    y, *grads = value_and_grads(ours(5, norm, dtype, segments), upstream, x, *parameters)
    hit = torch.zeros(170, dtype=torch.bool, device=DEVICE)
    hit[19:21] = norm == "layer"
    hit[20:61] |= norm == "group"
    assert y[0, hit].isnan().all() and y[0, ~hit].isfinite().all()
    assert all(g.isnan().any() for i, g in enumerate(grads) if norm == "layer" or i != 1)


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_kernels_do_not_depend_on_the_order_of_threads(norm, request):
    if DEVICE == "cpu":
        request.getfixturevalue("kernels")
    tensors, upstream = make_inputs(2, 90, 128, 10, 5), torch.randn(2, 90, 128, device=DEVICE)
    runs = []
    for order in (1, 2, 3):
        if DEVICE == "cpu":
            emulator.seed(order)
        runs.append(value_and_grads(ours(5, norm, BF16), upstream, *tensors))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("sm_count", [1, 3, 40])
@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.usefixtures("kernels")
def test_any_number_of_programs(norm, sm_count, monkeypatch):
    """Programs with several segments, segments over several programs, programs without work."""
    monkeypatch.setattr(_conv0_extension, "_EMULATED_SM_COUNT", sm_count)
    segments = torch.tensor([[0, 130], [130, 3], [140, 200], [350, 1]], device=DEVICE) if norm == "group" else None
    check_against_fp64(make_inputs(1, 360, 64, 10, 5), 5, norm, BF16, segments, floor=1e-5)


@pytest.mark.usefixtures("kernels")
def test_eps_and_waveforms_in_rows_of_a_wider_tensor():
    tensors = make_inputs(3, 20, 64, 10, 5)
    check_against_fp64(tensors, 5, "layer", BF16, eps=0.5, floor=1e-5)
    check_against_fp64([tensors[0][::2, 1:], *tensors[1:]], 5, "group", BF16, eps=0.5, floor=1e-5)


@pytest.mark.usefixtures("kernels")
def test_upstream_gradient_off_its_boundary():
    tensors = make_inputs(1, 20, 64, 10, 5)
    upstream = torch.randn(20 * 64 + 1, device=DEVICE).to(BF16)
    grads = [
        value_and_grads(ours(5, "layer", BF16), g.view(1, 20, 64), *tensors)
        for g in (upstream[1:], upstream[1:].clone())
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_kernels_take_what_fits(emulated):
    def fits(C, k, dtype, of=F32):
        return _conv0_extension.fits(torch.zeros(1, 99, dtype=of), torch.zeros(C, 1, k, dtype=of), dtype)

    assert fits(64, 10, BF16) and fits(512, 16, F16) and fits(64, 1, BF16, BF16)
    assert not fits(96, 10, BF16) and not fits(64, 17, BF16) and not fits(64, 10, F32) and not fits(64, 10, BF16, F64)


def call_bindings(way="fwd", **changes):
    """conv0_fwd_cuda or conv0_bwd_cuda with group norm of two segments, and what is changed."""
    f16, f64 = {"dtype": F16}, {"dtype": F64}
    memory = {
        "y": torch.empty(2, 20, 64, **f16),
        "stats": torch.zeros(2, 110, **f64),
        "waveforms": torch.zeros(2, 105),
        "weight": torch.zeros(64, 10),
        "bias": None,
        "norm_weight": None,
        "norm_bias": None,
        "segments": torch.tensor([[0, 3], [20, 9]]),
        "table": torch.zeros(3, 4, dtype=torch.long),
        "stride": 5,
        "programs": 2,
        "folded": torch.empty(2, 2, 64, 16, dtype=BF16),
        "means": torch.empty(2, 10),
        "scratch": torch.empty(2, 3, 66, **f64),
        "grads": torch.empty(64, 13),
        "outer": torch.empty(3, 64, 16),
        "outer_sum": torch.empty(2, 64, 16),
        "inner": torch.empty(0, 1, 16, 16),
        "inner_sum": torch.empty(16, 16),
    }
    y, stats, *tensors, stride, programs, folded, means, scratch, grads, outer, outer_sum, inner, inner_sum = (
        memory | changes
    ).values()
    settings = (stride, 1e-5, False, programs)
    ops = torch.ops.d2v_fast_emulated
    if way == "fwd":
        ops.conv0_fwd_cuda(*tensors, *settings, y, stats, folded, means, scratch)
    else:
        sums = (outer, outer_sum, inner, inner_sum)
        ops.conv0_bwd_cuda(y, stats, *tensors, *settings, grads, folded, means, scratch, *sums)


@pytest.mark.parametrize(
    "way,changes,message",
    [
        ("fwd", {"waveforms": torch.zeros(2, 105, dtype=F64)}, "waveforms must be float32, got float64"),
        ("fwd", {"waveforms": torch.zeros(105, 2).mT}, "waveforms must be contiguous in its last dimension"),
        ("fwd", {"waveforms": torch.zeros(2, 9)}, "waveforms must have rows of at least as many samples"),
        ("fwd", {"weight": torch.zeros(96, 10)}, "weight must have a multiple of 64 channels, got 96"),
        ("fwd", {"weight": torch.zeros(64, 17)}, "weight must have 1 to 16 taps, got 17"),
        ("fwd", {"bias": torch.zeros(65)}, r"bias must have shape \[64\], got \[65\]"),
        ("fwd", {"norm_weight": torch.zeros(64, dtype=F64)}, "norm_weight must be float32, got float64"),
        ("fwd", {"norm_bias": torch.zeros(128)[::2]}, "norm_bias must be contiguous"),
        ("fwd", {"stride": 0}, "stride must be positive"),
        ("fwd", {"programs": 0}, "programs must be positive"),
        ("fwd", {"y": torch.zeros(2, 20, 64)}, "y must be bfloat16 or float16, got float32"),
        ("fwd", {"y": torch.zeros(2, 21, 64, dtype=F16)}, r"y must have shape \[2, 20, 64\], got \[2, 21, 64\]"),
        ("fwd", {"y": torch.zeros(2561, dtype=F16)[1:].view(2, 20, 64)}, "y must start at a multiple of 16 bytes"),
        ("fwd", {"segments": torch.zeros(2, 3, dtype=torch.long)}, r"segments must have shape \[2, 2\]"),
        ("fwd", {"segments": torch.zeros(2, 2, dtype=torch.int)}, "segments must be int64, got int32"),
        ("fwd", {"table": None}, "segment_table must come with segments"),
        ("fwd", {"table": torch.zeros(2, 4, dtype=torch.long)}, r"segment_table must have shape \[3, 4\]"),
        ("fwd", {"stats": torch.zeros(2, 109, dtype=F64)}, r"stats must have shape \[2, 110\], got \[2, 109\]"),
        ("fwd", {"folded": torch.empty(1, 2, 64, 16, dtype=BF16)}, r"folded must have shape \[2, 2, 64, 16\]"),
        ("fwd", {"means": torch.empty(2, 9)}, r"table must have shape \[2, 10\], got \[2, 9\]"),
        ("fwd", {"scratch": torch.empty(2, 3, 65, dtype=F64)}, r"scratch must have shape \[2, \*, 66\]"),
        ("bwd", {"grads": torch.empty(64, 12)}, r"grads must have shape \[64, 13\], got \[64, 12\]"),
        ("bwd", {"outer": torch.empty(2, 64, 16)}, r"outer must have shape \[3, 64, 16\], got \[2, 64, 16\]"),
        ("bwd", {"outer_sum": torch.empty(1, 64, 16)}, r"outer_sum must have shape \[2, 64, 16\]"),
        ("bwd", {"inner": torch.empty(1, 1, 16, 16)}, r"inner must have shape \[0, 1, 16, 16\]"),
        ("bwd", {"inner_sum": torch.empty(16, 15)}, r"inner_sum must have shape \[16, 16\], got \[16, 15\]"),
        ("bwd", {"stats": torch.zeros(2, 110)}, "stats must be float64, got float32"),
    ],
)
def test_bindings_check_their_arguments(way, changes, message, emulated):
    call_bindings(way)
    with pytest.raises(RuntimeError, match=message):
        call_bindings(way, **changes)


@pytest.mark.parametrize("B,T,C,k,stride", [(1, 30, 96, 10, 5), (1, 30, 64, 17, 4)])
@pytest.mark.usefixtures("kernels")
def test_what_does_not_fit_takes_the_blocks(B, T, C, k, stride):
    check_against_fp64(make_inputs(B, T, C, k, stride), stride, "layer", BF16)


def test_keeps_nothing_of_the_results_size():
    tensors = make_inputs(2, 100, 64, 10, 5)
    inputs = [tensors[0], *(v.requires_grad_() for v in tensors[1:])]
    for norm, extra in (("layer", 2 * 100), ("group", 2 * 110)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):  # noqa: B023
            ours(5, norm, F32)(*inputs)
        own = {v.untyped_storage().data_ptr() for v in inputs}
        assert sum(v.numel() for v in saved if v.untyped_storage().data_ptr() not in own) == extra


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_gradient_of_waveforms(norm):
    x, *parameters = make_inputs(2, 12, 6, 4, 3)
    x64, *p64 = (v.double().requires_grad_() for v in (x[:, :30].cpu(), *(v.cpu() for v in parameters)))
    torch.autograd.gradcheck(ours(3, norm, F64), (x64, *p64))
    segments = torch.tensor([[1, 5], [9, 7]])
    torch.autograd.gradcheck(ours(3, "group", F64, segments), (x64, *p64))


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is CPU-only")
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_gradcheck(norm):
    x, *parameters = (v.double() for v in make_inputs(2, 12, 6, 4, 3))
    inputs = [v.requires_grad_() for v in parameters]
    torch.autograd.gradcheck(lambda *p: ours(3, norm, F64)(x, *p), inputs)


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_reference_is_the_definition(norm):
    tensors = cast(F64, [None if v is None else v.cpu() for v in make_inputs(1, 170, 12, 10, 5)])
    segments = torch.tensor(RAGGED) if norm == "group" else None
    got = conv0_norm_gelu_ref(*tensors, segments, stride=5, norm=norm, dtype=F64)
    torch.testing.assert_close(got, eager(5, norm, segments)(*tensors))


@pytest.mark.parametrize("path", ["blocks", "kernels"])
@pytest.mark.parametrize("norm,segments", [("layer", None), ("group", None), ("group", [[3, 10], [13, 6]])])
def test_opcheck(norm, segments, path, request):
    if path == "kernels":
        request.getfixturevalue("kernels")
    x, *parameters = make_inputs(1, 20, 64, 10, 5)
    segments = None if segments is None else torch.tensor(segments, device=DEVICE)
    _, stats = _fwd(x, *parameters, segments, 5, norm, 1e-5, BF16)
    grad = torch.randn(1, 20, 64, device=DEVICE).to(BF16)
    torch.library.opcheck(_bwd, (grad, stats, x, *parameters, segments, 5, norm, 1e-5))
    inputs = [v.requires_grad_() for v in parameters]
    torch.library.opcheck(_fwd, (x, *inputs, segments, 5, norm, 1e-5, BF16))


def test_compile_fullgraph():
    tensors, upstream = make_inputs(2, 20, 64, 10, 5), torch.randn(2, 20, 64, device=DEVICE)

    def function(x, *parameters):
        return conv0_norm_gelu(2 * x, *parameters, stride=5) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = value_and_grads(compiled, upstream, *tensors)
    torch.testing.assert_close(got, value_and_grads(function, upstream, *tensors))


def test_dtypes():
    x, *parameters = make_inputs(1, 20, 64, 10, 5)
    assert conv0_norm_gelu(x, *parameters, stride=5).dtype == F32
    assert conv0_norm_gelu(x, *cast(BF16, parameters), stride=5).dtype == BF16
    want = conv0_norm_gelu(x, *parameters, stride=5)
    with torch.autocast(DEVICE, BF16):
        got = conv0_norm_gelu(x, *parameters, stride=5)
        assert got.dtype == BF16
        assert torch.equal(conv0_norm_gelu(x, *parameters, stride=5, dtype=F32), want)  # computed in float32 inside
        if DEVICE == "cpu":  # PyTorch leaves float64 alone as well
            assert conv0_norm_gelu(x.double(), *cast(F64, parameters), stride=5).dtype == F64
    torch.testing.assert_close(got.float(), want, rtol=1e-2, atol=1e-3)
    grads = value_and_grads(
        lambda *t: conv0_norm_gelu(*t, stride=5), torch.randn(1, 20, 64), x, *cast(BF16, parameters)
    )
    assert all(g.dtype == BF16 for g in grads)


S2 = torch.tensor([[0, 1]])


@pytest.mark.parametrize(
    "call,error,match",
    [
        (lambda x, w: conv0_norm_gelu([0.0], w, stride=1), TypeError, "waveforms must be a tensor, got list"),
        (lambda x, w: conv0_norm_gelu(x.int(), w, stride=1), TypeError, "waveforms must be float32.* got torch.int32"),
        (lambda x, w: conv0_norm_gelu(x, w.long(), stride=1), TypeError, "weight must be float32.* got torch.int64"),
        (
            lambda x, w: conv0_norm_gelu(x[0], w, stride=1),
            ValueError,
            r"waveforms must be \[B, S\] .* got shape \(30,\)",
        ),
        (lambda x, w: conv0_norm_gelu(x[:0], w, stride=1), ValueError, r"at least one row, got shape \(0, 30\)"),
        (
            lambda x, w: conv0_norm_gelu(x[:, :9], w, stride=1),
            ValueError,
            "waveforms must have at least 10 samples, got 9",
        ),
        (
            lambda x, w: conv0_norm_gelu(x, w[:, 0], stride=1),
            ValueError,
            r"weight must be \[C, 1, k\], got .* \(8, 10\)",
        ),
        (lambda x, w: conv0_norm_gelu(x, w[:0], stride=1), ValueError, r"weight must be .* got shape \(0, 1, 10\)"),
        (lambda x, w: conv0_norm_gelu(x, w.to("meta"), stride=1), ValueError, "weight must be on .*, got meta"),
        (lambda x, w: conv0_norm_gelu(x, w, w, stride=1), ValueError, r"bias must have shape \(8,\), got \(8, 1, 10\)"),
        (lambda x, w: conv0_norm_gelu(x, w, None, 1.0, stride=1), TypeError, "norm_weight must be a tensor, got float"),
        (
            lambda x, w: conv0_norm_gelu(x, w, None, None, x[0], stride=1),
            ValueError,
            r"norm_bias must have shape \(8,\)",
        ),
        (lambda x, w: conv0_norm_gelu(x, w, stride=0), ValueError, "stride must be > 0, got 0"),
        (lambda x, w: conv0_norm_gelu(x, w, stride=1.5), TypeError, "stride must be an integer, got float"),
        (lambda x, w: conv0_norm_gelu(x, w, stride=True), TypeError, "stride must be an integer, got bool"),
        (lambda x, w: conv0_norm_gelu(x, w, stride=1, norm="batch"), ValueError, "norm must be .* got 'batch'"),
        (lambda x, w: conv0_norm_gelu(x, w, stride=1, eps=0.0), ValueError, "eps must be > 0, got 0.0"),
        (
            lambda x, w: conv0_norm_gelu(x, w, stride=1, dtype=torch.int8),
            TypeError,
            "dtype must be float32.* torch.int8",
        ),
        (lambda x, w: conv0_norm_gelu(x, w, stride=1, dtype="bf16"), TypeError, "dtype must be a torch.dtype, got str"),
        (lambda x, w: segmented(x, w, S2.float()), TypeError, "segments must be int32 or int64, got torch.float32"),
        (lambda x, w: segmented(x, w, [[0, 1]]), TypeError, "segments must be a tensor, got list"),
        (lambda x, w: segmented(x, w, S2[0]), ValueError, r"segments must be \[U, 2\], got shape \(2,\)"),
        (lambda x, w: segmented(x, w, [[0, 2], [40, 3]]), ValueError, r"rows of 21 frames, got \[40, 3\]"),
        (lambda x, w: segmented(x, w, [[-1, 2]]), ValueError, r"rows of 21 frames, got \[-1, 2\]"),
        (lambda x, w: segmented(x, w, [[3, -1]]), ValueError, r"rows of 21 frames, got \[3, -1\]"),
        (lambda x, w: segmented(x, w, [[20, 2]]), ValueError, r"rows of 21 frames, got \[20, 2\]"),
        (lambda x, w: segmented(x, w, [[7, 3], [0, 8]]), ValueError, "segments must not overlap, got frame 7 in two"),
    ],
)
def test_bad_inputs_raise(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.zeros(2, 30), torch.zeros(8, 1, 10))


def segmented(x, w, segments):
    rows = isinstance(segments, list) and len(segments[0]) == 2 and segments != [[0, 1]]
    return conv0_norm_gelu(x, w, stride=1, norm="group", segments=torch.tensor(segments) if rows else segments)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_does_not_wait_for_the_device(norm):
    tensors = make_inputs(2, 300, 512, 10, 5)
    upstream = torch.randn(2, 300, 512, device=DEVICE).to(BF16)
    segments = torch.tensor([[0, 200], [310, 20]], device=DEVICE) if norm == "group" else None
    for dtype in (BF16, F32):
        value_and_grads(ours(5, norm, dtype, segments), upstream, *tensors)
        with no_synchronisation():
            value_and_grads(ours(5, norm, dtype, segments), upstream, *tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_captured_graph_reads_the_tensors_again(norm):
    x, *parameters = make_inputs(2, 300, 512, 10, 5)
    grad = torch.randn(2, 300, 512, device=DEVICE).to(BF16)

    def step():
        y, stats = _fwd(x, *parameters, None, 5, norm, 1e-5, BF16)
        return y, stats, _bwd(grad, stats, x, *parameters, None, 5, norm, 1e-5)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, step(), strict=True))


@pytest.mark.gpu
def test_real_size():
    check_against_fp64(make_inputs(2, 20000, 512, 10, 5), 5, "layer", BF16, floor=1e-5)

"""First convolution with norm and GELU: blocks of PyTorch's operators, and the CUDA sources in the emulator."""

import emulator
import pytest
import torch
from checks import DEVICE, INTERPRET, no_synchronisation
from conv0_cases import cast, check_against_fp64, eager, make_inputs, ours, value_and_grads

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


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.usefixtures("kernels")
def test_more_than_2_31_elements(norm):
    """The second of two long clips: as if it were alone. The first is zeros, and gives no gradient."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of GPU memory")
    T = 2**21 + 3
    x, *parameters = make_inputs(1, T, 512, 10, 5)
    both = torch.cat([torch.zeros_like(x), x])
    upstream = torch.zeros(2, T, 512, dtype=BF16, device=DEVICE)
    upstream[1] = torch.randn(T, 512, device=DEVICE)
    got = value_and_grads(ours(5, norm, BF16), upstream, both, *parameters)
    want = value_and_grads(ours(5, norm, BF16), upstream[1:], x, *parameters)
    torch.testing.assert_close(got[0][1:], want[0], rtol=2e-2, atol=2e-2)
    for a, b in zip(got[1:], want[1:], strict=True):
        assert (a - b).norm() <= 1e-2 * b.norm() + 1e-6

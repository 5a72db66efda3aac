import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import DEVICE, assert_as_accurate_as_eager, no_synchronisation
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_fast.ops import strided_conv
from d2v_fast.ops.strided_conv import _fwd, _grad_weight, _grad_x, strided_conv_ref

pytestmark = pytest.mark.usefixtures("poison")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# of the speech front-ends; one product, two, gaps between what frames read; more than two strides (a convolution)
KERNELS = [(10, 5), (3, 2), (2, 2), (8, 4), (1, 1), (2, 1), (2, 4), (5, 4), (3, 1), (7, 3)]


def make_inputs(B, S, C, D, kernel, dtype=F32, weight_dtype=None):
    x = torch.randn(B, S, C).to(DEVICE, dtype)
    weight = (torch.randn(D, C, kernel) * (C * kernel) ** -0.5).to(DEVICE, weight_dtype or dtype)
    return x, weight, torch.randn(D).to(DEVICE, weight_dtype or dtype)


def eager(x, weight, bias, stride):
    return F.conv1d(x.mT, weight, bias, stride).mT


def value_and_grads(function, upstream, tensors, **keywords):
    """The function's value, and its gradients in the tensors that are there."""
    inputs = [None if v is None else v.detach().requires_grad_() for v in tensors]
    y = function(*inputs, **keywords)
    return [y.detach(), *torch.autograd.grad(y, [v for v in inputs if v is not None], upstream.to(y))]


def check_against_fp64(x, weight, bias, stride, floor=1e-6):
    tensors = (x, weight, bias)
    T = (x.shape[1] - weight.shape[2]) // stride + 1
    upstream = torch.randn(x.shape[0], T, weight.shape[0]).to(DEVICE, x.dtype)
    got = value_and_grads(strided_conv, upstream, tensors, stride=stride)
    like = [None if v is None else v.to(x.dtype) for v in tensors]
    single = value_and_grads(eager, upstream, like, stride=stride)
    exact = value_and_grads(
        eager, upstream.cpu(), [None if v is None else v.cpu().double() for v in like], stride=stride
    )
    for g, e, w, v in zip(got, single, exact, [x, *(v for v in tensors if v is not None)], strict=True):
        assert g.dtype == v.dtype and g.is_contiguous()
        assert_as_accurate_as_eager(g, e, w, floor=floor)


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize(("kernel", "stride"), KERNELS)
def test_matches_fp64(kernel, stride, B):
    """For lengths that leave every remainder, one frame included; with and without bias."""
    for frames in (1, 2, 9):
        for rest in range(stride):
            x, weight, bias = make_inputs(B, (frames - 1) * stride + kernel + rest, 5, 7, kernel)
            check_against_fp64(x, weight, bias if rest % 2 else None, stride)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (10, 5), (3, 1)])
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("B", [1, 2])
def test_low_precision(kernel, stride, dtype, B):
    check_against_fp64(*make_inputs(B, 401, 64, 48, kernel, dtype), stride)


def test_low_precision_error_of_a_speech_layer():
    """The partial sum of the shorter product is rounded: a third of the variance more, root 4/3 of the error."""
    x, weight, _ = make_inputs(1, 257, 512, 512, 3, BF16)
    exact = eager(x.double().cpu(), weight.double().cpu(), None, 2).to(DEVICE)
    error, budget = ((f(x, weight) - exact).norm() for f in (_two, lambda x, w: eager(x, w, None, 2)))
    assert error <= (1.25 if DEVICE == "cpu" else 2) * budget  # a GPU may round partial sums of its own


def _two(x, weight):
    return strided_conv(x, weight, stride=2)


@pytest.mark.parametrize("size", [65, 66, 401])
def test_sum_over_rows_in_parts(size, monkeypatch):
    """The gradient of the weights in low precision: 4 parts even and not, and 16."""
    monkeypatch.setattr(sys.modules["d2v_fast.ops.strided_conv"], "_ROWS", 8)
    check_against_fp64(*make_inputs(1, size, 64, 48, 3, BF16), 2)
    check_against_fp64(*make_inputs(3, size - size % 2, 16, 8, 2, F16), 2)


def test_mixed_dtypes():
    """Weights are rounded to x's dtype; gradients come back in the weights' own."""
    x, weight, bias = make_inputs(2, 41, 8, 6, 3, BF16, F32)
    check_against_fp64(x, weight, bias, 2)
    upstream = torch.randn(2, 20, 6).to(DEVICE, BF16)
    grad_bias = value_and_grads(strided_conv, upstream, (x, weight, bias), stride=2)[3]
    assert_as_accurate_as_eager(grad_bias, upstream.float().sum((0, 1)), upstream.double().sum((0, 1)))  # not rounded


def test_large_means():
    x, weight, bias = make_inputs(1, 65, 32, 16, 3)
    check_against_fp64(x + 4096, weight, bias, 2, floor=1e-5)


def test_stride_of_numpy():
    x, weight, _ = make_inputs(1, 11, 4, 3, 3)
    assert torch.equal(strided_conv(x, weight, stride=np.int64(2)), strided_conv(x, weight, stride=2))


def test_empty_batch():
    x, weight, bias = make_inputs(0, 11, 4, 3, 3)
    y, grad, grad_weight, grad_bias = value_and_grads(strided_conv, torch.zeros(0, 5, 3), (x, weight, bias), stride=2)
    assert y.shape == (0, 5, 3) and grad.shape == x.shape
    assert not grad_weight.any() and not grad_bias.any()


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (2, 4), (3, 1)])
def test_bad_values_reach_only_the_frames_that_read_them(kernel, stride):
    x, weight, bias = make_inputs(1, 30, 4, 6, kernel)
    x[0, 12, 1] = float("nan")
    y = strided_conv(x, weight, bias, stride=stride)[0]
    starts = stride * torch.arange(len(y), device=DEVICE)
    reads = (starts <= 12) & (starts + kernel > 12)
    assert y[reads].isnan().all() and y[~reads].isfinite().all()
    upstream = torch.zeros(1, len(y), 6)
    upstream[0, 3, 2] = float("nan")
    grad = value_and_grads(strided_conv, upstream, (x, weight, bias), stride=stride)[1][0]
    read = slice(3 * stride, 3 * stride + kernel)
    assert grad[read].isnan().all() and grad.isnan().any(1).sum() == kernel


def test_views_and_strides():
    base = torch.randn(3, 24, 10, device=DEVICE)
    _, weight, bias = make_inputs(1, 3, 10, 6, 3)
    for x in (base[:, 3:], base[::2], base[:, ::2], base.mT.contiguous().mT, base[:1, 5:].expand(3, 19, 10)):
        torch.testing.assert_close(strided_conv(x, weight, bias, stride=2), eager(x, weight, bias, 2))
    narrow = torch.randn(2, 24, 12, device=DEVICE)[..., 1:11]
    upstream = torch.randn(2, 6, 11).mT  # channels first
    views = narrow, weight.mT.contiguous().mT, torch.randn(12, device=DEVICE)[::2]
    got = value_and_grads(strided_conv, upstream, views, stride=2)
    torch.testing.assert_close(got, value_and_grads(eager, upstream, views, stride=2))


def test_ops_take_any_strides():
    """A compiler may lay out the arguments of the registered ops as it likes."""
    x, weight, bias = make_inputs(2, 21, 8, 6, 3)
    y = eager(x, weight, bias, 2)
    grad, strange = torch.randn_like(y), x.mT.contiguous().mT
    torch.testing.assert_close(_fwd(strange, weight, bias, 2), y.contiguous())
    want = _grad_weight(grad.contiguous(), x, weight, 2)
    torch.testing.assert_close(_grad_weight(grad.mT.contiguous().mT, strange, weight, 2), want)


def test_expanded_upstream_gradient():
    tensors = make_inputs(2, 21, 8, 6, 3)
    grads = [
        torch.autograd.grad(f(*inputs, stride=2).sum(), inputs)
        for f, inputs in ((f, [v.detach().requires_grad_() for v in tensors]) for f in (strided_conv, eager))
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("size", "B"), [(41, 1), (40, 1), (41, 2), (40, 2)])
def test_reads_views_of_the_activations(size, B, monkeypatch):
    """What the matrix products get is x itself (forward, weights), and a view of the result (gradient of x)."""
    x, weight, _ = make_inputs(B, size, 8, 6, 3)
    calls = []
    for name in ("mm", "addmm", "bmm", "baddbmm"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, f=real, **k: calls.append((*a, k.get("out"))) or f(*a, **k))
    y = _fwd(x, weight, None, 2)
    _grad_weight(y, x, weight, 2)
    reading = [any(v is not None and v.data_ptr() - x.data_ptr() in (0, 64) for v in call) for call in calls]
    assert len(calls) == 4 and all(reading)
    calls.clear()
    grad_x = _grad_x(y, weight, size, 2)
    assert [call[-1].data_ptr() - grad_x.data_ptr() for call in calls] == [0, 64]


@pytest.mark.parametrize(
    ("B", "size", "kernel", "name"), [(1, 41, 3, "mm"), (1, 41, 2, "mm"), (3, 40, 2, "mm"), (3, 40, 3, "bmm")]
)
def test_one_product_over_the_whole_batch(B, size, kernel, name, monkeypatch):
    """Where frames that belong to an output lie at one distance throughout the batch."""
    x, weight, _ = make_inputs(B, size, 8, 6, kernel)
    called = []
    for op in ("mm", "bmm"):
        real = getattr(torch, op)
        monkeypatch.setattr(torch, op, lambda *a, f=real, op=op, **k: called.append(op) or f(*a, **k))
    y = _fwd(x, weight, None, 2)
    _grad_x(y, weight, size, 2), _grad_weight(y, x, weight, 2)
    assert set(called) == {name}


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_unwanted_gradients_are_not_computed(frozen):
    tensors = dict(zip(("x", "weight", "bias"), make_inputs(1, 21, 8, 6, 3), strict=True))
    wanted = [v.requires_grad_() for name, v in tensors.items() if name != frozen]
    y = strided_conv(**tensors, stride=2)
    want = torch.autograd.grad(eager(**tensors, stride=2).square().sum(), wanted)
    with torch.profiler.profile() as profile:
        got = torch.autograd.grad(y.square().sum(), wanted)
    torch.testing.assert_close(got, want)
    ran = {event.name for event in profile.events()}
    assert ("d2v_fast::strided_conv_grad_x" in ran) == (frozen != "x")
    assert ("d2v_fast::strided_conv_grad_weight" in ran) == (frozen != "weight")


def test_backward_keeps_x_and_weight():
    x, weight, bias = (v.requires_grad_() for v in make_inputs(2, 21, 8, 6, 3))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        strided_conv(x, weight, bias, stride=2)
    assert {v.data_ptr() for v in saved} == {x.data_ptr(), weight.data_ptr()}


def test_is_deterministic():
    tensors, upstream = make_inputs(2, 301, 64, 64, 3, BF16), torch.randn(2, 150, 64)
    runs = [value_and_grads(strided_conv, upstream, tensors, stride=2) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("weight_dtype", [F32, BF16])
def test_autocast(weight_dtype):
    x, weight, bias = make_inputs(1, 41, 8, 6, 3, F32, weight_dtype)
    upstream = torch.randn(1, 20, 6)
    with torch.autocast(DEVICE, BF16):
        got = value_and_grads(strided_conv, upstream, (x, weight, bias), stride=2)
    assert [v.dtype for v in got] == [BF16, F32, weight_dtype, weight_dtype]
    want = value_and_grads(strided_conv, upstream, (x.to(BF16), weight, bias), stride=2)
    torch.testing.assert_close(got, [want[0], want[1].float(), *want[2:]])


@pytest.mark.parametrize(("B", "kernel"), [(1, 3), (2, 3), (2, 5)])
def test_backward_inside_autocast(B, kernel):
    """Of a forward outside of it: nothing is rounded on the way back."""
    tensors, upstream = make_inputs(B, 21, 8, 6, kernel), torch.randn(B, (21 - kernel) // 2 + 1, 6).to(DEVICE)
    leaves = [v.requires_grad_() for v in tensors]
    want = torch.autograd.grad(strided_conv(*leaves, stride=2), leaves, upstream)
    y = strided_conv(*leaves, stride=2)
    with torch.autocast(DEVICE, BF16):
        got = torch.autograd.grad(y, leaves, upstream)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is CPU-only")
def test_autocast_leaves_float64():
    with torch.autocast("cpu", BF16):
        assert strided_conv(*(v.double() for v in make_inputs(1, 9, 4, 3, 3)), stride=2).dtype == torch.float64


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is CPU-only")
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (2, 3), (3, 1)])
def test_gradcheck(kernel, stride):
    tensors = [v.double().requires_grad_() for v in make_inputs(2, 8, 3, 2, kernel)]
    for function in (strided_conv_ref, _fwd):
        torch.autograd.gradcheck(lambda *v, f=function: f(*v, stride), tensors)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (3, 1)])
def test_opcheck(kernel, stride):
    x, weight, bias = make_inputs(2, 9, 4, 3, kernel)
    grad = torch.randn_like(_fwd(x, weight, bias, stride))
    torch.library.opcheck(_grad_x, (grad, weight, 9, stride))
    torch.library.opcheck(_grad_weight, (grad, x, weight, stride))
    torch.library.opcheck(_fwd, (x, weight, None, stride))
    torch.library.opcheck(_fwd, (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), stride))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    def chain(x, weight, bias, stride):
        return strided_conv(2 * x, weight, bias, stride=stride) + 1

    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (21, 30):
        tensors = make_inputs(2, size, 4, 3, 3)
        upstream = torch.randn(2, (size - 3) // 2 + 1, 3)
        got = value_and_grads(compiled, upstream, tensors, stride=2)
        torch.testing.assert_close(got, value_and_grads(chain, upstream, tensors, stride=2))


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    B=st.integers(1, 3),
    kernel=st.integers(1, 12),
    stride=st.integers(1, 8),
    frames=st.integers(1, 9),
    rest=st.integers(0, 7),
    C=st.integers(1, 5),
    D=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_any_kernel_and_stride(B, kernel, stride, frames, rest, C, D, seed):
    """Forward is linear in x, so that both gradients follow from inner products; forward against the definition."""
    generator = torch.Generator().manual_seed(seed)
    size = (frames - 1) * stride + kernel + rest % stride
    x, weight, upstream = (
        torch.randn(shape, generator=generator).to(DEVICE) for shape in ((B, size, C), (D, C, kernel), (B, frames, D))
    )
    y, grad, grad_weight = value_and_grads(lambda x, w: strided_conv(x, w, stride=stride), upstream, (x, weight))
    windows = torch.stack([x[:, t * stride : t * stride + kernel] for t in range(frames)], 1)  # [B, T, k, C]
    torch.testing.assert_close(y, torch.einsum("btkc,dck->btd", windows, weight), rtol=1e-4, atol=1e-4)
    inner = (y * upstream).double().sum()
    torch.testing.assert_close((x * grad).double().sum(), inner, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close((weight * grad_weight).double().sum(), inner, rtol=1e-3, atol=1e-3)
    unread = torch.ones(size, dtype=torch.bool)
    for t in range(frames):
        unread[t * stride : t * stride + kernel] = False
    assert not grad[:, unread.to(DEVICE)].any()


@pytest.mark.parametrize(
    "call,error,match",
    [
        (lambda x, w, b: strided_conv([0.0], w, stride=2), TypeError, "x must be a tensor, got list"),
        (lambda x, w, b: strided_conv(x, None, stride=2), TypeError, "weight must be a tensor, got NoneType"),
        (lambda x, w, b: strided_conv(x, w, 1.0, stride=2), TypeError, "bias must be a tensor, got float"),
        (lambda x, w, b: strided_conv(x.int(), w, stride=2), TypeError, "x must be float32.* got torch.int32"),
        (lambda x, w, b: strided_conv(x, w.long(), stride=2), TypeError, "weight must be float32.* got torch.int64"),
        (lambda x, w, b: strided_conv(x, w, stride=2.0), TypeError, "stride must be an integer, got float"),
        (lambda x, w, b: strided_conv(x, w, stride=True), TypeError, "stride must be an integer, got bool"),
        (lambda x, w, b: strided_conv(x[0], w, stride=2), ValueError, r"x must be \[B, S, C\], got shape \(9, 4\)"),
        (lambda x, w, b: strided_conv(x, w[0], stride=2), ValueError, r"weight must be \[D, C, kernel\], .* \(4, 3\)"),
        (lambda x, w, b: strided_conv(x, w.mT, stride=2), ValueError, r"weight must be \[D, 4, kernel\] like x"),
        (lambda x, w, b: strided_conv(x, w[..., :0], stride=2), ValueError, r"none 0, got shape \(5, 4, 0\)"),
        (lambda x, w, b: strided_conv(x, w[:0], stride=2), ValueError, r"none 0, got shape \(0, 4, 3\)"),
        (lambda x, w, b: strided_conv(x, w, b[:4], stride=2), ValueError, r"bias must have shape \(5,\), got \(4,\)"),
        (lambda x, w, b: strided_conv(x, w.to("meta"), stride=2), ValueError, "weight must be on .*, got meta"),
        (lambda x, w, b: strided_conv(x, w, stride=0), ValueError, "stride must be at least 1, got 0"),
        (lambda x, w, b: strided_conv(x[:, :2], w, stride=2), ValueError, "x must have at least kernel = 3 .* got 2"),
    ],
)
def test_bad_inputs_raise(call, error, match):
    with pytest.raises(error, match=match):
        call(*make_inputs(2, 9, 4, 5, 3))


@pytest.mark.gpu
def test_does_not_wait_for_the_device():
    tensors, upstream = make_inputs(2, 401, 64, 64, 3, BF16), torch.randn(2, 200, 64, device=DEVICE)
    value_and_grads(strided_conv, upstream, tensors, stride=2)
    with no_synchronisation():
        value_and_grads(strided_conv, upstream, tensors, stride=2)


@pytest.mark.gpu
@pytest.mark.parametrize("B", [1, 2])
def test_captured_graph_reads_the_tensors_again(B):
    x, weight, bias = make_inputs(B, 401, 64, 64, 3, BF16)
    grad = torch.randn(B, 200, 64, dtype=BF16, device=DEVICE)

    def step():
        return _fwd(x, weight, bias, 2), _grad_x(grad, weight, 401, 2), _grad_weight(grad, x, weight, 2)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, step(), strict=True))


@pytest.mark.gpu
def test_weights_gradient_of_real_size():
    """Many rows: rounded partial sums would show."""
    x, weight, _ = make_inputs(1, 100_001, 512, 512, 3, BF16)
    grad = torch.randn(1, 50_000, 512, dtype=BF16, device=DEVICE)
    frames = [x[0, tap : tap + 99_999 : 2].float() for tap in range(3)]
    exact = torch.stack([grad[0].float().T @ v for v in frames], 2)
    (_, eager_grad, _) = torch.ops.aten.convolution_backward(
        grad.mT, x.mT, weight, None, [2], [0], [1], False, [0], 1, [False, True, False]
    )
    error, budget = ((v.float() - exact).norm() for v in (_grad_weight(grad, x, weight, 2), eager_grad))
    assert error <= 2 * budget


@pytest.mark.gpu
@pytest.mark.parametrize("B", [1, 3])
def test_copies_no_activations_on_the_device(B):
    """Beside the output, forward needs room for the rearranged weights only; likewise backward."""
    x, weight, _ = make_inputs(B, 20_001, 512, 512, 3, BF16)
    y = _fwd(x, weight, None, 2)
    for call, result in ((lambda: _fwd(x, weight, None, 2), y), (lambda: _grad_x(y, weight, 20_001, 2), x)):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        extra = torch.cuda.max_memory_allocated() - before - result.numel() * result.element_size()
        assert extra < 12 * 2**20  # 1.5 MB of weights, cuBLAS' workspace


@pytest.mark.gpu
def test_more_than_2_31_elements():
    """The second of two long rows: as if it were alone. The first is zeros, and gives no gradient."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of GPU memory")
    S = 2**21 + 7
    x = torch.zeros(2, S, 512, dtype=BF16, device=DEVICE)
    x[1] = torch.randn(S, 512, device=DEVICE)
    _, weight, _ = make_inputs(1, 3, 512, 512, 3, BF16)
    y, alone = _fwd(x, weight, None, 2), _fwd(x[1:], weight, None, 2)
    torch.testing.assert_close(y[1:], alone, rtol=2e-2, atol=2e-2)
    assert not y[0].any()
    torch.testing.assert_close(_grad_x(y, weight, S, 2)[1:], _grad_x(alone, weight, S, 2), rtol=2e-2, atol=2e-2)
    want = _grad_weight(alone, x[1:], weight, 2)
    assert (_grad_weight(y, x, weight, 2) - want).float().norm() <= 1e-2 * want.float().norm()

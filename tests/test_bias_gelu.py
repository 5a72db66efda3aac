import pytest
import torch
import torch.nn.functional as F
from checks import DEVICE, INTERPRET, RUNS_KERNELS, assert_as_accurate_as_eager, no_synchronisation
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_fast.ops import bias_gelu
from d2v_fast.ops.bias_gelu import _bwd, _fwd, bias_gelu_ref

pytestmark = pytest.mark.usefixtures("poison")

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# odd sizes, one row, no rows, one column, below / at / above a tile of the interpreter and of a GPU, two column blocks
SHAPES = [(7, 5), (1, 768), (0, 64), (3, 1), (64, 64), (65, 130), (200, 96), (9, 1030)]


def make_inputs(N, C, dtype=F32, bias_dtype=F32):
    x = (3 * torch.randn(N, C + 8)).to(DEVICE, dtype)[:, :C]  # the row stride is not C
    return x, torch.randn(C).to(DEVICE, bias_dtype)


def eager(x, bias):
    return F.gelu(x if bias is None else x + bias)


def value_and_grads(function, upstream, *tensors):
    """The function's value, and its gradients in the tensors that are there."""
    inputs = [None if v is None else v.detach().requires_grad_() for v in tensors]
    y = function(*inputs)
    grads = torch.autograd.grad(y, [v for v in inputs if v is not None], upstream.to(y))
    return [y.detach(), *grads]


def check_against_fp64(x, bias):
    upstream = torch.randn(x.shape).to(DEVICE, x.dtype)
    tensors = x, bias
    got = value_and_grads(bias_gelu, upstream, *tensors)
    single = value_and_grads(eager, upstream, *(None if v is None else v.float() for v in tensors))
    exact = value_and_grads(eager, upstream, *(None if v is None else v.double() for v in tensors))
    for g, e, w, like in zip(got, single, exact, (x, x, bias), strict=False):
        assert g.dtype == like.dtype and g.is_contiguous()
        assert_as_accurate_as_eager(g, e.to(g.dtype), w)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("N,C", SHAPES)
def test_matches_fp64(N, C, biased):
    x, bias = make_inputs(N, C)
    check_against_fp64(x, bias if biased else None)


@pytest.mark.parametrize("dtype,bias_dtype", [(BF16, F32), (BF16, BF16), (F16, F32), (F16, F16), (F32, BF16)])
def test_dtypes(dtype, bias_dtype):
    check_against_fp64(*make_inputs(67, 96, dtype, bias_dtype))


def test_both_tails():
    """Where erf is nearly -1 or 1; near -5 the result is far more accurate than float32 arithmetic on 1 + erf."""
    u = torch.linspace(-9, 9, 20001, device=DEVICE)[None]
    check_against_fp64(u, None)
    if RUNS_KERNELS:
        near = torch.linspace(-5.05, -4.95, 101, device=DEVICE)[None]
        exact = eager(near.double(), None)
        assert ((bias_gelu(near) - exact) / exact).abs().max() < 2.5e-3


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's NumPy
def test_infinities_and_nan():
    x = torch.zeros(3, 40, device=DEVICE)
    x[1, :4] = torch.tensor([float("inf"), -float("inf"), float("nan"), 1e18])
    got, want = bias_gelu(x), F.gelu(x)
    torch.testing.assert_close(got, want, equal_nan=True)
    assert got[1, 0] == float("inf") and got[1, 1:3].isnan().all() and got.isnan().sum() == 2
    _, grad, grad_bias = value_and_grads(bias_gelu, torch.ones(3, 40), x, torch.zeros(40, device=DEVICE))
    assert grad.isnan().nonzero().tolist() == [[1, 0], [1, 1], [1, 2]] and grad[1, 3] == 1
    assert grad_bias.isnan().sum() == 3


def test_leading_dims_views_and_strides():
    x = torch.randn(4, 9, 24, device=DEVICE)[:, 1:]  # rows that no single stride describes
    bias = torch.randn(48, device=DEVICE)[::2]
    torch.testing.assert_close(bias_gelu(x, bias), eager(x, bias))
    columns = torch.randn(24, 6, device=DEVICE).t()
    got = value_and_grads(bias_gelu, torch.randn(24, 6).t(), columns, bias)
    assert got[0].is_contiguous()
    torch.testing.assert_close(got[0], eager(columns, bias))
    torch.testing.assert_close(bias_gelu(columns[2], bias), got[0][2])


def test_backward_keeps_one_copy_of_rows():
    """What forward copies into rows is what backward reads: nothing that would be copied again is saved."""
    x = torch.randn(2, 24, 6, device=DEVICE, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        bias_gelu(x.mT)
    wide = [v for v in saved if v.shape == (2, 6, 24)]
    assert wide and all(v.is_contiguous() for v in wide)


def test_expanded_upstream_gradient():
    x, bias = make_inputs(70, 33)
    x.requires_grad_(), bias.requires_grad_()
    got = torch.autograd.grad(bias_gelu(x, bias).sum(), (x, bias))
    torch.testing.assert_close(got, torch.autograd.grad(eager(x, bias).sum(), (x, bias)))


def test_only_what_needs_a_gradient():
    x, bias = make_inputs(5, 8)
    assert not bias_gelu(x, bias).requires_grad
    y = bias_gelu(x, bias.requires_grad_())
    torch.testing.assert_close(torch.autograd.grad(y.sum(), bias)[0], value_and_grads(bias_gelu, y * 0 + 1, x, bias)[2])


def test_is_deterministic():
    x, bias = make_inputs(300, 70)
    upstream = torch.randn(300, 70).to(DEVICE)
    runs = [value_and_grads(bias_gelu, upstream, x, bias) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(not RUNS_KERNELS, reason="needs the Triton kernels")
@pytest.mark.parametrize("block_n,block_c,programs", [(1, 16, 3), (4, 8, 9), (16, 64, 1)])
def test_every_tile_gives_the_same_answer(block_n, block_c, programs):
    from d2v_fast.kernels import bias_gelu as kernels

    x, bias = make_inputs(11, 37, BF16)
    grad = torch.randn_like(x)
    config = kernels.LaunchConfig(block_n, block_c, num_warps=4, max_programs=programs)
    torch.testing.assert_close(kernels.bias_gelu_fwd(x, bias, config), kernels.bias_gelu_fwd(x, bias))
    got = kernels.bias_gelu_bwd(grad, x, bias, config)
    torch.testing.assert_close(got, kernels.bias_gelu_bwd(grad, x, bias))


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is CPU-only")
def test_gradcheck():
    x, bias = (v.double().requires_grad_() for v in make_inputs(5, 7))
    for function in (bias_gelu_ref, _fwd):  # the reference's own gradient, and the registered one
        torch.autograd.gradcheck(function, (x, bias))
        torch.autograd.gradcheck(lambda v, f=function: f(v, None), (x,))


@pytest.mark.parametrize("biased", [True, False])
def test_opcheck(biased):
    x, bias = make_inputs(5, 8)
    torch.library.opcheck(_bwd, (torch.randn(5, 8, device=DEVICE), x, bias if biased else None))
    torch.library.opcheck(_fwd, (x.requires_grad_(), bias.requires_grad_() if biased else None))


def test_compile_fullgraph():
    compiled = torch.compile(lambda x, bias: bias_gelu(2 * x, bias) + 1, fullgraph=True, backend="aot_eager")
    x, bias = make_inputs(5, 8)
    upstream = torch.randn(5, 8).to(DEVICE)
    got = value_and_grads(compiled, upstream, x, bias)
    torch.testing.assert_close(got, value_and_grads(lambda x, b: eager(2 * x, b) + 1, upstream, x, bias))


def test_autocast_keeps_the_dtype():
    x, bias = make_inputs(5, 8, BF16)
    with torch.autocast(DEVICE, BF16):
        assert bias_gelu(x, bias).dtype == BF16
        assert bias_gelu(x.float(), bias).dtype == F32


@settings(max_examples=30 if INTERPRET else 100, deadline=None, database=None, derandomize=True)
@given(
    N=st.integers(0, 70),
    C=st.integers(1, 70),
    scale=st.floats(1e-3, 1e3),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_bounds(N, C, scale, biased, seed):
    """-0.17 <= gelu(u), max(u, 0) - gelu(u) lies in [0, 0.17], and the derivative lies in [-0.13, 1.13]."""
    generator = torch.Generator().manual_seed(seed)
    x = (scale * torch.randn(N, C, generator=generator)).to(DEVICE)
    bias = torch.randn(C, generator=generator).to(DEVICE) if biased else None
    y, grad, *_ = value_and_grads(bias_gelu, torch.ones(N, C), x, bias)
    gap = (x if bias is None else x + bias).clamp(min=0) - y
    rounding = 1e-6 * scale
    assert ((gap >= -rounding) & (gap <= 0.17 + rounding)).all()
    assert ((grad >= -0.13) & (grad <= 1.13)).all()


@pytest.mark.parametrize(
    "call,error,match",
    [
        (lambda x, b: bias_gelu(None), TypeError, "x must be a tensor, got NoneType"),
        (lambda x, b: bias_gelu(x, [0.0] * 8), TypeError, "bias must be a tensor, got list"),
        (lambda x, b: bias_gelu(x.int(), b), TypeError, "x must be float32, bfloat16 or float16 .* got torch.int32"),
        (lambda x, b: bias_gelu(x, b.long()), TypeError, "bias must be float32.* got torch.int64"),
        (
            lambda x, b: bias_gelu(x[0, 0], b),
            ValueError,
            r"x must be \[..., C\] with C from 1 to 65536, got shape \(\)",
        ),
        (lambda x, b: bias_gelu(x[:, :0], b), ValueError, r"with C from 1 to 65536, got shape \(4, 0\)"),
        (lambda x, b: bias_gelu(x[:1, :1].expand(1, 65537)), ValueError, r"C from 1 to 65536, got shape \(1, 65537\)"),
        (lambda x, b: bias_gelu(x, b[:3]), ValueError, r"bias must have shape \(8,\), got \(3,\)"),
        (lambda x, b: bias_gelu(x, b[None]), ValueError, r"bias must have shape \(8,\), got \(1, 8\)"),
        (lambda x, b: bias_gelu(x, b.to("meta")), ValueError, "bias must be on .*, got meta"),
    ],
)
def test_bad_inputs_raise(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.zeros(4, 8, device=DEVICE), torch.zeros(8, device=DEVICE))


@pytest.mark.gpu
def test_does_not_wait_for_the_device():
    x, bias = make_inputs(300, 3072, BF16)
    upstream = torch.randn_like(x)
    value_and_grads(bias_gelu, upstream, x, bias)  # compiles
    with no_synchronisation():
        value_and_grads(bias_gelu, upstream, x, bias)


@pytest.mark.gpu
def test_captured_graph_reads_the_tensors_again():
    x, bias = make_inputs(300, 3072, BF16)
    grad = torch.randn_like(x)
    _fwd(x, bias), _bwd(grad, x, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, grads = _fwd(x, bias), _bwd(grad, x, bias)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, _fwd(x, bias))
    assert all(torch.equal(a, b) for a, b in zip(grads, _bwd(grad, x, bias), strict=True))


@pytest.mark.gpu
def test_more_than_2_31_elements():
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GB of GPU memory")
    x = torch.zeros(2**21 + 3, 1024, dtype=BF16, device=DEVICE)
    bias = torch.randn(1024, device=DEVICE)
    x[-1] = torch.randn(1024)
    torch.testing.assert_close(_fwd(x, bias)[-1].float(), eager(x[-1].float(), bias), rtol=1e-2, atol=1e-2)
    grad_x, _ = _bwd(x, x, bias)
    last = x[-1].detach().requires_grad_()
    (want,) = torch.autograd.grad(eager(last.float(), bias), last, last.detach().float())
    torch.testing.assert_close(grad_x[-1], want, rtol=2e-2, atol=1e-2)

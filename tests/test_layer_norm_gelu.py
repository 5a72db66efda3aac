import pytest
import torch
import torch.nn.functional as F
from checks import DEVICE, INTERPRET, RUNS_KERNELS, assert_as_accurate_as_eager, no_synchronisation
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_fast.ops import layer_norm_gelu
from d2v_fast.ops.layer_norm_gelu import _bwd, _fwd, layer_norm_gelu_ref

pytestmark = pytest.mark.usefixtures("poison")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EPS = 1e-5
# odd sizes, one row, no rows, one column, below / at / above a tile of the interpreter and of a GPU, several programs;
# the last takes the CPU two blocks
SHAPES = [(7, 5), (1, 512), (0, 64), (3, 1), (64, 64), (65, 130), (200, 96), (2, 1030), (2700, 200)]


def make_inputs(N, C, dtype=F32, vector_dtype=F32):
    x = (1 + 3 * torch.randn(N, C + 8)).to(DEVICE, dtype)[:, :C]  # the row stride is not C
    weight, bias = (1 + 0.5 * torch.randn(C), 0.5 * torch.randn(C))
    return x, weight.to(DEVICE, vector_dtype), bias.to(DEVICE, vector_dtype)


def eager(x, weight=None, bias=None, eps=EPS):
    return F.gelu(F.layer_norm(x, x.shape[-1:], weight, bias, eps))


def value_and_grads(function, upstream, *tensors):
    """The function's value, and its gradients in the tensors that are there."""
    inputs = [None if v is None else v.detach().requires_grad_() for v in tensors]
    y = function(*inputs)
    grads = torch.autograd.grad(y, [v for v in inputs if v is not None], upstream.to(y))
    return [y.detach(), *grads]


def check_against_fp64(*tensors, floor=1e-6):
    x = tensors[0]
    upstream = torch.randn(x.shape).to(DEVICE, x.dtype)
    got = value_and_grads(layer_norm_gelu, upstream, *tensors)
    single = value_and_grads(eager, upstream, *(None if v is None else v.float() for v in tensors))
    exact = value_and_grads(eager, upstream, *(None if v is None else v.double() for v in tensors))
    likes = [x, *(v for v in tensors if v is not None)]
    for g, e, w, like in zip(got, single, exact, likes, strict=True):
        assert g.dtype == like.dtype and g.is_contiguous()
        assert_as_accurate_as_eager(g, e.to(g.dtype), w, floor=floor)


@pytest.mark.parametrize("weighted,biased", [(True, True), (False, False), (True, False), (False, True)])
@pytest.mark.parametrize("N,C", SHAPES)
def test_matches_fp64(N, C, weighted, biased):
    x, weight, bias = make_inputs(N, C)
    check_against_fp64(x, weight if weighted else None, bias if biased else None)


@pytest.mark.parametrize("dtype,vector_dtype", [(BF16, F32), (BF16, BF16), (F16, F32), (F16, F16), (F32, BF16)])
def test_dtypes(dtype, vector_dtype):
    check_against_fp64(*make_inputs(67, 96, dtype, vector_dtype))


def test_large_means():
    """Mean 4096, deviation 1: the variance as a difference of sums would be lost."""
    x, weight, bias = make_inputs(33, 300)
    check_against_fp64(torch.randn_like(x) + 4096, weight, bias, floor=1e-5)
    got = layer_norm_gelu(torch.randn_like(x).round() + 2**20)  # exact in float32
    assert got.isfinite().all() and got.std() > 0.4


@pytest.mark.parametrize("C", [1, 24, 70, 999])
@pytest.mark.parametrize("value", [0.0, 7.5, -10.0, 1000.0])
def test_constant_rows(value, C):
    """Variance 0: the result is that of 0, whatever the constant (the mean is exact); the gradient stays finite."""
    x = torch.full((5, C), value, device=DEVICE)
    bias = torch.linspace(-2, 2, C, device=DEVICE)
    y, grad, *_ = value_and_grads(lambda x, b: layer_norm_gelu(x, None, b), torch.randn(5, C), x, bias)
    torch.testing.assert_close(y, F.gelu(bias).expand(5, C))
    assert grad.isfinite().all()


def test_eps():
    x, weight, bias = make_inputs(9, 40)
    got = layer_norm_gelu(x, weight, bias, eps=0.7)
    torch.testing.assert_close(got, eager(x, weight, bias, 0.7))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's NumPy
def test_bad_values_stay_in_their_row(bad):
    x, weight, bias = make_inputs(70, 20)
    x = x.clone()
    x[66, 3] = bad
    y, grad, grad_weight, grad_bias = value_and_grads(layer_norm_gelu, torch.randn(70, 20), x, weight, bias)
    rows = torch.arange(70, device=DEVICE) == 66
    assert y[rows].isnan().all() and grad[rows].isnan().all()
    assert y[~rows].isfinite().all() and grad[~rows].isfinite().all()
    assert grad_weight.isnan().all() and grad_bias.isnan().all()


def test_leading_dims_views_and_strides():
    x = torch.randn(4, 9, 24, device=DEVICE)[:, 1:]  # rows that no single stride describes
    vectors = torch.randn(2, 48, device=DEVICE)[:, ::2]
    torch.testing.assert_close(layer_norm_gelu(x, *vectors), eager(x, *vectors))
    channels_first = torch.randn(2, 24, 6, device=DEVICE).mT
    upstream = torch.randn(2, 24, 6).mT
    got = value_and_grads(layer_norm_gelu, upstream, channels_first, *vectors)
    assert got[0].is_contiguous()
    torch.testing.assert_close(got, value_and_grads(eager, upstream.to(DEVICE), channels_first, *vectors))
    torch.testing.assert_close(layer_norm_gelu(channels_first[1, 2], *vectors), got[0][1, 2])


def test_backward_keeps_one_copy_of_rows():
    """What forward copies into rows is what backward reads: nothing that would be copied again is saved."""
    x = torch.randn(2, 24, 6, device=DEVICE, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        layer_norm_gelu(x.mT)
    wide = [v for v in saved if v.shape == (2, 6, 24)]
    assert wide and all(v.is_contiguous() for v in wide)


def test_expanded_upstream_gradient():
    tensors = make_inputs(70, 33)
    grads = [
        torch.autograd.grad(f(*inputs).sum(), inputs)
        for f, inputs in ((f, [v.detach().requires_grad_() for v in tensors]) for f in (layer_norm_gelu, eager))
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_is_deterministic():
    tensors, upstream = make_inputs(300, 70), torch.randn(300, 70).to(DEVICE)
    runs = [value_and_grads(layer_norm_gelu, upstream, *tensors) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(not RUNS_KERNELS, reason="needs the Triton kernels")
@pytest.mark.parametrize("block_n,block_c,programs", [(1, 64, 3), (4, 128, 9), (16, 64, 1)])
def test_every_tile_gives_the_same_answer(block_n, block_c, programs):
    from d2v_fast.kernels import layer_norm_gelu as kernels

    x, weight, bias = make_inputs(11, 37, BF16)
    grad = torch.randn_like(x)
    config = kernels.LaunchConfig(block_n, block_c, num_warps=4, max_programs=programs)
    y, mean, rstd = kernels.layer_norm_gelu_fwd(x, weight, bias, EPS)
    torch.testing.assert_close(kernels.layer_norm_gelu_fwd(x, weight, bias, EPS, config), (y, mean, rstd))
    want = kernels.layer_norm_gelu_bwd(grad, x, mean, rstd, weight, bias)
    torch.testing.assert_close(kernels.layer_norm_gelu_bwd(grad, x, mean, rstd, weight, bias, config), want)


def test_gpu_tiles_hold_whole_rows():
    kernels = pytest.importorskip("d2v_fast.kernels.layer_norm_gelu")
    for C in (1, 37, 512, 768, 1024, 5000, 65536):
        for backward in (False, True):
            config = kernels.config_for(torch.empty(2, C, device="meta"), backward)
            assert config.block_c >= C and config.num_warps in (1, 2, 4, 8, 16, 32)
            assert config.block_n * config.block_c <= max(2048, config.block_c)


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is CPU-only")
@pytest.mark.parametrize("affine", [True, False])
def test_gradcheck(affine):
    x, *vectors = (v.double().requires_grad_() for v in make_inputs(5, 7))
    inputs = (x, *vectors) if affine else (x,)
    for function in (layer_norm_gelu_ref, _fwd):  # the reference's own gradient, and the registered one
        torch.autograd.gradcheck(
            lambda *v, f=function: f(*v, *(None,) * (3 - len(v)), EPS)[0], inputs, check_undefined_grad=False
        )


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 is CPU-only")
def test_float64_and_mixed():
    x, weight, bias = make_inputs(9, 20)
    assert layer_norm_gelu(x.double()).dtype == torch.float64
    y = layer_norm_gelu(x, weight.double(), bias)
    assert y.dtype == F32
    torch.testing.assert_close(y, eager(x.double(), weight.double(), bias.double()).float(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("affine", [True, False])
def test_opcheck(affine):
    x, weight, bias = make_inputs(5, 8)
    vectors = (weight, bias) if affine else (None, None)
    _, mean, rstd = _fwd(x, *vectors, EPS)
    torch.library.opcheck(_bwd, (torch.randn(5, 8, device=DEVICE), x, mean, rstd, *vectors))
    for v in (x, *vectors):
        _ = v is None or v.requires_grad_()
    torch.library.opcheck(_fwd, (x, *vectors, EPS))


def test_compile_fullgraph():
    compiled = torch.compile(lambda x, w, b: layer_norm_gelu(2 * x, w, b) + 1, fullgraph=True, backend="aot_eager")
    tensors, upstream = make_inputs(5, 8), torch.randn(5, 8).to(DEVICE)
    got = value_and_grads(compiled, upstream, *tensors)
    torch.testing.assert_close(got, value_and_grads(lambda x, w, b: eager(2 * x, w, b) + 1, upstream, *tensors))


def test_autocast_keeps_the_dtype():
    x, weight, bias = make_inputs(5, 8, BF16)
    with torch.autocast(DEVICE, BF16):
        assert layer_norm_gelu(x, weight, bias).dtype == BF16
        assert layer_norm_gelu(x.float(), weight, bias).dtype == F32


@settings(max_examples=30 if INTERPRET else 100, deadline=None, database=None, derandomize=True)
@given(
    N=st.integers(1, 70),
    C=st.integers(2, 70),
    log_scale=st.integers(-2, 6),
    shift=st.floats(-50, 50),
    seed=st.integers(0, 99),
)
def test_shift_and_scale_of_a_row_do_not_matter(N, C, log_scale, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, C, generator=generator, dtype=torch.float64)
    moved = (x * 2.0**log_scale + shift).float().to(DEVICE)
    upstream = torch.randn(N, C, generator=generator).to(DEVICE)
    y, grad = value_and_grads(lambda x: layer_norm_gelu(x, eps=1e-12), upstream, moved)
    deviation = moved.double().std(1, correction=0, keepdim=True)
    rounding = 1e-5 * (1 + (moved.abs().amax(1, keepdim=True) / deviation) ** 2)  # of x itself in float32
    assert ((y - eager(x.to(DEVICE), eps=0)).abs() <= rounding).all()
    # the gradient is orthogonal to what does not matter
    size = upstream.norm(dim=1, keepdim=True) / deviation + 1e-30
    assert (grad.double().sum(1, keepdim=True) / size).abs().max() < 1e-3
    assert (
        (grad.double() * (moved - moved.double().mean(1, keepdim=True))).sum(1, keepdim=True) / size
    ).abs().max() < (1e-3 * deviation.max() * C)


@pytest.mark.parametrize(
    "call,error,match",
    [
        (lambda x, v: layer_norm_gelu([0.0]), TypeError, "x must be a tensor, got list"),
        (lambda x, v: layer_norm_gelu(x, 1.0), TypeError, "weight must be a tensor, got float"),
        (lambda x, v: layer_norm_gelu(x, v, 0), TypeError, "bias must be a tensor, got int"),
        (lambda x, v: layer_norm_gelu(x, eps=None), TypeError, "eps must be a number, got NoneType"),
        (lambda x, v: layer_norm_gelu(x, eps=v[0]), TypeError, "eps must be a number, got Tensor"),
        (lambda x, v: layer_norm_gelu(x.int()), TypeError, "x must be float32, bfloat16 or float16 .* got torch.int32"),
        (lambda x, v: layer_norm_gelu(x, v.long()), TypeError, "weight must be float32.* got torch.int64"),
        (lambda x, v: layer_norm_gelu(x, v, v.bool()), TypeError, "bias must be float32.* got torch.bool"),
        (lambda x, v: layer_norm_gelu(x[0, 0]), ValueError, r"x must be \[..., C\] with C from 1 to 65536, .* \(\)"),
        (lambda x, v: layer_norm_gelu(x[:, :0]), ValueError, r"C from 1 to 65536, got shape \(4, 0\)"),
        (lambda x, v: layer_norm_gelu(x[:1, :1].expand(1, 65537)), ValueError, r"got shape \(1, 65537\)"),
        (lambda x, v: layer_norm_gelu(x, v[:3]), ValueError, r"weight must have shape \(8,\), got \(3,\)"),
        (lambda x, v: layer_norm_gelu(x, v, x), ValueError, r"bias must have shape \(8,\), got \(4, 8\)"),
        (lambda x, v: layer_norm_gelu(x, v.to("meta")), ValueError, "weight must be on .*, got meta"),
        (lambda x, v: layer_norm_gelu(x, eps=0.0), ValueError, "eps must be > 0, got 0.0"),
        (lambda x, v: layer_norm_gelu(x, eps=float("nan")), ValueError, "eps must be > 0, got nan"),
    ],
)
def test_bad_inputs_raise(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.zeros(4, 8, device=DEVICE), torch.zeros(8, device=DEVICE))


@pytest.mark.gpu
def test_does_not_wait_for_the_device():
    tensors = make_inputs(300, 512, BF16)
    upstream = torch.randn_like(tensors[0])
    value_and_grads(layer_norm_gelu, upstream, *tensors)  # compiles
    with no_synchronisation():
        value_and_grads(layer_norm_gelu, upstream, *tensors)


@pytest.mark.gpu
def test_captured_graph_reads_the_tensors_again():
    x, weight, bias = make_inputs(300, 512, BF16)
    grad = torch.randn_like(x)

    def step():
        y, mean, rstd = _fwd(x, weight, bias, EPS)
        return y, *_bwd(grad, x, mean, rstd, weight, bias)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, step(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("C", [16384, 65536])
def test_widest_rows(C):
    check_against_fp64(*make_inputs(3, C))


@pytest.mark.gpu
def test_more_than_2_31_elements():
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GB of GPU memory")
    x = torch.zeros(2**22 + 3, 512, dtype=BF16, device=DEVICE)
    _, weight, bias = make_inputs(1, 512)
    x[-1] = torch.randn(512)
    y, mean, rstd = _fwd(x, weight, bias, EPS)
    torch.testing.assert_close(y[-1].float(), eager(x[-1].float(), weight, bias), rtol=2e-2, atol=2e-2)
    grad_x, *_ = _bwd(x, x, mean, rstd, weight, bias)
    last = x[-1].float().requires_grad_()
    (want,) = torch.autograd.grad(eager(last, weight, bias), last, last.detach())
    torch.testing.assert_close(grad_x[-1].float(), want, rtol=2e-2, atol=2e-2)

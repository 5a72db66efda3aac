"""1-D convolution of channels-last activations as plain matrix products: the convolutions of the speech front-end.

fairseq: ``nn.Conv1d`` in ``ConvFeatureExtractionModel`` (no padding, dilation or groups). ``stride`` consecutive taps
read ``stride`` consecutive frames, which lie side by side in one row of a view of ``x``. With kernel 3 and stride 2

    y[t] = [x[2t] x[2t+1]] [W0 W1]^T + x[2t+2] W2^T

are two matrix products on views whose rows are 2 C apart, with kernel 2 there is only the first. Backward has the same
form: ``grad_x``, seen as rows of two frames, is ``grad [W0 W1]`` and then, every other frame, ``+ grad W2``; the
gradient of the weights is the transpose of each view times ``grad``. No im2col, no transposed activations.

More than two products would round a low-precision sum too often, so kernels longer than two strides go through
PyTorch's convolution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_fast.ops import _rows
from d2v_fast.ops._dispatch import check_device, check_float

_PARTS, _ROWS = 16, 1024  # a long low-precision sum is taken in at most so many parts, of at least so many rows


def strided_conv_ref(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """The definition of the op in plain PyTorch; differentiable. Contiguous, in x's dtype."""
    return F.conv1d(x.mT, *_rows.cast(x.dtype, weight, bias), stride).mT.contiguous()


def _num_frames(size: int, kernel: int, stride: int) -> int:
    return (size - kernel) // stride + 1


def _dense(x: Tensor) -> Tensor:
    """x [B, S, C] where each frame's C values follow those of the frame before; otherwise a contiguous copy."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _taps(kernel: int, stride: int) -> list[range]:
    """The taps of each matrix product: ``stride`` of them, the last may have fewer."""
    return [range(first, min(first + stride, kernel)) for first in range(0, kernel, stride)]


def _frames(x: Tensor, taps: range, T: int, stride: int) -> Tensor:
    """What ``taps`` read of x [B, S, C], a row for every frame of the output: a view [B, T, taps C]."""
    B, _, C = x.shape
    shape, strides = (B, T, len(taps) * C), (x.stride(0), stride * C, 1)
    return x.as_strided(shape, strides, x.storage_offset() + taps.start * C)


def _by_tap(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight [D, C, k] as [D, k C]: the columns of consecutive taps are what multiplies :func:`_frames`."""
    D, C, kernel = weight.shape
    out = torch.empty((D, kernel, C), device=weight.device, dtype=dtype)
    return out.copy_(weight.mT).view(D, kernel * C)


def _of_taps(matrix: Tensor, taps: range, C: int) -> Tensor:
    """Columns of [D, k C] that belong to ``taps``."""
    return matrix[:, taps.start * C : taps.stop * C]


def _as_matrices(*tensors: Tensor) -> list[Tensor] | None:
    """Views [B T, ..] of tensors [B, T, ..], None where the strides of one do not allow it."""
    if all(v.shape[0] == 1 or v.stride(0) == v.shape[1] * v.stride(1) for v in tensors):
        return [v.view(-1, v.shape[2]) for v in tensors]
    return None


def _multiply(out: Tensor, a: Tensor, b: Tensor, add: Tensor | None) -> None:
    """``out = add + a b`` for out [B, T, N], a [B, T, K], b [K, N]; ``add`` is ``out`` itself, a vector or nothing."""
    matrices = _as_matrices(out, a)
    if matrices is not None:
        flat, rows = matrices
        if add is None:
            torch.mm(rows, b, out=flat)
        else:
            torch.addmm(flat if add is out else add, rows, b, out=flat)
        return
    batched = b.expand(a.shape[0], *b.shape)
    if add is None:
        torch.bmm(a, batched, out=out)
    else:
        torch.baddbmm(add, a, batched, out=out)


def _parts(rows: int, dtype: torch.dtype) -> int:
    """How many products the sum over ``rows`` rows is made of.

    One in float32. In low precision several for many rows, to be added up in float32: enough tiles for a GPU, and each
    is rounded once, where a library that splits the sum by itself may add up rounded values.
    """
    return min(max(rows // _ROWS, 1), _PARTS) if dtype.itemsize < 4 else 1


def _multiply_sum(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out = sum_bt a[b, t]^T b[b, t]`` for out [M, N], a [B, T, M], b [B, T, N]; out is float32 where the sum has
    several parts."""
    matrices = _as_matrices(a, b)
    if matrices is None:
        torch.sum(torch.bmm(a.mT, b), 0, dtype=out.dtype, out=out)
        return
    rows = matrices[0].shape[0]
    parts = _parts(rows, a.dtype)
    if parts == 1:
        torch.mm(matrices[0].t(), matrices[1], out=out)
        return
    even = rows // parts * parts
    a, b = (v[:even].unflatten(0, (parts, -1)) for v in matrices)
    torch.sum(torch.bmm(a.mT, b), 0, dtype=out.dtype, out=out)
    if even < rows:
        a, b = (v[even:] for v in matrices)
        out += torch.mm(a.t(), b)


@torch.library.custom_op("d2v_fast::strided_conv_fwd", mutates_args=())
def _fwd(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    (B, S, C), (D, _, kernel) = x.shape, weight.shape
    if kernel > 2 * stride:
        return strided_conv_ref(x, weight, bias, stride)
    T = _num_frames(S, kernel, stride)
    x, matrix = _dense(x), _by_tap(weight, x.dtype)
    y = torch.empty((B, T, D), device=x.device, dtype=x.dtype)
    (add,) = _rows.cast(x.dtype, bias)
    # shorter product first: a low-precision sum is rounded in between, in proportion to what it holds by then
    for taps in reversed(_taps(kernel, stride)):
        _multiply(y, _frames(x, taps, T, stride), _of_taps(matrix, taps, C).t(), add)
        add = y
    return y


@torch.library.custom_op("d2v_fast::strided_conv_grad_x", mutates_args=())
def _grad_x(grad: Tensor, weight: Tensor, size: int, stride: int) -> Tensor:
    (B, T, _), (_, C, kernel) = grad.shape, weight.shape
    if kernel > 2 * stride:
        x = grad.new_empty((1, 1, 1)).expand(B, C, size)
        (grad_x, *_) = _convolution_backward(grad, x, weight, stride, [True, False, False])
        return grad_x.mT.contiguous()
    matrix, grad = _by_tap(weight, grad.dtype), grad.contiguous()
    first, *rest = _taps(kernel, stride)
    grad_x = torch.empty((B, size, C), device=grad.device, dtype=grad.dtype)
    _multiply(_frames(grad_x, first, T, stride), grad, _of_taps(matrix, first, C), None)
    # what the first product leaves: frames that nothing reads, and the end, to which later taps add
    _frames(grad_x, range(len(first), stride), T - 1, stride).zero_()
    grad_x[:, (T - 1) * stride + len(first) :].zero_()
    for taps in rest:
        out = _frames(grad_x, taps, T, stride)
        _multiply(out, grad, _of_taps(matrix, taps, C), out)
    return grad_x


@torch.library.custom_op("d2v_fast::strided_conv_grad_weight", mutates_args=())
def _grad_weight(grad: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    (_, T, D), (_, C, kernel) = grad.shape, weight.shape
    if kernel > 2 * stride:
        (_, grad_weight, _) = _convolution_backward(grad, x.mT, weight, stride, [False, True, False])
        return grad_weight.to(weight.dtype).contiguous()
    x, grad = _dense(x), grad.contiguous()
    several = _parts(grad.shape[0] * T, grad.dtype) > 1
    dtype = torch.float32 if several else grad.dtype
    matrix = torch.empty((D, kernel * C), device=grad.device, dtype=dtype)
    with torch.autocast(x.device.type, enabled=False):  # of the caller of backward; dtypes were settled in forward
        for taps in _taps(kernel, stride):
            _multiply_sum(_of_taps(matrix, taps, C), grad, _frames(x, taps, T, stride))
    return matrix.view(D, kernel, C).mT.to(weight.dtype, memory_format=torch.contiguous_format, copy=True)


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's gradients of x [B, C, S], weight and bias, those that are wanted."""
    (weight,) = _rows.cast(grad.dtype, weight)
    return torch.ops.aten.convolution_backward(grad.mT, x, weight, None, [stride], [0], [1], False, [0], 1, wanted)


@_fwd.register_fake
def _(x, weight, bias, stride):
    return x.new_empty(x.shape[0], _num_frames(x.shape[1], weight.shape[2], stride), weight.shape[0])


@_grad_x.register_fake
def _(grad, weight, size, stride):
    return grad.new_empty(grad.shape[0], size, weight.shape[1])


@_grad_weight.register_fake
def _(grad, x, weight, stride):
    return torch.empty(weight.shape, device=weight.device, dtype=weight.dtype)


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.stride = inputs
    ctx.size, ctx.bias_dtype = x.shape[1], None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
    return (
        _grad_x(grad, weight, ctx.size, ctx.stride) if wants_x else None,
        _grad_weight(grad, x, weight, ctx.stride) if wants_weight else None,
        grad.sum((0, 1), dtype=ctx.bias_dtype) if wants_bias else None,
        None,
    )


_fwd.register_autograd(_backward, setup_context=_setup_context)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> None:
    for name, v, dims in (("x", x, "[B, S, C]"), ("weight", weight, "[D, C, kernel]")):
        _rows.check_tensor(name, v)
        check_float(name, v)
        if v.dim() != 3:
            raise ValueError(f"{name} must be {dims}, got shape {tuple(v.shape)}")
    if min(weight.shape) == 0 or weight.shape[1] != x.shape[2]:
        raise ValueError(f"weight must be [D, {x.shape[2]}, kernel] like x, none 0, got shape {tuple(weight.shape)}")
    check_device("weight", weight, x.device)
    _rows.check_vector("bias", bias, weight.shape[0], x.device)
    if _rows.check_integer("stride", stride) < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    if x.shape[1] < weight.shape[2]:
        raise ValueError(f"x must have at least kernel = {weight.shape[2]} frames, got {x.shape[1]}")


def strided_conv(
    x: Tensor,  # [B, S, C]
    weight: Tensor,  # [D, C, kernel]
    bias: Tensor | None = None,  # [D]
    *,
    stride: int,
) -> Tensor:  # [B, T, D]
    """``F.conv1d`` without padding on channels-last data: T = (S - kernel) // stride + 1 frames.

    Args:
        x: [B, S, C] float32, bfloat16 or float16 (float64 on CPU). Rows of C values that do not follow each other in
            memory are copied, once for both ways. Fastest with B = 1 (or T * stride = S): all rows are then one matrix
            product, otherwise B of them in one batch.
        weight: [D, C, kernel], of any of these dtypes; rounded to x's.
        bias: [D], likewise.
        stride: frames from one output to the next, at least 1.

    Returns:
        [B, T, D] contiguous in x's dtype; under autocast x is cast as ``F.linear`` casts it. Differentiable in all
        tensors (frames that no output reads get 0), gradients in each tensor's dtype; backward keeps x and weight. With
        stride < kernel <= 2 stride in bfloat16 or float16, the sum of two products is rounded once more in between, the
        first being that of the fewer taps: at most twice the error of PyTorch's convolution in that dtype. float32 on a
        GPU follows ``torch.backends.cuda.matmul``, which has TF32 off by default where ``torch.backends.cudnn``, which
        PyTorch's convolution follows, has it on.

    Raises:
        ValueError: a shape is not as above, S < kernel, ``stride`` < 1, or devices differ.
        TypeError: an input is no floating point tensor, or float64 on a GPU; ``stride`` is no integer.
    """
    _check(x, weight, bias, stride)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _fwd(_dense(x), weight, bias, int(stride))

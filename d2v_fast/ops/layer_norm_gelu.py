"""``gelu(layer_norm(x))``: what follows every convolution of the speech front-end and of the convolutional positions.

fairseq: ``ConvFeatureExtractionModel`` (extractor mode "layer_norm") and ``make_conv_pos``. The norm is over the last
dim with the biased variance, the GELU the exact one. Backward keeps ``x`` and its rows' mean and 1 / deviation, and
recomputes the rest in one pass, the gradients of weight and bias included.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_fast.ops import _rows
from d2v_fast.ops._dispatch import cpu_runs_triton

_BLOCK = 2**17  # elements from which the registered op is faster on a CPU; four times as many stay in its cache


def layer_norm_gelu_ref(
    x: Tensor,  # [..., C]
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the rows' mean and 1 / deviation [..., 1]: the op in plain PyTorch, differentiable."""
    wide, w, b = _rows.cast(_rows.accumulation(x, weight, bias), x, weight, bias)
    u, mean, rstd = torch.native_layer_norm(wide, x.shape[-1:], w, b, eps)
    (y,) = _rows.cast(x.dtype, F.gelu(u))
    return y, mean, rstd


def layer_norm_gelu_grad_ref(
    grad: Tensor,  # [N, C]
    x: Tensor,  # [N, C]
    mean: Tensor,  # [N, 1]
    rstd: Tensor,  # [N, 1]
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradient of x, in its dtype, and of weight and bias, those that are there: [0 to 2, C].

    Block by block: a temporary of the size of x costs the CPU more than the arithmetic does.
    """
    w, b = _rows.cast(mean.dtype, weight, bias)
    wanted = [True, w is not None, b is not None]
    grad_x, total = x.new_empty(x.shape), _rows.empty_stack(x, mean.dtype, weight, bias).zero_()
    size = max(4 * _BLOCK // x.shape[1], 1)
    for *block, out in zip(*(v.split(size) for v in (grad, x, mean, rstd, grad_x)), strict=True):
        g, wide, m, r = _rows.cast(mean.dtype, *block)
        u = (wide - m).mul_(r)
        u = u if w is None else u.mul_(w)
        u = u if b is None else u.add_(b)
        torch.ops.aten.gelu_backward(g, u, grad_input=u)
        part, *vectors = torch.ops.aten.native_layer_norm_backward(u, wide, x.shape[1:], m, r, w, b, wanted)
        out.copy_(part)
        total += _rows.stack(vectors, total)
    return grad_x, total


@torch.library.custom_op("d2v_fast::layer_norm_gelu_fwd", mutates_args=(), device_types="cpu")
def _fwd(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if cpu_runs_triton(_rows.accumulation(x, weight, bias)):
        return _fwd_triton(x, weight, bias, eps)
    wide, w, b = _rows.cast(_rows.accumulation(x, weight, bias), x, weight, bias)
    u, mean, rstd = torch.native_layer_norm(wide, x.shape[-1:], w, b, eps)
    return torch.ops.aten.gelu_(u).to(x.dtype).contiguous(), mean.view(-1), rstd.view(-1)


@_fwd.register_kernel("cuda")
def _fwd_triton(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from d2v_fast.kernels import layer_norm_gelu as kernels

    y, mean, rstd = kernels.layer_norm_gelu_fwd(_rows.as_rows(x), _rows.dense(weight), _rows.dense(bias), eps)
    return y.view(x.shape), mean, rstd


@torch.library.custom_op("d2v_fast::layer_norm_gelu_bwd", mutates_args=(), device_types="cpu")
def _bwd(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    if cpu_runs_triton(mean.dtype):
        return _bwd_triton(grad, x, mean, rstd, weight, bias)
    rows = (_rows.as_rows(v) for v in (grad, x))
    grad_x, vectors = layer_norm_gelu_grad_ref(*rows, mean.view(-1, 1), rstd.view(-1, 1), weight, bias)
    return grad_x.view(x.shape), vectors


@_bwd.register_kernel("cuda")
def _bwd_triton(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    from d2v_fast.kernels import layer_norm_gelu as kernels

    grad_x, vectors = kernels.layer_norm_gelu_bwd(
        _rows.as_rows(grad), _rows.as_rows(x), mean, rstd, _rows.dense(weight), _rows.dense(bias)
    )
    return grad_x.view(x.shape), vectors


@_fwd.register_fake
def _(x, weight, bias, eps):
    acc = _rows.accumulation(x, weight, bias)
    stats = [torch.empty(x.shape[:-1].numel(), device=x.device, dtype=acc) for _ in range(2)]
    return _rows.empty_like_rows(x), *stats


@_bwd.register_fake
def _(grad, x, mean, rstd, weight, bias):
    return _rows.empty_like_rows(x), _rows.empty_stack(x, mean.dtype, weight, bias)


def _setup_context(ctx, inputs, output):
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, weight, bias)


def _backward(ctx, grad, *_):
    grad_x, vectors = _bwd(grad, *ctx.saved_tensors)
    return grad_x, *_rows.unstack(vectors, *ctx.saved_tensors[3:]), None


_fwd.register_autograd(_backward, setup_context=_setup_context)


def layer_norm_gelu(
    x: Tensor,  # [..., C]
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    *,
    eps: float = 1e-5,
) -> Tensor:
    """Exact GELU of the layer norm of ``x`` over its last dim.

    Args:
        x: [..., C] float32, bfloat16 or float16 (float64 on CPU), C from 1 to 65536. Rows may lie anywhere; a last dim
            without unit stride is copied, once for both ways.
        weight: [C] factor on the normalised values, 1 when None; of any of these dtypes.
        bias: [C] added after it, 0 when None.
        eps: added to the variance.

    Returns:
        [..., C] contiguous, in x's dtype, also under autocast (PyTorch's layer norm would return float32 there);
        computed in float32, variance in two passes. Differentiable in all tensors; deterministic. GELU is as accurate
        as :func:`d2v_fast.ops.bias_gelu` says; NaN and inf make their row NaN.

    Raises:
        ValueError: C is 0 or above 65536, a vector's shape is not (C,), devices differ, or ``eps`` is not positive.
        TypeError: an input is no floating point tensor, or float64 on a GPU; ``eps`` is no number.
    """
    _rows.check_rows("x", x)
    _rows.check_vector("weight", weight, x.shape[-1], x.device)
    _rows.check_vector("bias", bias, x.shape[-1], x.device)
    _rows.check_eps(eps)
    x = _rows.in_rows(x)
    if x.numel() < _BLOCK and _rows.runs_reference(x, _rows.accumulation(x, weight, bias)):
        return layer_norm_gelu_ref(x, weight, bias, eps)[0].contiguous()
    return _fwd(x, weight, bias, float(eps))[0]

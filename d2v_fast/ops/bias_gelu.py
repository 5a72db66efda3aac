"""``gelu(x + bias)``: what follows the first linear layer of a Transformer's FFN (fairseq ``fc1`` and ``gelu``).

The exact GELU, ``u Phi(u) = u (1 + erf(u / sqrt(2))) / 2``. The linear layer leaves its bias to this op, where it costs
no memory traffic. One pass each way; backward keeps ``x`` and recomputes the rest.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_fast.ops import _rows
from d2v_fast.ops._dispatch import cpu_runs_triton


def bias_gelu_ref(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition of the op in plain PyTorch; differentiable."""
    u, b = _rows.cast(_rows.accumulation(x, bias), x, bias)
    (y,) = _rows.cast(x.dtype, F.gelu(u if b is None else u + b))
    return y


def bias_gelu_grad_ref(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of x, in its dtype, and of the bias (empty without one)."""
    wide, u, b = _rows.cast(_rows.accumulation(x, bias), grad, x, bias)
    grad_u = torch.ops.aten.gelu_backward(wide, u if b is None else u + b)
    grad_bias = x.new_empty(0) if bias is None else grad_u.reshape(-1, x.shape[-1]).sum(0)
    return grad_u.to(x.dtype), grad_bias


@torch.library.custom_op("d2v_fast::bias_gelu_fwd", mutates_args=(), device_types="cpu")
def _fwd(x: Tensor, bias: Tensor | None) -> Tensor:
    if cpu_runs_triton(_rows.accumulation(x, bias)):
        return _fwd_triton(x, bias)
    return bias_gelu_ref(x, bias).contiguous()


@_fwd.register_kernel("cuda")
def _fwd_triton(x: Tensor, bias: Tensor | None) -> Tensor:
    from d2v_fast.kernels import bias_gelu as kernels

    return kernels.bias_gelu_fwd(_rows.as_rows(x), _rows.dense(bias)).view(x.shape)


@torch.library.custom_op("d2v_fast::bias_gelu_bwd", mutates_args=(), device_types="cpu")
def _bwd(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    if cpu_runs_triton(_rows.accumulation(x, bias)):
        return _bwd_triton(grad, x, bias)
    grad_x, grad_bias = bias_gelu_grad_ref(grad, x, bias)
    return grad_x.contiguous(), grad_bias


@_bwd.register_kernel("cuda")
def _bwd_triton(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    from d2v_fast.kernels import bias_gelu as kernels

    grad_x, grad_bias = kernels.bias_gelu_bwd(_rows.as_rows(grad), _rows.as_rows(x), _rows.dense(bias))
    return grad_x.view(x.shape), grad_bias


@_fwd.register_fake
def _(x, bias):
    return _rows.empty_like_rows(x)


@_bwd.register_fake
def _(grad, x, bias):
    size = 0 if bias is None else x.shape[-1]
    return _rows.empty_like_rows(x), x.new_empty(size, dtype=_rows.accumulation(x, bias))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = _bwd(grad, x, bias)
    return grad_x, None if bias is None else grad_bias.to(bias.dtype)


_fwd.register_autograd(_backward, setup_context=_setup_context)


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Exact GELU of ``x + bias``.

    Args:
        x: [..., C] float32, bfloat16 or float16 (float64 on CPU), C from 1 to 65536. Rows may lie anywhere; a last dim
            without unit stride is copied, once for both ways.
        bias: [C], of any of these dtypes, for instance float32 with bfloat16 ``x``.

    Returns:
        [..., C] contiguous, in x's dtype, also under autocast; computed in float32. Differentiable in both arguments;
        deterministic. ``erf`` is accurate to 3e-7, and GELU near -5 to 2e-3 of itself (PyTorch's float32: 5e-2).
        NaN propagates; -inf gives NaN and inf gives inf, as in PyTorch.

    Raises:
        ValueError: C is 0 or above 65536, the bias's shape is not (C,), or devices differ.
        TypeError: an input is no floating point tensor, or float64 on a GPU.
    """
    _rows.check_rows("x", x)
    _rows.check_vector("bias", bias, x.shape[-1], x.device)
    x = _rows.in_rows(x)
    if _rows.runs_reference(x, _rows.accumulation(x, bias)):
        return bias_gelu_ref(x, bias).contiguous()
    return _fwd(x, bias)

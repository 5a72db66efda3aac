"""Residual, dropout and layer norm around a Transformer's sublayer, with LayerScale and DropPath where there are any.

    h = residual + row_scale * column_scale * dropout(x)
    y = layer_norm(h)

Post-norm layers use ``y`` alone (fairseq ``TransformerSentenceEncoderLayer``); in pre-norm layers ``h`` is the residual
stream and ``y`` the input of the next sublayer (BEiT ``Block``). ``h`` is rounded to the residual's dtype before the
norm; it is written only where the caller or a backward reads it.

The dropout mask is never stored: it is a function of a seed that lives in a device tensor, and backward draws it again.
The seed comes from PyTorch's generator of the device, so ``torch.manual_seed`` governs it, drawing it does not wait for
the device, and a captured CUDA graph gets another one at every replay. CPU and GPU draw different masks: the CPU runs
PyTorch's own operators one by one, ``dropout`` among them.
"""

import torch
from torch import Tensor

from d2v_fast.ops import _rows
from d2v_fast.ops._dispatch import check_device, cpu_runs_triton
from d2v_fast.ops._dropout import dropout


def residual_dropout_layer_norm_ref(
    x: Tensor,  # [..., C]
    residual: Tensor,  # [..., C]
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    column_scale: Tensor | None = None,  # [C]
    row_scale: Tensor | None = None,  # [B]
    p: float = 0.0,
    eps: float = 1e-5,
    factor: Tensor | None = None,  # [..., C] of the dropout, if it is drawn already
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, h, and the rows' mean and 1 / deviation [..., 1]: the op in plain PyTorch, differentiable."""
    acc = _rows.accumulation(x, residual, weight, bias, column_scale)
    wide, stream, w, b, scale = _rows.cast(acc, x, residual, weight, bias, column_scale)
    if factor is not None:
        wide = wide * factor
    elif p > 0:
        wide = dropout(wide, p)
    total = stream + _scaled(wide, scale, row_scale)
    (h,) = _rows.cast(residual.dtype, total)
    if h is not total:  # the value of h, whose own gradient would be rounded
        total = total + (h.to(acc) - total).detach()
    y, mean, rstd = torch.native_layer_norm(total, x.shape[-1:], w, b, eps)
    return *_rows.cast(x.dtype, y), h, mean, rstd


def residual_dropout_layer_norm_grad_ref(
    grad_y: Tensor,  # [..., C]
    grad_h: Tensor | None,  # [..., C]
    h: Tensor,  # [..., C]
    mean: Tensor,  # [..., 1]
    rstd: Tensor,  # [..., 1]
    weight: Tensor | None,
    bias: Tensor | None,
    column_scale: Tensor | None,
    row_scale: Tensor | None,
    factor: Tensor | None,  # [..., C] of the dropout
    x: Tensor | None,  # [..., C], when the column scale wants a gradient
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and residual, each in its dtype, and of the vectors: [0 to 3, C].

    That of the residual is empty where it equals that of x. The vectors are weight, bias and, with ``x``, column scale,
    those that are there.
    """
    wide, g, stream, w, b, scale = _rows.cast(mean.dtype, h, grad_y, grad_h, weight, bias, column_scale)
    grad, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        g, wide, h.shape[-1:], mean, rstd, w, b, [True, w is not None, b is not None]
    )
    grad = grad if stream is None else grad + stream
    branch = _scaled(grad if factor is None else grad * factor, None, row_scale)
    grad_scale = None if x is None else (branch * x).reshape(-1, h.shape[-1]).sum(0)
    two = _two_gradients(grad_y, h, column_scale, row_scale, factor)
    return (
        _scaled(branch, scale, None).to(grad_y.dtype),
        grad.to(h.dtype) if two else h.new_empty(0),
        _rows.stack((grad_weight, grad_bias, grad_scale), wide),
    )


def _scaled(x: Tensor, column_scale: Tensor | None, row_scale: Tensor | None) -> Tensor:
    x = x if column_scale is None else x * column_scale
    return x if row_scale is None else x * row_scale.to(x.dtype).view(-1, *(1,) * (x.dim() - 1))


def _dropout_factor(x: Tensor, seed: Tensor | None, p: float) -> Tensor | None:
    """0 or 1 / (1 - p) for every element of ``x``: on the CPU a generator stands in for the kernels' Philox."""
    if seed is None:
        return None
    generator = torch.Generator().manual_seed(seed.item())
    return torch.empty(x.shape, dtype=_rows.accumulation(x)).bernoulli_(1 - p, generator=generator).div_(1 - p)


def _two_gradients(grad_y: Tensor, h: Tensor, *factors: Tensor | None) -> bool:
    """Whether the residual's gradient differs from that of x: in dtype, or by a factor."""
    return grad_y.dtype != h.dtype or any(v is not None for v in factors)


@torch.library.custom_op("d2v_fast::residual_dropout_layer_norm_fwd", mutates_args=(), device_types="cpu")
def _fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    column_scale: Tensor | None,
    row_scale: Tensor | None,
    seed: Tensor | None,
    p: float,
    eps: float,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Without ``keep``, h, mean and 1 / deviation are empty: neither the caller nor a backward reads them."""
    if cpu_runs_triton(_rows.accumulation(x, residual, weight, bias, column_scale)):
        return _fwd_triton(x, residual, weight, bias, column_scale, row_scale, seed, p, eps, keep)
    y, h, *stats = residual_dropout_layer_norm_ref(
        x, residual, weight, bias, column_scale, row_scale, 0.0, eps, _dropout_factor(x, seed, p)
    )
    kept = (h.contiguous(), *(v.view(-1) for v in stats))
    return y.contiguous(), *(kept if keep else (v.new_empty(0) for v in kept))


@_fwd.register_kernel("cuda")
def _fwd_triton(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    column_scale: Tensor | None,
    row_scale: Tensor | None,
    seed: Tensor | None,
    p: float,
    eps: float,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from d2v_fast.kernels import residual_dropout_layer_norm as kernels

    vectors = map(_rows.dense, (weight, bias, column_scale, row_scale))
    y, h, *stats = kernels.residual_dropout_layer_norm_fwd(
        _rows.as_rows(x), _rows.as_rows(residual), *vectors, seed, p, eps, keep
    )
    return y.view(x.shape), h.view(x.shape) if keep else h, *stats


@torch.library.custom_op("d2v_fast::residual_dropout_layer_norm_bwd", mutates_args=(), device_types="cpu")
def _bwd(
    grad_y: Tensor,
    grad_h: Tensor | None,
    h: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    column_scale: Tensor | None,
    row_scale: Tensor | None,
    seed: Tensor | None,
    x: Tensor | None,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if cpu_runs_triton(mean.dtype):
        return _bwd_triton(grad_y, grad_h, h, mean, rstd, weight, bias, column_scale, row_scale, seed, x, p)
    stats = (v.view(*h.shape[:-1], 1) for v in (mean, rstd))
    factor = _dropout_factor(h, seed, p)
    grads = residual_dropout_layer_norm_grad_ref(
        grad_y, grad_h, h, *stats, weight, bias, column_scale, row_scale, factor, x
    )
    return tuple(v.contiguous() for v in grads)


@_bwd.register_kernel("cuda")
def _bwd_triton(
    grad_y: Tensor,
    grad_h: Tensor | None,
    h: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    column_scale: Tensor | None,
    row_scale: Tensor | None,
    seed: Tensor | None,
    x: Tensor | None,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from d2v_fast.kernels import residual_dropout_layer_norm as kernels

    rows = [None if v is None else _rows.as_rows(v) for v in (grad_y, grad_h, h, x)]
    vectors = map(_rows.dense, (weight, bias, column_scale, row_scale))
    two = _two_gradients(grad_y, h, column_scale, row_scale, seed)
    grad_x, grad_residual, grads = kernels.residual_dropout_layer_norm_bwd(
        *rows[:3], mean, rstd, *vectors, seed, rows[3], p, two
    )
    return grad_x.view(h.shape), grad_residual.view(h.shape) if two else grad_residual, grads


@_fwd.register_fake
def _(x, residual, weight, bias, column_scale, row_scale, seed, p, eps, keep=True):
    acc = _rows.accumulation(x, residual, weight, bias, column_scale)
    rows = x.shape[:-1].numel() if keep else 0
    stats = [torch.empty(rows, device=x.device, dtype=acc) for _ in range(2)]
    return _rows.empty_like_rows(x), _rows.empty_like_rows(residual) if keep else residual.new_empty(0), *stats


@_bwd.register_fake
def _(grad_y, grad_h, h, mean, rstd, weight, bias, column_scale, row_scale, seed, x, p):
    two = _two_gradients(grad_y, h, column_scale, row_scale, seed)
    grad_residual = _rows.empty_like_rows(h) if two else h.new_empty(0)
    return _rows.empty_like_rows(grad_y), grad_residual, _rows.empty_stack(h, mean.dtype, weight, bias, x)


def _setup_context(ctx, inputs, output):
    x, _, weight, bias, column_scale, row_scale, seed, ctx.p, *_ = inputs
    _, h, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # post-norm layers do not use h: its gradient is None, not zeros
    ctx.x_dtype = x.dtype
    # The column scale's gradient needs x: h - residual would lose it to cancellation at the usual scale of 1e-4.
    kept_x = x if column_scale is not None and ctx.needs_input_grad[4] else None
    ctx.save_for_backward(h, mean, rstd, weight, bias, column_scale, row_scale, seed, kept_x)


def _backward(ctx, grad_y, grad_h, *_):
    h, mean, rstd, weight, bias, column_scale, row_scale, seed, x = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(h, dtype=ctx.x_dtype)
    grad_x, grad_residual, vectors = _bwd(
        grad_y, grad_h, h, mean, rstd, weight, bias, column_scale, row_scale, seed, x, ctx.p
    )
    two = _two_gradients(grad_y, h, column_scale, row_scale, seed)
    return (
        grad_x,
        grad_residual if two else grad_x,
        *_rows.unstack(vectors, weight, bias, None if x is None else column_scale),
        *(None,) * 5,
    )


_fwd.register_autograd(_backward, setup_context=_setup_context)


def residual_dropout_layer_norm(
    x: Tensor,  # [..., C]
    residual: Tensor,  # [..., C]
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    *,
    p: float = 0.0,
    training: bool = True,
    eps: float = 1e-5,
    column_scale: Tensor | None = None,  # [C]
    row_scale: Tensor | None = None,  # [B]
    return_residual: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``y = layer_norm(h)`` of ``h = residual + row_scale * column_scale * dropout(x)``, in one pass each way.

    Args:
        x: [..., C] output of the sublayer; float32, bfloat16 or float16 (float64 on CPU), C from 1 to 65536. Rows may
            lie anywhere; a last dim without unit stride is copied.
        residual: of x's shape; its dtype may differ, for instance float32 with bfloat16 ``x``.
        weight: [C] factor of the layer norm, 1 when None; of any of these dtypes.
        bias: [C] added after it, 0 when None.
        p: probability of dropping an element of ``x``, in [0, 1); those that stay are divided by ``1 - p``.
        training: False switches dropout off (not the scales).
        eps: added to the variance.
        column_scale: [C] factor on ``x`` (LayerScale).
        row_scale: [B] factor on ``x[b]``, B the size of x's first dim: 0 or ``1 / (1 - rate)`` for DropPath. It gets
            no gradient.
        return_residual: return ``(y, h)``, both differentiable (pre-norm), instead of ``y`` (post-norm).

    Returns:
        y [..., C] in x's dtype, and h in the residual's, both contiguous, also under autocast; computed in float32.
        With dropout off the result is deterministic; with dropout it is, given ``torch.manual_seed``. NaN and inf in a
        row make it NaN, in dropped elements too.

    Raises:
        ValueError: C is 0 or above 65536, shapes or devices differ, ``p`` is outside [0, 1) or ``eps`` not positive.
        TypeError: an input is no floating point tensor, or float64 on a GPU; ``p`` or ``eps`` is no number.
    """
    _rows.check_rows("x", x)
    _rows.check_rows("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(f"residual must have shape {tuple(x.shape)} like x, got {tuple(residual.shape)}")
    check_device("residual", residual, x.device)
    for name, v in (("weight", weight), ("bias", bias), ("column_scale", column_scale)):
        _rows.check_vector(name, v, x.shape[-1], x.device)
    if row_scale is not None and x.dim() < 2:
        raise ValueError(f"x must be [B, ..., C] with a row_scale, got shape {tuple(x.shape)}")
    _rows.check_vector("row_scale", row_scale, x.shape[0], x.device)
    _rows.check_number("p", p)
    if not 0 <= p < 1:
        raise ValueError(f"p must lie in [0, 1), got {p}")
    _rows.check_eps(eps)
    x = _rows.in_rows(x)
    row_scale = None if row_scale is None else row_scale.detach()
    if _rows.runs_reference(x, _rows.accumulation(x, residual, weight, bias, column_scale)):
        p = p if training else 0.0
        y, h, *_ = residual_dropout_layer_norm_ref(x, residual, weight, bias, column_scale, row_scale, p, eps)
        y, h = y.contiguous(), h.contiguous()
    else:
        seed = torch.randint(2**63 - 1, (), device=x.device) if training and p > 0 else None
        keep = return_residual or _rows.wants_grad(x, residual, weight, bias, column_scale)
        y, h, *_ = _fwd(x, residual, weight, bias, column_scale, row_scale, seed, float(p), float(eps), keep)
    return (y, h) if return_residual else y

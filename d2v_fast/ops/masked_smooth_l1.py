"""Masked regression loss of data2vec (paper section 3.4; fairseq: the end of ``Data2VecAudioModel.forward``).

With ``d = pred - target`` in float32, element by element:

    beta == 0:  d^2                                         (fairseq's convention: no factor 1/2)
    beta > 0:   d^2 / (2 beta) if |d| < beta else |d| - beta / 2

The registered op returns one sum per row; "sum" and "mean" reduce those, so every reduction shares one kernel and
is deterministic. The backward recomputes ``d``: nothing of size [N, D] is kept besides the inputs.
"""

import math

import torch
from torch import Tensor

from d2v_fast.ops._dispatch import accumulation_dtype, check_device, check_float, cpu_runs_triton
from d2v_fast.ops._rows import check_tensor


def masked_smooth_l1_ref(pred: Tensor, target: Tensor, mask: Tensor | None, beta: float, scale: float) -> Tensor:
    """Loss per row, [N]. The definition of the op in plain PyTorch; differentiable in ``pred``."""
    d = _difference(pred, target, mask)
    if beta == 0:
        return d.square().sum(-1) * scale
    size = d.abs()
    return torch.where(size < beta, d.square() * (0.5 / beta), size - 0.5 * beta).sum(-1) * scale


def masked_smooth_l1_grad_ref(
    grad_rows: Tensor,  # [N] upstream gradient of the row sums
    pred: Tensor,  # [N, D]
    target: Tensor,  # [N, D]
    mask: Tensor | None,  # [N]
    beta: float,
    scale: float,
) -> Tensor:
    """Gradient of :func:`masked_smooth_l1_ref` with respect to ``pred``, in pred's dtype."""
    d = _difference(pred, target, mask)
    slope = 2 * d if beta == 0 else (d / beta).clamp(-1, 1)
    weight = grad_rows[:, None] * scale
    if mask is not None:  # an infinite upstream gradient must not turn dropped rows into NaN
        weight = torch.where(mask[:, None], weight, 0)
    return (slope * weight).to(pred.dtype)


def _difference(pred: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    acc = accumulation_dtype(pred, target)
    d = pred.to(acc) - target.to(acc)
    return d if mask is None else torch.where(mask[:, None], d, 0)  # NaN in a dropped row stays there


@torch.library.custom_op("d2v_fast::masked_smooth_l1_fwd", mutates_args=(), device_types="cpu")
def _fwd(pred: Tensor, target: Tensor, mask: Tensor | None, beta: float, scale: float) -> Tensor:
    if cpu_runs_triton(accumulation_dtype(pred, target)):
        return _fwd_triton(pred, target, mask, beta, scale)
    return masked_smooth_l1_ref(pred, target, mask, beta, scale)


@_fwd.register_kernel("cuda")
def _fwd_triton(pred: Tensor, target: Tensor, mask: Tensor | None, beta: float, scale: float) -> Tensor:
    from d2v_fast.kernels import masked_smooth_l1 as kernels

    return kernels.masked_smooth_l1_fwd(pred, target, mask, beta, scale)


@torch.library.custom_op("d2v_fast::masked_smooth_l1_bwd", mutates_args=(), device_types="cpu")
def _bwd(grad_rows: Tensor, pred: Tensor, target: Tensor, mask: Tensor | None, beta: float, scale: float) -> Tensor:
    if cpu_runs_triton(accumulation_dtype(pred, target)):
        return _bwd_triton(grad_rows, pred, target, mask, beta, scale)
    return masked_smooth_l1_grad_ref(grad_rows, pred, target, mask, beta, scale)


@_bwd.register_kernel("cuda")
def _bwd_triton(
    grad_rows: Tensor, pred: Tensor, target: Tensor, mask: Tensor | None, beta: float, scale: float
) -> Tensor:
    from d2v_fast.kernels import masked_smooth_l1 as kernels

    return kernels.masked_smooth_l1_bwd(grad_rows, pred, target, mask, beta, scale)


@_fwd.register_fake
def _(pred, target, mask, beta, scale):
    return pred.new_empty(pred.shape[0], dtype=accumulation_dtype(pred, target))


@_bwd.register_fake
def _(grad_rows, pred, target, mask, beta, scale):
    return torch.empty(pred.shape, device=pred.device, dtype=pred.dtype)


def _setup_context(ctx, inputs, output):
    pred, target, mask, ctx.beta, ctx.scale = inputs
    ctx.save_for_backward(pred, target, mask)


def _backward(ctx, grad_rows):
    return _bwd(grad_rows, *ctx.saved_tensors, ctx.beta, ctx.scale), None, None, None, None


_fwd.register_autograd(_backward, setup_context=_setup_context)


def masked_smooth_l1(
    pred: Tensor,  # [..., D]
    target: Tensor,  # [..., D]
    mask: Tensor | None = None,  # [...] bool, True = this position counts
    *,
    beta: float = 0.0,
    scale: float | None = None,
    reduction: str = "sum",
) -> Tensor:
    """Squared error (``beta == 0``) or smooth L1 (``beta > 0``) over the positions that ``mask`` keeps.

    Args:
        pred: [..., D] float32, bfloat16 or float16 (float64 on CPU). The only input that gets a gradient.
        target: [..., D], same shape; its dtype may differ from pred's.
        mask: [...] bool, or None when every row counts, for instance rows already gathered to [N, D]. Rows that
            are not kept are never read: NaN in them reaches neither the loss nor the gradient, which is 0 there.
        beta: width of the quadratic part. 0 means ``d^2`` without the factor 1/2 (fairseq's ``loss_beta``).
        scale: factor on the loss, 1 when None. fairseq's default ``loss_scale`` is ``1 / sqrt(D)``.
        reduction: "sum", "mean" (over kept *elements*, counted on the device) or "none" (sum over D for each
            position, shape [...], 0 where the mask is False).

    Returns:
        float32 (float64 when an input is float64). A mask without a True, or no rows at all, gives 0 with zero
        gradients under every reduction. Accumulates in float32; deterministic; does not wait for the device.

    Raises:
        ValueError: shapes or devices differ, ``beta`` is negative or not finite, ``scale`` is not finite, or
            ``reduction`` is unknown.
        TypeError: an input is no tensor or not floating point, ``mask`` is not bool, or float64 on a GPU.
    """
    _check(pred, target, mask, beta, scale, reduction)
    width = pred.shape[-1]
    num_rows = math.prod(pred.shape[:-1])
    rows = _fwd(
        _as_rows(pred, num_rows, width),
        _as_rows(target.detach(), num_rows, width),
        None if mask is None else mask.reshape(-1).contiguous(),
        float(beta),
        1.0 if scale is None else float(scale),
    )
    if reduction == "none":
        return rows.view(pred.shape[:-1])
    if reduction == "sum":
        return rows.sum()
    if mask is None:
        return rows.sum() / max(num_rows * width, 1)
    return rows.sum() / (mask.sum() * width).clamp(min=1)


def _as_rows(x: Tensor, num_rows: int, width: int) -> Tensor:
    # [num_rows, width] with unit stride in the last dim; copies only where a view cannot give that
    x = x.reshape(num_rows, width)
    return x if x.stride(-1) == 1 else x.contiguous()


def _check(pred: Tensor, target: Tensor, mask: Tensor | None, beta: float, scale: float | None, reduction: str) -> None:
    check_tensor("pred", pred)
    check_tensor("target", target)
    if pred.dim() == 0 or pred.shape != target.shape:
        shapes = f"{tuple(pred.shape)} and {tuple(target.shape)}"
        raise ValueError(f"pred and target must have the same shape [..., D], got {shapes}")
    check_float("pred", pred)
    check_float("target", target)
    check_device("target", target, pred.device)
    if mask is not None:
        check_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}")
        if mask.shape != pred.shape[:-1]:
            raise ValueError(f"mask must have shape {tuple(pred.shape[:-1])}, got {tuple(mask.shape)}")
        check_device("mask", mask, pred.device)
    check_beta_and_scale(beta, scale)
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f"reduction must be 'sum', 'mean' or 'none', got {reduction!r}")


def check_beta_and_scale(beta: float, scale: float | None) -> None:
    """Raise ValueError unless ``beta`` is a finite number that is not negative, and ``scale`` finite or None."""
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be finite and >= 0, got {beta}")
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale}")

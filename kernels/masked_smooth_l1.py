"""Triton kernels of the masked regression loss: one sum per row forward, the gradient of ``pred`` backward.

Both are bound by memory traffic. Rows that the mask drops are never read.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2v_fast.kernels import launch


@dataclass(frozen=True)
class LaunchConfig:
    """Tile of one program: ``block_n`` rows, walked ``block_d`` columns at a time."""

    block_n: int
    block_d: int
    num_warps: int


def config_for(pred: Tensor) -> LaunchConfig:
    """The tile for ``pred`` [N, D]: the widest power of two that divides D, so that no lane idles at 768."""
    width = max(pred.shape[1], 1)
    if launch.interpreted(pred):
        return LaunchConfig(block_n=64, block_d=min(triton.next_power_of_2(width), 1024), num_warps=4)
    divisor = min(width & -width, 1024)
    block_d = divisor if divisor >= 128 else min(triton.next_power_of_2(width), 1024)
    return LaunchConfig(block_n=4, block_d=block_d, num_warps=4)


@triton.jit
def _rows_to_read(mask_ptr, N, HAS_MASK: tl.constexpr, BLOCK_N: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # int64: N * D may pass 2**31
    keep = rows < N
    if HAS_MASK:
        keep = tl.load(mask_ptr + rows, mask=keep, other=0) != 0
    return rows, keep


@triton.jit(do_not_specialize=["N"])
def _masked_smooth_l1_fwd_kernel(
    pred_ptr,  # [N, D]
    target_ptr,  # [N, D]
    mask_ptr,  # [N] bool, not read without HAS_MASK
    loss_ptr,  # [N] fp32
    N,
    D,
    beta,
    scale,
    stride_pred,
    stride_target,
    HAS_MASK: tl.constexpr,
    SQUARED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows, keep = _rows_to_read(mask_ptr, N, HAS_MASK, BLOCK_N)
    acc = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        live = keep[:, None] & (cols < D)[None, :]
        p = tl.load(pred_ptr + rows[:, None] * stride_pred + cols[None, :], mask=live, other=0.0)
        t = tl.load(target_ptr + rows[:, None] * stride_target + cols[None, :], mask=live, other=0.0)
        d = p.to(tl.float32) - t.to(tl.float32)  # lanes that are not live give 0
        if SQUARED:
            acc += d * d
        else:
            size = tl.abs(d)
            acc += tl.where(size < beta, d * d * (0.5 / beta), size - 0.5 * beta)
    tl.store(loss_ptr + rows, tl.sum(acc, axis=1) * scale, mask=rows < N)


@triton.jit(do_not_specialize=["N"])
def _masked_smooth_l1_bwd_kernel(
    grad_ptr,  # [N] upstream gradient; stride 0 when it is one scalar for all rows
    pred_ptr,  # [N, D]
    target_ptr,  # [N, D]
    mask_ptr,  # [N] bool, not read without HAS_MASK
    grad_pred_ptr,  # [N, D] contiguous
    N,
    D,
    beta,
    scale,
    stride_grad,
    stride_pred,
    stride_target,
    HAS_MASK: tl.constexpr,
    SQUARED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows, keep = _rows_to_read(mask_ptr, N, HAS_MASK, BLOCK_N)
    weight = tl.load(grad_ptr + rows * stride_grad, mask=keep, other=0.0).to(tl.float32) * scale
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        inside = (rows < N)[:, None] & (cols < D)[None, :]
        live = keep[:, None] & inside
        p = tl.load(pred_ptr + rows[:, None] * stride_pred + cols[None, :], mask=live, other=0.0)
        t = tl.load(target_ptr + rows[:, None] * stride_target + cols[None, :], mask=live, other=0.0)
        d = p.to(tl.float32) - t.to(tl.float32)
        if SQUARED:
            slope = 2.0 * d
        else:
            slope = d * (1.0 / beta)
            slope = tl.where(slope > 1.0, 1.0, tl.where(slope < -1.0, -1.0, slope))  # unlike clamp, NaN stays NaN
        grad = (slope * weight[:, None]).to(grad_pred_ptr.dtype.element_ty)
        tl.store(grad_pred_ptr + rows[:, None] * D + cols[None, :], grad, mask=inside)  # dropped rows: 0


def masked_smooth_l1_fwd(
    pred: Tensor,  # [N, D], unit stride in the last dim
    target: Tensor,  # [N, D], likewise
    mask: Tensor | None,  # [N] bool, contiguous
    beta: float,
    scale: float,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Loss per row, [N] fp32; 0 where the mask is False."""
    N, D = pred.shape
    config = config or config_for(pred)
    loss = torch.empty(N, device=pred.device, dtype=torch.float32)
    if N > 0:
        with launch.device_guard(pred):
            _masked_smooth_l1_fwd_kernel[(triton.cdiv(N, config.block_n),)](
                pred,
                target,
                pred if mask is None else mask,
                loss,
                N,
                D,
                beta,
                scale,
                pred.stride(0),
                target.stride(0),
                HAS_MASK=mask is not None,
                SQUARED=beta == 0,
                BLOCK_N=config.block_n,
                BLOCK_D=config.block_d,
                num_warps=config.num_warps,
            )
    return loss


def masked_smooth_l1_bwd(
    grad_rows: Tensor,  # [N], any stride
    pred: Tensor,  # [N, D], unit stride in the last dim
    target: Tensor,  # [N, D], likewise
    mask: Tensor | None,  # [N] bool, contiguous
    beta: float,
    scale: float,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Gradient of the row sums with respect to ``pred``: contiguous, in pred's dtype, every element written."""
    N, D = pred.shape
    config = config or config_for(pred)
    grad_pred = torch.empty((N, D), device=pred.device, dtype=pred.dtype)
    if grad_pred.numel() > 0:
        with launch.device_guard(pred):
            _masked_smooth_l1_bwd_kernel[(triton.cdiv(N, config.block_n),)](
                grad_rows,
                pred,
                target,
                pred if mask is None else mask,
                grad_pred,
                N,
                D,
                beta,
                scale,
                grad_rows.stride(0),
                pred.stride(0),
                target.stride(0),
                HAS_MASK=mask is not None,
                SQUARED=beta == 0,
                BLOCK_N=config.block_n,
                BLOCK_D=config.block_d,
                num_warps=config.num_warps,
            )
    return grad_pred

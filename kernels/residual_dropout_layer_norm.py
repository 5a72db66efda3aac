"""Triton kernels of ``h = residual + row_scale * column_scale * dropout(x)``, ``y = layer_norm(h)`` over rows [N, C].

The dropout mask is a function of (seed, row, column): Philox, four columns to a draw. Backward draws it again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2v_fast.kernels import launch, rows
from d2v_fast.kernels.rows import LaunchConfig


def config_for(x: Tensor, backward: bool = False, three_sums: bool = False) -> LaunchConfig:
    """The tile for ``x`` [N, C]. Backward keeps twice as much in registers, so a thread gets half the elements.

    ``three_sums``: backward adds up the gradient of a column scale as well, in half as many registers again.
    """
    if three_sums:
        return rows.whole_rows(x, 8, rows.FEW_WARPS_PER_SM)
    return rows.whole_rows(x, 8 if backward else 16)


@triton.jit
def _dropout_factor(seed, r, threshold, scale, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_N, BLOCK_C] of 0 or ``scale``; 0 where 32 random bits, read as an int32, are below ``threshold``."""
    group = tl.arange(0, BLOCK_C // 4)[None, :] + tl.zeros((BLOCK_N, 1), dtype=tl.int32)  # of four columns
    low, high = r.to(tl.int32)[:, None] + group * 0, (r >> 32).to(tl.int32)[:, None] + group * 0
    # seven rounds are the fewest that pass BigCrush (Salmon et al. 2011)
    a, b, c, d = tl.philox(seed, group, low, high, group * 0, n_rounds=7)
    bits = tl.interleave(tl.interleave(a, c), tl.interleave(b, d)).to(tl.int32, bitcast=True)
    return tl.where(bits < threshold, 0.0, scale)


@triton.jit(do_not_specialize=["N", "rows_per_sample", "threshold"])
def _residual_dropout_layer_norm_fwd_kernel(
    x_ptr,  # [N, C]
    residual_ptr,  # [N, C]
    weight_ptr,  # [C], not read without HAS_WEIGHT
    bias_ptr,  # [C], not read without HAS_BIAS
    column_scale_ptr,  # [C], not read without HAS_COLUMN_SCALE
    row_scale_ptr,  # [N / rows_per_sample], not read without HAS_ROW_SCALE
    seed_ptr,  # [] int64, not read without DROPOUT
    y_ptr,  # [N, C] contiguous
    h_ptr,  # [N, C] contiguous; this and the next two are not written without KEEP
    mean_ptr,  # [N] fp32
    rstd_ptr,  # [N] fp32
    N,
    C,
    rows_per_sample,
    stride_x,
    stride_residual,
    threshold,
    dropout_scale,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_COLUMN_SCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    DROPOUT: tl.constexpr,
    KEEP: tl.constexpr,  # somebody reads h: the caller, or backward
    FULL: tl.constexpr,  # C == BLOCK_C
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_C)
    r, inside = rows.tile(tl.program_id(0), cols, N, C, BLOCK_N)
    x = tl.load(x_ptr + r[:, None] * stride_x + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + r[:, None] * stride_residual + cols[None, :], mask=inside, other=0.0)
    if DROPOUT:
        x *= _dropout_factor(tl.load(seed_ptr), r, threshold, dropout_scale, BLOCK_N, BLOCK_C)
    x *= rows.load_vector(column_scale_ptr, cols, C, 1.0, HAS_COLUMN_SCALE)
    if HAS_ROW_SCALE:
        x *= tl.load(row_scale_ptr + r // rows_per_sample, mask=r < N, other=0.0).to(tl.float32)[:, None]
    h = (residual.to(tl.float32) + x).to(h_ptr.dtype.element_ty)
    out = r[:, None] * C + cols[None, :]
    if KEEP:
        tl.store(h_ptr + out, h, mask=inside)
    # of the rounded sum, kept or not: y is then a function of the h that backward reads
    normed, mean, rstd = rows.standardise(h.to(tl.float32), cols, C, eps, FULL)
    weight = rows.load_vector(weight_ptr, cols, C, 1.0, HAS_WEIGHT)
    bias = rows.load_vector(bias_ptr, cols, C, 0.0, HAS_BIAS)
    y = normed * weight + bias
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=inside)
    if KEEP:
        tl.store(mean_ptr + r, mean, mask=r < N)
        tl.store(rstd_ptr + r, rstd, mask=r < N)


@triton.jit(do_not_specialize=["N", "rows_per_sample", "threshold"])
def _residual_dropout_layer_norm_bwd_kernel(
    grad_y_ptr,  # [N, C]
    grad_h_ptr,  # [N, C], not read without HAS_GRAD_H
    h_ptr,  # [N, C] contiguous
    mean_ptr,  # [N] fp32
    rstd_ptr,  # [N] fp32
    weight_ptr,  # [C], not read without HAS_WEIGHT
    column_scale_ptr,  # [C], not read without HAS_COLUMN_SCALE
    row_scale_ptr,  # [N / rows_per_sample], not read without HAS_ROW_SCALE
    seed_ptr,  # [] int64, not read without DROPOUT
    x_ptr,  # [N, C], not read without HAS_X
    grad_x_ptr,  # [N, C] contiguous
    grad_residual_ptr,  # [N, C] contiguous, not written without TWO_GRADS
    partial_ptr,  # [programs, HAS_WEIGHT + HAS_BIAS + HAS_X, C] fp32
    N,
    C,
    rows_per_sample,
    stride_grad_y,
    stride_grad_h,
    stride_x,
    threshold,
    dropout_scale,
    HAS_GRAD_H: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_COLUMN_SCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    DROPOUT: tl.constexpr,
    HAS_X: tl.constexpr,  # the gradient of the column scale is wanted
    TWO_GRADS: tl.constexpr,  # that of the residual is not simply that of x
    FULL: tl.constexpr,  # C == BLOCK_C
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_C)
    weight = rows.load_vector(weight_ptr, cols, C, 1.0, HAS_WEIGHT)
    column_scale = rows.load_vector(column_scale_ptr, cols, C, 1.0, HAS_COLUMN_SCALE)
    weight_total = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    bias_total = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    scale_total = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        r, inside = rows.tile(block, cols, N, C, BLOCK_N)
        at = r[:, None] * C + cols[None, :]
        h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + r[:, None] * stride_grad_y + cols[None, :], mask=inside, other=0.0)
        grad_y = grad_y.to(tl.float32)
        mean = tl.load(mean_ptr + r, mask=r < N, other=0.0)
        rstd = tl.load(rstd_ptr + r, mask=r < N, other=0.0)
        normed = rows.standardise_again(h, mean, rstd, cols, C, FULL)
        if HAS_WEIGHT:
            weight_total += grad_y * normed
        if HAS_BIAS:
            bias_total += grad_y
        grad = rows.standardise_grad(grad_y * weight, normed, rstd, C)
        if HAS_GRAD_H:
            grad_h = tl.load(grad_h_ptr + r[:, None] * stride_grad_h + cols[None, :], mask=inside, other=0.0)
            grad += grad_h.to(tl.float32)
        if TWO_GRADS:
            tl.store(grad_residual_ptr + at, grad.to(grad_residual_ptr.dtype.element_ty), mask=inside)
        if HAS_ROW_SCALE:
            grad *= tl.load(row_scale_ptr + r // rows_per_sample, mask=r < N, other=0.0).to(tl.float32)[:, None]
        if DROPOUT:
            grad *= _dropout_factor(tl.load(seed_ptr), r, threshold, dropout_scale, BLOCK_N, BLOCK_C)
        if HAS_X:
            x = tl.load(x_ptr + r[:, None] * stride_x + cols[None, :], mask=inside, other=0.0)
            scale_total += tl.where(inside, grad * x.to(tl.float32), 0.0)
        grad *= column_scale
        tl.store(grad_x_ptr + at, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
    out = partial_ptr + tl.program_id(0).to(tl.int64) * (HAS_WEIGHT + HAS_BIAS + HAS_X) * C + cols
    if HAS_WEIGHT:
        tl.store(out, tl.sum(weight_total, axis=0), mask=cols < C)
    if HAS_BIAS:
        tl.store(out + HAS_WEIGHT * C, tl.sum(bias_total, axis=0), mask=cols < C)
    if HAS_X:
        tl.store(out + (HAS_WEIGHT + HAS_BIAS) * C, tl.sum(scale_total, axis=0), mask=cols < C)


def _dropout(p: float) -> tuple[int, float]:
    """The int32 below which random bits drop an element, and the factor on those that stay."""
    return round(p * 2**32) - 2**31, 1 / (1 - p)


def _rows_per_sample(N: int, row_scale: Tensor | None) -> int:
    """How many rows share a factor; 1 where there are no rows or factors (the kernels divide by it)."""
    return 1 if row_scale is None or N == 0 else N // row_scale.numel()


def residual_dropout_layer_norm_fwd(
    x: Tensor,  # [N, C], unit stride in the last dim
    residual: Tensor,  # [N, C], likewise
    weight: Tensor | None,  # [C] contiguous
    bias: Tensor | None,  # [C] contiguous
    column_scale: Tensor | None,  # [C] contiguous
    row_scale: Tensor | None,  # [B] contiguous, N a multiple of B
    seed: Tensor | None,  # [] int64; None without dropout
    p: float,
    eps: float,
    keep: bool = True,  # False: y is all that anybody reads
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (x's dtype) and h (residual's), both contiguous, and the rows' mean and 1 / deviation [N] fp32.

    Without ``keep`` all but y are empty.
    """
    N, C = x.shape
    config = config or config_for(x)
    threshold, dropout_scale = _dropout(p)
    y = torch.empty((N, C), device=x.device, dtype=x.dtype)
    h = torch.empty((N, C) if keep else (0,), device=x.device, dtype=residual.dtype)
    mean, rstd = (torch.empty(N if keep else 0, device=x.device, dtype=torch.float32) for _ in range(2))
    if N > 0:
        with launch.device_guard(x):
            _residual_dropout_layer_norm_fwd_kernel[(triton.cdiv(N, config.block_n),)](
                x,
                residual,
                *(x if v is None else v for v in (weight, bias, column_scale, row_scale, seed)),
                y,
                h,
                mean,
                rstd,
                N,
                C,
                _rows_per_sample(N, row_scale),
                x.stride(0),
                residual.stride(0),
                threshold,
                dropout_scale,
                eps,
                HAS_WEIGHT=weight is not None,
                HAS_BIAS=bias is not None,
                HAS_COLUMN_SCALE=column_scale is not None,
                HAS_ROW_SCALE=row_scale is not None,
                DROPOUT=seed is not None,
                KEEP=keep,
                FULL=config.block_c == C,
                BLOCK_N=config.block_n,
                BLOCK_C=config.block_c,
                num_warps=config.num_warps,
            )
    return y, h, mean, rstd


def residual_dropout_layer_norm_bwd(
    grad_y: Tensor,  # [N, C], unit stride in the last dim
    grad_h: Tensor | None,  # [N, C], likewise
    h: Tensor,  # [N, C] contiguous
    mean: Tensor,  # [N] fp32
    rstd: Tensor,  # [N] fp32
    weight: Tensor | None,  # [C] contiguous
    bias: Tensor | None,  # [C]; only whether there is one counts
    column_scale: Tensor | None,  # [C] contiguous
    row_scale: Tensor | None,  # [B] contiguous
    seed: Tensor | None,  # [] int64
    x: Tensor | None,  # [N, C], unit stride in the last dim; given when the column scale wants a gradient
    p: float,
    two_grads: bool,  # False: the gradient of the residual is that of x, and not written
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, residual (empty without ``two_grads``) and the vectors.

    The last is [0 to 3, C] fp32: weight, bias and, with ``x``, column scale, those that are there.
    """
    N, C = h.shape
    config = config or config_for(h, backward=True, three_sums=x is not None)
    programs = max(min(config.max_programs, triton.cdiv(N, config.block_n)), 1)
    threshold, dropout_scale = _dropout(p)
    grad_x = torch.empty((N, C), device=h.device, dtype=grad_y.dtype)
    grad_residual = torch.empty((N, C) if two_grads else (0,), device=h.device, dtype=h.dtype)
    vectors = sum(v is not None for v in (weight, bias, x))
    partials = torch.empty((programs, vectors, C), device=h.device, dtype=torch.float32)
    with launch.device_guard(h):  # without rows as well: the gradients of the vectors are 0 then
        _residual_dropout_layer_norm_bwd_kernel[(programs,)](
            grad_y,
            grad_y if grad_h is None else grad_h,
            h,
            mean,
            rstd,
            *(h if v is None else v for v in (weight, column_scale, row_scale, seed, x)),
            grad_x,
            grad_residual,
            partials,
            N,
            C,
            _rows_per_sample(N, row_scale),
            grad_y.stride(0),
            0 if grad_h is None else grad_h.stride(0),
            0 if x is None else x.stride(0),
            threshold,
            dropout_scale,
            HAS_GRAD_H=grad_h is not None,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            HAS_COLUMN_SCALE=column_scale is not None,
            HAS_ROW_SCALE=row_scale is not None,
            DROPOUT=seed is not None,
            HAS_X=x is not None,
            TWO_GRADS=two_grads,
            FULL=config.block_c == C,
            BLOCK_N=config.block_n,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
        )
    return grad_x, grad_residual, partials.sum(0)

"""Triton kernels of ``gelu(layer_norm(x))`` over rows [N, C]: one pass forward, one pass backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2v_fast.kernels import launch, rows
from d2v_fast.kernels.gelu import gelu, gelu_grad
from d2v_fast.kernels.rows import LaunchConfig


def config_for(x: Tensor, backward: bool = False) -> LaunchConfig:
    """The tile for ``x`` [N, C]. Backward keeps twice as much in registers, so a thread gets half the elements."""
    return rows.whole_rows(x, 8 if backward else 16)


@triton.jit(do_not_specialize=["N"])
def _layer_norm_gelu_fwd_kernel(
    x_ptr,  # [N, C]
    weight_ptr,  # [C], not read without HAS_WEIGHT
    bias_ptr,  # [C], not read without HAS_BIAS
    y_ptr,  # [N, C] contiguous
    mean_ptr,  # [N] fp32
    rstd_ptr,  # [N] fp32
    N,
    C,
    stride_x,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FULL: tl.constexpr,  # C == BLOCK_C
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_C)
    r, inside = rows.tile(tl.program_id(0), cols, N, C, BLOCK_N)
    x = tl.load(x_ptr + r[:, None] * stride_x + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    normed, mean, rstd = rows.standardise(x, cols, C, eps, FULL)
    weight = rows.load_vector(weight_ptr, cols, C, 1.0, HAS_WEIGHT)
    bias = rows.load_vector(bias_ptr, cols, C, 0.0, HAS_BIAS)
    y = gelu(normed * weight + bias)
    tl.store(y_ptr + r[:, None] * C + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + r, mean, mask=r < N)
    tl.store(rstd_ptr + r, rstd, mask=r < N)


@triton.jit(do_not_specialize=["N"])
def _layer_norm_gelu_bwd_kernel(
    grad_ptr,  # [N, C]
    x_ptr,  # [N, C]
    mean_ptr,  # [N] fp32
    rstd_ptr,  # [N] fp32
    weight_ptr,  # [C], not read without HAS_WEIGHT
    bias_ptr,  # [C], not read without HAS_BIAS
    grad_x_ptr,  # [N, C] contiguous
    partial_ptr,  # [programs, HAS_WEIGHT + HAS_BIAS, C] fp32
    N,
    C,
    stride_grad,
    stride_x,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FULL: tl.constexpr,  # C == BLOCK_C
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_C)
    weight = rows.load_vector(weight_ptr, cols, C, 1.0, HAS_WEIGHT)
    bias = rows.load_vector(bias_ptr, cols, C, 0.0, HAS_BIAS)
    weight_total = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    bias_total = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        r, inside = rows.tile(block, cols, N, C, BLOCK_N)
        x = tl.load(x_ptr + r[:, None] * stride_x + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + r[:, None] * stride_grad + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + r, mask=r < N, other=0.0)
        rstd = tl.load(rstd_ptr + r, mask=r < N, other=0.0)
        normed = rows.standardise_again(x, mean, rstd, cols, C, FULL)
        grad *= gelu_grad(normed * weight + bias)
        if HAS_WEIGHT:
            weight_total += grad * normed
        if HAS_BIAS:
            bias_total += grad
        grad_x = rows.standardise_grad(grad * weight, normed, rstd, C)
        tl.store(grad_x_ptr + r[:, None] * C + cols[None, :], grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    out = partial_ptr + tl.program_id(0).to(tl.int64) * (HAS_WEIGHT + HAS_BIAS) * C + cols
    if HAS_WEIGHT:
        tl.store(out, tl.sum(weight_total, axis=0), mask=cols < C)
    if HAS_BIAS:
        tl.store(out + HAS_WEIGHT * C, tl.sum(bias_total, axis=0), mask=cols < C)


def layer_norm_gelu_fwd(
    x: Tensor,  # [N, C], unit stride in the last dim
    weight: Tensor | None,  # [C] contiguous
    bias: Tensor | None,  # [C] contiguous
    eps: float,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``gelu(layer_norm(x))`` (contiguous, in x's dtype), and the rows' mean and 1 / deviation [N] fp32."""
    N, C = x.shape
    config = config or config_for(x)
    y = torch.empty((N, C), device=x.device, dtype=x.dtype)
    mean, rstd = (torch.empty(N, device=x.device, dtype=torch.float32) for _ in range(2))
    if N > 0:
        with launch.device_guard(x):
            _layer_norm_gelu_fwd_kernel[(triton.cdiv(N, config.block_n),)](
                x,
                x if weight is None else weight,
                x if bias is None else bias,
                y,
                mean,
                rstd,
                N,
                C,
                x.stride(0),
                eps,
                HAS_WEIGHT=weight is not None,
                HAS_BIAS=bias is not None,
                FULL=config.block_c == C,
                BLOCK_N=config.block_n,
                BLOCK_C=config.block_c,
                num_warps=config.num_warps,
            )
    return y, mean, rstd


def layer_norm_gelu_bwd(
    grad: Tensor,  # [N, C], unit stride in the last dim
    x: Tensor,  # [N, C], likewise
    mean: Tensor,  # [N] fp32
    rstd: Tensor,  # [N] fp32
    weight: Tensor | None,  # [C] contiguous
    bias: Tensor | None,  # [C] contiguous
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient of x (contiguous, in x's dtype), and of weight and bias, those that are there: [0 to 2, C] fp32."""
    N, C = x.shape
    config = config or config_for(x, backward=True)
    programs = max(min(config.max_programs, triton.cdiv(N, config.block_n)), 1)
    grad_x = torch.empty((N, C), device=x.device, dtype=x.dtype)
    vectors = sum(v is not None for v in (weight, bias))
    partials = torch.empty((programs, vectors, C), device=x.device, dtype=torch.float32)
    with launch.device_guard(x):  # without rows as well: the gradients of weight and bias are 0 then
        _layer_norm_gelu_bwd_kernel[(programs,)](
            grad,
            x,
            mean,
            rstd,
            x if weight is None else weight,
            x if bias is None else bias,
            grad_x,
            partials,
            N,
            C,
            grad.stride(0),
            x.stride(0),
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            FULL=config.block_c == C,
            BLOCK_N=config.block_n,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
        )
    return grad_x, partials.sum(0)

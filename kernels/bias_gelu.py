"""Triton kernels of ``gelu(x + bias)`` over rows [N, C]: one pass forward, one pass backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2v_fast.kernels import launch, rows
from d2v_fast.kernels.gelu import gelu, gelu_grad
from d2v_fast.kernels.rows import LaunchConfig


def config_for(x: Tensor) -> LaunchConfig:
    """The tile for ``x`` [N, C]: the widest power of two that divides C, so that no lane idles at 3072."""
    width = x.shape[1]
    row = triton.next_power_of_2(width)
    if launch.interpreted(x):
        return LaunchConfig(block_n=max(8192 // row, 64), block_c=min(row, 1024), num_warps=4, max_programs=3)
    divisor = min(width & -width, 1024)
    block_c = divisor if divisor >= 128 else min(max(row, 8), 1024)
    return LaunchConfig(min(2048 // block_c, 64), block_c, 4, rows.max_programs(x, 4))


@triton.jit
def _columns(C, BLOCK_C: tl.constexpr):
    num_col_blocks = tl.cdiv(C, BLOCK_C)
    cols = (tl.program_id(0) % num_col_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    return tl.program_id(0) // num_col_blocks, cols


@triton.jit(do_not_specialize=["N"])
def _bias_gelu_fwd_kernel(
    x_ptr,  # [N, C]
    bias_ptr,  # [C], not read without HAS_BIAS
    y_ptr,  # [N, C] contiguous
    N,
    C,
    stride_x,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    block, cols = _columns(C, BLOCK_C)
    r, inside = rows.tile(block, cols, N, C, BLOCK_N)
    bias = rows.load_vector(bias_ptr, cols, C, 0.0, HAS_BIAS)
    x = tl.load(x_ptr + r[:, None] * stride_x + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    y = gelu(x + bias)
    tl.store(y_ptr + r[:, None] * C + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "num_programs"])
def _bias_gelu_bwd_kernel(
    grad_ptr,  # [N, C]
    x_ptr,  # [N, C]
    bias_ptr,  # [C], not read without HAS_BIAS
    grad_x_ptr,  # [N, C] contiguous
    partial_ptr,  # [num_programs, C] fp32, not written without HAS_BIAS
    N,
    C,
    num_programs,  # that share the rows of one column block
    stride_grad,
    stride_x,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program, cols = _columns(C, BLOCK_C)
    bias = rows.load_vector(bias_ptr, cols, C, 0.0, HAS_BIAS)
    total = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    for block in range(program, tl.cdiv(N, BLOCK_N), num_programs):
        r, inside = rows.tile(block, cols, N, C, BLOCK_N)
        x = tl.load(x_ptr + r[:, None] * stride_x + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + r[:, None] * stride_grad + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        grad *= gelu_grad(x + bias)
        tl.store(grad_x_ptr + r[:, None] * C + cols[None, :], grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if HAS_BIAS:
            total += grad
    if HAS_BIAS:
        tl.store(partial_ptr + program.to(tl.int64) * C + cols, tl.sum(total, axis=0), mask=cols < C)


def bias_gelu_fwd(
    x: Tensor,  # [N, C], unit stride in the last dim
    bias: Tensor | None,  # [C] contiguous
    config: LaunchConfig | None = None,
) -> Tensor:
    """``gelu(x + bias)``, contiguous, in x's dtype."""
    N, C = x.shape
    config = config or config_for(x)
    y = torch.empty((N, C), device=x.device, dtype=x.dtype)
    if N > 0:
        with launch.device_guard(x):
            _bias_gelu_fwd_kernel[(triton.cdiv(N, config.block_n) * triton.cdiv(C, config.block_c),)](
                x,
                x if bias is None else bias,
                y,
                N,
                C,
                x.stride(0),
                HAS_BIAS=bias is not None,
                BLOCK_N=config.block_n,
                BLOCK_C=config.block_c,
                num_warps=config.num_warps,
            )
    return y


def bias_gelu_bwd(
    grad: Tensor,  # [N, C], unit stride in the last dim
    x: Tensor,  # [N, C], likewise
    bias: Tensor | None,  # [C] contiguous
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x (contiguous, in x's dtype) and of the bias (fp32, empty without one)."""
    N, C = x.shape
    config = config or config_for(x)
    col_blocks = triton.cdiv(C, config.block_c)
    programs = max(min(config.max_programs // col_blocks, triton.cdiv(N, config.block_n)), 1)
    grad_x = torch.empty((N, C), device=x.device, dtype=x.dtype)
    partials = torch.empty((0 if bias is None else programs, C), device=x.device, dtype=torch.float32)
    with launch.device_guard(x):  # without rows as well: the gradient of the bias is 0 then
        _bias_gelu_bwd_kernel[(programs * col_blocks,)](
            grad,
            x,
            x if bias is None else bias,
            grad_x,
            partials,
            N,
            C,
            programs,
            grad.stride(0),
            x.stride(0),
            HAS_BIAS=bias is not None,
            BLOCK_N=config.block_n,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
        )
    return grad_x, partials.new_empty(0) if bias is None else partials.sum(0)

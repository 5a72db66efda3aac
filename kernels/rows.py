"""Shared by the kernels that work on rows [N, C]: tiles, launch sizes and the normalisation of a row.

A forward program owns ``block_n`` rows. A backward program takes row blocks in turn, keeps sums over its rows
(gradients of weights and biases) in registers, and writes them once; PyTorch adds up what the programs wrote. No
atomics, the same result every time.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2v_fast.kernels import launch

_SM_COUNT = 132  # of an H100; stands in where tensors have no device
_WARPS_PER_SM = 24  # of a persistent kernel with at most 80 registers
FEW_WARPS_PER_SM = 16  # of one with at most 128


@dataclass(frozen=True)
class LaunchConfig:
    """Tile of ``block_n`` rows and ``block_c`` columns; at most ``max_programs`` programs share the row blocks."""

    block_n: int
    block_c: int
    num_warps: int
    max_programs: int


def whole_rows(x: Tensor, per_thread: int, warps_per_sm: int = _WARPS_PER_SM) -> LaunchConfig:
    """Tile of whole rows of ``x`` [N, C]: 2048 elements or one row, ``per_thread`` of them to a thread."""
    row = max(triton.next_power_of_2(x.shape[1]), 8)
    if launch.interpreted(x):
        return LaunchConfig(block_n=max(8192 // row, 64), block_c=row, num_warps=4, max_programs=3)
    block_n = min(max(2048 // row, 1), 64)
    num_warps = min(max(block_n * row // (32 * per_thread), 1), 32)
    return LaunchConfig(block_n, row, num_warps, max_programs(x, num_warps, warps_per_sm))


def max_programs(x: Tensor, num_warps: int, warps_per_sm: int = _WARPS_PER_SM) -> int:
    """How many programs of a persistent kernel fill the device of ``x``."""
    count = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else _SM_COUNT
    return count * max(warps_per_sm // num_warps, 1)


@triton.jit
def tile(block, cols, N, C, BLOCK_N: tl.constexpr):
    """Rows (int64: N * C may pass 2**31) of a row block, and where it and ``cols`` are inside [N, C]."""
    rows = tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return rows, (rows < N)[:, None] & (cols < C)[None, :]


@triton.jit
def load_vector(ptr, cols, C, default, PRESENT: tl.constexpr):
    """[BLOCK_C] values in fp32, or one default for all columns."""
    if PRESENT:
        return tl.load(ptr + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    else:
        return default


@triton.jit
def _divide(total, C):
    """total / C to the last bit (Markstein); a division on a GPU is off by two units, and takes more instructions."""
    size = tl.cast(C, tl.float32)
    inverse = 1.0 / size
    quotient = total * inverse
    return tl.fma(tl.fma(quotient, -size, total), inverse, quotient)


@triton.jit
def standardise(x, cols, C, eps, FULL: tl.constexpr):
    """x [BLOCK_N, BLOCK_C], 0 outside: normalised rows, mean and 1 / deviation. Two passes in registers.

    FULL: there are no columns outside.
    """
    mean = _divide(tl.sum(x, axis=1), C)  # exact in constant rows of round values, so that they become 0
    d = x - mean[:, None]
    if not FULL:
        d = tl.where((cols < C)[None, :], d, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(d * d, axis=1) / C + eps)
    return d * rstd[:, None], mean, rstd


@triton.jit
def standardise_again(x, mean, rstd, cols, C, FULL: tl.constexpr):
    """The normalised rows of :func:`standardise` in backward; mean and rstd are 0 in rows outside."""
    normed = (x - mean[:, None]) * rstd[:, None]
    if not FULL:
        normed = tl.where((cols < C)[None, :], normed, 0.0)
    return normed


@triton.jit
def standardise_grad(grad, normed, rstd, C):
    """Gradient of the rows x, given that of the normalised rows; both 0 outside."""
    mean_grad = tl.sum(grad, axis=1) / C
    mean_product = tl.sum(grad * normed, axis=1) / C
    return (grad - mean_grad[:, None] - normed * mean_product[:, None]) * rstd[:, None]

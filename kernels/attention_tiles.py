"""Tiles that the kernels of bias_attention share: launch sizes, rows of heads, logits, and the mask of dropout.

Tiles of 64 queries and 64 keys for heads of up to 64 channels. At 197 positions they cover 256 queries, as those of 128
that larger heads prefer would, but only 208 keys: what is left of the keys goes into one of 16, 32 or 64.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2v_fast.kernels import launch

LOG2_E = tl.constexpr(1.4426950408889634)
ROW_ALIGNMENT = 16  # elements: rows of a bias are read this many at a time


@dataclass(frozen=True)
class LaunchConfig:
    """Tiles of ``block_m`` queries and ``block_n`` keys; ``num_stages`` tiles of a loop are in flight at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # of a thread; the assembler spills some to gain warps if it is not told


# By kernel and width of a tile of head vectors. Wider ones take twice the registers, which more warps share.
_LOW_PRECISION = {
    ("fwd", 64): LaunchConfig(64, 64, 4, num_stages=2, max_registers=168),  # three programs on a processor
    ("dq", 64): LaunchConfig(64, 64, 4, num_stages=2),
    ("dkv", 64): LaunchConfig(64, 64, 4, num_stages=2),
    ("dbias", 64): LaunchConfig(64, 64, 4, num_stages=3),
    ("fwd", 128): LaunchConfig(64, 64, 4, num_stages=2),
    ("dq", 128): LaunchConfig(32, 64, 8, num_stages=2),
    ("dkv", 128): LaunchConfig(32, 64, 8, num_stages=2),
    ("dbias", 128): LaunchConfig(32, 64, 8, num_stages=2),
}


def config_for(q: Tensor, k: Tensor, kernel: str) -> LaunchConfig:
    """The tiles of ``kernel`` ("fwd", "dq", "dkv" or "dbias") for ``q`` [B, Tq, H, D] and ``k`` [B, Tk, H, D].

    float32 is multiplied without tensor cores, which would round it to 10 bits, and its tiles are in registers.
    """
    wide = head_block(q.shape[3]) > 64
    if launch.interpreted(q):
        block_m, block_n = (min(max(triton.next_power_of_2(x.shape[1]), 16), 128) for x in (q, k))
        return LaunchConfig(block_m, block_n, num_warps=4, num_stages=1)
    if q.dtype == torch.float32:
        return LaunchConfig(16 if wide else 32, 32, num_warps=8, num_stages=1)
    return _LOW_PRECISION[kernel, 128 if wide else 64]


def head_block(D: int) -> int:
    """Width of a tile of head vectors: a power of two that tensor cores take."""
    return max(triton.next_power_of_2(D), 16)


def tail_block(count: int, block: int) -> int:
    """Size of the tile for what tiles of ``block`` leave over of ``count``; 0 if that is nothing."""
    return max(triton.next_power_of_2(count % block), 16) if count % block else 0


def drop_threshold(p: float) -> int:
    """An element is dropped where 16 random bits are below this."""
    return min(round(p * 2**16), 2**16 - 1)


def keep_scale(p: float) -> float:
    """The factor on elements that stay: 1 / (1 - p), for the p that 16 bits resolve, so that the mean is exact."""
    return 2**16 / (2**16 - drop_threshold(p))


@triton.jit
def find(program, blocks, H):
    """Block, and as int64 sample and head, of a program; programs of one head of a sample share keys in the cache."""
    each = program // blocks
    return program % blocks, (each // H).to(tl.int64), (each % H).to(tl.int64)


@triton.jit
def key_count(lengths_ptr, b, num_k, HAS_LENGTHS: tl.constexpr):
    """How many keys sample b has."""
    if HAS_LENGTHS:
        return tl.minimum(tl.maximum(tl.load(lengths_ptr + b).to(tl.int32), 0), num_k)
    else:
        return num_k


@triton.jit
def load_rows(
    ptr, first, stride, count, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):
    """[BLOCK, BLOCK_D], the rows from ``first`` on of a matrix [count, D] with unit stride in D, 0 outside.

    Not MASKED: the rows are inside. Offsets within the tile are 32 bits wide, which saves registers in loops.
    """
    rows, cols = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    at = ptr + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + cols[None, :])
    if MASKED:
        return tl.load(at, mask=(rows < count - first)[:, None] & (cols < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        return tl.load(at, mask=(cols < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def store_rows(ptr, first, stride, count, x, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write x [BLOCK, BLOCK_D] to the rows from ``first`` on of a matrix [count, D]."""
    rows, cols = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    at = ptr + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + cols[None, :])
    tl.store(at, x.to(ptr.dtype.element_ty), mask=(rows < count - first)[:, None] & (cols < D)[None, :])


@triton.jit
def load_positions(ptr, index, count, PRESENT: tl.constexpr):
    """Positions in fp32 (exact up to 2^24), or anything where there are none."""
    if PRESENT:
        return tl.load(ptr + index, mask=index < count, other=0).to(tl.float32)
    else:
        return index.to(tl.float32)


@triton.jit
def load_bias(ptr, rows, cols, num_rows, stride, PRESENT: tl.constexpr, MASKED: tl.constexpr):
    """[rows, cols] of the bias of one head, or anything where there is none; rows outside get the last one.

    Not MASKED: the columns are inside. Columns up to the stride may be read, and it is a multiple of 16: accesses are
    wide, however many columns there are.
    """
    if PRESENT:
        at = ptr + (tl.minimum(rows, num_rows - 1)[:, None] * stride + cols[None, :])
        if MASKED:
            return tl.load(at, mask=(cols < stride)[None, :], other=0.0)
        else:
            return tl.load(at)
    else:
        return rows[:, None] + cols[None, :]


@triton.jit
def logits_tile(
    x,  # [X, BLOCK_D] queries, or keys for logits the other way round
    y,  # [Y, BLOCK_D]
    bias,  # [X, Y], of HAS_BIAS
    distance,  # [X, Y] fp32 |pos_q - pos_k|, of HAS_SLOPES
    slope,
    inside,  # [X, Y] bool, or [X, 1] or [1, Y], of MASKED
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """[X, Y] logits times log2(e) in fp32, -inf where not inside."""
    s = tl.dot(x, tl.trans(y), input_precision="ieee") * (scale * LOG2_E)
    if HAS_BIAS:
        s += bias.to(tl.float32) * LOG2_E
    if HAS_SLOPES:
        s -= distance * (slope * LOG2_E)
    if MASKED:
        s = tl.where(inside, s, -float("inf"))
    return s


@triton.jit
def _two_bits(bits, threshold):
    """Of a draw's 32 bits: whether each half keeps its element, as bits 0 and 1."""
    low = (bits & 0xFFFF).to(tl.int32) >= threshold
    high = (bits >> 16).to(tl.int32) >= threshold
    return low.to(tl.int32) | (high.to(tl.int32) << 1)


@triton.jit
def keep_bits(seed, head, rows, start, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_M, 8 for every 64 keys] int32: bits of eight keys of a query, eight apart, set where they are kept."""
    DRAWS: tl.constexpr = 8 * ((BLOCK_N + 63) // 64)
    none = tl.zeros((BLOCK_M, DRAWS), dtype=tl.int32)
    draw = start // 64 * 8 + tl.arange(0, DRAWS)[None, :] + none
    # seven rounds are the fewest that pass BigCrush (Salmon et al. 2011)
    a, b, c, d = tl.philox(seed, draw, rows[:, None] + none, head.to(tl.int32) + none, none, n_rounds=7)
    low = _two_bits(a, threshold) | (_two_bits(b, threshold) << 2)
    return low | (_two_bits(c, threshold) << 4) | (_two_bits(d, threshold) << 6)


@triton.jit
def keep_tile(seed, head, rows, start, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_M, BLOCK_N] bool, False where an element is dropped, for keys from ``start`` on, a multiple of 16.

    A function of (seed, head of a sample, query, key), whatever the tiles. A draw of Philox has bits for eight keys
    eight apart: in the layout of tensor cores they belong to the thread that draws. A tile does not straddle 64 keys,
    or holds all of them.
    """
    GROUPS: tl.constexpr = (BLOCK_N + 63) // 64
    EACH: tl.constexpr = BLOCK_N // GROUPS // 8
    bits = keep_bits(seed, head, rows, start, threshold, BLOCK_M, BLOCK_N)
    bits = tl.broadcast_to(tl.reshape(bits, (BLOCK_M, GROUPS, 1, 8)), (BLOCK_M, GROUPS, EACH, 8))
    which = start % 64 // 8 + tl.arange(0, BLOCK_N) // 8 % 8
    return ((tl.reshape(bits, (BLOCK_M, BLOCK_N)) >> which[None, :]) & 1) != 0


@triton.jit
def grad_logits(
    p,  # [BLOCK_M, BLOCK_N] softmax
    grad,  # [BLOCK_M, BLOCK_D] of the result
    v,  # [BLOCK_N, BLOCK_D]
    delta,  # [BLOCK_M]
    keep,  # [BLOCK_M, BLOCK_N], of DROPOUT
    keep_scale,
    inside,  # [1, BLOCK_N], of MASKED
    DROPOUT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] gradient of the logits."""
    grad_p = tl.dot(grad, tl.trans(v), input_precision="ieee")
    if DROPOUT:
        grad_p = tl.where(keep, grad_p * keep_scale, 0.0)
    grad_s = p * (grad_p - delta[:, None])
    if MASKED:  # also where a row is NaN
        grad_s = tl.where(inside, grad_s, 0.0)
    return grad_s


@triton.jit
def keep_or_nothing(
    seed, head, rows, start, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr
):
    """:func:`keep_tile`, or anything without dropout."""
    if DROPOUT:
        return keep_tile(seed, head, rows, start, threshold, BLOCK_M, BLOCK_N)
    else:
        return rows[:, None]

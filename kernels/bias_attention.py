"""Triton kernels of attention with an additive bias: the tiles that all of them share, and the forward.

    logits = scale * q k^T + bias - slope * |pos_q - pos_k|,    o = dropout(softmax(logits)) v

Nothing of the size [B, H, Tq, Tk] is ever in memory. A forward program owns ``block_m`` queries of a head of a sample
and walks over its keys (Dao et al. 2022); backward is in bias_attention_grad.py. Logits are in units of log 2
throughout: a GPU has exp2, and exp costs a product more.

Tiles of 64 queries and 64 keys. At 197 positions these are padded to 256 queries, as they would be by the 128 that
larger heads prefer, but to 208 keys: what the last tile of keys is too wide for is done in one of 16, 32 or 64.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2v_fast.kernels import launch

LOG2_E = tl.constexpr(1.4426950408889634)
MAX_HEAD_DIM = 128
ROW_ALIGNMENT = 16  # elements: rows of a bias are read this many at a time


@dataclass(frozen=True)
class LaunchConfig:
    """Tiles of ``block_m`` queries and ``block_n`` keys; ``num_stages`` tiles of a loop are in flight at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def config_for(q: Tensor) -> LaunchConfig:
    """The tiles for ``q`` [B, Tq, H, D].

    float32 is multiplied without tensor cores, whose operands would be rounded to 10 bits, and its tiles are smaller:
    they are in registers.
    """
    if launch.interpreted(q):
        return LaunchConfig(128, 128, num_warps=4, num_stages=1)
    if q.dtype == torch.float32:
        return LaunchConfig(32, 32, num_warps=4, num_stages=1)
    return LaunchConfig(64, 64, num_warps=4, num_stages=2)


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
def load_rows(ptr, rows, stride, count, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """[rows, BLOCK_D] of a matrix [count, D] with unit stride in D, 0 outside; not MASKED: the rows are inside."""
    cols = tl.arange(0, BLOCK_D)
    at = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if MASKED:
        return tl.load(at, mask=(rows < count)[:, None] & (cols < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        return tl.load(at, mask=(cols < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def store_rows(ptr, rows, stride, count, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write x [rows, BLOCK_D] to the matrix [count, D], whose rows are ``stride`` apart."""
    cols = tl.arange(0, BLOCK_D)
    at = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=(rows < count)[:, None] & (cols < D)[None, :])


@triton.jit
def load_positions(ptr, index, count, PRESENT: tl.constexpr):
    """Positions in fp32 (exact up to 2^24), or anything where there are none."""
    if PRESENT:
        return tl.load(ptr + index, mask=index < count, other=0).to(tl.float32)
    else:
        return index.to(tl.float32)


@triton.jit
def load_bias(ptr, rows, cols, num_rows, stride, PRESENT: tl.constexpr):
    """[rows, cols] of the bias of one head, or anything where there is none.

    Columns up to the stride may be read, and it is a multiple of 16: accesses are wide, however many columns there are.
    """
    if PRESENT:
        at = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
        return tl.load(at, mask=(rows < num_rows)[:, None] & (cols < stride)[None, :], other=0.0)
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
def keep_tile(seed, head, rows, start, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_M, BLOCK_N] bool, False where an element is dropped, for keys from ``start`` on, a multiple of BLOCK_N.

    A function of (seed, head of a sample, query, key), whatever the tiles: the 128 bits of a draw serve eight keys of
    a query that are eight apart, which belong to one thread in the layout of tensor cores.
    """
    GROUPS: tl.constexpr = (BLOCK_N + 63) // 64  # of 64 keys; narrower tiles use some of the bits
    none = tl.zeros((BLOCK_M, 8 * GROUPS), dtype=tl.int32)
    draw = start // 64 * 8 + tl.arange(0, 8 * GROUPS)[None, :] + none
    # seven rounds are the fewest that pass BigCrush (Salmon et al. 2011)
    a, b, c, d = tl.philox(seed, draw, rows[:, None] + none, head.to(tl.int32) + none, none, n_rounds=7)
    if BLOCK_N >= 64:
        bits = tl.join(tl.join(a, b), tl.join(c, d))
        bits = tl.reshape(tl.join(bits & 0xFFFF, bits >> 16), (BLOCK_M, GROUPS, 8, 2, 2, 2))
        bits = tl.permute(bits, (0, 1, 4, 3, 5, 2))
    elif BLOCK_N == 32:
        late = start % 64 >= 32
        bits = tl.join(tl.where(late, c, a), tl.where(late, d, b))
        bits = tl.permute(tl.join(bits & 0xFFFF, bits >> 16), (0, 2, 3, 1))
    else:
        quarter = start % 64 // 16
        bits = tl.where(quarter < 2, tl.where(quarter == 0, a, b), tl.where(quarter == 2, c, d))
        bits = tl.permute(tl.join(bits & 0xFFFF, bits >> 16), (0, 2, 1))
    return tl.reshape(bits, (BLOCK_M, BLOCK_N)).to(tl.int32) >= threshold


@triton.jit
def _attend(
    total,  # [BLOCK_M, BLOCK_D] fp32, sum of weights times values
    peak,  # [BLOCK_M] fp32, largest logit so far
    norm,  # [BLOCK_M] fp32, sum of weights, which are relative to exp2(peak)
    q,
    k_ptr,
    v_ptr,
    bias_ptr,
    pos_k_ptr,
    pos_q,
    slope,
    seed,
    head,
    rows,
    start,
    num_rows,
    num_cols,
    stride_k,
    stride_v,
    stride_bias,
    scale,
    threshold,
    HAS_BIAS: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    DROPOUT: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of keys, from ``start`` on."""
    cols = start + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, cols, stride_k, num_cols, D, BLOCK_D, MASKED)
    distance = tl.abs(pos_q[:, None] - load_positions(pos_k_ptr, cols, num_cols, HAS_SLOPES)[None, :])
    bias = load_bias(bias_ptr, rows, cols, num_rows, stride_bias, HAS_BIAS)
    inside = (cols < num_cols)[None, :]
    s = logits_tile(q, k, bias, distance, slope, inside, scale, HAS_BIAS, HAS_SLOPES, MASKED)
    new_peak = tl.maximum(peak, tl.max(s, axis=1))
    base = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # nothing to attend to so far
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(peak - base)
    norm = norm * shrink + tl.sum(p, axis=1)
    if DROPOUT:
        p = tl.where(keep_tile(seed, head, rows, start, threshold, BLOCK_M, BLOCK_N), p, 0.0)
    v = load_rows(v_ptr, cols, stride_v, num_cols, D, BLOCK_D, MASKED)
    total = tl.dot(p.to(v.dtype), v, total * shrink[:, None], input_precision="ieee")
    return total, new_peak, norm


@triton.jit(do_not_specialize=["num_q", "num_k", "threshold"])
def _bias_attention_fwd_kernel(
    q_ptr,  # [B, Tq, H, D], unit stride in D, like k and v
    k_ptr,  # [B, Tk, H, D]
    v_ptr,  # [B, Tk, H, D]
    bias_ptr,  # [H, Tq, stride_bias_q], not read without HAS_BIAS
    slopes_ptr,  # [H] fp32, and positions, not read without HAS_SLOPES
    pos_q_ptr,  # [B, Tq] int32
    pos_k_ptr,  # [B, Tk] int32
    lengths_ptr,  # [B] int, not read without HAS_LENGTHS
    seed_ptr,  # [] int64, not read without DROPOUT
    out_ptr,  # [B, Tq, H, D] contiguous
    lse_ptr,  # [B, H, Tq] fp32: log2 of the sum of exp2 of logits; 0 where there is no key
    H,
    num_q,
    num_k,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_v_b,
    stride_v_t,
    stride_v_h,
    stride_bias_h,
    stride_bias_q,
    scale,
    threshold,
    keep_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    DROPOUT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr,  # keys in the last, partial tile
    NUM_STAGES: tl.constexpr,
):
    block, b, h = find(tl.program_id(0), tl.cdiv(num_q, BLOCK_M), H)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    length = key_count(lengths_ptr, b, num_k, HAS_LENGTHS)
    q = load_rows(q_ptr + b * stride_q_b + h * stride_q_h, rows, stride_q_t, num_q, D, BLOCK_D, True)
    k_ptr += b * stride_k_b + h * stride_k_h
    v_ptr += b * stride_v_b + h * stride_v_h
    bias_ptr += h * stride_bias_h
    pos_k_ptr += b * num_k
    pos_q = load_positions(pos_q_ptr + b * num_q, rows, num_q, HAS_SLOPES)
    slope = tl.load(slopes_ptr + h) if HAS_SLOPES else 0.0
    seed = tl.load(seed_ptr) if DROPOUT else 0
    head = b * H + h
    peak = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
    norm = tl.zeros((BLOCK_M,), dtype=tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    whole = length // BLOCK_N * BLOCK_N
    for start in tl.range(0, whole, BLOCK_N, num_stages=NUM_STAGES):
        total, peak, norm = _attend(
            total, peak, norm, q, k_ptr, v_ptr, bias_ptr, pos_k_ptr, pos_q, slope, seed, head, rows, start,
            num_q, length, stride_k_t, stride_v_t, stride_bias_q, scale, threshold,
            HAS_BIAS, HAS_SLOPES, DROPOUT, False, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if TAIL > 0:
        for start in tl.range(whole, length, BLOCK_N, num_stages=1):
            total, peak, norm = _attend(
                total, peak, norm, q, k_ptr, v_ptr, bias_ptr, pos_k_ptr, pos_q, slope, seed, head, rows, start,
                num_q, length, stride_k_t, stride_v_t, stride_bias_q, scale, threshold,
                HAS_BIAS, HAS_SLOPES, DROPOUT, True, D, BLOCK_M, TAIL, BLOCK_D,
            )  # fmt: skip
    some = tl.where(norm == 0.0, 1.0, norm)  # a query without keys gets 0
    base = tl.where(peak == -float("inf"), 0.0, peak)
    out = total * (keep_scale / some)[:, None]
    store_rows(out_ptr + (b * num_q * H + h) * D, rows, H * D, num_q, out, D, BLOCK_D)
    tl.store(lse_ptr + head * num_q + rows, base + tl.log2(some), mask=rows < num_q)


@dataclass(frozen=True)
class Extras:
    """What goes into the logits besides queries and keys, and what happens to their softmax."""

    bias: Tensor | None  # [H, Tq, >= Tk], as align_bias returns it
    slopes: Tensor | None  # [H] fp32 contiguous
    pos_q: Tensor | None  # [B, Tq] int32 contiguous, with slopes
    pos_k: Tensor | None  # [B, Tk] int32 contiguous
    lengths: Tensor | None  # [B] int contiguous
    seed: Tensor | None  # [] int64; None without dropout
    p: float
    scale: float

    @classmethod
    def make(
        cls,
        bias: Tensor | None,
        slopes: Tensor | None,
        pos_q: Tensor | None,
        pos_k: Tensor | None,
        lengths: Tensor | None,
        seed: Tensor | None,
        p: float,
        scale: float,
    ) -> "Extras":
        """From tensors of any strides, slopes of any dtype and positions of any integer dtype."""
        slopes = None if slopes is None else slopes.float().contiguous()
        pos_q, pos_k = (None if x is None else x.int().contiguous() for x in (pos_q, pos_k))
        lengths = None if lengths is None else lengths.contiguous()
        return cls(align_bias(bias), slopes, pos_q, pos_k, lengths, seed, p, scale)

    def tensors(self, other: Tensor) -> list[Tensor]:
        """All of them in the order of the kernels, ``other`` for one that is missing."""
        each = (self.bias, self.slopes, self.pos_q, self.pos_k, self.lengths, self.seed)
        return [other if x is None else x for x in each]

    def bias_strides(self) -> tuple[int, int]:
        """Between heads and between queries."""
        return (0, 0) if self.bias is None else (self.bias.stride(0), self.bias.stride(1))

    def flags(self) -> dict[str, bool]:
        """The kernels' constants."""
        return {
            "HAS_BIAS": self.bias is not None,
            "HAS_SLOPES": self.slopes is not None,
            "HAS_LENGTHS": self.lengths is not None,
            "DROPOUT": self.seed is not None,
        }


def align_bias(bias: Tensor | None) -> Tensor | None:
    """``bias`` [H, Tq, Tk] with rows of a multiple of 16 elements that may be read to their end.

    One that is a view of such rows is returned as it is, any other copied: it has no dim of samples, so it is small.
    """
    if bias is None:
        return None
    H, Tq, Tk = bias.shape
    width = bias.stride(1)
    there = bias.untyped_storage().nbytes() // bias.element_size() - bias.storage_offset()
    strides = bias.stride(2) == 1 and width >= Tk and width % ROW_ALIGNMENT == 0 and bias.stride(0) % ROW_ALIGNMENT == 0
    if strides and (H - 1) * bias.stride(0) + Tq * width <= there and launch.aligned([bias]):
        return bias
    return torch.nn.functional.pad(bias, (0, -Tk % ROW_ALIGNMENT)).contiguous()


def bias_attention_fwd(
    q: Tensor,  # [B, Tq, H, D], unit stride in D, like k and v
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    extras: Extras,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """The result [B, Tq, H, D] in q's dtype, contiguous, and log2 of the sum of exp2 of the logits [B, H, Tq] fp32."""
    B, Tq, H, D = q.shape
    config = config or config_for(q)
    out = torch.empty((B, Tq, H, D), device=q.device, dtype=q.dtype)
    lse = torch.empty((B, H, Tq), device=q.device, dtype=torch.float32)
    if out.numel() > 0:
        tail = config.block_n if extras.lengths is not None else tail_block(k.shape[1], config.block_n)
        with launch.device_guard(q):
            _bias_attention_fwd_kernel[(triton.cdiv(Tq, config.block_m) * B * H,)](
                q,
                k,
                v,
                *extras.tensors(q),
                out,
                lse,
                H,
                Tq,
                k.shape[1],
                *(stride for x in (q, k, v) for stride in x.stride()[:3]),
                *extras.bias_strides(),
                extras.scale,
                drop_threshold(extras.p),
                keep_scale(extras.p) if extras.seed is not None else 1.0,
                **extras.flags(),
                D=D,
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                BLOCK_D=head_block(D),
                TAIL=tail,
                NUM_STAGES=config.num_stages,
                num_warps=config.num_warps,
            )
    return out, lse

"""Triton kernel of attention with an additive bias: the forward.

    logits = scale * q k^T + bias - slope * |pos_q - pos_k|,    o = dropout(softmax(logits)) v

Nothing of the size [B, H, Tq, Tk] is ever in memory. A program owns a tile of queries of a head of a sample and walks
over its keys (Dao et al. 2022); backward is in bias_attention_grad.py. Logits are in units of log 2 throughout: a GPU
has exp2, and exp is that and a product.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2v_fast.kernels import launch
from d2v_fast.kernels.attention_tiles import (
    ROW_ALIGNMENT,
    LaunchConfig,
    config_for,
    drop_threshold,
    find,
    head_block,
    keep_scale,
    keep_tile,
    key_count,
    load_bias,
    load_positions,
    load_rows,
    logits_tile,
    store_rows,
    tail_block,
)


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
    k = load_rows(k_ptr, start, stride_k, num_cols, D, BLOCK_N, BLOCK_D, MASKED)
    distance = tl.abs(pos_q[:, None] - load_positions(pos_k_ptr, cols, num_cols, HAS_SLOPES)[None, :])
    bias = load_bias(bias_ptr, rows, cols, num_rows, stride_bias, HAS_BIAS, MASKED)
    inside = (cols < num_cols)[None, :]
    s = logits_tile(q, k, bias, distance, slope, inside, scale, HAS_BIAS, HAS_SLOPES, MASKED)
    new_peak = tl.maximum(peak, tl.max(s, axis=1))
    base = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # nothing to attend to so far
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(peak - base)
    norm = norm * shrink + tl.sum(p, axis=1)
    if DROPOUT:
        p = tl.where(keep_tile(seed, head, rows, start, threshold, BLOCK_M, BLOCK_N), p, 0.0)
    v = load_rows(v_ptr, start, stride_v, num_cols, D, BLOCK_N, BLOCK_D, MASKED)
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
    first = block * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    length = key_count(lengths_ptr, b, num_k, HAS_LENGTHS)
    q = load_rows(q_ptr + b * stride_q_b + h * stride_q_h, first, stride_q_t, num_q, D, BLOCK_M, BLOCK_D, True)
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
    store_rows(out_ptr + (b * num_q * H + h) * D, first, H * D, num_q, out, D, BLOCK_M, BLOCK_D)
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


def numbers(extras: Extras, tensors: Sequence[Tensor]) -> list[float]:
    """Strides of ``tensors`` [B, T, H, D] and of the bias, scale, threshold and the factor on what dropout keeps."""
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    strides += [0, 0] if extras.bias is None else extras.bias.stride()[:2]
    factor = keep_scale(extras.p) if extras.seed is not None else 1.0
    return [*strides, extras.scale, drop_threshold(extras.p), factor]


def options(q: Tensor, config: LaunchConfig) -> dict[str, int | None]:
    """The constants that follow from ``config`` and the width of ``q`` [B, Tq, H, D], and the launch's own options."""
    return {
        "D": q.shape[3],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": head_block(q.shape[3]),
        "NUM_STAGES": config.num_stages,
        "num_warps": config.num_warps,
        "maxnreg": config.max_registers,
    }


def bias_attention_fwd(
    q: Tensor,  # [B, Tq, H, D], unit stride in D, like k and v
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    extras: Extras,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """The result [B, Tq, H, D] in q's dtype, contiguous, and log2 of the sum of exp2 of the logits [B, H, Tq] fp32."""
    B, Tq, H, D = q.shape
    config = config or config_for(q, k, "fwd")
    tail = config.block_n if extras.lengths is not None else tail_block(k.shape[1], config.block_n)
    if tail == config.block_n:  # a masked tile of full width needs more registers than the others
        config = replace(config, max_registers=255)
    out = torch.empty((B, Tq, H, D), device=q.device, dtype=q.dtype)
    lse = torch.empty((B, H, Tq), device=q.device, dtype=torch.float32)
    if out.numel() > 0:
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
                *numbers(extras, (q, k, v)),
                **extras.flags(),
                **options(q, config),
                TAIL=tail,
            )
    return out, lse

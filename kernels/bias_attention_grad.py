"""Triton kernels of the backward of bias_attention.

The softmax is worked out again from its saved normaliser, in three kernels, none of which needs atomics:

- ``_dq``: a program owns a tile of queries of a head of a sample and walks over its keys. Gradients of queries and, in
  part, of slopes.
- ``_dbias``: a tile of the bias of a head, which stays in registers with its gradient while the program walks over a
  slice of the batch. What is left is [slices, H, Tq, Tk] of partial sums, not [B, H, Tq, Tk].
- ``_dkv``: a tile of keys of a head of a sample, over its queries. Gradients of keys and values.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2v_fast.kernels import launch
from d2v_fast.kernels.attention_tiles import (
    LaunchConfig,
    config_for,
    find,
    grad_logits,
    keep_or_nothing,
    key_count,
    load_bias,
    load_positions,
    load_rows,
    logits_tile,
    store_rows,
    tail_block,
)
from d2v_fast.kernels.bias_attention import Extras, numbers, options
from d2v_fast.kernels.bias_attention_dbias import bias_attention_dbias


@triton.jit
def _row_state(
    out_ptr, lse_ptr, delta_ptr, grad, first, num_q, stride,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The normalisers of rows from ``first`` on, and the products of result and gradient, kept for what follows."""
    rows = first + tl.arange(0, BLOCK_M)
    out = load_rows(out_ptr, first, stride, num_q, D, BLOCK_M, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), axis=1)
    tl.store(delta_ptr + rows, delta, mask=rows < num_q)
    return tl.load(lse_ptr + rows, mask=rows < num_q, other=float("inf")), delta  # a weight of 0 outside


@triton.jit
def _dq_tile(
    grad_q,  # [BLOCK_M, BLOCK_D] fp32, to which this tile's share is added
    grad_slope,  # [BLOCK_M] fp32, likewise
    q,
    grad,
    k_ptr,
    v_ptr,
    lse,
    delta,
    bias_ptr,
    pos_q,
    pos_k_ptr,
    slope,
    seed,
    head,
    rows,
    start,
    num_q,
    length,
    stride_k,
    stride_v,
    stride_bias,
    scale,
    threshold,
    keep_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    DROPOUT: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of keys."""
    cols = start + tl.arange(0, BLOCK_N)
    keep = keep_or_nothing(seed, head, rows, start, threshold, BLOCK_M, BLOCK_N, DROPOUT)
    k = load_rows(k_ptr, start, stride_k, length, D, BLOCK_N, BLOCK_D, MASKED)
    v = load_rows(v_ptr, start, stride_v, length, D, BLOCK_N, BLOCK_D, MASKED)
    distance = tl.abs(pos_q[:, None] - load_positions(pos_k_ptr, cols, length, HAS_SLOPES)[None, :])
    bias = load_bias(bias_ptr, rows, cols, num_q, stride_bias, HAS_BIAS, MASKED)
    inside = (cols < length)[None, :]
    s = logits_tile(q, k, bias, distance, slope, inside, scale, HAS_BIAS, HAS_SLOPES, MASKED)
    grad_s = grad_logits(tl.exp2(s - lse[:, None]), grad, v, delta, keep, keep_scale, inside, DROPOUT, MASKED)
    if HAS_SLOPES:
        grad_slope -= tl.sum(grad_s * distance, axis=1)
    return tl.dot(grad_s.to(k.dtype), k, grad_q, input_precision="ieee"), grad_slope


@triton.jit(do_not_specialize=["num_q", "num_k", "threshold"])
def _bias_attention_dq_kernel(
    grad_ptr,  # [B, Tq, H, D], unit stride in D
    out_ptr,  # [B, Tq, H, D] contiguous
    lse_ptr,  # [B, H, Tq] fp32
    q_ptr,  # q to seed as in forward
    k_ptr,
    v_ptr,
    bias_ptr,
    slopes_ptr,
    pos_q_ptr,
    pos_k_ptr,
    lengths_ptr,
    seed_ptr,
    delta_ptr,  # [B, H, Tq] fp32, written for _dkv
    grad_q_ptr,  # [B, Tq, H, D] contiguous
    grad_slopes_ptr,  # [B, H, blocks] fp32, not written without HAS_SLOPES
    H,
    num_q,
    num_k,
    stride_grad_b,
    stride_grad_t,
    stride_grad_h,
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
    TAIL: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    block, b, h = find(tl.program_id(0), tl.cdiv(num_q, BLOCK_M), H)
    first = block * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    length = key_count(lengths_ptr, b, num_k, HAS_LENGTHS)
    head = b * H + h
    q = load_rows(q_ptr + b * stride_q_b + h * stride_q_h, first, stride_q_t, num_q, D, BLOCK_M, BLOCK_D, True)
    grad_ptr += b * stride_grad_b + h * stride_grad_h
    grad = load_rows(grad_ptr, first, stride_grad_t, num_q, D, BLOCK_M, BLOCK_D, True)
    result = (b * num_q * H + h) * D
    lse, delta = _row_state(
        out_ptr + result,
        lse_ptr + head * num_q,
        delta_ptr + head * num_q,
        grad,
        first,
        num_q,
        H * D,
        D,
        BLOCK_M,
        BLOCK_D,
    )
    k_ptr += b * stride_k_b + h * stride_k_h
    v_ptr += b * stride_v_b + h * stride_v_h
    bias_ptr += h * stride_bias_h
    pos_k_ptr += b * num_k
    pos_q = load_positions(pos_q_ptr + b * num_q, rows, num_q, HAS_SLOPES)
    slope = tl.load(slopes_ptr + h) if HAS_SLOPES else 0.0
    seed = tl.load(seed_ptr) if DROPOUT else 0
    grad_q = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    grad_slope = tl.zeros((BLOCK_M,), dtype=tl.float32)
    whole = length // BLOCK_N * BLOCK_N
    for start in tl.range(0, whole, BLOCK_N, num_stages=NUM_STAGES):
        grad_q, grad_slope = _dq_tile(
            grad_q, grad_slope, q, grad, k_ptr, v_ptr, lse, delta, bias_ptr, pos_q, pos_k_ptr, slope, seed, head, rows,
            start, num_q, length, stride_k_t, stride_v_t, stride_bias_q, scale, threshold, keep_scale,
            HAS_BIAS, HAS_SLOPES, DROPOUT, False, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if TAIL > 0:
        for start in tl.range(whole, length, BLOCK_N, num_stages=1):
            grad_q, grad_slope = _dq_tile(
                grad_q, grad_slope, q, grad, k_ptr, v_ptr, lse, delta, bias_ptr, pos_q, pos_k_ptr, slope, seed, head,
                rows, start, num_q, length, stride_k_t, stride_v_t, stride_bias_q, scale, threshold, keep_scale,
                HAS_BIAS, HAS_SLOPES, DROPOUT, True, D, BLOCK_M, TAIL, BLOCK_D,
            )  # fmt: skip
    store_rows(grad_q_ptr + result, first, H * D, num_q, grad_q * scale, D, BLOCK_M, BLOCK_D)
    if HAS_SLOPES:
        tl.store(grad_slopes_ptr + tl.program_id(0), tl.sum(grad_slope, axis=0))


@triton.jit
def _dkv_tile(
    grad_k,  # [BLOCK_N, BLOCK_D] fp32, like grad_v, to which this tile's share is added
    grad_v,
    k,
    v,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    q_ptr,
    bias_ptr,
    pos_q_ptr,
    pos_k,
    slope,
    seed,
    head,
    first,
    start,
    num_q,
    length,
    stride_grad,
    stride_q,
    stride_bias,
    scale,
    threshold,
    keep_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    MASKED: tl.constexpr,  # columns outside may have to be 0; others than these have results of their own, not stored
    DROPOUT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of queries."""
    rows = first + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, first, stride_q, num_q, D, BLOCK_M, BLOCK_D, True)
    grad = load_rows(grad_ptr, first, stride_grad, num_q, D, BLOCK_M, BLOCK_D, True)
    lse = tl.load(lse_ptr + rows, mask=rows < num_q, other=float("inf"))  # a weight of 0 outside
    delta = tl.load(delta_ptr + rows, mask=rows < num_q, other=0.0)
    distance = tl.abs(load_positions(pos_q_ptr, rows, num_q, HAS_SLOPES)[:, None] - pos_k[None, :])
    cols = start + tl.arange(0, BLOCK_N)
    bias = load_bias(bias_ptr, rows, cols, num_q, stride_bias, HAS_BIAS, True)
    keep = keep_or_nothing(seed, head, rows, start, threshold, BLOCK_M, BLOCK_N, DROPOUT)
    inside = (cols < length)[None, :]
    p = tl.exp2(logits_tile(q, k, bias, distance, slope, inside, scale, HAS_BIAS, HAS_SLOPES, MASKED) - lse[:, None])
    kept = p
    if DROPOUT:
        kept = tl.where(keep, kept, 0.0)
    if MASKED:
        kept = tl.where(inside, kept, 0.0)
    grad_v = tl.dot(tl.trans(kept.to(grad.dtype)), grad, grad_v, input_precision="ieee")
    grad_s = grad_logits(p, grad, v, delta, keep, keep_scale, inside, DROPOUT, MASKED)
    grad_k = tl.dot(tl.trans(grad_s.to(q.dtype)), q, grad_k, input_precision="ieee")
    return grad_k, grad_v


@triton.jit(do_not_specialize=["num_q", "num_k", "threshold"])
def _bias_attention_dkv_kernel(
    grad_ptr,  # as in _dq
    lse_ptr,
    delta_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    slopes_ptr,
    pos_q_ptr,
    pos_k_ptr,
    lengths_ptr,
    seed_ptr,
    grad_k_ptr,  # [B, Tk, H, D] contiguous, like grad_v
    grad_v_ptr,
    H,
    num_q,
    num_k,
    stride_grad_b,
    stride_grad_t,
    stride_grad_h,
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
    NUM_STAGES: tl.constexpr,
):
    block, b, h = find(tl.program_id(0), tl.cdiv(num_k, BLOCK_N), H)
    start = block * BLOCK_N
    cols = start + tl.arange(0, BLOCK_N)
    length = key_count(lengths_ptr, b, num_k, HAS_LENGTHS)
    k = load_rows(k_ptr + b * stride_k_b + h * stride_k_h, start, stride_k_t, length, D, BLOCK_N, BLOCK_D, True)
    v = load_rows(v_ptr + b * stride_v_b + h * stride_v_h, start, stride_v_t, length, D, BLOCK_N, BLOCK_D, True)
    head = b * H + h
    grad_ptr += b * stride_grad_b + h * stride_grad_h
    q_ptr += b * stride_q_b + h * stride_q_h
    lse_ptr += head * num_q
    delta_ptr += head * num_q
    bias_ptr += h * stride_bias_h
    pos_q_ptr += b * num_q
    pos_k = load_positions(pos_k_ptr + b * num_k, cols, num_k, HAS_SLOPES)
    slope = tl.load(slopes_ptr + h) if HAS_SLOPES else 0.0
    seed = tl.load(seed_ptr) if DROPOUT else 0
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    last = tl.where(start < length, num_q, 0)  # nobody attends to a tile behind the last key
    for row in tl.range(0, last, BLOCK_M, num_stages=NUM_STAGES):
        grad_k, grad_v = _dkv_tile(
            grad_k, grad_v, k, v, grad_ptr, lse_ptr, delta_ptr, q_ptr, bias_ptr, pos_q_ptr, pos_k, slope, seed, head,
            row, start, num_q, length, stride_grad_t, stride_q_t, stride_bias_q, scale, threshold, keep_scale,
            HAS_BIAS, HAS_SLOPES, HAS_LENGTHS, DROPOUT, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    result = (b * num_k * H + h) * D
    store_rows(grad_k_ptr + result, start, H * D, num_k, grad_k * scale, D, BLOCK_N, BLOCK_D)
    store_rows(grad_v_ptr + result, start, H * D, num_k, grad_v * keep_scale, D, BLOCK_N, BLOCK_D)


def bias_attention_dq(
    grad: Tensor,  # [B, Tq, H, D], unit stride in D
    out: Tensor,  # [B, Tq, H, D] contiguous
    lse: Tensor,  # [B, H, Tq] fp32
    q: Tensor,  # [B, Tq, H, D], unit stride in D, like k and v
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    extras: Extras,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of q, contiguous, of the slopes [H] fp32 (empty without), and sums of ``grad * out`` [B, H, Tq] fp32."""
    B, Tq, H, _ = q.shape
    config = config or config_for(q, k, "dq")
    blocks = triton.cdiv(Tq, config.block_m)
    delta, grad_q = torch.empty_like(lse), torch.empty(q.shape, device=q.device, dtype=q.dtype)
    parts = torch.empty((B, H, blocks if extras.slopes is not None else 0), device=q.device, dtype=torch.float32)
    values = numbers(extras, (grad, q, k, v))
    tail = config.block_n if extras.lengths is not None else tail_block(k.shape[1], config.block_n)
    with launch.device_guard(q):
        _bias_attention_dq_kernel[(blocks * B * H,)](
            grad, out, lse, q, k, v, *extras.tensors(q), delta, grad_q, parts, H, Tq, k.shape[1], *values,
            **extras.flags(), **options(q, config), TAIL=tail,
        )  # fmt: skip
    return grad_q, parts.new_empty(0) if extras.slopes is None else parts.sum((0, 2)), delta


def bias_attention_dkv(
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,  # [B, H, Tq] fp32, from bias_attention_dq
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extras: Extras,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v, contiguous and in their dtype."""
    B, Tq, H, _ = q.shape
    config = config or config_for(q, k, "dkv")
    grad_k, grad_v = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (k, v))
    values = numbers(extras, (grad, q, k, v))
    with launch.device_guard(q):
        _bias_attention_dkv_kernel[(triton.cdiv(k.shape[1], config.block_n) * B * H,)](
            grad, lse, delta, q, k, v, *extras.tensors(q), grad_k, grad_v, H, Tq, k.shape[1], *values,
            **extras.flags(), **options(q, config),
        )  # fmt: skip
    return grad_k, grad_v


def bias_attention_bwd(
    grad: Tensor,  # [B, Tq, H, D], unit stride in D
    out: Tensor,  # [B, Tq, H, D] contiguous
    lse: Tensor,  # [B, H, Tq] fp32
    q: Tensor,  # [B, Tq, H, D], unit stride in D, like k and v
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    extras: Extras,
    wants_bias: bool,  # its gradient
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous and each in its dtype, of the bias [H, Tq, Tk] fp32 and the slopes [H] fp32.

    The last two are empty where they are not wanted, or there is none.
    """
    if q.numel() * k.numel() == 0:
        shapes = (q.shape[2], q.shape[1], k.shape[1]) if wants_bias else 0, 0 if extras.slopes is None else q.shape[2]
        return *(torch.zeros_like(x) for x in (q, k, v)), *(lse.new_zeros(shape) for shape in shapes)
    grad_q, grad_slopes, delta = bias_attention_dq(grad, out, lse, q, k, v, extras)
    grad_bias = bias_attention_dbias(grad, lse, delta, q, k, v, extras) if wants_bias else lse.new_empty(0)
    grad_k, grad_v = bias_attention_dkv(grad, lse, delta, q, k, v, extras)
    return grad_q, grad_k, grad_v, grad_bias, grad_slopes

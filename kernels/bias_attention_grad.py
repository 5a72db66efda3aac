"""Triton kernels of the backward of bias_attention.

The softmax is worked out again from its saved normaliser, in three kinds of program, none of which needs atomics:

- ``_dq``: a tile of queries of a head of a sample, over its keys. Gradients of queries and, in part, of slopes.
- ``_dbias``: a tile of queries of a head, over a slice of the batch. All keys (up to 256) are walked over in tiles
  whose gradients of the bias stay in registers through the batch, so that this takes [slices, H, Tq, Tk] of memory and
  not [B, H, Tq, Tk]. It sees every key of its queries, so it does the work of ``_dq`` as well; where there are more
  keys, ``_dq`` does.
- ``_dkv``: a tile of keys of a head of a sample, over its queries. Gradients of keys and values.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2v_fast.kernels import launch
from d2v_fast.kernels.bias_attention import (
    ROW_ALIGNMENT,
    Extras,
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

MAX_SLICES = 8  # of the batch; each leaves a gradient of the bias to be added up
_PROGRAMS_PER_SM = 2  # of _dbias: four warps of up to 255 registers


@triton.jit
def _grad_tile(
    x,  # [X, BLOCK_D] queries or, for everything the other way round, keys
    y,  # [Y, BLOCK_D] the others
    grad_x,  # of x: gradients of the result of queries, or values of keys
    grad_y,
    lse,  # [X, 1] or [1, Y], like delta
    delta,
    bias,  # [X, Y], like the next three where they are there
    distance,
    keep,
    inside,
    slope,
    scale,
    keep_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    DROPOUT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """[X, Y]: weights that dropout leaves, without its factor, and the gradient of the logits."""
    p = tl.exp2(logits_tile(x, y, bias, distance, slope, inside, scale, HAS_BIAS, HAS_SLOPES, MASKED) - lse)
    grad_p = tl.dot(grad_x, tl.trans(grad_y), input_precision="ieee")
    kept = p
    if DROPOUT:
        kept = tl.where(keep, p, 0.0)
        grad_p = tl.where(keep, grad_p * keep_scale, 0.0)
    grad_s = p * (grad_p - delta)
    if MASKED:  # also where a row is NaN
        kept = tl.where(inside, kept, 0.0)
        grad_s = tl.where(inside, grad_s, 0.0)
    return kept, grad_s


@triton.jit
def _keep(seed, head, rows, start, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr):
    """:func:`keep_tile`, or anything without dropout."""
    if DROPOUT:
        return keep_tile(seed, head, rows, start, threshold, BLOCK_M, BLOCK_N)
    else:
        return rows[:, None]


@triton.jit
def _row_state(out_ptr, lse_ptr, delta_ptr, grad, rows, num_q, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The normalisers of ``rows``, and the products of result and gradient, which are kept for _dkv."""
    out = load_rows(out_ptr, rows, stride, num_q, D, BLOCK_D, True)
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
    k = load_rows(k_ptr, cols, stride_k, length, D, BLOCK_D, MASKED)
    v = load_rows(v_ptr, cols, stride_v, length, D, BLOCK_D, MASKED)
    distance = tl.abs(pos_q[:, None] - load_positions(pos_k_ptr, cols, length, HAS_SLOPES)[None, :])
    bias = load_bias(bias_ptr, rows, cols, num_q, stride_bias, HAS_BIAS)
    keep = _keep(seed, head, rows, start, threshold, BLOCK_M, BLOCK_N, DROPOUT)
    kept, grad_s = _grad_tile(
        q, k, grad, v, lse[:, None], delta[:, None], bias, distance, keep, (cols < length)[None, :], slope, scale,
        keep_scale, HAS_BIAS, HAS_SLOPES, DROPOUT, MASKED,
    )  # fmt: skip
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
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    length = key_count(lengths_ptr, b, num_k, HAS_LENGTHS)
    head = b * H + h
    q = load_rows(q_ptr + b * stride_q_b + h * stride_q_h, rows, stride_q_t, num_q, D, BLOCK_D, True)
    grad = load_rows(grad_ptr + b * stride_grad_b + h * stride_grad_h, rows, stride_grad_t, num_q, D, BLOCK_D, True)
    result = (b * num_q * H + h) * D
    lse, delta = _row_state(
        out_ptr + result, lse_ptr + head * num_q, delta_ptr + head * num_q, grad, rows, num_q, H * D, D, BLOCK_D
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
    store_rows(grad_q_ptr + result, rows, H * D, num_q, grad_q * scale, D, BLOCK_D)
    if HAS_SLOPES:
        tl.store(grad_slopes_ptr + tl.program_id(0), tl.sum(grad_slope, axis=0))


@triton.jit(do_not_specialize=["B", "num_q", "num_k", "per_slice", "threshold"])
def _bias_attention_dbias_kernel(
    grad_ptr,  # as in _dq
    lse_ptr,
    delta_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    lengths_ptr,
    seed_ptr,
    grad_bias_ptr,  # [slices, H, Tq, width] fp32
    B,
    H,
    num_q,
    num_k,
    per_slice,  # samples
    width,  # of a row, a multiple of 16
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
    HAS_LENGTHS: tl.constexpr,
    DROPOUT: tl.constexpr,
    MASKED: tl.constexpr,  # there may be columns outside
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    # programs of one slice of a head share what they read
    tile, part, h = find(tl.program_id(0), tl.cdiv(num_q, BLOCK_M) * tl.cdiv(num_k, BLOCK_N), H)
    rows = tile // tl.cdiv(num_k, BLOCK_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = tile % tl.cdiv(num_k, BLOCK_N) * BLOCK_N
    cols = start + tl.arange(0, BLOCK_N)
    bias = load_bias(bias_ptr + h * stride_bias_h, rows, cols, num_q, stride_bias_q, True)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first = part * per_slice
    for b in tl.range(first, tl.minimum(first + per_slice, B), num_stages=NUM_STAGES):
        head = b * H + h
        length = key_count(lengths_ptr, b, num_k, HAS_LENGTHS)
        q = load_rows(q_ptr + b * stride_q_b + h * stride_q_h, rows, stride_q_t, num_q, D, BLOCK_D, True)
        grad = load_rows(grad_ptr + b * stride_grad_b + h * stride_grad_h, rows, stride_grad_t, num_q, D, BLOCK_D, True)
        k = load_rows(k_ptr + b * stride_k_b + h * stride_k_h, cols, stride_k_t, length, D, BLOCK_D, True)
        v = load_rows(v_ptr + b * stride_v_b + h * stride_v_h, cols, stride_v_t, length, D, BLOCK_D, True)
        lse = tl.load(lse_ptr + head * num_q + rows, mask=rows < num_q, other=float("inf"))  # a weight of 0 outside
        delta = tl.load(delta_ptr + head * num_q + rows, mask=rows < num_q, other=0.0)
        keep = _keep(seed, head, rows, start, threshold, BLOCK_M, BLOCK_N, DROPOUT)
        kept, grad_s = _grad_tile(
            q, k, grad, v, lse[:, None], delta[:, None], bias, bias, keep, (cols < length)[None, :], 0.0, scale,
            keep_scale, True, False, DROPOUT, MASKED,
        )  # fmt: skip
        total += grad_s
    out = grad_bias_ptr + (part * H + h) * num_q * width + rows.to(tl.int64)[:, None] * width + cols[None, :]
    tl.store(out, total, mask=(rows < num_q)[:, None] & (cols < width)[None, :])


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
    first_row,
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
    DROPOUT: tl.constexpr,
    MASKED_ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of queries."""
    rows = first_row + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, rows, stride_q, num_q, D, BLOCK_D, MASKED_ROWS)
    grad = load_rows(grad_ptr, rows, stride_grad, num_q, D, BLOCK_D, MASKED_ROWS)
    lse = tl.load(lse_ptr + rows, mask=rows < num_q, other=float("inf"))  # a weight of 0 outside
    delta = tl.load(delta_ptr + rows, mask=rows < num_q, other=0.0)
    # keys by queries: both products below then take their first factor from registers
    distance = tl.abs(pos_k[:, None] - load_positions(pos_q_ptr, rows, num_q, HAS_SLOPES)[None, :])
    cols = start + tl.arange(0, BLOCK_N)
    bias = tl.trans(load_bias(bias_ptr, rows, cols, num_q, stride_bias, HAS_BIAS))
    keep = tl.trans(_keep(seed, head, rows, start, threshold, BLOCK_M, BLOCK_N, DROPOUT))
    kept, grad_s = _grad_tile(
        k, q, v, grad, lse[None, :], delta[None, :], bias, distance, keep, (cols < length)[:, None], slope, scale,
        keep_scale, HAS_BIAS, HAS_SLOPES, DROPOUT, MASKED,
    )  # fmt: skip
    grad_v = tl.dot(kept.to(grad.dtype), grad, grad_v, input_precision="ieee")
    grad_k = tl.dot(grad_s.to(q.dtype), q, grad_k, input_precision="ieee")
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
    MASKED: tl.constexpr,  # there may be columns outside
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr,  # queries in the last, partial tile
    NUM_STAGES: tl.constexpr,
):
    block, b, h = find(tl.program_id(0), tl.cdiv(num_k, BLOCK_N), H)
    start = block * BLOCK_N
    cols = start + tl.arange(0, BLOCK_N)
    length = key_count(lengths_ptr, b, num_k, HAS_LENGTHS)
    k = load_rows(k_ptr + b * stride_k_b + h * stride_k_h, cols, stride_k_t, length, D, BLOCK_D, True)
    v = load_rows(v_ptr + b * stride_v_b + h * stride_v_h, cols, stride_v_t, length, D, BLOCK_D, True)
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
    whole = last // BLOCK_M * BLOCK_M
    for row in tl.range(0, whole, BLOCK_M, num_stages=NUM_STAGES):
        grad_k, grad_v = _dkv_tile(
            grad_k, grad_v, k, v, grad_ptr, lse_ptr, delta_ptr, q_ptr, bias_ptr, pos_q_ptr, pos_k, slope, seed, head,
            row, start, num_q, length, stride_grad_t, stride_q_t, stride_bias_q, scale, threshold, keep_scale,
            HAS_BIAS, HAS_SLOPES, DROPOUT, False, MASKED, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if TAIL > 0:
        for row in tl.range(whole, last, BLOCK_M, num_stages=1):
            grad_k, grad_v = _dkv_tile(
                grad_k, grad_v, k, v, grad_ptr, lse_ptr, delta_ptr, q_ptr, bias_ptr, pos_q_ptr, pos_k, slope, seed,
                head, row, start, num_q, length, stride_grad_t, stride_q_t, stride_bias_q, scale, threshold, keep_scale,
                HAS_BIAS, HAS_SLOPES, DROPOUT, True, MASKED, D, TAIL, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    result = (b * num_k * H + h) * D
    store_rows(grad_k_ptr + result, cols, H * D, num_k, grad_k * scale, D, BLOCK_D)
    store_rows(grad_v_ptr + result, cols, H * D, num_k, grad_v * keep_scale, D, BLOCK_D)


def dq_config_for(q: Tensor) -> LaunchConfig:
    """The tiles of _dq for ``q`` [B, Tq, H, D]."""
    return config_for(q)


def dkv_config_for(q: Tensor) -> LaunchConfig:
    """The tiles of _dkv."""
    return config_for(q)


def bias_config_for(q: Tensor) -> LaunchConfig:
    """The tiles of _dbias."""
    return config_for(q)


@lru_cache
def _processors(device: torch.device) -> int:
    # without a GPU this serves offline compilation, for an H100
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def num_slices(B: int, tiles: int, device: torch.device) -> int:
    """Into how many slices _dbias cuts a batch of B, for ``tiles`` tiles of bias: what keeps all processors busy.

    The time of a program is that of its samples; as many run at once as processors hold.
    """
    at_once = _processors(device) * _PROGRAMS_PER_SM
    return min(range(1, min(B, MAX_SLICES) + 1), key=lambda n: (triton.cdiv(tiles * n, at_once) * triton.cdiv(B, n), n))


def _shared(q: Tensor, extras: Extras, tensors: Sequence[Tensor]) -> tuple[list[int], tuple[float, ...]]:
    """Strides of ``tensors`` [B, T, H, D] and of the bias, and the three numbers behind them."""
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    factor = keep_scale(extras.p) if extras.seed is not None else 1.0
    return [*strides, *extras.bias_strides()], (extras.scale, drop_threshold(extras.p), factor)


def _options(q: Tensor, config: LaunchConfig) -> dict[str, int]:
    return {
        "D": q.shape[3],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": head_block(q.shape[3]),
        "NUM_STAGES": config.num_stages,
        "num_warps": config.num_warps,
    }


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
    B, Tq, H, D = q.shape
    config = config or dq_config_for(q)
    blocks = triton.cdiv(Tq, config.block_m)
    delta, grad_q = torch.empty_like(lse), torch.empty(q.shape, device=q.device, dtype=q.dtype)
    parts = torch.empty((B, H, blocks if extras.slopes is not None else 0), device=q.device, dtype=torch.float32)
    strides, numbers = _shared(q, extras, (grad, q, k, v))
    tail = config.block_n if extras.lengths is not None else tail_block(k.shape[1], config.block_n)
    with launch.device_guard(q):
        _bias_attention_dq_kernel[(blocks * B * H,)](
            grad, out, lse, q, k, v, *extras.tensors(q), delta, grad_q, parts, H, Tq, k.shape[1], *strides, *numbers,
            **extras.flags(), **_options(q, config), TAIL=tail,
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
    B, Tq, H, D = q.shape
    config = config or dkv_config_for(q)
    grad_k, grad_v = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (k, v))
    strides, numbers = _shared(q, extras, (grad, q, k, v))
    with launch.device_guard(q):
        _bias_attention_dkv_kernel[(triton.cdiv(k.shape[1], config.block_n) * B * H,)](
            grad, lse, delta, q, k, v, *extras.tensors(q), grad_k, grad_v, H, Tq, k.shape[1], *strides, *numbers,
            **extras.flags(), **_options(q, config), TAIL=tail_block(Tq, config.block_m),
            MASKED=extras.lengths is not None or k.shape[1] % config.block_n > 0,
        )  # fmt: skip
    return grad_k, grad_v


def bias_attention_dbias(
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extras: Extras,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Gradient of the bias [H, Tq, Tk] fp32."""
    B, Tq, H, D = q.shape
    Tk = k.shape[1]
    config = config or bias_config_for(q)
    width = triton.cdiv(Tk, ROW_ALIGNMENT) * ROW_ALIGNMENT
    tiles = triton.cdiv(Tq, config.block_m) * triton.cdiv(Tk, config.block_n) * H
    slices = num_slices(B, tiles, q.device)
    partials = torch.empty((slices, H, Tq, width), device=q.device, dtype=torch.float32)
    strides, numbers = _shared(q, extras, (grad, q, k, v))
    with launch.device_guard(q):
        _bias_attention_dbias_kernel[(tiles * slices,)](
            grad, lse, delta, q, k, v, extras.bias, *(q if x is None else x for x in (extras.lengths, extras.seed)),
            partials, B, H, Tq, Tk, triton.cdiv(B, slices), width, *strides, *numbers,
            HAS_LENGTHS=extras.lengths is not None, DROPOUT=extras.seed is not None,
            MASKED=extras.lengths is not None or Tk % config.block_n > 0, **_options(q, config),
        )  # fmt: skip
    return partials[..., :Tk].sum(0)


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

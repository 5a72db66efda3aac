"""Triton kernel of the gradient of a bias that all samples share; see bias_attention_grad.py."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2v_fast.kernels import launch
from d2v_fast.kernels.attention_tiles import (
    ROW_ALIGNMENT,
    LaunchConfig,
    config_for,
    find,
    grad_logits,
    keep_or_nothing,
    key_count,
    load_bias,
    load_rows,
    logits_tile,
)
from d2v_fast.kernels.bias_attention import Extras, numbers, options

MAX_SLICES = 8  # of the batch; each leaves a gradient of the bias to be added up
_PROGRAMS_PER_SM = 2  # four warps of up to 255 registers


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
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    # programs of one slice of a head share what they read
    tile, part, h = find(tl.program_id(0), tl.cdiv(num_q, BLOCK_M) * tl.cdiv(num_k, BLOCK_N), H)
    first = tile // tl.cdiv(num_k, BLOCK_N) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    start = tile % tl.cdiv(num_k, BLOCK_N) * BLOCK_N
    cols = start + tl.arange(0, BLOCK_N)
    bias = load_bias(bias_ptr + h * stride_bias_h, rows, cols, num_q, stride_bias_q, True, True)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    sample = part * per_slice
    for b in tl.range(sample, tl.minimum(sample + per_slice, B), num_stages=NUM_STAGES):
        head = b * H + h
        length = key_count(lengths_ptr, b, num_k, HAS_LENGTHS)
        q = load_rows(q_ptr + b * stride_q_b + h * stride_q_h, first, stride_q_t, num_q, D, BLOCK_M, BLOCK_D, True)
        grad = grad_ptr + b * stride_grad_b + h * stride_grad_h
        grad = load_rows(grad, first, stride_grad_t, num_q, D, BLOCK_M, BLOCK_D, True)
        k = load_rows(k_ptr + b * stride_k_b + h * stride_k_h, start, stride_k_t, length, D, BLOCK_N, BLOCK_D, True)
        v = load_rows(v_ptr + b * stride_v_b + h * stride_v_h, start, stride_v_t, length, D, BLOCK_N, BLOCK_D, True)
        lse = tl.load(lse_ptr + head * num_q + rows, mask=rows < num_q, other=float("inf"))  # a weight of 0 outside
        delta = tl.load(delta_ptr + head * num_q + rows, mask=rows < num_q, other=0.0)
        keep = keep_or_nothing(seed, head, rows, start, threshold, BLOCK_M, BLOCK_N, DROPOUT)
        inside = (cols < length)[None, :]
        p = tl.exp2(logits_tile(q, k, bias, bias, 0.0, inside, scale, True, False, HAS_LENGTHS) - lse[:, None])
        total += grad_logits(p, grad, v, delta, keep, keep_scale, inside, DROPOUT, HAS_LENGTHS)
    out = grad_bias_ptr + (part * H + h) * num_q * width + rows.to(tl.int64)[:, None] * width + cols[None, :]
    tl.store(out, total, mask=(rows < num_q)[:, None] & (cols < width)[None, :])


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


def bias_attention_dbias(
    grad: Tensor,  # [B, Tq, H, D], unit stride in D
    lse: Tensor,  # [B, H, Tq] fp32
    delta: Tensor,  # [B, H, Tq] fp32, sums of grad * out
    q: Tensor,  # [B, Tq, H, D], unit stride in D, like k and v
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    extras: Extras,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Gradient of the bias [H, Tq, Tk] fp32."""
    B, Tq, H, _ = q.shape
    Tk = k.shape[1]
    config = config or config_for(q, k, "dbias")
    width = triton.cdiv(Tk, ROW_ALIGNMENT) * ROW_ALIGNMENT
    tiles = triton.cdiv(Tq, config.block_m) * triton.cdiv(Tk, config.block_n) * H
    slices = num_slices(B, tiles, q.device)
    partials = torch.empty((slices, H, Tq, width), device=q.device, dtype=torch.float32)
    values = numbers(extras, (grad, q, k, v))
    with launch.device_guard(q):
        _bias_attention_dbias_kernel[(tiles * slices,)](
            grad, lse, delta, q, k, v, extras.bias, *(q if x is None else x for x in (extras.lengths, extras.seed)),
            partials, B, H, Tq, Tk, triton.cdiv(B, slices), width, *values,
            HAS_LENGTHS=extras.lengths is not None, DROPOUT=extras.seed is not None,
            **options(q, config),
        )  # fmt: skip
    return partials[..., :Tk].sum(0)

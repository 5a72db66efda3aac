"""Attention with dropout on the CPU, block by block of heads.

PyTorch has no fused attention with dropout there: it writes the logits, their softmax, a mask and their product for all
heads to memory. Here a block stays in the cache from the logits to its output; backward keeps one tensor of that size,
the softmax, with a negative sign where it is dropped.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from d2v_fast.ops._dropout import kept

BLOCK = 2**18  # logits in a block: 1 MiB in float32


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows of the batch with all heads, or some heads of one row."""
    (B, Tq, H, _), T = q.shape, k.shape[1]
    heads = min(H, max(1, BLOCK // (Tq * T)))
    rows = max(1, BLOCK // (Tq * T * H))
    for b in range(0, B, rows):
        for h in range(0, H, heads):
            yield slice(b, min(b + rows, B)), slice(h, min(h + heads, H))


def _take(x: Tensor, rows: slice, heads: slice) -> Tensor:
    """[B, T, H, D] -> [n, T, D], a view where it is one row's."""
    return x[rows, :, heads].transpose(1, 2).flatten(0, 1)


def _put(into: Tensor, rows: slice, heads: slice, x: Tensor) -> None:
    """[n, T, D] into its place in [B, T, H, D]."""
    place = into[rows, :, heads].transpose(1, 2)
    place.copy_(x.view(place.shape))


def _part(mask: Tensor, rows: slice, heads: slice) -> Tensor:
    """What a mask that broadcasts to [B, H, Tq, T] has for a block."""
    every = slice(None)
    return mask[rows if mask.shape[0] > 1 else every, heads if mask.shape[1] > 1 else every]


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, p):
        y = torch.empty_like(q, memory_format=torch.contiguous_format)
        ctx.scale, ctx.grow = q.shape[-1] ** -0.5, 1 / (1 - p)
        signed = []
        for block in _blocks(q, k):
            logits = torch.bmm(_take(q, *block) * ctx.scale, _take(k, *block).mT)  # [n, Tq, T]
            if mask is not None:
                part = _part(mask, *block)
                logits.view(-1, block[1].stop - block[1].start, *logits.shape[1:]).add_(part)
            weights = torch.softmax(logits, -1)
            signed.append(torch.where(kept(weights.shape, p), weights, -weights))
            weights = torch.clamp(signed[-1], min=0, out=logits)
            _put(y, *block, torch.bmm(weights, _take(v, *block)).mul_(ctx.grow))
        ctx.save_for_backward(q, k, v, mask, *signed)
        return y

    @staticmethod
    def backward(ctx, grad):
        q, k, v, mask, *signed = ctx.saved_tensors
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        grad_mask = torch.zeros_like(mask) if ctx.needs_input_grad[3] else None
        for block, weights in zip(_blocks(q, k), signed, strict=True):
            upstream = _take(grad, *block) * ctx.grow
            grad_v = torch.bmm(weights.clamp(min=0).mT, upstream)
            dropped = torch.ops.aten.threshold_backward(torch.bmm(upstream, _take(v, *block).mT), weights, 0)
            logits = torch.ops.aten._softmax_backward_data(dropped, weights.abs(), -1, weights.dtype)  # their gradient
            if grad_mask is not None:
                part = _part(grad_mask, *block)
                each = logits.view(-1, block[1].stop - block[1].start, *logits.shape[1:])
                part.add_(each.sum_to_size(part.shape))
            _put(grads[0], *block, torch.bmm(logits, _take(k, *block)).mul_(ctx.scale))
            _put(grads[1], *block, torch.bmm(logits.mT, _take(q, *block)).mul_(ctx.scale))
            _put(grads[2], *block, grad_v)
        return *grads, grad_mask, None


def dropped_attention(
    q: Tensor,  # [B, Tq, H, D]
    k: Tensor,  # [B, T, H, D]
    v: Tensor,  # [B, T, H, D]
    mask: Tensor | None,  # broadcasts to [B, H, Tq, T]; added to the logits, or bool, True = keep
    p: float,
) -> Tensor:  # [B, Tq, H, D]
    """Softmax attention with scale 1 / sqrt(D) and dropout of its weights; differentiable, in the mask as well.

    For CPU tensors of one dtype, float32 or float64; every row of a mask keeps a key.
    """
    if mask is not None and mask.dtype == torch.bool:
        mask = q.new_zeros(mask.shape).masked_fill_(~mask, float("-inf"))
    return _Dropped.apply(q, k, v, mask, p)

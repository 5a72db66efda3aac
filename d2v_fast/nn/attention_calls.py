"""How each backend of attention is called. Dense tensors are [B, T, H, D], packed ones [N, H, D]."""

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_fast.nn.sequences import Sequences


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """PyTorch's scaled_dot_product_attention; ``mask`` broadcasts to [B, H, Tq, T]."""
    y = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, dropout_p=p)
    return y.transpose(1, 2)


def logit_mask(
    q: Tensor,  # [B, Tq, H, D]
    bias: Tensor | None,  # [H, Tq, T]
    alibi: tuple[Tensor, Tensor] | None,  # [H], [B, T]
    padding_mask: Tensor | None,  # [B, T]
) -> Tensor | None:
    """What is added to the logits, broadcasting to [B, H, Tq, T]; a bool mask of what to keep where that says it all.

    Rows of padding alone are kept: there would be nothing to divide by.
    """
    mask = None if bias is None else bias[None].to(q.dtype)  # [1, H, Tq, T]
    if alibi is not None:
        slopes, positions = alibi
        distance = (positions[:, :, None] - positions[:, None, :]).abs()  # [B, T, T]
        mask = (-slopes[:, None, None] * distance[:, None]).to(q.dtype)  # [B, H, T, T]
    if padding_mask is not None:
        keep = (~padding_mask | padding_mask.all(1, keepdim=True))[:, None, None]  # [B, 1, 1, T]
        mask = keep if mask is None else mask.masked_fill(~keep, float("-inf"))
    return mask


def each(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, queries: Sequences, p: float) -> Tensor:
    """Packed rows, one sequence after the other: reads the lengths, which costs nothing on the CPU alone."""
    of_keys, of_queries = sequences.cu_seqlens.diff().tolist(), queries.cu_seqlens.diff().tolist()
    parts = zip(q.split(of_queries), k.split(of_keys), v.split(of_keys), strict=True)
    return torch.cat([_one(a, b, c, p) for a, b, c in parts])


def _one(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    if q.shape[0] == 0 or k.shape[0] == 0:
        return q * 0
    return sdpa(q[None], k[None], v[None], None, p)[0]


def padded(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, queries: Sequences, p: float) -> Tensor:
    """Packed rows as a padded batch [U, max_length, H, D] and back, without a look at the lengths on the host."""
    U, T, Tq = sequences.count, sequences.max_length, queries.max_length
    lengths = sequences.cu_seqlens.diff()[:, None]  # [U, 1]
    keep = (torch.arange(T, device=k.device) < lengths) | (lengths == 0)
    to_keys, to_queries = _slots(sequences), _slots(queries)
    keys, values = (x.new_zeros(U * T, *x.shape[1:]).index_copy(0, to_keys, x) for x in (k, v))
    asked = q.new_zeros(U * Tq, *q.shape[1:]).index_copy(0, to_queries, q)
    y = sdpa(*(x.unflatten(0, (U, -1)) for x in (asked, keys, values)), keep[:, None, None], p)
    return y.flatten(0, 1).index_select(0, to_queries)


def _slots(sequences: Sequences) -> Tensor:
    """Row [N] of each packed row in a padded batch of max_length positions a sequence, flattened."""
    cu_seqlens = sequences.cu_seqlens
    rows = torch.arange(sequences.num_rows, dtype=torch.int32, device=cu_seqlens.device)
    which = torch.searchsorted(cu_seqlens[1:], rows, right=True)  # [N]
    return which * sequences.max_length + (rows - cu_seqlens.index_select(0, which))

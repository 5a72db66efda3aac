"""Attention. ``attention`` is the one place that decides how it is computed: by the table in ``attention_backends``."""

import operator
from itertools import pairwise

import torch
from torch import Tensor

from d2v_fast.nn import attention_backends as backends
from d2v_fast.nn.attention_calls import Inputs
from d2v_fast.nn.sequences import Sequences
from d2v_fast.ops._dispatch import check_device, check_float, check_index
from d2v_fast.ops._rows import check_number, check_tensor, wants_grad


def attention(
    q: Tensor,  # [B, Tq, H, D]; packed [M, H, D]
    k: Tensor,  # [B, T, H, D]; packed [N, H, D]
    v: Tensor,  # like k
    *,
    sequences: Sequences | None = None,  # of k and v: rows are packed
    queries: Sequences | None = None,  # of q, if they are others
    bias: Tensor | None = None,  # [H, Tq, T]
    alibi: tuple[Tensor, Tensor] | None = None,  # slopes [H], positions [B, T]
    padding_mask: Tensor | None = None,  # [B, T] bool
    dropout_p: float = 0.0,
    backend: str = "auto",
    strict: bool = False,
) -> Tensor:  # like q
    """``dropout(softmax(q k' / sqrt(D) + bias)) v`` for each head, without a copy of q, k or v.

    Args:
        q: [B, Tq, H, D] queries; float32, bfloat16 or float16 (float64 on the CPU). They may lie anywhere, such as in
            one tensor [B, T, 3, H, D] with the keys and values; only a last dim without unit stride is copied.
        k: [B, T, H, D] keys, of q's dtype.
        v: [B, T, H, D] values.
        sequences: q, k and v are packed rows [N, H, D], and a row attends to those of its own sequence.
        queries: q is packed rows [M, H, D] of these sequences instead, one for each of ``sequences``; some may be
            empty. Queries whose sequence has no keys give 0.
        bias: [H, Tq, T] added to the logits of every sample, of any of the dtypes; it gets its gradient. Dense only.
        alibi: ``-slopes[h] * |positions[b, i] - positions[b, j]|`` is added to the logits, with slopes [H], which get
            their gradient, and positions [B, T] int32 or int64. Dense only, with as many queries as keys.
        padding_mask: [B, T] bool, True = padding, which is never attended to. Dense only. A sample of padding alone
            gives numbers without meaning.
        dropout_p: probability of dropping a weight, in [0, 1); 0 in evaluation. The backends draw different masks,
            all governed by ``torch.manual_seed``.
        backend: "auto" takes the best that is installed, see ``attention_backends.BACKENDS``; or one of its names.
        strict: refuse "auto" to take a slower backend because a better one is not installed.

    Returns:
        [B, Tq, H, D] or [M, H, D] in q's dtype.

    Raises:
        TypeError: q, k, v or the bias of a wrong dtype, ``cu_seqlens`` not int32, mask not bool, positions not integer.
        ValueError: shapes or devices that do not fit, ``bias``, ``alibi`` or ``padding_mask`` with packed rows, both of
            the first two, ``dropout_p`` outside of [0, 1), an unknown backend or one that cannot do this. What
            ``cu_seqlens`` hold is only looked at on the CPU; elsewhere it would wait for the device.
        RuntimeError: ``strict``, and a better backend is not installed; the message says which.
    """
    _check(q, k, v, sequences, queries, dropout_p)
    if sequences is None:
        _check_dense(q, k, bias, alibi, padding_mask)
    else:
        extra = {"bias": bias, "alibi": alibi, "padding_mask": padding_mask}
        for name in (name for name, x in extra.items() if x is not None):
            raise ValueError(f"{name} must be None for packed rows")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    index = backends.backend_index(
        backend,
        strict,
        q.device.index or 0,
        q.device.type,
        q.dtype,
        operator.index(q.shape[-1]),  # a number, also where torch.compile takes sizes for unknown
        sequences is not None,
        queries is not None,
        True if dropout_p > 0 else False,  # noqa: SIM210  # a branch: a constant in torch.compile
        "dense" if bias is not None else "none" if alibi is None else "alibi",
        padding_mask is not None,
        wants_grad(q, k, v, bias, None if alibi is None else alibi[0]),
        torch.compiler.is_compiling(),
        torch.are_deterministic_algorithms_enabled(),
    )
    queries = sequences if queries is None else queries
    inputs = Inputs(q, k, v, sequences, queries, bias, alibi, padding_mask, float(dropout_p))
    return backends.BACKENDS[index].call(inputs)


def _check(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences | None, queries: Sequences | None, dropout_p: float
) -> None:
    form, dims = ("[B, T, H, D]", 4) if sequences is None else ("[N, H, D]", 3)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
        check_float(name, x)
        if x.dim() != dims or 0 in x.shape[-2:]:
            raise ValueError(f"{name} must be {form}, got shape {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must be {q.dtype} like q, got {x.dtype}")
        check_device(name, x, q.device)
    if k.shape[-2:] != q.shape[-2:] or (sequences is None and k.shape[0] != q.shape[0]):
        raise ValueError(f"k must have the samples, heads and channels of q {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have shape {tuple(k.shape)} like k, got {tuple(v.shape)}")
    check_number("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    if sequences is not None:
        _check_sequences("sequences", sequences, k)
        if queries is None and q.shape != k.shape:
            raise ValueError(f"q must have shape {tuple(k.shape)} like k without queries, got {tuple(q.shape)}")
        if queries is not None:
            _check_sequences("queries", queries, q)
            if queries.count != sequences.count:
                raise ValueError(f"queries must be {sequences.count} sequences like those of keys, got {queries.count}")
    elif queries is not None:
        raise ValueError("queries must be None without sequences of keys")


def _check_sequences(name: str, sequences: Sequences, x: Tensor) -> None:
    """Raise unless ``sequences`` are sequences of the rows x [N, H, D]."""
    cu_seqlens, N = sequences.cu_seqlens, x.shape[0]
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name}.cu_seqlens must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"{name}.cu_seqlens must be [U + 1] with U at least 1, got {tuple(cu_seqlens.shape)}")
    check_device(f"{name}.cu_seqlens", cu_seqlens, x.device)
    if sequences.num_rows != N:
        raise ValueError(f"{name} must be of the {N} rows there are, got {sequences.num_rows}")
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return
    ends = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(ends)]
    if ends[0] != 0 or ends[-1] != N or min(lengths) < 0:
        raise ValueError(f"{name}.cu_seqlens must rise from 0 to {N} and never fall, got {ends}")
    if max(lengths) > sequences.max_length:
        raise ValueError(f"{name}.max_length must be at least {max(lengths)}, got {sequences.max_length}")


def _check_dense(
    q: Tensor, k: Tensor, bias: Tensor | None, alibi: tuple[Tensor, Tensor] | None, padding_mask: Tensor | None
) -> None:
    (B, Tq, H, _), T = q.shape, k.shape[1]
    if bias is not None:
        check_tensor("bias", bias)
        check_float("bias", bias)
        check_device("bias", bias, q.device)
        if bias.shape != (H, Tq, T):
            raise ValueError(f"bias must have shape {(H, Tq, T)}, got {tuple(bias.shape)}")
    if alibi is not None:
        slopes, positions = alibi
        if bias is not None:
            raise ValueError("bias must be None with alibi")
        check_float("slopes", slopes)
        check_device("slopes", slopes, q.device)
        check_index("positions", positions, q.device)
        if slopes.shape != (H,) or positions.shape != (B, T) or Tq != T:
            raise ValueError(
                f"alibi must be slopes [{H}] and positions {[B, T]}, with {T} queries like keys, "
                f"got {tuple(slopes.shape)}, {tuple(positions.shape)} and {Tq}"
            )
    if padding_mask is not None:
        if padding_mask.dtype != torch.bool:
            raise TypeError(f"padding_mask must be bool, got {padding_mask.dtype}")
        if padding_mask.shape != (B, T):
            raise ValueError(f"padding_mask must have shape {(B, T)}, got {tuple(padding_mask.shape)}")
        check_device("padding_mask", padding_mask, q.device)

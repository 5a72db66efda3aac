"""How each backend of attention is called: one function each, from :class:`Inputs` to a tensor like q.

All of them compute softmax(q k' / sqrt(D) + bias) v. None reads the device, with the two exceptions that say so.
"""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from itertools import groupby, repeat
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from d2v_fast import ops
from d2v_fast.nn.sequences import Sequences


class Inputs(NamedTuple):
    """The arguments of :func:`d2v_fast.nn.attention.attention`; ``queries`` is always there when rows are packed."""

    q: Tensor  # [B, Tq, H, D]; packed [M, H, D]
    k: Tensor  # [B, T, H, D]; packed [N, H, D]
    v: Tensor  # like k
    sequences: Sequences | None = None
    queries: Sequences | None = None
    bias: Tensor | None = None  # [H, Tq, T]
    alibi: tuple[Tensor, Tensor] | None = None  # [H], [B, T]
    padding_mask: Tensor | None = None  # [B, T]
    dropout_p: float = 0.0

    @property
    def scale(self) -> float:
        """Factor on the logits, of the head dim before any padding."""
        return self.q.shape[-1] ** -0.5


def load(module: str, name: str) -> Callable[..., Tensor]:
    """``module.name`` of a package that may not be installed."""
    return getattr(importlib.import_module(module), name)


# torch.compile runs it while tracing: what torch.compiler.assume_constant_result does, which imports the compiler
load._dynamo_marked_constant = True


def _lengths(x: Inputs) -> tuple[Tensor, Tensor, int, int]:
    """Ends of the sequences of queries and keys, and the longest of each: the order of every varlen function.

    Lengths are at least 1: where no query is asked for, a grid of no blocks could not be launched.
    """
    ends = x.queries.cu_seqlens, x.sequences.cu_seqlens
    return *ends, max(1, x.queries.max_length), max(1, x.sequences.max_length)


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output alone: some releases return the rows' log-sum-exp with it."""
    return result[0] if isinstance(result, tuple) else result


def fa2(x: Inputs) -> Tensor:
    """FlashAttention 2, the package flash-attn."""
    options = {"dropout_p": x.dropout_p, "deterministic": torch.are_deterministic_algorithms_enabled()}
    if x.sequences is None:
        return load("flash_attn", "flash_attn_func")(x.q, x.k, x.v, **options)
    return load("flash_attn", "flash_attn_varlen_func")(x.q, x.k, x.v, *_lengths(x), **options)


def fa3(x: Inputs) -> Tensor:
    """FlashAttention 3 for Hopper, the module flash_attn_interface."""
    package, options = "flash_attn_interface", {"deterministic": torch.are_deterministic_algorithms_enabled()}
    if x.sequences is None:
        return _first(load(package, "flash_attn_func")(x.q, x.k, x.v, **options))
    return _first(load(package, "flash_attn_varlen_func")(x.q, x.k, x.v, *_lengths(x), **options))


def fa4(x: Inputs) -> Tensor:
    """FlashAttention 4, the package flash-attn-4."""
    package, options = "flash_attn.cute", {"deterministic": torch.are_deterministic_algorithms_enabled()}
    if x.sequences is None:
        return _first(load(package, "flash_attn_func")(x.q, x.k, x.v, **options))
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    options.update(zip(names, _lengths(x), strict=True))
    return _first(load(package, "flash_attn_varlen_func")(x.q, x.k, x.v, **options))


def _padded_heads(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with zeros up to the next multiple of 8 channels, which changes no product."""
    missing = -x.q.shape[-1] % 8
    return (x.q, x.k, x.v) if missing == 0 else tuple(F.pad(y, (0, missing)) for y in (x.q, x.k, x.v))


def torch_varlen(x: Inputs) -> Tensor:
    """PyTorch's ``varlen_attn``: FlashAttention 2, or what has been activated in its place."""
    from torch.nn.attention.varlen import varlen_attn

    y = varlen_attn(*_padded_heads(x), *_lengths(x), scale=x.scale)
    return y[..., : x.q.shape[-1]]


def aten_flash(x: Inputs) -> Tensor:
    """The operator behind PyTorch's flash attention: packed rows and dropout, which no public function has together."""
    y, *_ = torch.ops.aten._flash_attention_forward(
        *_padded_heads(x), *_lengths(x), x.dropout_p, False, False, scale=x.scale
    )
    return y[..., : x.q.shape[-1]]


def aten_efficient(x: Inputs) -> Tensor:
    """The operator behind PyTorch's memory-efficient attention: packed rows also in float32."""
    q, k, v = (y[None] for y in _padded_heads(x))
    backward = torch.is_grad_enabled() and any(y.requires_grad for y in (q, k, v))
    y, *_ = torch.ops.aten._efficient_attention_forward(
        q, k, v, None, *_lengths(x), x.dropout_p, 0, backward, scale=x.scale
    )
    return y[0, ..., : x.q.shape[-1]]


def xformers(x: Inputs) -> Tensor:
    """xformers' memory-efficient attention. Packed, its mask is made on the host, which waits for the device."""
    call = load("xformers.ops.fmha", "memory_efficient_attention")
    if x.sequences is None:
        return call(x.q, x.k, x.v, p=x.dropout_p)
    lengths = (s.cu_seqlens.diff().tolist() for s in (x.queries, x.sequences))
    mask = load("xformers.ops.fmha.attn_bias", "BlockDiagonalMask").from_seqlens(*lengths, device=x.q.device)
    return call(x.q[None], x.k[None], x.v[None], attn_bias=mask, p=x.dropout_p)[0]


def bias_attention(x: Inputs) -> Tensor:
    """Our kernel: the bias and its gradient without a tensor of the logits' size."""
    slopes, positions = x.alibi or (None, None)
    return ops.bias_attention(x.q, x.k, x.v, x.bias, slopes=slopes, positions=positions, p=x.dropout_p)


def flex(x: Inputs) -> Tensor:
    """PyTorch's FlexAttention with the bias looked up in the kernel; its gradient is summed in no fixed order."""
    from torch.nn.attention.flex_attention import flex_attention

    def add_bias(score, b, h, i, j):
        if x.alibi is None:
            return score + x.bias[h, i, j]
        slopes, positions = x.alibi
        return score - slopes[h] * (positions[b, i] - positions[b, j]).abs()

    function = flex_attention if torch.compiler.is_compiling() or x.q.device.type == "cpu" else _compiled_flex()
    score_mod = add_bias if x.bias is not None or x.alibi is not None else None
    return function(*(y.transpose(1, 2) for y in (x.q, x.k, x.v)), score_mod=score_mod).transpose(1, 2)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention is one fused kernel only after ``torch.compile``."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def sdpa(x: Inputs) -> Tensor:
    """PyTorch's scaled_dot_product_attention, which chooses among its own backends."""
    y = F.scaled_dot_product_attention(
        *(y.transpose(1, 2) for y in (x.q, x.k, x.v)), attn_mask=logit_mask(x), dropout_p=x.dropout_p
    )
    return y.transpose(1, 2)


def _only(backend: SDPBackend, x: Inputs) -> AbstractContextManager:
    """A context in which scaled_dot_product_attention takes ``backend``; none of the fast ones takes empty tensors."""
    return sdpa_kernel(SDPBackend.MATH if 0 in (*x.q.shape, *x.k.shape) else backend)


def sdpa_flash(x: Inputs) -> Tensor:
    """FlashAttention 2 through scaled_dot_product_attention."""
    with _only(SDPBackend.FLASH_ATTENTION, x):
        return sdpa(x)


def sdpa_cudnn(x: Inputs) -> Tensor:
    """cuDNN's attention through scaled_dot_product_attention; it builds a plan for every new shape."""
    with _only(SDPBackend.CUDNN_ATTENTION, x):
        return sdpa(x)


def sdpa_efficient(x: Inputs) -> Tensor:
    """Memory-efficient attention; a bias becomes a tensor of the logits' size, and so does its gradient."""
    with _only(SDPBackend.EFFICIENT_ATTENTION, x):
        return sdpa(x)


def sdpa_math(x: Inputs) -> Tensor:
    """Matrix products and a softmax, one after the other."""
    with sdpa_kernel(SDPBackend.MATH):
        return sdpa(x)


def logit_mask(x: Inputs) -> Tensor | None:
    """What is added to the logits, broadcasting to [B, H, Tq, T]; a bool mask of what to keep where that says it all.

    Rows of padding alone are kept: there would be nothing to divide by.
    """
    mask = None if x.bias is None else x.bias[None].to(x.q.dtype)  # [1, H, Tq, T]
    if x.alibi is not None:
        slopes, positions = x.alibi
        distance = (positions[:, :, None] - positions[:, None, :]).abs()  # [B, T, T]
        mask = (-slopes[:, None, None] * distance[:, None]).to(x.q.dtype)  # [B, H, T, T]
    if x.padding_mask is not None:
        keep = (~x.padding_mask | x.padding_mask.all(1, keepdim=True))[:, None, None]  # [B, 1, 1, T]
        mask = keep if mask is None else mask.masked_fill(~keep, float("-inf"))
    return mask


def by_sample(x: Inputs) -> Tensor:
    """For dropout on the CPU: products and softmax of one sample at a time, whose weights then stay in the cache.

    16 random bits a weight decide what is dropped; PyTorch's dropout takes longer than the products.
    """
    if x.q.shape[0] == 0:
        return sdpa(x)
    q, k, v = (y.transpose(1, 2).unbind() for y in (x.q * x.scale, x.k, x.v))  # B x [H, T, D]
    mask = logit_mask(x)
    masks = repeat(None) if mask is None else mask.expand(len(q), *mask.shape[1:]).unbind()
    y = torch.stack([_one_sample(*sample, x.dropout_p) for sample in zip(q, k, v, masks)])  # noqa: B905
    return y.transpose(1, 2)


def _one_sample(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    logits = q @ k.mT  # [H, Tq, T]
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    weights = logits.softmax(-1)
    limit = round(p * 2**16)
    if limit == 0:
        return weights @ v
    words = torch.empty(-(-weights.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.int16)[: weights.numel()].view_as(weights) >= limit - 2**15
    return (weights * keep) @ (v / (1 - limit / 2**16))


def each(x: Inputs) -> Tensor:
    """Packed rows, equal neighbours together: reads the lengths, which is free on the CPU alone."""
    lengths = list(zip(*(s.cu_seqlens.diff().tolist() for s in (x.queries, x.sequences)), strict=True))
    runs = [(len(list(run)), *pair) for pair, run in groupby(lengths)]  # (sequences, queries in each, keys in each)
    of_queries, of_keys = ([count * lengths[i] for count, *lengths in runs] for i in range(2))
    parts = zip(runs, x.q.split(of_queries), x.k.split(of_keys), x.v.split(of_keys), strict=True)
    return torch.cat([_equal(*run, q, k, v, x.dropout_p) for run, q, k, v in parts])


def _equal(count: int, queries: int, keys: int, q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    if queries == 0 or keys == 0:
        return q.masked_fill(torch.ones((), dtype=torch.bool), 0.0)  # zeros with a gradient, of zeros
    inputs = Inputs(*(y.unflatten(0, (count, -1)) for y in (q, k, v)), dropout_p=p)
    call = by_sample if p > 0 and q.dtype.itemsize >= 4 else sdpa  # as the table has it
    return call(inputs).flatten(0, 1)


def padded(x: Inputs) -> Tensor:
    """Packed rows as a padded batch [U, max_length, H, D] and back, without a look at the lengths on the host."""
    U, T, Tq = x.sequences.count, x.sequences.max_length, x.queries.max_length
    padding = torch.arange(T, device=x.k.device) >= x.sequences.cu_seqlens.diff()[:, None]  # [U, T]
    to_keys, to_queries = _slots(x.sequences), _slots(x.queries)
    k, v = (y.new_zeros(U * T, *y.shape[1:]).index_copy(0, to_keys, y) for y in (x.k, x.v))
    q = x.q.new_zeros(U * Tq, *x.q.shape[1:]).index_copy(0, to_queries, x.q)
    batch = (y.unflatten(0, (U, -1)) for y in (q, k, v))
    y = sdpa(Inputs(*batch, padding_mask=padding, dropout_p=x.dropout_p))
    return y.flatten(0, 1).index_select(0, to_queries)


def _slots(sequences: Sequences) -> Tensor:
    """Row [N] of each packed row in a padded batch of max_length positions a sequence, flattened."""
    cu_seqlens = sequences.cu_seqlens
    rows = torch.arange(sequences.num_rows, dtype=torch.int32, device=cu_seqlens.device)
    which = torch.searchsorted(cu_seqlens[1:], rows, right=True)  # [N]
    return which * sequences.max_length + (rows - cu_seqlens.index_select(0, which))

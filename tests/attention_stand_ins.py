"""Packages that compute attention, as stand-ins: real functions' arguments by their names, and their results."""

import sys
from types import ModuleType

import torch
import torch.nn.functional as F


def stand_in(monkeypatch, name, **attributes):
    """A package of this name."""
    module = ModuleType(name)
    vars(module).update(attributes)
    for parent in (name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)):
        monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent, ModuleType(parent)))
    monkeypatch.setitem(sys.modules, name, module)


def attend(q, k, v, scale=None):
    """[B, T, H, D]."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2)


def attend_rows(q, k, v, ends_q, ends_k, max_q, max_k, scale=None):
    assert ends_q.dtype == ends_k.dtype == torch.int32
    lengths_q, lengths_k = ends_q.diff().tolist(), ends_k.diff().tolist()
    assert max(lengths_q) <= max_q and max(lengths_k) <= max_k
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    return torch.cat([attend(*(x[None] for x in part), scale)[0] for part in parts])


class Seen(dict):
    """The options of the last call."""


def fake_fa2(seen):
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        seen.update(dropout_p=dropout_p, deterministic=deterministic)
        return attend(q, k, v)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        seen.update(dropout_p=dropout_p, deterministic=deterministic)
        return attend_rows(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)

    return "flash_attn", {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}


def fake_fa3(seen):
    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        seen.update(deterministic=deterministic)
        return attend(q, k, v)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        seen.update(deterministic=deterministic)
        y = attend_rows(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return y, torch.empty(0)  # as the first releases did

    functions = {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}
    return "flash_attn_interface", functions


def fake_fa4(seen):
    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    ):  # fmt: skip
        seen.update(deterministic=deterministic)
        return attend(q, k, v), None

    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
        softmax_scale=None, causal=False, deterministic=False,
    ):  # fmt: skip
        seen.update(deterministic=deterministic)
        return attend_rows(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), None

    return "flash_attn.cute", {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}


def fake_xformers(seen):
    class BlockDiagonalMask:
        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
            mask = cls()
            mask.lengths = q_seqlen, kv_seqlen
            return mask

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        seen.update(dropout_p=p)
        if attn_bias is None:
            return attend(query, key, value)
        ends = [torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in attn_bias.lengths]
        return attend_rows(query[0], key[0], value[0], *ends, *map(max, attn_bias.lengths))[None]

    bias = ModuleType("attn_bias")
    bias.BlockDiagonalMask = BlockDiagonalMask
    functions = {"memory_efficient_attention": memory_efficient_attention, "attn_bias": bias}
    return "xformers.ops.fmha", functions

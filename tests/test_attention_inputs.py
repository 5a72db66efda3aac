"""Bad arguments of attention."""

import re
from dataclasses import replace

import pytest
import torch
from attention_cases import (
    H,
    sequences_of,
)

from d2v_fast.nn.attention import attention


def good(packed=False):
    x = torch.randn(12, H, 8) if packed else torch.randn(2, 6, H, 8)
    arguments = {"q": x, "k": x, "v": x}
    return {**arguments, "sequences": sequences_of([7, 5])} if packed else arguments


BAD = [
    ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
    ({"q": torch.zeros(2, 6, H, 8, dtype=torch.int32)}, TypeError, "q must be float32, bfloat16 or float16"),
    (
        {"k": torch.zeros(2, 6, H, 8, dtype=torch.bfloat16)},
        TypeError,
        "k must be torch.float32 like q, got torch.bfloat16",
    ),
    ({"q": torch.zeros(6, H, 8)}, ValueError, "q must be [B, T, H, D], got shape (6, 3, 8)"),
    ({"v": torch.zeros(2, 6, H, 0)}, ValueError, "v must be [B, T, H, D], got shape (2, 6, 3, 0)"),
    ({"q": torch.zeros(2, 6, 2, 8)}, ValueError, "k must have the samples, heads and channels of q (2, 6, 2, 8)"),
    ({"q": torch.zeros(1, 6, H, 8)}, ValueError, "k must have the samples, heads and channels of q (1, 6, 3, 8)"),
    ({"v": torch.zeros(2, 5, H, 8)}, ValueError, "v must have shape (2, 6, 3, 8) like k, got (2, 5, 3, 8)"),
    ({"v": torch.zeros(2, 6, H, 8, device="meta")}, ValueError, "v must be on cpu, got meta"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p must lie in [0, 1), got 1.0"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p must lie in [0, 1), got -0.1"),
    ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a number, got str"),
    ({"queries": sequences_of([3, 3])}, ValueError, "queries must be None without sequences of keys"),
    ({"bias": torch.zeros(H, 6, 5)}, ValueError, "bias must have shape (3, 6, 6), got (3, 6, 5)"),
    ({"bias": torch.zeros(H, 6, 6, dtype=torch.int64)}, TypeError, "bias must be float32, bfloat16 or float16"),
    ({"padding_mask": torch.zeros(2, 6)}, TypeError, "padding_mask must be bool, got torch.float32"),
    (
        {"padding_mask": torch.zeros(2, 5, dtype=torch.bool)},
        ValueError,
        "padding_mask must have shape (2, 6), got (2, 5)",
    ),
    ({"alibi": (torch.zeros(H), torch.zeros(2, 6))}, TypeError, "positions must be int32 or int64, got torch.float32"),
    ({"alibi": (torch.zeros(2), torch.zeros(2, 6, dtype=torch.int32))}, ValueError, "alibi must be slopes [3]"),
    (
        {"bias": torch.zeros(H, 6, 6), "alibi": (torch.zeros(H), torch.zeros(2, 6, dtype=torch.int32))},
        ValueError,
        "bias must be None with alibi",
    ),
    ({"backend": "fast"}, ValueError, "backend must be 'auto' or one of 'bias_attention', 'fa3', "),
    ({"backend": "each"}, ValueError, "backend 'each' cannot compute this attention (takes packed tensors, not dense)"),
    ({"backend": "fa2"}, ValueError, "(runs on cuda, not on cpu); these can: sdpa, sdpa_math"),
]
KEYS = sequences_of([7, 5])
BAD_PACKED = [
    ({"k": torch.zeros(2, 6, H, 8)}, ValueError, "k must be [N, H, D], got shape (2, 6, 3, 8)"),
    ({"bias": torch.zeros(H, 6, 6)}, ValueError, "bias must be None for packed rows"),
    ({"padding_mask": torch.zeros(2, 6, dtype=torch.bool)}, ValueError, "padding_mask must be None for packed rows"),
    ({"alibi": (torch.zeros(H), torch.zeros(2, 6))}, ValueError, "alibi must be None for packed rows"),
    ({"queries": sequences_of([4, 4])}, ValueError, "queries must be of the 12 rows there are, got 8"),
    ({"queries": sequences_of([4, 4, 4])}, ValueError, "queries must be 2 sequences like those of keys, got 3"),
    ({"q": torch.zeros(9, H, 8)}, ValueError, "q must have shape (12, 3, 8) like k without queries, got (9, 3, 8)"),
    (
        {"sequences": replace(KEYS, cu_seqlens=torch.tensor([0, 7, 12]))},
        TypeError,
        "sequences.cu_seqlens must be int32",
    ),
    (
        {"sequences": replace(KEYS, cu_seqlens=KEYS.cu_seqlens[None])},
        ValueError,
        "sequences.cu_seqlens must be [U + 1] with U at least 1, got (1, 3)",
    ),
    (
        {"sequences": replace(KEYS, cu_seqlens=KEYS.cu_seqlens.to("meta"))},
        ValueError,
        "sequences.cu_seqlens must be on cpu, got meta",
    ),
    ({"sequences": replace(KEYS, num_rows=11)}, ValueError, "sequences must be of the 12 rows there are, got 11"),
    ({"sequences": replace(KEYS, max_length=6)}, ValueError, "sequences.max_length must be at least 7, got 6"),
    *(
        (
            {"sequences": replace(KEYS, cu_seqlens=torch.tensor(ends, dtype=torch.int32))},
            ValueError,
            f"sequences.cu_seqlens must rise from 0 to 12 and never fall, got {ends}",
        )
        for ends in ([0, 13, 12], [1, 7, 12], [0, 7, 11])
    ),
]


@pytest.mark.parametrize(("changed", "kind", "message"), BAD)
def test_bad_input(changed, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        attention(**{**good(), **changed})


@pytest.mark.parametrize(("changed", "kind", "message"), BAD_PACKED)
def test_bad_packed_input(changed, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        attention(**{**good(packed=True), **changed})

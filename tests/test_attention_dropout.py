"""Dropout of the weights of attention."""

import pytest
import torch
from attention_cases import (
    H,
    check,
    check_dropout,
    dropped_weights,
    math_attention,
    random,
)

from d2v_fast.nn.attention import attention


@pytest.mark.parametrize(
    ("backend", "packed"),
    [
        ("sdpa", False),
        ("sdpa_math", False),
        ("bias_attention", False),
        ("by_sample", False),
        ("each", True),
        ("padded", True),
    ],
)
def test_dropout(backend, packed):
    p = 0.3
    torch.manual_seed(1)
    weights = dropped_weights(backend, packed, p)
    check_dropout(weights, p)
    torch.manual_seed(1)
    assert torch.equal(dropped_weights(backend, packed, p), weights)
    assert not torch.equal(dropped_weights(backend, packed, p), weights)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("extra", ["none", "bias", "alibi"])
def test_dropout_of_a_known_mask(extra, padded):
    """Dropped weights are read off with the identity as values; result and gradients are those of that mask."""
    B, T, p = 2, 16, 0.25
    leaves = {"qkv": random(B, T, 3, H, T)}
    if extra == "bias":
        leaves["bias"] = random(H, T, T)
    elif extra == "alibi":
        leaves["slopes"] = random(H)
    positions = torch.randperm(T).expand(B, T)
    padding = torch.arange(T) >= torch.tensor([[T], [T - 3]])

    def options(bias=None, slopes=None):
        alibi = None if slopes is None else (slopes, positions)
        return {"bias": bias, "alibi": alibi, "padding_mask": padding if padded else None}

    def call(qkv, **more):
        torch.manual_seed(1)
        return attention(*qkv.unbind(2), **options(**more), dropout_p=p, backend="by_sample")

    seen = leaves["qkv"].detach().clone()
    seen[:, :, 2] = torch.eye(T)[:, None]
    with torch.no_grad():
        weights = call(seen, **{name: x for name, x in leaves.items() if name != "qkv"}).transpose(1, 2)
    keep = (weights != 0).double() / (1 - p)
    assert (keep == 0).any() and (keep != 0).any()
    check(call, lambda qkv, **more: math_attention(*qkv.unbind(2), **options(**more), keep=keep.to(qkv.dtype)), leaves)


@pytest.mark.parametrize("backend", ["by_sample", "sdpa"])
def test_dropout_so_rare_that_it_never_happens(backend):
    q, k, v = torch.randn(2, 8, 3, H, 16).unbind(2)
    got = attention(q, k, v, dropout_p=1e-9, backend=backend)
    torch.testing.assert_close(got, attention(q, k, v), rtol=1e-5, atol=1e-6)

"""Attention in plain PyTorch, and the comparison with it in float64."""

import pytest
import torch
from checks import assert_as_accurate_as_eager

from d2v_fast.nn.attention import attention
from d2v_fast.nn.sequences import Sequences

H = 3
LENGTHS = [5, 7, 0, 1, 30, 7, 7]
ASKED = [2, 0, 1, 1, 11, 3, 3]


def math_attention(q, k, v, bias=None, alibi=None, padding_mask=None, keep=None):
    """[B, T, H, D], step by step in the dtype of q; rows without keys give 0. ``keep`` is a mask of kept weights."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    logits = q @ k.mT / q.shape[-1] ** 0.5
    if bias is not None:
        logits = logits + bias
    if alibi is not None:
        slopes, positions = alibi
        logits = logits - slopes[:, None, None] * (positions[:, None, :, None] - positions[:, None, None, :]).abs()
    if padding_mask is not None:
        logits = logits.masked_fill(padding_mask[:, None, None, :], float("-inf"))
    weights = logits.softmax(-1)
    return ((weights if keep is None else weights * keep) @ v).transpose(1, 2)


def math_packed(q, k, v, asked, lengths):
    """Each sequence alone."""
    parts = zip(q.split(asked), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat(
        [math_attention(*(x[None] for x in part))[0] if part[1].numel() else part[0] * 0 for part in parts]
    )


def sequences_of(lengths, device="cpu"):
    """Unlike ``Sequences.from_lengths``, some may be empty."""
    ends = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    return Sequences(ends, max(lengths), sum(lengths))


def random(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, device=device).to(dtype).requires_grad_()


def check(call, math, leaves, factor=2.0):
    """Result and gradients of ``call`` against ``math`` in float64; the yardstick is the error of ``math``.

    Both take the tensors of the dict ``leaves`` by name.
    """
    exact = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    outputs = call(**leaves), math(**leaves), math(**exact)
    upstream = torch.randn_like(outputs[0])
    grads = [
        torch.autograd.grad(y, list(xs.values()), upstream.to(y.dtype))
        for y, xs in zip(outputs, (leaves, leaves, exact), strict=True)
    ]
    assert outputs[0].dtype == next(iter(leaves.values())).dtype
    for name, *results in zip(
        ["output", *leaves], *([y, *gs] for y, gs in zip(outputs, grads, strict=True)), strict=True
    ):
        try:
            assert_as_accurate_as_eager(*results, factor=factor)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def check_dense(backend, dtype=torch.float32, B=2, T=13, D=16, extra="none", padded=False, device="cpu"):
    leaves = {"qkv": random(B, T, 3, H, D, dtype=dtype, device=device)}
    positions = torch.arange(T, device=device).mul(3).remainder(T).expand(B, T).to(torch.int32)
    padding = torch.arange(T, device=device) >= torch.tensor([[T], *[[T - 3]] * (B - 1)], device=device)
    if extra == "bias":
        leaves["bias"] = random(H, T, T, device=device)
    elif extra == "alibi":
        leaves["slopes"] = random(H, device=device)

    def options(bias=None, slopes=None):
        alibi = None if slopes is None else (slopes, positions)
        return {"bias": bias, "alibi": alibi, "padding_mask": padding if padded else None}

    def math(qkv, **more):
        more = {name: x.to(qkv.dtype) for name, x in more.items()}
        return math_attention(*qkv.unbind(2), **options(**more))

    check(lambda qkv, **more: attention(*qkv.unbind(2), **options(**more), backend=backend), math, leaves)


def check_packed(backend, dtype=torch.float32, D=16, lengths=LENGTHS, asked=None, device="cpu"):
    keys, queries = sequences_of(lengths, device), sequences_of(asked, device) if asked else None
    leaves = {"kv": random(keys.num_rows, 2, H, D, dtype=dtype, device=device)}
    leaves["q"] = random(sum(asked or lengths), H, D, dtype=dtype, device=device)

    def call(kv, q):
        return attention(q, *kv.unbind(1), sequences=keys, queries=queries, backend=backend)

    check(call, lambda kv, q: math_packed(q, *kv.unbind(1), asked or lengths, lengths), leaves)


def dropped_weights(backend, packed, p, T=96, device="cpu", dtype=torch.float32):
    """The weights [U, H, T, T] after dropout, where all were 1 / T before; times T."""
    U, D = 3, T
    v = torch.eye(T, device=device, dtype=dtype)[None, :, None].expand(U, T, H, D).contiguous()
    q = torch.zeros_like(v)
    if packed:
        rows = (x.flatten(0, 1) for x in (q, q, v))
        sequences = Sequences.even(U, T, torch.device(device))
        y = attention(*rows, sequences=sequences, dropout_p=p, backend=backend).unflatten(0, (U, T))
    else:
        y = attention(q, q, v, dropout_p=p, backend=backend)
    return y.transpose(1, 2).double() * T


def check_dropout(weights, p):
    kept = weights != 0
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=0.01)
    torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], 1 / (1 - p)), rtol=1e-2, atol=0)
    rows = kept.flatten(0, 2).double()
    assert (rows.mean(1) - (1 - p)).abs().max() < 0.25 and len(rows.unique(dim=0)) == len(rows)  # each draws its own

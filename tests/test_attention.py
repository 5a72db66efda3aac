"""Attention against float64: dense and packed, biases, masks, other queries than keys; and which backend is taken."""

import pytest
import torch

from d2v_fast.nn.attention import attention
from d2v_fast.nn.attention_calls import Inputs, each, padded
from d2v_fast.nn.sequences import Sequences


def math_attention(q, k, v, bias=None, padding_mask=None):
    """[B, T, H, D] in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    logits = q @ k.mT / q.shape[-1] ** 0.5
    if bias is not None:
        logits = logits + bias.double()
    if padding_mask is not None:
        logits = logits.masked_fill(padding_mask[:, None, None, :], float("-inf"))
    return (logits.softmax(-1).nan_to_num() @ v).transpose(1, 2)


def math_packed(q, k, v, of_keys, of_queries):
    parts = zip(q.split(of_queries), k.split(of_keys), v.split(of_keys), strict=True)
    return torch.cat([math_attention(*(x[None] for x in part))[0] for part in parts])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_dense(biased, padded):
    q, k, v = torch.randn(3, 2, 13, 4, 8, requires_grad=True).unbind()
    bias = torch.randn(4, 13, 13, requires_grad=True) if biased else None
    padding = torch.arange(13) >= torch.tensor([[13], [9]]) if padded else None
    got, want = attention(q, k, v, bias=bias, padding_mask=padding), math_attention(q, k, v, bias, padding)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(got)
    inputs = [q, k, v] + ([bias] if biased else [])
    for a, b in zip(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(want, inputs, upstream.double()), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def pack(lengths):
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Sequences(ends, max(lengths), sum(lengths))


@pytest.mark.parametrize("call", [each, padded])
@pytest.mark.parametrize("asked", [None, [2, 0, 1, 3, 0]])
def test_packed(call, asked):
    lengths = [5, 7, 0, 1, 9]
    sequences, queries = pack(lengths), pack(asked or lengths)
    q = torch.randn(queries.num_rows, 3, 8, requires_grad=True)
    k, v = torch.randn(2, sequences.num_rows, 3, 8, requires_grad=True).unbind()
    got, want = call(Inputs(q, k, v, sequences, queries)), math_packed(q, k, v, lengths, asked or lengths)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, [q, k, v], upstream),
        torch.autograd.grad(want, [q, k, v], upstream.double()),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

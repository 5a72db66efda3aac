"""Attention with dropout on the CPU: against float64 with the same mask, statistics, and dropout itself."""

import pytest
import torch
from checks import assert_as_accurate_as_eager

from d2v_fast.nn import attention_cpu
from d2v_fast.nn.attention_cpu import dropped_attention
from d2v_fast.ops._dropout import dropout, kept


def restated(q, k, v, mask, keep, p):
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    logits = logits if mask is None else logits + mask
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1) * keep / (1 - p), v)


@pytest.fixture
def drawn(monkeypatch):
    """The masks of the blocks, in the order in which they are drawn."""
    masks = []

    def remember(shape, p):
        masks.append(kept(shape, p))
        return masks[-1]

    monkeypatch.setattr(attention_cpu, "kept", remember)
    return masks


@pytest.mark.parametrize("mask_shape", [None, (1, 4, 5, 7), (3, 1, 1, 7), (3, 4, 5, 7)])
@pytest.mark.parametrize("block", [1, 70, 300, 2**18], ids="block{}".format)
def test_values_and_gradients(block, mask_shape, drawn, monkeypatch):
    monkeypatch.setattr(attention_cpu, "BLOCK", block)
    B, Tq, T, H, p = 3, 5, 7, 4, 0.3
    fused = torch.randn(B, T, 3, H, 8)  # strided, as slices of one product are
    inputs = [fused[:, :Tq, 0], fused[:, :, 1], fused[:, :, 2]] + (
        [] if mask_shape is None else [torch.randn(mask_shape)]
    )
    inputs = [x.requires_grad_() for x in inputs]
    mask = inputs[3] if mask_shape else None
    y = dropped_attention(*inputs[:3], mask, p)
    keep = torch.empty(B, H, Tq, T)
    for (rows, heads), part in zip(attention_cpu._blocks(*inputs[:2]), drawn, strict=True):
        keep[rows, heads] = part.view(keep[rows, heads].shape).float()
    eager = restated(*inputs[:3], mask, keep, p)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    exact = restated(*doubles[:3], doubles[3] if mask_shape else None, keep.double(), p)
    upstream = torch.randn_like(y)
    assert_as_accurate_as_eager(y, eager, exact)
    for got, want, wanted in zip(
        torch.autograd.grad(y, inputs, upstream),
        torch.autograd.grad(eager, inputs, upstream),
        torch.autograd.grad(exact, doubles, upstream.double()),
        strict=True,
    ):
        assert_as_accurate_as_eager(got, want, wanted)


def test_bool_mask(drawn):
    q, k, v = torch.randn(3, 2, 6, 3, 8).unbind()
    keep = torch.tensor([6, 4])[:, None, None, None] > torch.arange(6)
    got = dropped_attention(q, k, v, keep, 0.2)
    hidden = torch.zeros(keep.shape).masked_fill(~keep, float("-inf"))
    want = restated(q, k, v, hidden, drawn[0].view(2, 3, 6, 6), 0.2)
    torch.testing.assert_close(got, want)


def test_mean_is_attention_without_dropout():
    q, k, v = torch.randn(3, 1, 16, 2, 8).unbind()
    mean = torch.stack([dropped_attention(q, k, v, None, 0.4) for _ in range(2000)]).mean(0)
    want = restated(q, k, v, None, torch.ones(()), 0.0)
    assert (mean - want).abs().max() < 0.12


@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
@pytest.mark.parametrize("shape", [(300, 333), (100_001,), (0, 4)])
def test_dropout(shape, p):
    x = torch.ones(shape, requires_grad=True)
    y = dropout(x, p)
    y.backward(torch.full_like(y, 3.0))
    assert y.shape == shape and torch.equal(x.grad, 3 * y)
    assert ((y == 0) | (y - 1 / (1 - p)).abs().lt(1e-5 / (1 - p))).all()
    if x.numel():
        assert (y == 0).double().mean().item() == pytest.approx(p, abs=0.006)
        assert (y[:-1] == 0).ne(y[1:] == 0).double().mean().item() == pytest.approx(2 * p * (1 - p), abs=0.01)
        assert not torch.equal(dropout(x, p), y)


def test_dropout_follows_the_seed():
    x = torch.ones(1000)
    torch.manual_seed(3)
    first = dropout(x, 0.2)
    torch.manual_seed(3)
    assert torch.equal(first, dropout(x, 0.2)) and torch.equal(dropout(x, 0.0), x)

"""Dropout on the CPU: rate, values, gradient, independence of neighbours, seed."""

import pytest
import torch

from d2v_fast.ops._dropout import dropout


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

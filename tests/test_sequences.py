"""Sequences without padding: tables, taking and putting rows, fixed numbers of rows."""

import numpy as np
import pytest
import torch

from d2v_fast.nn.sequences import Sequences


def lists(s: Sequences) -> list:
    return [s.cu_seqlens.tolist(), s.max_length, s.num_rows]


MASK = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 1]], bool)


def test_tables():
    assert lists(Sequences.even(3, 4)) == [[0, 4, 8, 12], 4, 12]
    assert lists(Sequences.from_lengths([3, 1, 2])) == [[0, 3, 4, 6], 3, 6]
    masked = Sequences.from_mask(MASK)
    assert lists(masked) == [[0, 3, 3, 5], 3, 5] and masked.rows.tolist() == [0, 2, 3, 11, 14] and masked.real is None
    assert masked.count == 3 and masked.cu_seqlens.dtype == torch.int32 and masked.rows.dtype == torch.int64
    moved = masked.map(lambda x: x + 1)
    assert moved.cu_seqlens.tolist() == [1, 4, 4, 6] and moved.rows.tolist() == [1, 3, 4, 12, 15] and moved.real is None


def test_take_and_put():
    masked, x = Sequences.from_mask(MASK), torch.randn(15, 2, requires_grad=True)
    rows = masked.take(x)
    assert torch.equal(rows, x.view(3, 5, 2)[torch.from_numpy(MASK)])
    back = masked.put(rows, torch.zeros(15, 2))
    assert torch.equal(back, x * torch.from_numpy(MASK).view(15, 1))
    upstream = torch.randn(15, 2)
    (grad,) = torch.autograd.grad(back, x, upstream)
    assert torch.equal(grad, upstream * torch.from_numpy(MASK).view(15, 1))


@pytest.mark.parametrize("num_rows", [5, 6, 12, 15])
def test_fixed_number_of_rows(num_rows):
    tail = Sequences.from_mask(MASK, num_rows=num_rows)
    ends, real = tail.cu_seqlens.numpy(), tail.real.numpy()
    assert tail.count == 3 + -(-num_rows // 5) and tail.max_length == 5
    assert ends[:4].tolist() == [0, 3, 3, 5] and ends[-1] == num_rows and np.diff(ends).min() >= 0
    assert np.diff(ends).max() <= 5
    assert tail.rows[:5].tolist() == [0, 2, 3, 11, 14] and real.tolist() == [True] * 5 + [False] * (num_rows - 5)


def test_bad_input():
    with pytest.raises(ValueError, match=r"lengths must be \[U\] with every sequence at least 1 long, got \[3, 0\]"):
        Sequences.from_lengths([3, 0])
    with pytest.raises(ValueError, match="lengths must be"):
        Sequences.from_lengths(np.zeros(0, int))
    with pytest.raises(TypeError, match="lengths must be integers, got float64"):
        Sequences.from_lengths([1.5])
    with pytest.raises(TypeError, match="mask must be bool, got int64"):
        Sequences.from_mask(MASK.astype(int))
    with pytest.raises(ValueError, match=r"mask must be \[B, T\]"):
        Sequences.from_mask(MASK[:0])
    with pytest.raises(ValueError, match="num_rows must be at least 5 for this mask, got 4"):
        Sequences.from_mask(MASK, num_rows=4)

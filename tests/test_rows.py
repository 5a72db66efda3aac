"""Rows [N, C] of tensors of any layout, as the ops on the last dim see them."""

import pytest
import torch

from d2v_fast.ops import _rows


@pytest.mark.parametrize(
    ("view", "copied"),
    [
        (lambda x: x, False),
        (lambda x: x[..., :5], False),
        (lambda x: x[0], False),
        (lambda x: x[0, 0], False),
        (lambda x: x[:, :1, :5], False),
        (lambda x: x[1:, :, 2:], False),
        (lambda x: x[:1, :1, :5].expand(4, 6, 5), False),
        (lambda x: x[:0], False),
        (lambda x: x[:, 1:], True),
        (lambda x: x[:, ::2, :5], False),
        (lambda x: x[..., ::2], True),
        (lambda x: x[..., :1], False),
        (lambda x: x.mT[..., :1], True),
        (lambda x: x[..., :1].expand(3, 4, 6), True),
        (lambda x: x.mT, True),
        (lambda x: x.transpose(0, 1), True),
        (lambda x: x[:1].transpose(0, 1), False),
        (lambda x: x[0].mT, True),
    ],
)
def test_rows_are_copied_at_most_once(view, copied):
    x = view(torch.randn(3, 4, 8))
    got = _rows.in_rows(x)
    assert torch.equal(got, x)
    assert (got is not x) == copied and got.is_contiguous() >= copied
    rows = _rows.as_rows(got)
    assert rows.data_ptr() == got.data_ptr()  # whatever was to be copied has been
    assert rows.stride(1) == 1
    assert torch.equal(rows, x.reshape(-1, x.shape[-1]))


def test_copy_is_differentiable():
    x = torch.randn(3, 4, 8, requires_grad=True)
    upstream = torch.randn(3, 8, 4)
    (grad,) = torch.autograd.grad(_rows.in_rows(x.mT), x, upstream)
    assert torch.equal(grad, upstream.mT)

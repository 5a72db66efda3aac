"""Inputs of the fused loss, and what it is held to in float64."""

import torch
from checks import DEVICE, assert_as_accurate_as_eager
from eager_targets import eager_loss, eager_spread, eager_targets

from d2v_fast.ops import data2vec_loss

F32 = torch.float32


def make_pred(N, C, dtype=F32, mean=0.0):
    """Rows that are wider apart than C."""
    return (mean + 1.5 * torch.randn(N, C + 8)).to(DEVICE, dtype)[:, :C]


def fused(pred, layers, positions, upstream=1.0, **options):
    """(LossOutput, gradient of pred for the given upstream gradient)."""
    pred = pred.detach().requires_grad_()
    out = data2vec_loss(pred, layers, positions, **options)
    (grad,) = torch.autograd.grad(out.loss * upstream, pred)
    return out, grad


def teacher_rows(positions, clones, T):
    """Positions of the student's batch as positions of the teacher's."""
    if clones is None:
        return positions
    return clones[(positions // T).long()] * T + positions % T


def check_against_fp64(pred, layers, positions, *, clones=None, upstream=None, **options):
    upstream = torch.randn(()).item() if upstream is None else upstream
    got, grad = fused(pred, layers, positions, upstream, target_batch_index=clones, **options)
    assert got.loss.dtype == F32 and grad.dtype == pred.dtype and grad.is_contiguous()
    assert not got.target_var.requires_grad and not got.pred_var.requires_grad and got.num_masked == pred.shape[0]

    kept = positions >= 0
    assert not grad[~kept].any()
    pred, positions, grad = pred[kept], positions[kept], grad[kept]
    beta, scale = options.pop("beta", 0.0), options.pop("scale", None)
    scale = 1.0 if scale is None else scale
    options.setdefault("norm", "instance")
    options["positions"] = teacher_rows(positions, clones, layers[0].shape[1])

    def plain(dtype):
        p = pred.detach().to(dtype).requires_grad_()
        target = eager_targets([x.to(dtype) for x in layers], **options)
        loss = eager_loss(p, target, beta, scale)
        (grad,) = torch.autograd.grad(loss, p)
        return loss.detach(), grad, eager_spread(target), eager_spread(p.detach())

    eager, exact = plain(F32), plain(torch.float64)
    rounded = eager[1].to(pred.dtype).float() * upstream  # the gradient is rounded twice, as documented
    assert_as_accurate_as_eager(got.loss, eager[0], exact[0])
    assert_as_accurate_as_eager(grad, rounded.to(pred.dtype), exact[1] * upstream)
    assert_as_accurate_as_eager(got.target_var, eager[2], exact[2])
    assert_as_accurate_as_eager(got.pred_var, eager[3], exact[3])

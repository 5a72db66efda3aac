"""Targets and loss in plain PyTorch, independent of the ops' references: torch's own norms and losses."""

import torch
import torch.nn.functional as F
from checks import DEVICE
from torch import Tensor

EPS = 1e-5


def make_layers(K, B, T, C, dtype=torch.float32, mean=1.0):
    """K layer results whose channels differ in mean and spread, one class-token row in front of the frames."""
    shift, spread = mean * torch.randn(C), 0.3 + torch.rand(C)
    return [(shift + spread * torch.randn(B, 1 + T, C)).to(DEVICE, dtype)[:, 1:] for _ in range(K)]


def some_positions(B, T, dtype=torch.int32):
    return (torch.rand(B * T) < 0.4).nonzero()[:, 0].to(DEVICE, dtype)


def one_norm(x: Tensor, norm: str, lengths: list[int] | None) -> Tensor:
    """Sequence by sequence where lengths count."""
    B, T, C = x.shape
    if norm == "layer":
        return F.layer_norm(x, (C,), eps=EPS)
    if norm == "none":
        return x
    if norm == "batch":
        valid = x.flatten(0, 1) if lengths is None else torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)])
        var, mean = torch.var_mean(valid, 0, correction=0)
        return F.batch_norm(x.flatten(0, 1), mean, var, eps=EPS).view(B, T, C)
    if lengths is None:
        return F.instance_norm(x.transpose(1, 2), eps=EPS).transpose(1, 2)
    rows = []
    for row, n in zip(x, lengths, strict=True):
        var, mean = torch.var_mean(row[:n], 0, correction=0)
        rows.append((row - mean) / (var + EPS).sqrt())
    return torch.stack(rows)


def eager_targets(layers, norm, post_norm="none", positions=None, lengths=None):
    lengths = None if lengths is None else lengths.tolist()
    y = sum(one_norm(x, norm, lengths) for x in layers) / len(layers)
    y = one_norm(y, post_norm, lengths)
    return y if positions is None else y.flatten(0, 1)[positions.long()]


def eager_loss(pred: Tensor, target: Tensor, beta: float, scale: float) -> Tensor:
    if beta == 0:
        return F.mse_loss(pred, target, reduction="sum") * scale
    return F.smooth_l1_loss(pred, target, reduction="sum", beta=beta) * scale


def eager_spread(y: Tensor) -> Tensor:
    """fairseq's ``compute_var`` on one process."""
    return (y.var(dim=0) + 1e-6).sqrt().mean()

"""Dropout on the CPU. PyTorch draws a Bernoulli number an element there, on one core, which takes longer than most of
what is around it; here an element is dropped by 32 random bits, two elements a draw."""

import torch
import torch.nn.functional as F
from torch import Tensor


def kept(shape: torch.Size, p: float) -> Tensor:
    """Bool, on the CPU, False with probability ``p``, which counts in steps of 2**-32; from PyTorch's generator."""
    count = shape.numel()
    words = torch.randint(-(2**63), 2**63 - 1, (-(-count // 2),))  # 64 bits each
    least = min(round(p * 2**32), 2**32 - 1) - 2**31
    return (words.view(torch.int32)[:count] >= least).view(shape)


def dropout(x: Tensor, p: float) -> Tensor:
    """``F.dropout`` in training, with other draws on the CPU."""
    if p == 0 or x.device.type != "cpu":
        return F.dropout(x, p)
    return x * kept(x.shape, p) * (1 / (1 - p))

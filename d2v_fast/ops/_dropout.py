"""Dropout on the CPU. PyTorch draws a Bernoulli number an element there, on one core, which takes longer than most of
what is around it; here an element is dropped by 32 random bits, two elements a draw."""

import torch
import torch.nn.functional as F
from torch import Tensor


def dropout(x: Tensor, p: float) -> Tensor:
    """``F.dropout`` in training; on the CPU with other draws of the same generator, and ``p`` in steps of 2**-32."""
    if p == 0 or x.device.type != "cpu":
        return F.dropout(x, p)
    words = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 2),))  # 64 bits each
    limit = min(round(p * 2**32), 2**32 - 1) - 2**31
    keep = words.view(torch.int32)[: x.numel()].view(x.shape) >= limit
    return x * keep * (1 / (1 - p))

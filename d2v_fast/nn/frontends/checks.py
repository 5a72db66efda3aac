"""What the front-ends check about their inputs."""

from typing import Any

import torch
from torch import Tensor


def check_tensor(name: str, x: Any) -> None:
    """Raise TypeError unless ``x`` is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")


def check_dtype(name: str, x: Tensor, weight: Tensor) -> None:
    """Raise TypeError unless ``x`` is floating-point like ``weight``, or autocast will make them alike."""
    if x.dtype == weight.dtype:
        return
    casts = x.is_floating_point() and torch.float64 not in (x.dtype, weight.dtype)
    if not (casts and torch.is_autocast_enabled(x.device.type)):
        raise TypeError(f"{name} must be {weight.dtype}, as the model's weights are, got {x.dtype}")

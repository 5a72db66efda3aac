"""Shared by every op: what the CPU key runs, and the checks that all public functions make."""

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

# Triton reads the same variable when it defines its kernels, so the two always agree.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cpu_runs_triton(dtype: torch.dtype) -> bool:
    """Whether CPU tensors of ``dtype`` go through the interpreted Triton kernels instead of the reference.

    float64 always takes the reference: it exists for ``gradcheck``, and the kernels accumulate in float32.
    """
    return INTERPRET and dtype in KERNEL_DTYPES


@cache
def has_triton() -> bool:
    """Whether Triton is installed; without it, ops that have a fast multi-tensor form in PyTorch use that on a GPU."""
    return importlib.util.find_spec("triton") is not None


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 as soon as one tensor is float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_float(name: str, x: Tensor) -> None:
    """Raise TypeError unless ``x`` has a dtype that the kernels take (float64 is taken on CPU only)."""
    if x.dtype not in KERNEL_DTYPES and x.dtype != torch.float64:
        raise TypeError(f"{name} must be float32, bfloat16 or float16 (float64 on CPU), got {x.dtype}")
    if x.dtype == torch.float64 and x.device.type != "cpu":
        raise TypeError(f"{name} must not be float64 on {x.device.type}: the kernels accumulate in float32")


def check_index(name: str, x: Tensor, device: torch.device) -> None:
    """Raise unless ``x`` is an int32 or int64 tensor on ``device``."""
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {x.dtype}")
    check_device(name, x, device)


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    """Raise ValueError unless ``x`` is on ``device``."""
    if x.device != device:
        raise ValueError(f"{name} must be on {device}, got {x.device}")


def check_scalar(name: str, x: Tensor, device: torch.device) -> None:
    """Raise unless ``x`` is a float32 or float64 tensor of shape [] on ``device``."""
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be a float32 or float64 tensor, got {x.dtype}")
    if x.dim() != 0:
        raise ValueError(f"{name} must have shape [], got {tuple(x.shape)}")
    check_device(name, x, device)

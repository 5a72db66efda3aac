"""Shared by the ops on the last dim of [..., C]: rows without copies where possible, and checks of arguments."""

from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from d2v_fast.ops._dispatch import accumulation_dtype, check_device, check_float, cpu_runs_triton

MAX_WIDTH = 65536  # columns; the kernels hold a row in one tile


def runs_reference(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a public function is plain, differentiable PyTorch for ``x``, computed in ``dtype``.

    It is on the CPU, where the Python of a registered op takes longer than the work of a small model's layer.
    """
    return x.device.type != "cuda" and not cpu_runs_triton(dtype)


def accumulation(*tensors: Tensor | None) -> torch.dtype:
    """:func:`accumulation_dtype` of the tensors that are there."""
    return accumulation_dtype(*(v for v in tensors if v is not None))


def as_rows(x: Tensor) -> Tensor:
    """[..., C] as [N, C] with unit stride in the last dim; copies only where a view cannot give that."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def in_rows(x: Tensor) -> Tensor:
    """``x`` where :func:`as_rows` does not copy it, otherwise a contiguous copy (differentiable).

    For an op that keeps ``x``: the copy of the forward is the one that backward reads.
    """
    if x.is_contiguous():
        return x
    dims = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1]
    even = all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(dims))
    return x if even and x.stride(-1) == 1 else x.contiguous()


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward may follow for one of the tensors that are there."""
    return torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)


def dense(v: Tensor | None) -> Tensor | None:
    """A vector in contiguous memory, as the kernels read it."""
    return None if v is None else v.contiguous()


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in ``dtype``; those that have it are returned as they are, without a microsecond of dispatch each."""
    return [v if v is None or v.dtype == dtype else v.to(dtype) for v in tensors]


def empty_like_rows(x: Tensor) -> Tensor:
    """Contiguous output of x's shape and dtype, for fake implementations."""
    return torch.empty(x.shape, device=x.device, dtype=x.dtype)


def stack(grads: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """Gradients of the vectors that are there, [K, C]: one tensor, so that kernels sum all of them in one launch."""
    there = [v for v in grads if v is not None]
    return torch.stack(there) if there else like.new_empty(0, like.shape[-1])


def unstack(grads: Tensor, *vectors: Tensor | None) -> list[Tensor | None]:
    """The gradient of each vector, in its dtype; None for one that is missing."""
    each = iter(grads.unbind(0))
    return [None if v is None else next(each).to(v.dtype) for v in vectors]


def empty_stack(x: Tensor, dtype: torch.dtype, *vectors: Tensor | None) -> Tensor:
    """Output like that of :func:`stack`, for fake implementations."""
    return x.new_empty((sum(v is not None for v in vectors), x.shape[-1]), dtype=dtype)


def check_tensor(name: str, x: Any) -> None:
    """Raise TypeError unless ``x`` is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")


def check_number(name: str, x: Any) -> None:
    """Raise TypeError unless ``x`` is a real number of Python or NumPy."""
    if not isinstance(x, Real):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")


def check_integer(name: str, x: Any) -> int:
    """``x`` as an int; TypeError unless it is an integer of Python or NumPy (a bool is none)."""
    if not isinstance(x, Integral) or isinstance(x, bool):
        raise TypeError(f"{name} must be an integer, got {type(x).__name__}")
    return x if isinstance(x, int) else int(x)


def check_rows(name: str, x: Tensor) -> None:
    """Raise unless ``x`` is a floating point tensor [..., C] with 1 <= C <= MAX_WIDTH."""
    check_tensor(name, x)
    check_float(name, x)
    if x.dim() == 0 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"{name} must be [..., C] with C from 1 to {MAX_WIDTH}, got shape {tuple(x.shape)}")


def check_vector(name: str, v: Tensor | None, size: int, device: torch.device) -> None:
    """Raise unless ``v`` is None or a floating point tensor [size] on ``device``."""
    if v is None:
        return
    check_tensor(name, v)
    check_float(name, v)
    if v.shape != (size,):
        raise ValueError(f"{name} must have shape ({size},), got {tuple(v.shape)}")
    check_device(name, v, device)


def check_eps(eps: float) -> None:
    """Raise unless ``eps`` is a positive number."""
    check_number("eps", eps)
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps}")

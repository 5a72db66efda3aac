"""Two implementations on the same weights and inputs: how they are compared, and the float64 they are judged by."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

TOLERANCE = 1e-5  # of float32 results: norm of the difference over the norm, each tensor by itself


def relative(a: Tensor, b: Tensor) -> float:
    """Size of a - b, as a share of b."""
    return ((a - b).norm() / b.norm()).item()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """The gradient of every parameter under its name in ``state_dict``, zeros where it got none."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}


def assert_equal(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float = TOLERANCE) -> None:
    """Every tensor of ``got`` is that of ``want``; all that are not are named, with their differences."""
    differences = {name: (x - want[name]).norm().item() for name, x in got.items()}
    sizes = {name: want[name].norm().item() for name in got}
    failed = {name: (x, sizes[name]) for name, x in differences.items() if not x <= tolerance * sizes[name]}
    assert not failed, f"(difference, size): {failed}"


@contextmanager
def float64() -> Iterator[None]:
    """Models that are made inside are float64, and stay so where their code asks for at least float32."""
    keep, default = torch.Tensor.float, torch.get_default_dtype()
    torch.Tensor.float = lambda x: x if x.dtype == torch.float64 else keep(x)
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.Tensor.float = keep
        torch.set_default_dtype(default)

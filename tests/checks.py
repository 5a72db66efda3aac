"""Shared test settings, and the one accuracy rule that every op is held to."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from d2v_fast.ops._dispatch import INTERPRET

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"
RUNS_KERNELS = INTERPRET or DEVICE == "cuda"  # otherwise the ops run their reference


def assert_as_accurate_as_eager(
    actual: Tensor, eager: Tensor, exact: Tensor, factor: float = 2.0, floor: float = 1e-6
) -> None:
    """The error against the float64 answer may be ``factor`` times PyTorch's own, plus ``floor`` of its size."""
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    exact = exact.double().to(actual.device)
    error = (actual.double() - exact).abs().max().item()
    budget = factor * (eager.double().to(actual.device) - exact).abs().max().item()
    budget += floor * exact.abs().max().item()
    assert error <= budget, f"error {error:.3e} > budget {budget:.3e}"  # NaN fails as well


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """An error from PyTorch for whatever waits for the GPU inside."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")

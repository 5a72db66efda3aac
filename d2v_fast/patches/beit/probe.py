"""Trying ours beside what it replaces, for code that is known by its structure and not by its source."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-2  # of results that may be small differences of large numbers; another formula is far from it


@contextmanager
def trial(module: nn.Module) -> Iterator[torch.Generator]:
    """Evaluate ``module`` inside: no dropout, gradient, autocast or random numbers of others; gives a generator."""
    modes = [(each, each.training) for each in module.modules()]
    device = next(module.parameters()).device.type
    module.eval()
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield torch.Generator().manual_seed(0)
    finally:
        for each, mode in modes:
            each.training = mode


def random_like(x: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Normal numbers of ``shape`` in the dtype and on the device of ``x``."""
    return torch.randn(tuple(shape), generator=generator).to(x)


def difference(got: Any, want: Any) -> str | None:
    """Where results, tensors or lists of them, differ by more than rounding; None where they do not."""
    if isinstance(want, (list, tuple)):
        if not isinstance(got, (list, tuple)) or len(got) != len(want):
            return "it returns another number of results"
        found = (difference(mine, theirs) for mine, theirs in zip(got, want, strict=True))
        return next((reason for reason in found if reason is not None), None)
    if not isinstance(want, Tensor) or got.shape != want.shape:
        return f"it returns {tuple(want.shape) if isinstance(want, Tensor) else type(want).__name__}"
    error = ((got - want).double().norm() / want.double().norm().clamp(min=1e-12)).item()
    return None if error <= TOLERANCE else f"its result differs from ours by {error:.2g} of its size"


def compare(module: nn.Module, run: Callable[[torch.Generator], tuple[Any, Any]]) -> str | None:
    """Why ours is not what ``module`` computes, by ``run``, which gives results of ours and of theirs.

    Weights in half precision, whose rounding hides small differences, are not compared.
    """
    if next(module.parameters()).dtype not in (torch.float32, torch.float64):
        return None
    try:
        with trial(module) as generator:
            reason = difference(*run(generator))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        return f"it could not be tried: {error}"
    return None if reason is None else f"tried on random numbers, {reason}"

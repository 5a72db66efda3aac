"""Tensors of two runs, by name: how far apart they are, and the table that says so."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """A tensor that both runs have, or one of them only."""

    what: str  # "output", "loss", "gradient", "state" or "module" (the output of one)
    name: str
    relative: float  # norm of the difference over the norm of upstream's, in float64
    largest: float  # absolute difference of an element
    norm: float  # of upstream's
    note: str = ""  # what is not comparable; relative is infinite then


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor and number in nested mappings, sequences and dataclasses, under a dotted name."""
    if isinstance(value, Tensor):
        yield name, value.detach()
    elif isinstance(value, (bool, int, float)):
        yield name, torch.tensor(value, dtype=torch.float64)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from leaves(part, f"{name}.{key}".strip("."))
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from leaves(part, f"{name}.{i}".strip("."))
    elif is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            yield from leaves(getattr(value, each.name), f"{name}.{each.name}".strip("."))


def differences(
    what: str, want: Mapping[str, Tensor | None], got: Mapping[str, Tensor | None], floor: float = 0.0
) -> Iterator[Difference]:
    """One for each name; norms below ``floor`` times that of all of upstream's together count as that much.

    None, a gradient that there is not, differs from zeros.
    """
    least = 0.0
    if floor:
        squares = (_plain(x).abs().square().sum().item() for x in want.values() if x is not None)
        least = floor * sum(squares) ** 0.5
    for name in dict.fromkeys((*want, *got)):
        yield _difference(what, name, want.get(name), got.get(name), least)


def _difference(what: str, name: str, a: Tensor | None, b: Tensor | None, least: float) -> Difference:
    if a is None and b is None:
        return Difference(what, name, 0.0, 0.0, 0.0)
    if a is None or b is None:
        return Difference(what, name, inf, inf, 0.0, "upstream has none" if a is None else "ours has none")
    if a.shape != b.shape:
        return Difference(what, name, inf, inf, 0.0, f"shape {list(b.shape)}, upstream {list(a.shape)}")
    a, b = _plain(a), _plain(b).to(a.device)
    same = (a == b) | (a.isnan() & b.isnan())  # infinities are subtracted nowhere
    apart = (b - a).masked_fill(same, 0).abs()
    norm = a.masked_fill(same & ~a.isfinite(), 0).norm().item()
    size = apart.norm().item()
    largest = apart.max().item() if apart.numel() else 0.0
    if size != size or not norm < inf:
        return Difference(what, name, inf, inf, norm, "not finite in one of them")
    scale = max(norm, least)
    return Difference(what, name, 0.0 if size == 0 else size / scale if scale else inf, largest, norm)


def _plain(x: Tensor) -> Tensor:
    return x.detach().to(torch.complex128 if x.is_complex() else torch.float64)


def table(rows: Iterable[Difference]) -> Iterator[str]:
    """Aligned lines, under a heading."""
    rows = list(rows)
    width = max((len(row.name) for row in rows), default=0)
    yield f"  {'':<8}  {'':<{width}}  {'relative':>8}  {'largest':>8}  {'norm':>8}"
    for row in rows:
        numbers = f"{row.relative:>8.1e}  {row.largest:>8.1e}  {row.norm:>8.1e}"
        yield f"  {row.what:<8}  {row.name:<{width}}  {numbers}  {row.note}".rstrip()

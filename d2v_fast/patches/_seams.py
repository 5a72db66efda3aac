"""What can be replaced: a :class:`Seam` is one method and ours for it, a :class:`Site` a seam at an object or class."""

import inspect
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from d2v_fast.errors import UserError
from d2v_fast.launch.switches import PARTS, check

logger = logging.getLogger("d2v_fast.patches")
MARK = "__d2v_fast__"  # functions of ours have it, and what others wrap around them by functools.wraps


class PatchError(UserError):
    """A model that cannot be patched, or not as asked for, or a patch that cannot be taken back."""


@dataclass(frozen=True)
class Options:
    """What :func:`d2v_fast.patch` was asked for."""

    parts: frozenset[str] = frozenset(PARTS)
    strict: bool = False
    teacher: Any = None  # of another object than the model, where its owner keeps it apart (BEiT-style training)

    @classmethod
    def of(cls, switches: Mapping[str, Any], strict: Any, unknown: Mapping[str, Any], teacher: Any = None) -> "Options":
        """From one switch for each part, and keywords that nobody knows.

        Raises:
            TypeError: there are such keywords, or a switch is not a bool.
        """
        check({**unknown, **switches, "strict": strict})
        return cls(frozenset(part for part in PARTS if switches[part]), strict, teacher)


@dataclass(frozen=True)
class Seam:
    """A method, and what takes its place."""

    part: str  # one of PARTS: the switch of patch() that governs it
    attribute: str  # the method's name
    # (the method as it was, taking self first; options) -> ours with the same signature; a static method has no self
    make: Callable[[Callable, Options], Callable]
    does: str  # what is better now, for the report
    known: frozenset[str] = frozenset()  # fingerprints of the sources that ours was written from; empty: any
    refuses: Callable[[Any], str | None] = field(default=lambda owner: None)  # why ours does not fit this instance
    # called when the method is in place at an instance: builds what a compiler could not trace being built
    prepare: Callable[[Any], None] = field(default=lambda owner: None)
    op: str = ""  # of benchmarks/bench_*.py; at sizes where it was measured to be slower (_rules.py) upstream's runs
    also: frozenset[str] = frozenset()  # more of PARTS that it needs: it does the work of these as well


@dataclass(frozen=True)
class Site:
    """A seam at an object, or at a class."""

    path: str  # of the owner in the model, e.g. "encoder.layers.0"; "" is the model itself
    owner: Any
    seam: Seam

    @property
    def kind(self) -> type:
        """The owner's class, or the owner where it is one."""
        return self.owner if isinstance(self.owner, type) else type(self.owner)

    @property
    def name(self) -> str:
        """For the report, e.g. ``encoder.layers.0 TransformerSentenceEncoderLayer.forward``."""
        return f"{self.path} {self.kind.__name__}.{self.seam.attribute}".strip()

    @property
    def method(self) -> Any:
        """What the class has there: a function, a ``staticmethod``, something else, or None."""
        return inspect.getattr_static(self.kind, self.seam.attribute, None)

    @property
    def is_static(self) -> bool:
        """Whether it is a static method."""
        return isinstance(self.method, staticmethod)


@dataclass(frozen=True)
class Skipped:
    """A place that stays as it was."""

    name: str
    part: str
    reason: str
    harmless: bool = False  # switched off by the caller, or replaced already: no error with strict=True


def disabled() -> bool:
    """Whether ``D2V_FAST_DISABLE=1`` is set."""
    return os.environ.get("D2V_FAST_DISABLE", "") == "1"


def is_ours(method: Any) -> bool:
    """Whether a function or bound method was put there by a patch, or calls one that was."""
    return hasattr(getattr(method, "__func__", method), MARK)

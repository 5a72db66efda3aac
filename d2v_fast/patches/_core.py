"""Replacing methods of other people's objects: what was replaced, what was not and why, and how to put it back.

A :class:`Seam` is one method and ours in its place; a :class:`Site` is a seam at an object, or a class, that has it.
Swaps live in the ``__dict__`` of an instance or class; parameters, buffers and ``state_dict`` keys are not touched.
Copies made with ``copy.deepcopy`` are patched too, and belong to the same :class:`Patch`; unpickled ones are as their
authors wrote them.
"""

import logging
import os
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch

from d2v_fast.errors import UserError
from d2v_fast.patches._fingerprint import fingerprint

logger = logging.getLogger("d2v_fast.patches")
STATE = "_d2v_fast"  # the one attribute that patched instances get besides the methods themselves
PARTS = ("ema", "loss", "targets", "attention", "conv", "norms", "encoder", "masks", "metrics")
_MISSING = object()


class PatchError(UserError):
    """A model that cannot be patched, or not as asked for, or a patch that cannot be taken back."""


@dataclass(frozen=True)
class Options:
    """What :func:`d2v_fast.patch` was asked for."""

    parts: frozenset[str] = frozenset(PARTS)
    strict: bool = False


@dataclass(frozen=True)
class Seam:
    """A method, and what takes its place."""

    part: str  # one of PARTS: the switch of patch() that governs it
    attribute: str  # the method's name
    # (the method as it was, taking self first; options) -> ours with the same signature, named ``attribute`` later
    make: Callable[[Callable, Options], Callable]
    does: str  # what is better now, for the report
    known: frozenset[str] = frozenset()  # fingerprints of the sources that ours was written from; empty: any
    refuses: Callable[[Any], str | None] = field(default=lambda owner: None)  # why ours does not fit this owner


@dataclass(frozen=True)
class Site:
    """A seam at an object, or at a class."""

    path: str  # of the owner in the model, e.g. "encoder.layers.0"; "" is the model itself
    owner: Any
    seam: Seam

    @property
    def name(self) -> str:
        """For the report, e.g. ``encoder.layers.0 TransformerSentenceEncoderLayer.forward``."""
        kind = self.owner if isinstance(self.owner, type) else type(self.owner)
        return f"{self.path} {kind.__name__}.{self.seam.attribute}".strip()


@dataclass(frozen=True)
class Skipped:
    """A place that stays as it was."""

    name: str
    part: str
    reason: str
    harmless: bool = False  # switched off by the caller, or replaced already: no error with strict=True


class State:
    """What our methods keep with the object they belong to. A copy of the object starts with an empty one."""

    def __init__(self, owner: Any = None, patch: "Patch | None" = None) -> None:
        self.cache: dict[str, Any] = {}  # built at the first call: plans, modules of ours around their parameters
        self.fallbacks: Counter[tuple[str, str]] = Counter()  # (method, reason) -> calls left to the original
        self._owner = None if owner is None else weakref.ref(owner)
        self._patch = None if patch is None else weakref.ref(patch)

    def __deepcopy__(self, memo: dict) -> "State":
        owner = None if self._owner is None else self._owner()
        patch = None if self._patch is None else self._patch()
        copied = memo.get(id(owner))
        if patch is not None and copied is not None:
            patch._own(copied)
        return State(copied, patch)

    def __reduce__(self) -> tuple:
        return State, ()


def state_of(owner: Any) -> State:
    """What our methods keep with ``owner``; made where the swap was in its class."""
    found = owner.__dict__.get(STATE)
    if found is None:
        found = owner.__dict__[STATE] = State(owner)
    return found


def fall_back(owner: Any, method: str, reason: str, options: Options) -> None:
    """Note that this call goes to the original ``method``; the first time for a reason, say so.

    Raises:
        PatchError: with ``strict=True``.
    """
    if options.strict:
        raise PatchError(f"strict=True: {type(owner).__name__}.{method} would run as upstream wrote it: {reason}")
    fallbacks = state_of(owner).fallbacks
    if (method, reason) not in fallbacks:
        logger.warning("%s.%s runs as upstream wrote it: %s", type(owner).__name__, method, reason)
    fallbacks[method, reason] += 1


def disabled() -> bool:
    """Whether ``D2V_FAST_DISABLE=1`` is set."""
    return os.environ.get("D2V_FAST_DISABLE", "") == "1"


class Patch:
    """Record of what was swapped: ``print`` it, :meth:`revert` it, or use it as a context manager."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.applied: list[Site] = []
        self.skipped: list[Skipped] = []
        self._undo: list[tuple[Any, str, Callable, Any]] = []  # owner, attribute, ours, what was there
        self._copies: weakref.WeakSet = weakref.WeakSet()

    def apply(self, sites: Iterable[Site], options: Options) -> "Patch":
        """Swap all that fit; either all of them are in place afterwards, or an error was raised and none is.

        Raises:
            PatchError: ``strict=True``, and something does not fit.
            RuntimeError: a CUDA graph is being captured.
        """
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("nothing can be patched while a CUDA graph is captured; patch before the capture")
        wanted = [site for site in sites if self._wants(site, options)]
        refused = [s for s in self.skipped if not s.harmless]
        if options.strict and refused:
            raise PatchError("strict=True: " + "; ".join(f"{s.name}: {s.reason}" for s in refused))
        try:
            for site in wanted:
                self._swap(site, options)
        except BaseException:
            self.revert()
            raise
        for site in wanted:
            logger.info("replaced %s: %s", site.name, site.seam.does)
        return self

    def skip(self, name: str, part: str, reason: str, harmless: bool = False) -> None:
        """Record a place that stays as it is; before :meth:`apply`, which raises for it with ``strict=True``."""
        self.skipped.append(Skipped(name, part, reason, harmless))
        if not harmless:
            logger.warning("left %s as it is: %s", name, reason)

    def _wants(self, site: Site, options: Options) -> bool:
        seam, owner = site.seam, site.owner
        if seam.part not in options.parts:
            self.skip(site.name, seam.part, f"{seam.part}=False", harmless=True)
            return False
        present = getattr(owner, seam.attribute, None)
        if present is None:
            self.skip(site.name, seam.part, "there is no such method in this version")
            return False
        if is_ours(present):
            self.skip(site.name, seam.part, "already replaced", harmless=True)
            return False
        if not isinstance(owner, type) and seam.attribute in owner.__dict__:
            self.skip(site.name, seam.part, f"somebody else replaced it already, by {present!r}")
            return False
        if seam.known and fingerprint(present) not in seam.known:
            found = fingerprint(present)
            self.skip(site.name, seam.part, f"its source is not one that ours was written from (fingerprint {found})")
            return False
        reason = seam.refuses(owner)
        if reason is not None:
            self.skip(site.name, seam.part, reason)
        return reason is None

    def _swap(self, site: Site, options: Options) -> None:
        owner, attribute = site.owner, site.seam.attribute
        before = owner.__dict__.get(attribute, _MISSING)
        kind = owner if isinstance(owner, type) else type(owner)
        ours = site.seam.make(getattr(kind, attribute), options)
        ours.__name__ = attribute  # a pickle looks the method up by it, and finds upstream's
        ours.__d2v_fast__ = site.seam
        if isinstance(owner, type):
            setattr(owner, attribute, ours)
        else:
            if STATE not in owner.__dict__:
                owner.__dict__[STATE] = State(owner, self)
            owner.__dict__[attribute] = MethodType(ours, owner)
        self._undo.append((owner, attribute, ours, before))
        self.applied.append(site)

    def _own(self, copied: Any) -> None:
        self._copies.add(copied)

    def revert(self) -> None:
        """Put everything back, in copies as well. A second time it does nothing.

        Raises:
            PatchError: somebody replaced one of these methods after us; nothing was put back then.
        """
        for owner, attribute, ours, _ in self._undo:
            found = owner.__dict__.get(attribute)
            if getattr(found, "__func__", found) is not ours:
                name = f"{type(owner).__name__}.{attribute}"
                raise PatchError(f"{name} was replaced by {found!r} after this patch: take that back first")
        instances = {id(owner): owner for owner, *_ in self._undo if not isinstance(owner, type)}
        mine = {ours for *_, ours, _ in self._undo}
        while self._undo:
            owner, attribute, _, before = self._undo.pop()
            if isinstance(owner, type):
                delattr(owner, attribute) if before is _MISSING else setattr(owner, attribute, before)
            else:
                del owner.__dict__[attribute]
        for owner in self._copies:
            for name in [n for n, v in owner.__dict__.items() if getattr(v, "__func__", None) in mine]:
                del owner.__dict__[name]
        for owner in (*instances.values(), *self._copies):
            if not any(is_ours(value) for value in owner.__dict__.values()):
                owner.__dict__.pop(STATE, None)
        self._copies = weakref.WeakSet()

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *exc: object) -> None:
        self.revert()

    def fallbacks(self) -> Counter[tuple[str, str]]:
        """(``Class.method``, reason) -> calls that went to the original method in spite of the patch."""
        found: Counter[tuple[str, str]] = Counter()
        owners = {id(owner): owner for owner, *_ in self._undo if not isinstance(owner, type)}
        for owner in (*owners.values(), *self._copies):
            with suppress(KeyError):
                for (method, reason), count in owner.__dict__[STATE].fallbacks.items():
                    found[f"{type(owner).__name__}.{method}", reason] += count
        return found

    def __str__(self) -> str:
        """The table: what was replaced, what was not and why, and calls that went to the original."""
        lines = [f"{self.title}: {len(self.applied)} replaced, {len(self.skipped)} left as they were"]
        lines += _table("replaced", ((s.name, s.seam.part, s.seam.does) for s in self.applied))
        lines += _table("left", ((s.name, s.part, s.reason) for s in self.skipped))
        for (name, reason), count in sorted(self.fallbacks().items()):
            lines.append(f"  {count} calls of {name} ran as upstream wrote it: {reason}")
        return "\n".join(lines)


def is_ours(method: Any) -> bool:
    """Whether a function or bound method was put there by a :class:`Patch`."""
    return hasattr(getattr(method, "__func__", method), "__d2v_fast__")


def _table(title: str, rows: Iterable[tuple[str, str, str]]) -> Iterator[str]:
    """Aligned lines; places that differ in a number only share one."""
    counts = Counter((re.sub(r"(?<=\.)\d+", "*", name), part, text) for name, part, text in rows)
    width = max((len(name) for name, _, _ in counts), default=0)
    for (name, part, text), count in counts.items():
        yield f"  {title:<8} {count:>3} x {name:<{width}}  {part:<9}  {text}"

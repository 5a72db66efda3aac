"""Replacing methods of other people's objects: what was replaced, what was not and why, and how to put it back.

Swaps live in the ``__dict__`` of an instance or class; parameters, buffers and ``state_dict`` keys are not touched.
Copies made with ``copy.deepcopy`` are patched too, and belong to the same :class:`Patch`; unpickled ones are as their
authors wrote them.
"""

import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from d2v_fast.patches._calls import Calls, counted
from d2v_fast.patches._fingerprint import fingerprint
from d2v_fast.patches._report import Row, summary, table
from d2v_fast.patches._rules import guarded, has_rules
from d2v_fast.patches._seams import (
    MARK,
    PARTS,
    Options,
    PatchError,
    Seam,
    Site,
    Skipped,
    disabled,
    is_ours,
    logger,
)
from d2v_fast.patches._state import (
    STATE,
    State,
    fall_back,
    foreign_plumbing,
    forget,
    note,
    put,
    state_of,
    states_at,
    take_off,
    tell_again,
)

__all__ = [
    "PARTS",
    "STATE",
    "Options",
    "Patch",
    "PatchError",
    "Seam",
    "Site",
    "Skipped",
    "State",
    "disabled",
    "fall_back",
    "is_ours",
    "logger",
    "state_of",
]
_MISSING = object()
REPLACED = "already replaced"


class Patch:
    """Record of what was swapped: ``print`` it, :meth:`revert` it, or use it as a context manager."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.applied: list[Site] = []
        self.skipped: list[Skipped] = []
        self.reverted = False
        self._past: tuple[Counter, Counter] = Counter(), Counter()  # fallbacks until it was reverted, partial ones
        self._calls: list[Calls] = []  # of each that was applied
        self._undo: list[tuple[Site, Callable, Any]] = []  # where, ours, what the __dict__ of a class had there
        self._copies: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # id -> a copy of an owner
        self._logged = (0, 0)  # how many of the applied and the skipped

    def apply(self, sites: Iterable[Site], options: Options) -> "Patch":
        """Swap all that fit; either all of them are in place afterwards, or an error was raised and none is.

        May be called again with more sites.

        Raises:
            PatchError: ``strict=True``, and something does not fit.
            RuntimeError: a CUDA graph is being captured.
        """
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("nothing can be patched while a CUDA graph is captured; patch before the capture")
        wanted: dict[tuple[int, str], Site] = {}
        for site in sites:
            key = (id(site.owner), site.seam.attribute)
            if key in wanted:
                self.skip(site.name, site.seam.part, f"the same object as {wanted[key].name}", harmless=True)
            elif self._wants(site, options):
                wanted[key] = site
        refused = [s for s in self.skipped if not s.harmless]
        if options.strict and refused:
            raise PatchError("strict=True: " + "; ".join(f"{s.name}: {s.reason}" for s in refused))
        made = [(site, *_made(site, options)) for site in wanted.values()]  # nothing is swapped if one of these raises
        start = len(self._undo)
        try:
            for site, ours, _ in made:
                self._swap(site, ours)
            for site, *_ in made:
                if not isinstance(site.owner, type):
                    site.seam.prepare(site.owner)
        except BaseException:
            self._put_back(start)
            raise
        self.applied += wanted.values()
        self._calls += [calls for *_, calls in made]
        self._log()
        return self

    def skip(self, name: str, part: str, reason: str, harmless: bool = False) -> None:
        """Record a place that stays as it is; before :meth:`apply`, which raises for it with ``strict=True``."""
        self.skipped.append(Skipped(name, part, reason, harmless))

    def _wants(self, site: Site, options: Options) -> bool:
        reason, harmless = _unfit(site, options)
        if reason is not None:
            self.skip(site.name, site.seam.part, reason, harmless)
        return reason is None

    def _swap(self, site: Site, ours: Callable) -> None:
        owner, attribute = site.owner, site.seam.attribute
        self._undo.append((site, ours, owner.__dict__.get(attribute, _MISSING)))
        if isinstance(owner, type):
            setattr(owner, attribute, staticmethod(ours) if site.is_static else ours)
        else:
            put(owner, ours, attribute, site.is_static)
            state_of(owner).patches.add(self)

    def own(self, copied: Any) -> None:
        """Revert a copy of one of the owners as well."""
        self._copies[id(copied)] = copied

    def check_revert(self) -> None:
        """Raise the error that :meth:`revert` would raise, and change nothing.

        Raises:
            PatchError: somebody replaced one of these methods after us.
        """
        for site, ours, _ in self._undo:
            if not _has(site, ours):
                found = site.owner.__dict__.get(site.seam.attribute)
                by = "removed" if found is None else f"replaced by {found!r}"
                raise PatchError(f"{site.name} was {by} after this patch: take that back first")

    def revert(self) -> None:
        """Put everything back, in copies as well. A second time it does nothing; what an earlier patch replaced stays.

        Raises:
            PatchError: somebody replaced one of these methods after us; nothing was put back then.
        """
        self.check_revert()
        if not self.reverted and any(s.reason == REPLACED for s in self.skipped):
            logger.warning("%s: what an earlier patch replaced stays; its own handle takes it back", self.title)
        self._past = self.fallbacks(), self.partial_fallbacks()
        self._put_back(0)
        self._copies.clear()
        self.reverted = True

    def _put_back(self, start: int) -> None:
        """Undo the swaps from number ``start`` on."""
        undo, self._undo = self._undo[start:], self._undo[:start]
        functions = {ours for _, ours, _ in undo}
        owners = {id(site.owner): site.owner for site, _, _ in undo if not isinstance(site.owner, type)}
        for owner in (*owners.values(), *self._copies.values()):
            take_off(owner, functions)
        for site, ours, before in reversed(undo):
            tell_again(site.kind)
            if not isinstance(site.owner, type) or not _has(site, ours):
                continue
            if before is _MISSING:
                delattr(site.owner, site.seam.attribute)
            else:
                setattr(site.owner, site.seam.attribute, before)
        forget(tuple(site.owner for site, _, _ in undo if isinstance(site.owner, type)))
        kept = {id(site.owner) for site, _, _ in self._undo}
        for owner in owners.values():
            if id(owner) not in kept and STATE in owner.__dict__:
                state_of(owner).patches.discard(self)

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *exc: object) -> None:
        self.revert()

    def fallbacks(self) -> Counter[tuple[str, str]]:
        """(``Class.method``, reason) -> calls that went to the original method, or in part, in spite of the patch."""
        return self._past[0] + _named((kind, state.fallbacks) for kind, state in self._states())

    def partial_fallbacks(self) -> Counter[tuple[str, str]]:
        """Those of :meth:`fallbacks` that were only a part of their call; ours computed the rest."""
        return self._past[1] + _named((kind, state.partial) for kind, state in self._states())

    def _states(self) -> Iterator[tuple[type, State]]:
        """What knows the fallbacks of these swaps, and the class of whose calls they are."""
        owners = {id(site.owner): site.owner for site, _, _ in self._undo}
        yield from states_at(tuple(owner for owner in owners.values() if isinstance(owner, type)))
        for owner in (*owners.values(), *self._copies.values()):
            state = owner.__dict__.get(STATE)
            if isinstance(state, State):
                yield type(owner), state

    @property
    def calls(self) -> int:
        """Calls of all methods of ours, those among them that went to the original included."""
        return sum(calls.count for calls in self._calls)

    @property
    def calls_left(self) -> int:
        """Those of :attr:`calls` that went to the original as a whole."""
        return self.fallbacks().total() - self.partial_fallbacks().total()

    def __repr__(self) -> str:
        title = f"{self.title}, taken back" if self.reverted else self.title
        return f"<{title}: {summary(len(self.applied), len(self.skipped), self.reverted)}>"

    def rows(self) -> list[Row]:
        """Lines of the table."""
        replaced = "was replaced" if self.reverted else "replaced"
        both = zip(self.applied, self._calls, strict=True)
        rows = [Row(replaced, s.name, s.seam.part, s.seam.does, calls=calls.count) for s, calls in both]
        rows += [Row("left", s.name, s.part, s.reason) for s in self.skipped]
        partial = self.partial_fallbacks()
        for (name, why), count in sorted(self.fallbacks().items()):
            part = "in part" if (name, why) in partial else "of calls"
            rows.append(Row("upstream", name, part, why, count))
        return rows

    def __str__(self) -> str:
        """The table: what was replaced and how often it was called, what was not replaced and why.

        Calls that went to the original, or in part, in spite of the patch are lines of their own; they are among the
        calls above.
        """
        return "\n".join([repr(self)[1:-1], *table(self.rows())])

    def _log(self) -> None:
        applied, skipped = self._logged
        self._logged = (len(self.applied), len(self.skipped))
        for line in table(Row("replaced", s.name, s.seam.part, s.seam.does) for s in self.applied[applied:]):
            logger.info(line.strip())
        for line in table(Row("left", s.name, s.part, s.reason) for s in self.skipped[skipped:] if not s.harmless):
            logger.warning(line.strip())


def _named(counts: Iterable[tuple[type, Counter]]) -> Counter[tuple[str, str]]:
    """(``Class.method``, reason) -> calls, of (method, reason) -> calls of each class."""
    found: Counter[tuple[str, str]] = Counter()
    for kind, each in counts:
        for (method, reason), count in each.items():
            found[f"{kind.__name__}.{method}", reason] += count
    return found


def _has(site: Site, ours: Callable) -> bool:
    """Whether ``ours`` is in place."""
    found = site.owner.__dict__.get(site.seam.attribute)
    return getattr(found, "__func__", found) is ours


def _unfit(site: Site, options: Options) -> tuple[str | None, bool]:
    """Why this stays as it is, and whether that is all right; (None, False) where it does not."""
    seam, owner, method = site.seam, site.owner, site.method
    off = [part for part in (seam.part, *sorted(seam.also)) if part not in options.parts]
    if off:
        return ", ".join(f"{part}=False" for part in off), True
    if method is None:
        return "there is no such method in this version", False
    if isinstance(method, classmethod) or not (
        inspect.isroutine(method) and callable(getattr(site.kind, seam.attribute))
    ):
        return f"it is a {type(method).__name__}, not a method", False
    inside = owner.__dict__.get(seam.attribute) if not isinstance(owner, type) else None
    if is_ours(method) or is_ours(inside):
        return REPLACED, True
    if inside is not None:
        return f"somebody else replaced it already, by {inside!r}", False
    if not isinstance(owner, type) and (name := foreign_plumbing(owner)) is not None:
        return f"this object has a {name} of its own, which ours would replace", False
    if seam.known and (found := fingerprint(method)) not in seam.known:
        return f"its source is not one that ours was written from (fingerprint {found})", False
    # instances of a class may differ: there, ours looks at each call
    return None if isinstance(owner, type) else seam.refuses(owner), False


def _made(site: Site, options: Options) -> tuple[Callable, Calls]:
    """Our function, under the name and signature of the original, and the count of its calls."""
    attribute = site.seam.attribute
    original = getattr(site.kind, attribute)
    ours = site.seam.make(original, options)
    if ours is original:
        raise TypeError(f"make() of the seam at {site.name} returned the original method")
    if site.seam.op and has_rules(site.seam.op):
        ours = guarded(ours, original, site.seam.op, lambda owner, reason: note(owner, attribute, reason))
    ours, calls = counted(ours)
    ours.__name__, ours.__qualname__ = attribute, getattr(original, "__qualname__", attribute)
    # callers look at the arguments by name; __wrapped__ would invite them to unwrap ours
    ours.__signature__ = inspect.signature(original)
    setattr(ours, MARK, site.seam)
    return ours, calls

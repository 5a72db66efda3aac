"""The table that a patch prints."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A place, or calls of one method that had the same reason to run as upstream wrote them."""

    what: str  # "replaced", "was replaced", "left" or "upstream"
    name: str
    part: str
    text: str
    count: int = 1
    calls: int | None = None  # of ours, where they are shown


def summary(replaced: int, left: int, reverted: bool) -> str:
    """The numbers of a heading."""
    return f"{replaced} {'were replaced' if reverted else 'replaced'}, {left} left as they were"


def table(rows: Iterable[Row]) -> Iterator[str]:
    """Aligned lines; places that differ in a number only share one, and their calls are added."""
    lines: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        lines.setdefault((row.what, re.sub(r"\b\d+\b", "*", row.name), row.part, row.text), []).append(row)
    first = max((8, *(len(what) for what, *_ in lines)))
    width = max((len(name) for _, name, _, _ in lines), default=0)
    for (what, name, part, text), same in lines.items():
        count = sum(row.count for row in same)
        calls = [row.calls for row in same if row.calls is not None]
        shown = f"  {_number(sum(calls))}" if calls else ""
        yield f"  {what:<{first}} {count:>4} x {name:<{width}}  {part:<9}  {text}{shown}"


def _number(calls: int) -> str:
    if calls == 0:
        return "never called"
    return "1 call" if calls == 1 else f"{calls} calls"

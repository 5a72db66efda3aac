"""Items and files that cannot be read: named in the log, counted, and bounded by ``data.max_bad_fraction``.

A file of many items (a tar, a table, a text) is counted as a file, whatever it holds: of what is cut short nobody knows
how many items there were.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from d2v_fast.train.errors import DataError

logger = logging.getLogger(__name__)

ITEMS_ALLOWED, FILES_ALLOWED = 10, 1  # whatever share of the data they are, up to half of it: see too_many


def too_many(bad: int, total: int, allowed: float, few: int) -> bool:
    """Whether ``bad`` of ``total`` are more than the share ``allowed``, and not just few.

    Few are up to ``few``, if they are less than half of a total above it. Where none are allowed, one is too many.
    """
    if bad <= allowed * total:
        return False
    return allowed == 0 or bad > few or 2 * bad >= total > few


def check_items(unreadable: Sequence[tuple[str, str]], total: int, allowed: float) -> None:
    """Raise the DataError of too many different ``unreadable`` items (name, reason) among ``total``."""
    if too_many(len(unreadable), total, allowed, ITEMS_ALLOWED):
        raise _too_many_bad(unreadable, total, allowed, "items")


def check_files(unreadable: Sequence[tuple[str, str]], total: int, allowed: float) -> None:
    """Raise the DataError of too many ``unreadable`` files of many items (name, reason) among ``total``."""
    if too_many(len(unreadable), total, allowed, FILES_ALLOWED):
        raise _too_many_bad(unreadable, total, allowed, "files")


def log_skipped(skipped: Sequence[tuple[str, str]], total: int, what: str) -> None:
    """One warning for everything that a scan left out, with its share of ``total``."""
    if skipped:
        examples = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
        more = "; ..." * (len(skipped) > 3)
        share = f"{len(skipped)} of {total} {what} ({len(skipped) / total:.1%})"
        logger.warning("skipped %s: %s%s", share, examples, more)


def nothing_left(path: str | Path, skipped: Sequence[tuple[str, str]], expected: str) -> DataError:
    """The error for a scan after which nothing is left."""
    if not skipped:
        return DataError(f"{path} holds nothing to train on; expected {expected}")
    examples = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
    return DataError(f"none of the {len(skipped)} files under {path} can be used; expected {expected}. {examples}")


def _too_many_bad(unreadable: Sequence[tuple[str, str]], total: int, allowed: float, what: str) -> DataError:
    bad, examples = len(unreadable), "; ".join(f"{name}: {reason}" for name, reason in unreadable[-3:])
    return DataError(
        f"{bad} of {total} {what} could not be read ({bad / total:.2%}), more than data.max_bad_fraction = {allowed}; "
        f"last: {examples}. Mend the data, or raise data.max_bad_fraction."
    )

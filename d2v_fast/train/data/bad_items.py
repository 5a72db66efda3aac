"""Items and files that cannot be read: named in the log, counted, and bounded by ``data.max_bad_fraction``.

A file of many items (a tar, a table, a text) is counted as a file, whatever it holds: of what is cut short nobody knows
how many items there were.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from d2v_fast.train.errors import DataError

logger = logging.getLogger(__name__)

ITEMS_ALLOWED = 10  # different ones, whatever share of the data they are
FILES_ALLOWED = 1


def too_many_items(bad: int, read: int, different: int, allowed: float) -> bool:
    """Whether ``bad`` of ``read`` items are more than the share ``allowed``, and not just few.

    Few are ten ``different`` ones, unless they are more than half of more than ten. Where none are allowed, one is too
    many.
    """
    if bad <= allowed * read:
        return False
    few = different <= ITEMS_ALLOWED and not 2 * bad > read > ITEMS_ALLOWED
    return allowed == 0 or not few


def check_files(unreadable: Sequence[tuple[str, str]], total: int, allowed: float) -> None:
    """Raise the DataError of more ``unreadable`` files (name, reason) than one and than ``allowed`` of ``total``.

    Where none are allowed, one is too many.
    """
    count = len(unreadable)
    if count > allowed * total and (allowed == 0 or count > FILES_ALLOWED):
        raise too_many_bad(count, total, allowed, unreadable, "files")


def log_skipped(skipped: Sequence[tuple[str, str]], total: int) -> None:
    """One warning for everything that a scan left out."""
    if skipped:
        examples = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
        logger.warning("skipped %d of %d files (%s%s)", len(skipped), total, examples, "; ..." * (len(skipped) > 3))


def nothing_left(path: str | Path, skipped: Sequence[tuple[str, str]], expected: str) -> DataError:
    """The error for a scan after which nothing is left."""
    if not skipped:
        return DataError(f"{path} holds nothing to train on; expected {expected}")
    examples = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
    return DataError(f"none of the {len(skipped)} files under {path} can be used; expected {expected}. {examples}")


def too_many_bad(
    bad: int, total: int, allowed: float, last: Sequence[tuple[str, str]], what: str = "items"
) -> DataError:
    """The error for more unreadable items, or files, than ``data.max_bad_fraction`` allows."""
    examples = "; ".join(f"{name}: {reason}" for name, reason in last[-3:])
    return DataError(
        f"{bad} of {total} {what} could not be read ({bad / total:.2%}), more than data.max_bad_fraction = {allowed}; "
        f"last: {examples}. Mend the data, or raise data.max_bad_fraction."
    )

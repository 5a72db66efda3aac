"""Recognising a function's source: what ours was written from, and no other."""

import hashlib
import inspect
import textwrap
from collections.abc import Callable


def fingerprint(function: Callable) -> str:
    """16 hex digits of the source of a function or method, comments included; "unknown" where there is no source."""
    try:
        source = inspect.getsource(inspect.unwrap(getattr(function, "__func__", function)))
    except (OSError, TypeError):
        return "unknown"
    lines = [line.rstrip() for line in textwrap.dedent(source).splitlines()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

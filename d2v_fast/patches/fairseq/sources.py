"""Whether methods that ours does without, and which nobody calls then, are still upstream's."""

from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

import torch

from d2v_fast.patches._fingerprint import fingerprint

_source = cache(fingerprint)


@torch.compiler.disable
def not_upstreams(owner: Any, known: Mapping[str, Collection[str]]) -> str | None:
    """Which of these methods of ``owner`` somebody overrode, or None; ``known`` has the fingerprints of upstream's."""
    for name, sources in known.items():
        method: Callable = getattr(owner, name)
        function = getattr(method, "__func__", method)
        if hasattr(function, "__wrapped__") or _source(function) not in sources:
            return f"the source of {type(owner).__name__}.{name} is not one that ours was written from"
    return None

"""Counts the bytes that Triton kernels move, by watching their loads and stores in the interpreter.

Needs TRITON_INTERPRET=1. Launchers choose their tiles as for a GPU, so small shapes show the access pattern of large
ones.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
from recorder import gpu_launchers
from triton.runtime import interpreter


@dataclass
class Traffic:
    """Bytes of all launches of a call."""

    launches: int = 0
    distinct: int = 0  # every address once per launch and direction: what memory sees behind a perfect cache
    requested: int = 0  # every live lane of every access: what the caches see


class _Watch:
    def __init__(self):
        self.traffic = Traffic()
        self.accesses: dict[tuple[str, int], list[np.ndarray]] = defaultdict(list)

    def access(self, kind: str, pointers: Any, mask: Any) -> None:
        live = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)  # masks may be int8
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        self.accesses[kind, size].append(np.unique(pointers.data[live]))
        self.traffic.requested += size * int(live.sum())

    def finish_launch(self) -> None:
        self.traffic.launches += 1
        for (_, size), addresses in self.accesses.items():
            self.traffic.distinct += size * len(np.unique(np.concatenate(addresses)))
        self.accesses.clear()


def measure(function: Callable[[], Any], num_sms: int) -> Traffic:
    """Call ``function`` and count what its Triton kernels load and store."""
    watch = _Watch()
    builder = interpreter.InterpreterBuilder
    load, store, run = builder.create_masked_load, builder.create_masked_store, interpreter.InterpretedFunction.run

    def watched_load(self, pointers, mask, *rest):
        watch.access("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        watch.access("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def watched_run(self, *args, **kwargs):
        result = run(self, *args, **kwargs)
        watch.finish_launch()
        return result

    with (
        gpu_launchers(num_sms),
        mock.patch.object(builder, "create_masked_load", watched_load),
        mock.patch.object(builder, "create_masked_store", watched_store),
        mock.patch.object(interpreter.InterpretedFunction, "run", watched_run),
        np.errstate(all="ignore"),  # inputs are undefined memory
    ):
        function()
    return watch.traffic

"""Sizes at which an op of ours was measured to be slower than what it replaces, so that upstream's code runs there.

An entry comes from a committed benchmark. After ``make gpu-check`` on a GPU,
``python benchmarks/publish.py benchmarks/results/<gpu> --rules`` prints both tables below: an entry for every size at
which upstream's code took less time than ours (mode ``fwd+bwd`` where there is one), and one that holds under
torch.compile where upstream's code was faster when compiled. ``tests/test_patches_rules.py`` compares both with the
files. On a GPU that nobody timed, ours runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slower:
    """A measured loss. Rows and width are those of a seam's first tensor: all dimensions but the last, and that."""

    op: str  # of benchmarks/bench_*.py
    device: str  # "cpu", or the GPU's name as torch says it
    dtype: torch.dtype
    rows: tuple[int, int]  # from, to; what was measured, and no further
    width: tuple[int, int]
    ratio: float  # upstream's time over ours
    source: str  # file below benchmarks/results
    compiled: bool = False  # it holds while torch.compile traces, and only then: upstream's code was compiled too


SLOWER: tuple[Slower, ...] = ()
# device -> ops with committed times of their own. On CPUs, whole updates and the front-end were timed, all of them
# faster (benchmarks/results/README.md).
TIMED: dict[str, frozenset[str]] = {"cpu": frozenset({"conv_encoder"})}


def use(op: str, *, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    """Whether ours should run at this size, and what that is known from."""
    name, compiling = device_name(device), torch.compiler.is_compiling()
    for case in SLOWER:
        inside = case.rows[0] <= rows <= case.rows[1] and case.width[0] <= width <= case.width[1]
        if inside and (case.op, case.device, case.dtype, case.compiled) == (op, name, dtype, compiling):
            size = f"{rows} x {width}, {str(dtype).removeprefix('torch.')}" + (", compiled," if compiling else "")
            return False, f"{op} takes {1 / case.ratio:.2f} times as long at {size} on {name} ({case.source})"
    return True, f"{'timed' if op in TIMED.get(name, ()) else 'not timed'} on {name}"


def device_name(device: torch.device) -> str:
    """What entries call a device."""
    return _gpu_name(device.index) if device.type == "cuda" else device.type


def _gpu_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


# torch.compile runs it while tracing: what torch.compiler.assume_constant_result does, which imports the compiler
_gpu_name._dynamo_marked_constant = True


def has_rules(op: str) -> bool:
    """Whether there is a size at which this op is left alone."""
    return any(case.op == op for case in SLOWER)


def guarded(ours: Callable, original: Callable, op: str, left: Callable[[Any, str], None]) -> Callable:
    """``ours`` where it is faster; the method as it was elsewhere, after ``left(self, reason)``."""

    def method(self, *args, **kwargs):
        x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if x is not None and x.dim() > 0:
            width = x.shape[-1]
            rows = x.numel() // width if width else 0
            fast, reason = use(op, rows=rows, width=width, dtype=x.dtype, device=x.device)
            if not fast:
                left(self, reason)
                return original(self, *args, **kwargs)
        return ours(self, *args, **kwargs)

    return method


def describe() -> str:
    """The table in a line, for :func:`d2v_fast.info`."""
    gpus = sorted(name for name in TIMED if name != "cpu")
    timed = f"timed on {', '.join(gpus)}" if gpus else "no GPU was timed"
    return f"{timed}; sizes left to upstream as ours is slower there: {len(SLOWER) or 'none'}"

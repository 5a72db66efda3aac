"""Timing and reporting that every benchmark shares."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import d2v_fast


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(functions: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call, the providers taking turns, so that drift of the machine meets all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(warmup + rounds):
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            if round_ >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median, fastest and slowest in seconds."""
    return {"median": statistics.median(times), "min": min(times), "max": max(times), "rounds": len(times)}


def environment() -> dict[str, str]:
    """What a number must be read with."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": device,
        "torch": torch.__version__,
        "d2v_fast": d2v_fast.__version__,
        "python": platform.python_version(),
    }


def write_json(path: str | Path, record: dict[str, Any]) -> None:
    """Write ``record`` with the environment beside it."""
    Path(path).write_text(json.dumps({"environment": environment(), **record}, indent=2) + "\n", encoding="utf-8")

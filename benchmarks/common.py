"""What every benchmark shares: the environment a number is read with, its file, and calls that take turns."""

import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import checkout
import torch

import d2v_fast
from d2v_fast.ops import _extension

ROOT = checkout.ROOT
RESULTS = ROOT / "benchmarks" / "results"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def without_extension() -> Iterator[None]:
    """The ops take their PyTorch or Triton path, as where the extension is not installed."""
    before = os.environ.get(_extension.REFUSED)
    os.environ[_extension.REFUSED] = "1"
    try:
        yield
    finally:
        os.environ.pop(_extension.REFUSED)
        if before is not None:
            os.environ[_extension.REFUSED] = before


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


def ratios(times: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Time of each provider over that of ``base`` in the same round: median, 20th and 80th percentile."""
    result = {}
    for name, values in times.items():
        per_round = sorted(t / b for t, b in zip(values, times[base], strict=True))
        last = len(per_round) - 1
        quantiles = {"p20": per_round[round(0.2 * last)], "p80": per_round[round(0.8 * last)]}
        result[name] = {"ratio": statistics.median(per_round), **quantiles}
    return result


def git_commit(given: str | None = None) -> str:
    """The commit of this checkout, "-dirty" when tracked files differ; ``given`` where there is no git."""
    if given:
        return given
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return "unknown"

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    # the results are what a run rewrites
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return git("rev-parse", "HEAD") + ("-dirty" if changed else "")


def names_code(commit: str) -> bool:
    """Whether ``commit`` says which code ran, so that results of two runs belong together."""
    return commit != "unknown" and not commit.endswith("-dirty")


def _nvidia_smi() -> dict[str, str]:
    if shutil.which("nvidia-smi") is None:
        return {"driver": "unknown", "clocks": "unknown"}
    query = "--query-gpu=driver_version,clocks.sm,clocks.mem"
    command = ["nvidia-smi", f"--id={torch.cuda.current_device()}", query, "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"driver": "unknown", "clocks": "unknown"}
    driver, sm, memory = done.stdout.strip().split(", ")
    return {"driver": driver, "clocks": f"SM {sm}, memory {memory}, as found"}


def environment(commit: str | None = None) -> dict[str, str]:
    """What a number must be read with."""
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads",
        **({**_nvidia_smi(), "cuda": torch.version.cuda or "none"} if gpu else {}),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "extension": _extension.why_not() or "available",
        "python": platform.python_version(),
        "d2v_fast": d2v_fast.__version__,
        "commit": git_commit(commit),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return triton.__version__


def device_folder(name: str | None = None) -> str:
    """The folder of a device's results: its name in lower case, words joined by "-"."""
    name = name or (torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def write_json(path: str | Path, record: dict[str, Any], commit: str | None = None) -> None:
    """Write ``record`` with the environment in front; a file that is there is replaced, never added to."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment(commit), **record}, indent=1, allow_nan=False)
    partial = path.with_name(path.name + ".part")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)

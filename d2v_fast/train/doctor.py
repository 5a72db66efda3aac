"""What a run's own numbers say about it: where its time went, what was skipped, and what to change."""

import math
import os
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from d2v_fast.train.errors import DataError
from d2v_fast.train.logging import number, read_lines
from d2v_fast.train.words import counted

WAITS = 0.05  # share of the time from which on waiting for data is worth a remark
IDLES = 0.10  # the same for a GPU without work
HOST = 0.90  # share of the time that the host spends inside of updates, from which on it may be what is too slow
RATES = ("audio_seconds_per_s", "frames_per_s", "images_per_s", "tokens_per_s", "masked_per_s", "tflop_per_s", "mfu")


def examine(folder: Path, cores: int) -> list[str]:
    """Lines about the run in ``folder``, advice last; ``cores`` are those of this machine.

    Raises:
        DataError: there is no run, or none that has logged anything; its configuration cannot be read.
    """
    lines = _metrics(folder / "metrics.jsonl")
    rows = [row for _, row in lines if row is not None]
    if not rows:
        raise DataError(f"run {folder}: no metrics.jsonl with a whole line; expected the folder (out=...) of a run")
    # the first record is of a start: kernels were compiled, workers began
    steady = [row for row in rows[1:] if _numbers([row], "seconds_per_update")] or rows
    config = _config(folder / "config.yaml")
    advice = _advice(rows, steady, config, cores)
    if len(rows) < len(lines):
        damaged = f"{len(lines) - len(rows)} of {len(lines)} lines"
        advice.append(f"{damaged} of metrics.jsonl are no records and were left out: look at the disk")
    return [*_facts(folder, rows, steady, config), *(f"advice: {text}" for text in advice)]


def _metrics(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    try:
        return read_lines(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from None


def _config(path: Path) -> dict[str, int]:
    """What is looked at of a run's configuration, as far as it has that."""
    try:
        values = OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else {}
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} must hold keys and values, got {values!r}")
    found = {key: values[key] for key in ("updates", "workers") if key in values}
    for key, value in found.items():
        if type(value) is not int:
            raise DataError(f"{path}: {key} must be a whole number, got {value!r}")
    return found


def _numbers(rows: list[dict[str, Any]], key: str) -> list[float]:
    """Of the rows that have it."""
    values = (number(row, key) for row in rows)
    return [value for value in values if not math.isnan(value)]


def _mean(rows: list[dict[str, Any]], key: str) -> float | None:
    """Over the rows that have it; None where none has."""
    values = _numbers(rows, key)
    return sum(values) / len(values) if values else None


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.1f} %"


def _facts(folder: Path, rows: list[dict], steady: list[dict], config: dict[str, int]) -> list[str]:
    last = rows[-1]
    of = f" of {config['updates']}" if "updates" in config else ""
    each = _mean(steady, "seconds_per_update")
    pace = "" if each is None else f", {each:.3f} s each"
    if each is not None and "updates" in config:
        pace += f", {each * (config['updates'] - last['update']) / 3600:.1f} h to go"
    rates = [f"{name} {_mean(steady, name):.4g}" for name in RATES if _mean(steady, name) is not None]
    wait, worst = _mean(steady, "data_wait"), _mean(steady, "data_wait_worst")
    slowest = "" if worst is None else f", of the slowest rank {_share(worst)}"
    idle, between = _mean(steady, "gpu_idle"), _mean(steady, "device_idle")
    skipped, files = sum(_numbers(rows, "skipped")), sum(_numbers([last], "skipped_files"))
    lines = [
        f"run           {folder}: update {last['update']}{of}{pace}",
        f"rates         {', '.join(rates) or 'none logged'}",
        f"loader wait   {_share(wait)} of the time{slowest}",
        f"GPU idle      {_share(idle)}; between updates {_share(between)}",
        f"skipped       {skipped:.0f} updates, {files:.0f} files",
    ]
    if peak := _mean([last], "peak_memory"):
        lines.append(f"peak memory   {peak / 2**30:.2f} GiB")
    if "graph_replays" in last:
        replays, fallbacks = number(last, "graph_replays"), number(last, "graph_fallbacks")
        lines.append(f"CUDA graphs   {replays:.0f} updates replayed, {fallbacks:.0f} not")
    return lines


def _advice(rows: list[dict], steady: list[dict], config: dict[str, int], cores: int) -> list[str]:
    """What to change, by what is wrong."""
    last, advice = rows[-1], []
    wait, worst = _mean(steady, "data_wait") or 0, _mean(steady, "data_wait_worst") or 0
    if max(wait, worst) > WAITS:
        advice.append(_loader_advice(config, cores))
    if worst > 2 * max(wait, WAITS):
        advice.append("one rank waits for data much longer than the others: look at its disk and its cores")
    idle = _mean(steady, "gpu_idle")
    idle = idle if idle is not None else _mean(steady, "device_idle") or 0  # which is the least that it can be
    host, each = _mean(steady, "host_seconds") or 0, _mean(steady, "seconds_per_update") or 0
    if idle > IDLES and wait <= WAITS:
        late = host > HOST * each
        advice.append(
            "the GPU waits for the host, not for data: cuda_graph=auto, OMP_NUM_THREADS=1, larger micro-batches"
            if late
            else "the GPU waits between updates, not for data: raise log_every and checkpoint_every"
        )
    if any(_numbers(rows, "skipped")):
        advice.append("updates were skipped, loss or gradient not finite: lower optim.lr, set optim.clip_norm")
    if any(_numbers([last], "skipped_files")):
        advice.append("files could not be read: the log names each with the reason")
    if number(last, "graph_fallbacks") > 0.1 * last["update"]:
        advice.append("many updates were not replayed as CUDA graphs: the log names the reason; data.crop_multiple")
    return advice


def _loader_advice(config: dict[str, int], cores: int) -> str:
    """How the loader could be faster on this machine."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = config.get("workers", 0)
    room = cores // ranks - 1  # one core for the process itself
    if workers < room:
        return (
            f"updates wait for data: workers={min(room, 2 * max(workers, 1))} (now {workers}; {counted(cores, 'core')})"
        )
    return (
        f"updates wait for data, with {counted(workers, 'worker')} on {counted(cores, 'core')}: data on a local disk, "
        "in a format that is quicker to decode, or smaller images (data.decode_size)"
    )

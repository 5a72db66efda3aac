"""What a run's own numbers say about it: where its time went, what was skipped, and what to change."""

import os
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from d2v_fast.train.errors import DataError
from d2v_fast.train.logging import read_metrics

WAITS = 0.05  # share of the time from which on waiting for data is worth a remark
IDLES = 0.10  # the same for a GPU without work
HOST = 0.90  # share of the time that the host spends inside of updates, from which on it may be what is too slow
RATES = ("audio_seconds_per_s", "frames_per_s", "images_per_s", "tokens_per_s", "masked_per_s", "tflop_per_s", "mfu")


def examine(folder: Path, cores: int) -> list[str]:
    """Lines about the run in ``folder``, advice last; ``cores`` are those of this machine.

    Raises:
        DataError: there is no run, or none that has logged anything.
    """
    rows = read_metrics(folder)
    if not rows:
        raise DataError(f"run {folder}: no metrics.jsonl with a whole line; expected the folder (out=...) of a run")
    # the first record is of a start: kernels were compiled, workers began
    steady = [row for row in rows[1:] if "seconds_per_update" in row] or rows
    config = _config(folder)
    return [*_facts(folder, rows, steady, config), *_advice(rows, steady, config, cores)]


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    return OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else {}


def _mean(rows: list[dict[str, Any]], key: str) -> float | None:
    """Over the rows that have it; None where none has."""
    values = [row[key] for row in rows if key in row]
    return sum(values) / len(values) if values else None


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.1f} %"


def _facts(folder: Path, rows: list[dict], steady: list[dict], config: dict[str, Any]) -> list[str]:
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
    lines = [
        f"run           {folder}: update {last['update']}{of}{pace}",
        f"rates         {', '.join(rates) or 'none logged'}",
        f"loader wait   {_share(wait)} of the time{slowest}",
        f"GPU idle      {_share(idle)}; between updates {_share(between)}",
        f"skipped       {sum(row.get('skipped', 0) for row in rows):.0f} updates, {last.get('skipped_files', 0)} files",
    ]
    if "peak_memory" in last:
        lines.append(f"peak memory   {last['peak_memory'] / 2**30:.2f} GiB")
    if "graph_replays" in last:
        lines.append(f"CUDA graphs   {last['graph_replays']} updates replayed, {last['graph_fallbacks']} not")
    return lines


def _advice(rows: list[dict], steady: list[dict], config: dict[str, Any], cores: int) -> list[str]:
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
    if any(row.get("skipped", 0) for row in rows):
        advice.append("updates were skipped, loss or gradient not finite: lower optim.lr, set optim.clip_norm")
    if last.get("skipped_files", 0):
        advice.append("files could not be read: the log names each with the reason")
    if last.get("graph_fallbacks", 0) > 0.1 * last["update"]:
        advice.append("many updates were not replayed as CUDA graphs: the log names the reason; data.crop_multiple")
    return [f"advice: {text}" for text in advice]


def _loader_advice(config: dict[str, Any], cores: int) -> str:
    """How the loader could be faster on this machine."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = config.get("workers", 0)
    room = cores // ranks - 1  # one core for the process itself
    if workers < room:
        return f"updates wait for data: workers={min(room, 2 * max(workers, 1))} (now {workers}; {cores} cores)"
    return (
        f"updates wait for data, and {workers} workers use all {cores} cores: data on a local disk, in a format that "
        "is quicker to decode, or smaller images (data.decode_size)"
    )

"""``bench_train_step.py`` on a GPU: time, units, MFU, memory, host time and launches of an update of each provider.

"as written" is the peer of ``step_peers.py`` as its trainer runs it (speech and text: fairseq's half-precision model
with flat float32 weights; images: a teacher outside of autocast), "as written, autocast" the same model with float32
parameters under one bfloat16 autocast, as all others have it: "patched", their authors' code with ``d2v_fast.patch``,
"eager", the step of ``step_plain.py``, "torch.compile" of that, and ours. Each provider is built, warmed up, timed and
deleted before the next one.

All read the same batch. "d2v_fast graph" computes as many masked rows as any mask can have, as a run with graphs does,
the others those of this mask; so torch.compile never meets another shape.

``percent_of_matmul`` and ``percent_of_peak`` are taken from the FLOPs of the whole computation
(``d2v_fast/train/flops.py``, nothing left out), so what a provider leaves out counts for it; ``mfu`` is that of
docs/metrics.md, without what ours leaves out.
"""

import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import step_peers
import step_plain
import torch
from common import DEVICE, synchronize
from timing import host_us, matmul_tflop_per_s
from torch.profiler import ProfilerActivity, profile

from d2v_fast.nn import Batch, Data2Vec, Data2VecConfig
from d2v_fast.train.flops import batch_flops
from d2v_fast.train.gpus import peak_tflops
from d2v_fast.train.graph import CapturedStep
from d2v_fast.train.optim import OptimConfig, build_optimizer
from d2v_fast.train.step import train_step

OURS, GRAPH, COMPILED, EAGER = "d2v_fast", "d2v_fast graph", "torch.compile", "eager"
WRITTEN, WRITTEN_AUTOCAST, PATCHED = "as written", "as written, autocast", "patched"
PROVIDERS = (OURS, GRAPH, COMPILED, EAGER, WRITTEN, WRITTEN_AUTOCAST, PATCHED)
OUT_OF_TIME, OUT_OF_MEMORY, NOT_INSTALLED = "skipped: out of time", "out of memory", "not installed"
STOPPED = "failed: stopped while it ran"  # what the file says until a provider has ended
WARM_UP_SHARE = 0.4  # of a provider's time, at most
MIB = 2**20
Step = Callable[[Batch], object]


@dataclass(frozen=True)
class Counts:
    """Updates of a provider: at most so many, and at least ``least`` of either kind however little time there is."""

    warm_up: int = 50
    rounds: int = 200
    least: int = 10


@dataclass(frozen=True)
class Rates:
    """TFLOP/s: of a large bfloat16 product in this process, and of the data sheet, None where that is unknown."""

    matmul: float
    peak: float | None


def device_rates() -> Rates:
    """Of the current GPU."""
    return Rates(matmul_tflop_per_s(), peak_tflops(torch.cuda.get_device_name()))


def provider(name: str, config: Data2VecConfig, optim: OptimConfig) -> tuple[Step, dict] | None:
    """A step of one provider, on weights of its own, and what to say of it; None where it is not installed."""
    torch.manual_seed(0)
    plain = name in (EAGER, COMPILED)
    with DEVICE:  # initial values of a large model take a CPU many seconds
        model = Data2Vec(step_plain.plain_config(config) if plain else config).train()
    if plain:
        return step_plain.plain_step(model, optim, compiled=name == COMPILED), {}
    if name in (WRITTEN, WRITTEN_AUTOCAST, PATCHED):
        # fairseq's own speech model cannot run under autocast: its mask embedding stays float32
        peer = step_peers.load(model, restated=name == WRITTEN_AUTOCAST)
        if name == PATCHED and peer.patch is None:
            return None
        if name == PATCHED:
            peer.patch()
        step = peer.as_trained(optim) if name == WRITTEN else step_peers.autocast_step(peer, optim)
        return step, {"peer": peer.name}
    optimizer, updates = build_optimizer(model, optim), iter(range(1_000_000))
    how = {"clip_norm": optim.clip_norm, "autocast": DEVICE.type == "cuda"}
    if name == OURS:
        return lambda batch: train_step(model, [batch], optimizer, lr=optim.lr, update=next(updates), **how), {}
    captured = CapturedStep(model, optimizer, strict=True, **how)
    return lambda batch: captured([batch], lr=optim.lr, update=next(updates)), {}


def step_tflop(config: Data2VecConfig, batch: Batch) -> float:
    """TFLOP of forward and backward of the student and forward of the teacher, nothing left out."""
    return batch_flops(step_plain.plain_config(config), batch) / 1e12


def units(config: Data2VecConfig, batch: Batch) -> float:
    """Seconds of audio, images or tokens of a batch; ``train/predict.py`` reads how many of them a second takes."""
    if config.modality == "image":
        return batch.inputs.shape[0]
    return batch.inputs.numel() / (config.frontend.sample_rate if config.modality == "speech" else 1)


def launches(call: Callable[[], object]) -> int:
    """Kernels and copies that a call puts on the device; 0 on a CPU, and where the profiler sees none."""
    if DEVICE.type != "cuda":
        return 0
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in seen.events())


def warm_up(call: Callable[[], object], counts: Counts, seconds: float) -> list[float]:
    """Seconds of each of the updates that compile, capture, allocate."""
    times, end = [], time.monotonic() + seconds
    while len(times) < counts.warm_up and (len(times) < counts.least or time.monotonic() < end):
        start = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start)
    return times


def step_times(call: Callable[[], object], rounds: int) -> tuple[list[float], float]:
    """Seconds from the end of each update to the end of the next, and by the clock in all.

    Nothing waits for the device in between but what the step waits for itself, as in a run.
    """
    on_device = DEVICE.type == "cuda"
    synchronize()
    start = time.perf_counter()
    marks = [_mark(on_device)]
    for _ in range(rounds):
        call()
        marks.append(_mark(on_device))
    synchronize()
    wall = time.perf_counter() - start
    if on_device:
        return [1e-3 * a.elapsed_time(b) for a, b in pairwise(marks)], wall
    return [b - a for a, b in pairwise(marks)], wall


def _mark(on_device: bool) -> torch.cuda.Event | float:
    if not on_device:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@contextmanager
def released() -> Iterator[None]:
    """Before and afterwards the memory of what nobody holds is free, compiled models' too."""

    def release() -> None:
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    release()
    try:
        yield
    finally:
        release()


def measure(
    name: str, config: Data2VecConfig, batch: Batch, optim: OptimConfig, rates: Rates, counts: Counts, seconds: float
) -> dict:
    """The row of one provider, which may take about so many ``seconds``; why there is none where it failed."""
    with released():
        try:
            return _measure(name, config, batch, optim, rates, counts, seconds)
        except Exception as error:
            if _is_out_of_memory(error):
                return {"status": OUT_OF_MEMORY}
            traceback.print_exc(file=sys.stdout)
            return {"status": f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


def _is_out_of_memory(error: BaseException | None) -> bool:
    """A capture that fails wraps the reason."""
    return error is not None and (isinstance(error, torch.OutOfMemoryError) or _is_out_of_memory(error.__cause__))


def _measure(
    name: str, config: Data2VecConfig, batch: Batch, optim: OptimConfig, rates: Rates, counts: Counts, seconds: float
) -> dict:
    start, (allocated, reserved) = time.monotonic(), _memory()
    _reset_peak()
    built = provider(name, config, optim)
    if built is None:
        return {"status": NOT_INSTALLED}
    step, row = built

    def call() -> object:
        return step(batch)

    warmed = warm_up(call, counts, WARM_UP_SHARE * seconds)
    if name != GRAPH:  # whose memory is allocated while it is captured, never in a replay
        _reset_peak()
    left = seconds - (time.monotonic() - start)
    rounds = int(min(counts.rounds, max(counts.least, left / statistics.median(warmed[-counts.least :]))))
    times, wall = step_times(call, rounds)
    now, now_reserved = _memory()
    peak = (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0) - allocated
    p20, median, p80 = torch.tensor(times).double().quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    on_host = batch.to("cpu", non_blocking=False)
    tflop = step_tflop(config, on_host)
    computed = batch_flops(config, on_host) / 1e12 if name in (OURS, GRAPH) else tflop
    row |= {
        "status": "ok",
        "ms": 1e3 * median,
        "ms_p20": 1e3 * p20,
        "ms_p80": 1e3 * p80,
        "wall_ms": 1e3 * wall / rounds,
        "warm_up": len(warmed),
        "rounds": rounds,
        "samples_per_s": batch.inputs.shape[0] / median,
        "units_per_s": units(config, batch) / median,
        "tflop": tflop,
        "percent_of_matmul": 100 * tflop / median / rates.matmul,
        "peak_mib": peak / MIB,
        "state_mib": (now - allocated) / MIB,  # between updates: weights, moments, averages, copies
        "reserved_mib": (now_reserved - reserved) / MIB,
        "host_ms": host_us(call, 5) / 1e3,
    }
    if rates.peak is not None:
        row |= {"percent_of_peak": 100 * tflop / median / rates.peak, "mfu": computed / median / rates.peak}
    count = launches(call)
    return row | ({"launches": count} if count else {})


def _memory() -> tuple[int, int]:
    """Bytes that are allocated, and that PyTorch holds."""
    return (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) if torch.cuda.is_available() else (0, 0)


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def relate(rows: list[dict]) -> None:
    """Add to the rows of one recipe their time over ours, and their peak of memory over that of the reference."""
    measured = {row["provider"]: row for row in rows if row["status"] == "ok"}
    for row in measured.values():
        if OURS in measured:
            row["ratio"] = row["ms"] / measured[OURS]["ms"]
        if measured.get(WRITTEN, {}).get("peak_mib"):
            row["memory_ratio"] = row["peak_mib"] / measured[WRITTEN]["peak_mib"]


def line(row: dict) -> str:
    """A row in words."""
    start = f"{row['case']:12} {row['provider']:21}"
    if row["status"] != "ok":
        return f"{start} {row['status']}"
    ratio = f" time / d2v_fast {row['ratio']:.2f}," if "ratio" in row else ""
    memory = f" ({row['memory_ratio']:.2f} of as written)" if "memory_ratio" in row else ""
    peak = f", {row['percent_of_peak']:.1f} % of peak" if "percent_of_peak" in row else ""
    count = f", {row['launches']} launches" if "launches" in row else ""
    return (
        f"{start}{ratio} {row['ms']:.1f} ms ({row['ms_p20']:.1f} to {row['ms_p80']:.1f}, {row['rounds']} updates after "
        f"{row['warm_up']}), {row['samples_per_s']:.1f} samples/s, {row['units_per_s']:.0f} units/s, "
        f"{row['percent_of_matmul']:.1f} % of matmul{peak}, peak {row['peak_mib']:.0f} MiB{memory}, "
        f"host {row['host_ms']:.2f} ms{count}" + (f" [{row['peer']}]" if "peer" in row else "")
    )

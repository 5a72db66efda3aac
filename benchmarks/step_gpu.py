"""``bench_train_step.py`` on a GPU: time, units, MFU, memory, host time and launches of an update of each provider.

"as written" is the peer of ``step_peers.py`` as its trainer runs it (speech and text: fairseq's half-precision model
with flat float32 weights; images: a teacher in float32, outside of autocast), with TF32 allowed in products, as in the
PyTorch 1.7.1 that BEiT's code pins. "as written, today's defaults" is the same for images without it, PyTorch's default
since 1.12. Both have AdamW as today's PyTorch runs BEiT's call of it: "foreach" on a GPU. "as written, autocast" is the
same model with float32 parameters under one bfloat16 autocast, as all others have it: "patched", their authors' code
with ``d2v_fast.patch``, "eager", the step of ``step_plain.py``, "torch.compile" of that (in its default mode, without
graphs), and ours. "d2v_fast, nothing left out" is ours with ``model.prune`` off: kernels alone. Ours is timed again
behind the others ("d2v_fast again"), which tells the noise.

Each provider is built, warmed up, timed and deleted before the next one: first what has no graph and is not compiled,
so that what takes long or may leave a device unusable costs no other row. Where a failure leaves such a device its row
says ``device_lost``, and the process has to end: with ``--resume`` the next one goes on with the others.

All read the same batch. "d2v_fast graph" computes as many masked rows as any mask can have, as a run with graphs does,
the others those of this mask; so torch.compile never meets another shape.

``percent_of_matmul`` and ``percent_of_peak`` are taken from the FLOPs of the whole computation
(``d2v_fast/train/flops.py``, nothing left out), so what a provider leaves out counts for it; ``mfu`` is that of
docs/metrics.md, without what ours leaves out (``computed_tflop``).
"""

import gc
import hashlib
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

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
AGAIN, UNPRUNED = "d2v_fast again", "d2v_fast, nothing left out"
WRITTEN, WRITTEN_TODAY, WRITTEN_AUTOCAST = "as written", "as written, today's defaults", "as written, autocast"
PATCHED = "patched"
PEERS = (WRITTEN, WRITTEN_TODAY, WRITTEN_AUTOCAST, PATCHED)
PROVIDERS = (OURS, WRITTEN, EAGER, WRITTEN_AUTOCAST, PATCHED, WRITTEN_TODAY, UNPRUNED, AGAIN, GRAPH, COMPILED)
IMAGES_ONLY = (WRITTEN_TODAY,)  # the others as written have no float32 products
COMPILE_SHARE = 4.0  # of the time, where all other providers have 1
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


def providers_of(modality: str) -> list[str]:
    """Names, in the order in which they are measured."""
    return [name for name in PROVIDERS if modality == "image" or name not in IMAGES_ONLY]


def share(name: str) -> float:
    """Of the time for all that is left, in parts of what most providers have."""
    return COMPILE_SHARE if name == COMPILED else 1.0


def machine() -> str:
    """Tells this GPU since the machine's last start from others of its name; "unknown" where nothing does."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    known = [boot.read_text()] if boot.exists() else []
    if torch.cuda.is_available():
        known.append(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))
    return hashlib.sha256("".join(known).encode()).hexdigest()[:12] if known else "unknown"


def device_rates() -> Rates:
    """Of the current GPU."""
    launches(lambda: None)  # the profiler changes a process for good: before all providers, not between them
    return Rates(matmul_tflop_per_s(), peak_tflops(torch.cuda.get_device_name()))


def provider(name: str, config: Data2VecConfig, optim: OptimConfig) -> tuple[Step, dict] | None:
    """A step of one provider, on weights of its own, and what to say of it; None where it is not installed."""
    torch.manual_seed(0)
    plain = name in (EAGER, COMPILED)
    if name == UNPRUNED:
        config = replace(config, prune=step_plain.plain_config(config).prune)
    with DEVICE:  # initial values of a large model take a CPU many seconds
        model = Data2Vec(step_plain.plain_config(config) if plain else config).train()
    if plain:
        return step_plain.plain_step(model, optim, compiled=name == COMPILED), {}
    if name in PEERS:
        # fairseq's own speech model cannot run under autocast: its mask embedding stays float32
        peer = step_peers.load(model, restated=name == WRITTEN_AUTOCAST)
        if name == PATCHED and peer.patch is None:
            return None
        if name == PATCHED:
            peer.patch()
        as_trained = name in (WRITTEN, WRITTEN_TODAY)
        step = peer.as_trained(optim) if as_trained else step_peers.autocast_step(peer, optim)
        return step, {"peer": peer.name}
    optimizer, updates = build_optimizer(model, optim), iter(range(1_000_000))
    how = {"clip_norm": optim.clip_norm, "autocast": DEVICE.type == "cuda"}
    if name != GRAPH:
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
        with suppress(RuntimeError):  # of a device that was lost: its row says so
            release()


def device_works() -> bool:
    """Whether the device still computes and draws: not after an illegal access, nor after some failed captures."""
    try:
        x = torch.rand(64, 64, device=DEVICE)
        return (x @ x).sum().isfinite().item()
    except RuntimeError:
        return False


def measure(
    name: str, config: Data2VecConfig, batch: Batch, optim: OptimConfig, rates: Rates, counts: Counts, seconds: float
) -> dict:
    """The row of one provider, which may take about so many ``seconds``; why there is none where it failed.

    ``device_lost`` where nothing can be measured in this process any more.
    """
    with released():
        row = _row(name, config, batch, optim, rates, counts, seconds)
    if (row["status"] != "ok" or "launches_failed" in row) and not device_works():
        row["device_lost"] = True
    return row


def _row(
    name: str, config: Data2VecConfig, batch: Batch, optim: OptimConfig, rates: Rates, counts: Counts, seconds: float
) -> dict:
    try:
        # products in float32 as PyTorch 1.7.1 has them, and as today's does; convolutions are alike
        with step_peers.tf32(products=name == WRITTEN, convolutions=True):
            return _measure(name, config, batch, optim, rates, counts, seconds)
    except Exception as error:
        if _is_out_of_memory(error):
            return {"status": OUT_OF_MEMORY}
        traceback.print_exc(file=sys.stdout)
        return {"status": f"failed: {_said(error)}"}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


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
    computed = batch_flops(config, on_host) / 1e12 if name in (OURS, AGAIN, GRAPH) else tflop
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
        "computed_tflop": computed,
        "tf32_products": torch.backends.cuda.matmul.allow_tf32,
        "percent_of_matmul": 100 * tflop / median / rates.matmul,
        "peak_mib": peak / MIB,
        "state_mib": (now - allocated) / MIB,  # between updates: weights, moments, averages, copies
        "reserved_mib": (now_reserved - reserved) / MIB,
        "host_ms": host_us(call, 5) / 1e3,
    }
    if rates.peak is not None:
        row |= {"percent_of_peak": 100 * tflop / median / rates.peak, "mfu": computed / median / rates.peak}
    try:
        count = launches(call)
    except Exception as error:  # no reason to lose what was timed
        traceback.print_exc(file=sys.stdout)
        return row | {"launches_failed": _said(error)}
    return row | ({"launches": count} if count else {})


def _memory() -> tuple[int, int]:
    """Bytes that are allocated, and that PyTorch holds."""
    return (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) if torch.cuda.is_available() else (0, 0)


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def relate(rows: list[dict]) -> None:
    """Add to the rows of one recipe their time over ours, and their peak of memory over that of the reference.

    Ours is the mean of both its timings (``mean_ms``), ``noise`` their difference. What another machine has timed gets
    no ratio: GPUs of one name differ.
    """
    measured = {row["provider"]: row for row in rows if row["status"] == "ok"}
    ours, again = measured.get(OURS), measured.get(AGAIN)
    if ours is not None:
        for key in ("mean_ms", "noise"):
            ours.pop(key, None)
        if again is not None and again.get("machine") == ours.get("machine"):
            ours["mean_ms"] = (ours["ms"] + again["ms"]) / 2
            ours["noise"] = abs(ours["ms"] - again["ms"]) / min(ours["ms"], again["ms"])
    for row in measured.values():
        row.pop("ratio", None)
        row.pop("memory_ratio", None)
        if ours is not None and row.get("machine") == ours.get("machine"):
            row["ratio"] = row.get("mean_ms", row["ms"]) / ours.get("mean_ms", ours["ms"])
        if measured.get(WRITTEN, {}).get("peak_mib"):
            row["memory_ratio"] = row["peak_mib"] / measured[WRITTEN]["peak_mib"]


def line(row: dict) -> str:
    """A row in words."""
    start = f"{row['case']:12} {row['provider']:28}"
    if row["status"] != "ok":
        return f"{start} {row['status']}{', device lost' if row.get('device_lost') else ''}"
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

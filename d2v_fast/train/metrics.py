"""How fast a run is and what it waits for, counted on the host between two log steps; docs/metrics.md defines each."""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from d2v_fast.nn import Batch, Data2VecConfig
from d2v_fast.train.flops import Plan, batch_flops, plans
from d2v_fast.train.gpus import peak_tflops

COLUMNS = (
    "updates",
    "seconds",
    "waited",  # seconds for the loader
    "worked",  # seconds of the host inside of updates
    "busy",  # seconds between the first and the last operation of each update on a CUDA device; 0 elsewhere
    "items",  # clips, images or blocks of text
    "positions",  # frames, patches or tokens, without padding
    "masked",  # positions
    "audio",  # seconds of speech
    "flops",
    "samples",  # of the GPU's utilisation
    "utilisation",  # their sum, each in [0, 1]
    "peak_flops",  # per second, of the device; 0 if unknown
    "peak_memory",  # bytes
)
SAMPLE_SECONDS = 1.0  # between two questions for the GPU's utilisation, which the driver averages over about as long
REDUCTIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "sum": sum,
    "mean": lambda values: sum(values) / len(values),
    "max": max,
    "min": min,
}


def combine(rows: Sequence[Sequence[float]], how: Sequence[str]) -> list[float]:
    """One number a column out of the ranks' ``rows`` [world_size][columns]; ``how``: "sum", "mean", "max" or "min".

    Raises:
        ValueError: a row of another length than ``how``, or an unknown reduction.
    """
    unknown = [name for name in how if name not in REDUCTIONS]
    if unknown:
        raise ValueError(f"how must be of {', '.join(REDUCTIONS)}, got {unknown[0]!r}")
    for row in rows:
        if len(row) != len(how):
            raise ValueError(f"rows must have {len(how)} columns as how has, got {len(row)}")
    return [float(REDUCTIONS[name](column)) for name, column in zip(how, zip(*rows, strict=True), strict=True)]


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU, or of this process (without the loader's workers) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Meter:
    """Counts what one rank's updates worked on, since the last :meth:`take`. Nothing waits for the device in between.

    Args:
        config: of the model.
        device: of this rank.
        clock: seconds; another one for tests.
        event: makes what marks a point of the device's work, as ``torch.cuda.Event`` does; None without CUDA.
        utilisation: per cent of the last second or so in which the GPU ran a kernel, as ``torch.cuda.utilization`` asks
            the driver; where that fails (nvidia-ml-py is not installed, part of a GPU), nobody asks again.
    """

    def __init__(
        self,
        config: Data2VecConfig,
        device: torch.device,
        *,
        clock: Callable[[], float] = time.perf_counter,
        event: Callable[[], torch.cuda.Event] | None = None,
        utilisation: Callable[[], float] | None = None,
    ) -> None:
        self.config, self.device, self._clock = config, device, clock
        self._event, self._utilisation, self._asked = event, utilisation, 0.0
        peak = None
        if device.type == "cuda":
            peak = peak_tflops(torch.cuda.get_device_name(device))
            self._event = event or partial(torch.cuda.Event, enable_timing=True)
            self._utilisation = utilisation or partial(torch.cuda.utilization, device)
        self._peak = 1e12 * (peak or 0)
        self._free: list[torch.cuda.Event] = []  # used in the window before
        self._plans: dict[tuple[bool, bool], tuple[Plan, Plan]] = {}
        self._began: float | None = None
        self._reset()

    def _reset(self) -> None:
        self._sums = dict.fromkeys(COLUMNS, 0.0)
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for the loader."""
        begun = self._start()
        yield
        self._sums["waited"] += self._clock() - begun

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around one update: copies to the device, forward, backward, optimizer and teacher."""
        begun = self._start()
        first = self._mark()
        yield
        if first is not None:
            self._marks.append((first, self._mark()))
        self._sums["worked"] += self._clock() - begun
        self._sums["updates"] += 1
        self._sample(begun)

    def add(self, batches: Sequence[Batch | None]) -> None:
        """Take in the micro-batches of an update, still on the host; None for one of which nothing could be read."""
        for batch in batches:
            if batch is not None:
                self._add(batch)

    def _add(self, batch: Batch) -> None:
        sums, positions = self._sums, batch.mask.numel()
        if batch.lengths is not None:
            positions = int(batch.lengths.sum())
        sums["items"] += batch.inputs.shape[0]
        sums["positions"] += positions
        sums["masked"] += batch.num_masked
        kind = batch.masked is None, batch.valid is None
        if kind not in self._plans:
            self._plans[kind] = plans(self.config, batch)
        sums["flops"] += batch_flops(self.config, batch, self._plans[kind])
        if self.config.modality == "speech":
            valid = positions / batch.mask.numel()
            sums["audio"] += batch.inputs.numel() / self.config.frontend.sample_rate * valid

    def _start(self) -> float:
        now = self._clock()
        if self._began is None:
            self._began = now
        return now

    def _mark(self) -> torch.cuda.Event | None:
        if self._event is None:
            return None
        event = self._free.pop() if self._free else self._event()
        event.record()
        return event

    def _sample(self, now: float) -> None:
        """Ask for the GPU's utilisation, if it is time to."""
        if self._utilisation is None or now - self._asked < SAMPLE_SECONDS:
            return
        self._asked = now
        try:
            self._sums["utilisation"] += self._utilisation() / 100
            self._sums["samples"] += 1
        except Exception:  # of several libraries, and no reason to stop
            self._utilisation = None

    def take(self) -> list[float]:
        """This rank's numbers by ``COLUMNS``, and a new window. For log steps: it waits for the device."""
        if self._marks:
            self._marks[-1][1].synchronize()
        sums = self._sums
        sums["busy"] = sum(first.elapsed_time(last) for first, last in self._marks) / 1e3
        now = self._clock()
        sums["seconds"] = now - (now if self._began is None else self._began)
        sums["peak_flops"], sums["peak_memory"] = self._peak, float(peak_memory(self.device))
        self._began = now
        self._free += [event for pair in self._marks for event in pair]
        self._reset()
        return list(sums.values())

    def record(self, rows: Sequence[Sequence[float]]) -> dict[str, float]:
        """What goes to the log, from the lists that :meth:`take` gave on every rank; {} if there was no update."""
        c = {name: column for name, *column in zip(COLUMNS, *rows, strict=True)}
        seconds, updates, ranks = max(c["seconds"]), max(c["updates"]), len(rows)
        if seconds <= 0 or updates == 0:
            return {}
        record = {"seconds_per_update": seconds / updates, "data_wait": sum(c["waited"]) / ranks / seconds}
        if ranks > 1:
            record["data_wait_worst"] = max(c["waited"]) / seconds
        record["host_seconds"] = sum(c["worked"]) / ranks / updates
        if self._event is not None:
            record["device_idle"] = max(0.0, 1 - sum(c["busy"]) / ranks / seconds)
        if sum(c["samples"]) > 0:
            record["gpu_idle"] = 1 - sum(c["utilisation"]) / sum(c["samples"])
        rates = {
            "speech": {"audio_seconds_per_s": "audio", "frames_per_s": "positions"},
            "image": {"images_per_s": "items"},
            "text": {"tokens_per_s": "positions"},
        }[self.config.modality]
        for name, column in {**rates, "masked_per_s": "masked"}.items():
            record[name] = sum(c[column]) / seconds
        record["tflop_per_s"] = sum(c["flops"]) / ranks / seconds / 1e12
        if min(c["peak_flops"]) > 0:
            record["mfu"] = sum(c["flops"]) / seconds / sum(c["peak_flops"])
        record["peak_memory"] = max(c["peak_memory"])
        return record

"""Times on a GPU: queued calls or a captured graph, inputs that rotate through more memory than the L2 cache holds."""

import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from common import synchronize

Call = Callable[[], Any]
QUANTILES = [0.2, 0.5, 0.8]
LAUNCH_BOUND_MS = 0.05  # below, gaps between launches count as much as the kernels
_CYCLES_PER_US = 2000  # more than any clock, so that a sleep lasts at least as long as asked for


@dataclass(frozen=True)
class GpuTime:
    """Milliseconds of one call on the device, and how they were taken ("queued" or "graph")."""

    p20: float
    p50: float
    p80: float
    timer: str


def l2_bytes() -> int:
    """Size of the L2 cache."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def input_sets(set_bytes: int) -> int:
    """How many input sets make a round longer than the L2 cache: 1 for a set that flushes it alone."""
    if set_bytes > 20 * l2_bytes():
        return 1
    return min(max(-(-4 * l2_bytes() // max(set_bytes, 1)), 3), 32)


def gpu_time(calls: Sequence[Call], capturable: bool, rep_ms: int = 100) -> GpuTime:
    """Time of one call on the device: the same op on each of several input sets, taking turns.

    The launches of a call are queued behind a pause of the device, so that host time does not count however slow the
    host is ("queued"); :func:`wall_ms` has the time with it. What waits for the device inside keeps its gaps. Below
    50 us, replays of a CUDA graph, where one can be captured ("graph").
    """
    for call in calls:
        call()  # compiles, fills caches
    host = host_us(calls[0])
    times = _queued_ms(calls, host, 5)
    middle = statistics.median(times)
    if middle < LAUNCH_BOUND_MS and capturable:
        return _graph_time(calls, middle, rep_ms)
    times = _queued_ms(calls, host, min(max(round(rep_ms / middle), 10), 100))
    return GpuTime(*_quantiles(times), "queued")


def _queued_ms(calls: Sequence[Call], host: float, count: int) -> list[float]:
    """Milliseconds of ``count`` calls, each behind a pause of twice the ``host`` microseconds that launching takes."""
    turns = itertools.cycle(calls)
    outputs: deque = deque(maxlen=len(calls))  # stay alive, or they would all be written to the same cached place
    events = [_event_pair() for _ in range(count)]
    for start, end in events:
        torch.cuda._sleep(int(2 * host * _CYCLES_PER_US))
        start.record()
        outputs.append(next(turns)())
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _event_pair() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def _quantiles(times: Sequence[float]) -> list[float]:
    return torch.tensor(times, dtype=torch.float64).quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()


def wall_ms(calls: Sequence[Call], least_ms: float = 50.0) -> float:
    """Milliseconds of a call among many, one after the other: the device's time or the host's, whichever is longer."""
    torch.cuda.synchronize()
    turns, count, start = itertools.cycle(calls), 0, time.perf_counter()
    while count < 3 or 1e3 * (time.perf_counter() - start) < least_ms:
        next(turns)()
        count += 1
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / count


def _graph_time(calls: Sequence[Call], estimate_ms: float, rep_ms: int) -> GpuTime:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    rounds = min(max(round(2.0 / (estimate_ms * len(calls))), 1), 50)
    # outputs of a round stay alive, or they would all be written to the same cached place
    outputs: deque = deque(maxlen=len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in list(calls) * rounds:
            outputs.append(call())
    replays = min(max(round(rep_ms / (estimate_ms * rounds * len(calls))), 10), 200)
    events = [_event_pair() for _ in range(replays)]
    graph.replay()
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) / (rounds * len(calls)) for start, end in events]
    return GpuTime(*_quantiles(times), "graph")


def host_us(call: Call, count: int = 15) -> float:
    """Median microseconds until a call returns to the host, with nothing queued before it."""
    times = []
    for _ in range(count):
        synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    synchronize()
    return 1e6 * statistics.median(times)


def peak_mib(call: Call) -> float:
    """Memory that a call needs on top of what was allocated before it, its results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak / 2**20


def held_mib(forward: Call) -> float:
    """Memory that stays allocated after a forward until its backward, its results included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    result = forward()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    del result
    return held / 2**20


def copy_gb_per_s(size: int = 2**30) -> float:
    """Rate of a large copy on this device, bytes read plus bytes written: the ceiling of every memory-bound op."""
    source = torch.randn(size // 4, device="cuda")
    target = torch.empty_like(source)
    milliseconds = triton.testing.do_bench(lambda: target.copy_(source), warmup=25, rep=200, quantiles=QUANTILES)[1]
    return 2 * source.nbytes / milliseconds / 1e6


def matmul_tflop_per_s(size: int = 8192) -> float:
    """Rate of a large bfloat16 matrix product on this device: the ceiling of everything made of matrix products."""
    a, b = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    milliseconds = triton.testing.do_bench(lambda: a @ b, warmup=50, rep=200, quantiles=QUANTILES)[1]
    return 2 * size**3 / milliseconds / 1e9

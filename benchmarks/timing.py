"""Times on a GPU: events or a captured graph, inputs that rotate through more memory than the L2 cache holds."""

import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

Call = Callable[[], Any]
QUANTILES = [0.2, 0.5, 0.8]
LAUNCH_BOUND_MS = 0.05  # below, gaps between launches count as much as the kernels


@dataclass(frozen=True)
class GpuTime:
    """Milliseconds of one call, and how they were taken ("events" or "graph")."""

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
    """Time of one call: the same op on each of several input sets, taking turns.

    Ops below 50 us, and ops whose launches take longer than their kernels, are timed as replays of a CUDA graph when
    they can be captured. What cannot be captured (it waits for the device) keeps the time between events.
    """
    for call in calls:
        call()  # compiles, fills caches
    turns = itertools.cycle(calls)
    p20, p50, p80 = triton.testing.do_bench(lambda: next(turns)(), warmup=25, rep=rep_ms, quantiles=QUANTILES)
    launch_bound = p50 < LAUNCH_BOUND_MS or 1e-3 * host_us(calls[0]) > 0.7 * p50
    if launch_bound and capturable:
        return _graph_time(calls, p50, rep_ms)
    return GpuTime(p20, p50, p80, "events")


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
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    graph.replay()
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = torch.tensor([start.elapsed_time(end) for start, end in events], dtype=torch.float64)
    p20, p50, p80 = (times / (rounds * len(calls))).quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    return GpuTime(p20, p50, p80, "graph")


def host_us(call: Call, count: int = 15) -> float:
    """Median microseconds until a call returns to the host, with nothing queued before it."""
    times = []
    for _ in range(count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
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


def copy_gb_per_s(size: int = 2**30) -> float:
    """Rate of a large copy on this device, bytes read plus bytes written: the ceiling of every memory-bound op."""
    source = torch.randn(size // 4, device="cuda")
    target = torch.empty_like(source)
    milliseconds = triton.testing.do_bench(lambda: target.copy_(source), warmup=25, rep=200, quantiles=QUANTILES)[1]
    return 2 * source.nbytes / milliseconds / 1e6

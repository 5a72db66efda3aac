"""Runs one op's benchmark: every provider is checked against float64 first, and only what is right is timed.

A bench file describes its op as a :class:`Bench`; this module has the rest, so that all ops are measured alike.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from common import DEVICE, interleaved, ratios
from torch import Tensor

torch.backends.cudnn.allow_tf32 = False  # float32 means the same on all sides; products do without by default

OURS = "d2v_fast"
Results = dict[str, Any]  # name -> tensor or list of tensors
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of low-precision results; others: Bench.tolerance
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class WrongResult(ValueError):
    """A provider computes something else."""


class NotInstalled(ImportError):
    """A peer library is not there."""


@dataclass(frozen=True)
class Case:
    """One row of the table. ``sizes`` make the inputs, ``options`` go to every provider."""

    name: str
    dtype: str
    sizes: dict[str, Any]
    options: dict[str, Any]
    main: bool = True  # part of the standard run; the others need --cases all


@dataclass(frozen=True)
class Provider:
    """``load`` returns the function to run, or raises :class:`NotInstalled`."""

    load: Callable[[], Callable[..., Results]]
    prepare: Callable[[Results], Results] | None = None  # another memory layout of equal inputs, made before the clock
    capturable: bool = True  # False: waits for the device, so no CUDA graph can hold it
    compiled: bool = False
    peer: bool = False  # another library's code: reported, but no reason to fail
    around: Callable[[], AbstractContextManager] = nullcontext  # entered for every call, backward included


def ours(function: Callable[..., Results], **flags: Any) -> Provider:
    """Our op."""
    return Provider(lambda: function, **flags)


def eager(function: Callable[..., Results], **flags: Any) -> Provider:
    """Plain PyTorch."""
    return Provider(lambda: function, **flags)


def compiled(function: Callable[..., Results], **flags: Any) -> Provider:
    """``torch.compile`` of plain PyTorch, for the shapes of the case."""
    return Provider(lambda: torch.compile(function, dynamic=False), compiled=True, **flags)


@dataclass(frozen=True)
class Bench:
    """An op: its cases, its inputs, who computes it, and the least traffic any implementation needs."""

    op: str
    cases: Sequence[Case]
    smoke: Sequence[Case]
    inputs: Callable[..., Results]  # (dtype, **sizes) -> tensors, lists of tensors or None
    exact: Callable[..., Results]  # on float64 inputs
    providers: Mapping[str, Provider]
    minimal_bytes: Callable[[Case, str], int]  # of a case in a mode
    differentiable: Sequence[str] = ()  # inputs that get a gradient; none: forward only
    tolerance: float = 1e-4  # relative norm of the error of float32 results
    low_tolerance: float = 1.0  # factor on TOLERANCE: several layers in a row round several times
    passes: Callable[[Case, str], Sequence[tuple[int, int]]] | None = None  # FLOP, bytes of each necessary pass
    checked_with: dict[str, Any] = field(default_factory=dict)  # sizes or options that the check replaces
    also_check: Callable[[Callable[..., Results], Case], None] | None = None  # raises WrongResult

    @property
    def modes(self) -> tuple[str, ...]:
        return ("fwd", "fwd+bwd") if self.differentiable else ("fwd",)


def make_inputs(bench: Bench, case: Case, provider: Provider | None = None, seed: int = 0) -> Results:
    """The same numbers for every provider, in the layout it wants."""
    torch.manual_seed(seed)
    inputs = bench.inputs(DTYPES[case.dtype], **case.sizes)
    return provider.prepare(inputs) if provider and provider.prepare else inputs


def make_call(
    bench: Bench, case: Case, mode: str, function: Callable, inputs: Results,
    around: Callable[[], AbstractContextManager] = nullcontext,
) -> Callable[[], Results]:  # fmt: skip
    """A function without arguments: forward without gradients, or forward and backward with given upstream ones."""
    options = case.options
    if mode == "fwd":

        def forward() -> Results:
            with torch.no_grad(), around():
                return function(**inputs, **options)

        return forward

    leaves = _leaves(bench, inputs)
    flat = [x for xs in leaves.values() for x in xs]
    upstream: dict[str, Tensor] = {}

    def forward_backward() -> Results:
        with around():
            results = function(**inputs, **options)
            outputs = {name: x for name, x in results.items() if isinstance(x, Tensor) and x.requires_grad}
            for name, x in outputs.items():
                if name not in upstream:  # at the first call
                    upstream[name] = _upstream(x, DTYPES[case.dtype])
            grads = iter(torch.autograd.grad(list(outputs.values()), flat, [upstream[n] for n in outputs]))
        results = {name: x.detach() if isinstance(x, Tensor) else x for name, x in results.items()}
        return {**results, **{f"grad_{name}": [next(grads) for _ in xs] for name, xs in leaves.items()}}

    return forward_backward


def make_forward(
    bench: Bench, case: Case, function: Callable, inputs: Results,
    around: Callable[[], AbstractContextManager] = nullcontext,
) -> Callable[[], Results]:  # fmt: skip
    """A function without arguments: forward alone, holding what backward would need."""
    _leaves(bench, inputs)

    def forward() -> Results:
        with around():
            return function(**inputs, **case.options)

    return forward


def _leaves(bench: Bench, inputs: Results) -> dict[str, list[Tensor]]:
    """The tensors of each input that gets a gradient."""
    leaves = {name: _tensors(inputs[name]) for name in bench.differentiable}
    for x in (x for xs in leaves.values() for x in xs):
        x.requires_grad_()
    return {name: xs for name, xs in leaves.items() if xs}


def _upstream(x: Tensor, low: torch.dtype) -> Tensor:
    """The same gradient for every provider: random, and representable in the case's dtype."""
    if x.dim() == 0:
        return torch.full_like(x, 0.375)
    generator = torch.Generator(device=x.device).manual_seed(1)
    return torch.randn(x.shape, generator=generator, device=x.device).to(low).to(x.dtype)


def to_double(inputs: Results) -> Results:
    """float64 copies of all floating point inputs."""

    def one(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return [one(y) for y in x]
        return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x

    return {name: one(x) for name, x in inputs.items()}


def exact_results(bench: Bench, case: Case, mode: str) -> Results:
    """The float64 answer to the inputs of the check."""
    case = check_case(bench, case)
    return make_call(bench, case, mode, bench.exact, to_double(make_inputs(bench, case)))()


def check_case(bench: Bench, case: Case) -> Case:
    """``case`` with what the check replaces, such as no dropout."""
    sizes, options = (
        {name: bench.checked_with.get(name, value) for name, value in values.items()}
        for values in (case.sizes, case.options)
    )
    return replace(case, sizes=sizes, options=options)


def check(bench: Bench, case: Case, mode: str, provider: Provider, function: Callable, exact: Results) -> float:
    """The largest error relative to its limit; raises :class:`WrongResult` above 1."""
    case = check_case(bench, case)
    inputs = make_inputs(bench, case, provider)
    _poison(sum(x.nbytes for x in _tensors(inputs)))
    actual = make_call(bench, case, mode, function, inputs, provider.around)()
    worst = 0.0
    for name, want in exact.items():
        got = actual.get(name)
        if got is None:
            raise WrongResult(f"{name} is missing")
        pairs = list(zip(_tensors(got), _tensors(want), strict=True))
        for g, w in pairs:
            if g.shape != w.shape:
                raise WrongResult(f"{name} has shape {tuple(g.shape)}, expected {tuple(w.shape)}")
            error = ((g.double() - w).norm() / w.norm().clamp(min=1e-30)).item()
            low = TOLERANCE.get(g.dtype)
            share = error / (bench.tolerance if low is None else low * bench.low_tolerance)
            if not share <= 1:  # NaN as well
                raise WrongResult(f"{name}: relative error {error:.1e} against float64")
            worst = max(worst, share)
    return worst


def _poison(size: int) -> None:
    """Leave NaN in the allocator's free memory, so that an output element nobody writes is noticed."""
    torch.full((min(size, 2**31) // 4 + 1,), float("nan"), device=DEVICE)


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, Mapping):
        x = list(x.values())
    return [t for y in x for t in _tensors(y)] if isinstance(x, list | tuple) else []


def ready(bench: Bench, case: Case, mode: str, names: Sequence[str], deadline: float) -> tuple[list[dict], dict]:
    """A row for every provider, and the functions of those that gave the right answer.

    Past ``deadline`` (of ``time.monotonic``) nothing new is started and the rows say so.
    """
    rows, functions = [], {}
    torch.compiler.reset()  # each case is compiled for its own shapes
    exact = exact_results(bench, case, mode) if time.monotonic() < deadline else {}
    for name in names:
        provider = bench.providers[name]
        row = {"case": case.name, "dtype": case.dtype, "mode": mode, "provider": name, "peer": provider.peer}
        rows.append(row)
        if time.monotonic() > deadline:
            row["status"] = "skipped: out of time"
            continue
        try:
            function = provider.load()
            row["error_of_limit"] = check(bench, case, mode, provider, function, exact)
            if bench.also_check:
                bench.also_check(function, case)
        except NotInstalled:
            row["status"] = "not installed"
        except WrongResult as error:
            row["status"] = f"wrong: {error}"
        except Exception as error:  # reported in the table, and the run fails unless the provider is a peer
            row["status"] = f"failed: {reason(error)}"
        else:
            row["status"] = "ok"
            functions[name] = function
    return rows, functions


def reason(error: Exception) -> str:
    """What went wrong, in one line; where the first line only announces the second, both."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[: 2 if lines and lines[0].endswith(':') else 1])}"


def run_cpu(bench: Bench, case: Case, mode: str, rows: list[dict], functions: dict, rounds: int) -> None:
    """Ratios of interleaved wall-clock times; no absolute time leaves this function."""
    calls = {}
    for name, function in functions.items():
        provider = bench.providers[name]
        inputs = make_inputs(bench, case, provider)
        calls[name] = make_call(bench, case, mode, function, inputs, provider.around)
    if OURS not in calls:
        return
    result = ratios(interleaved(calls, rounds), OURS)
    for row in rows:
        row.update(result.get(row["provider"], {}))


@dataclass(frozen=True)
class Rates:
    """What this device reaches on a large copy (GB/s) and, where a bench counts FLOP, a large matrix product."""

    copy: float
    matmul: float = math.nan  # TFLOP/s in bfloat16


def run_gpu(bench: Bench, case: Case, mode: str, rows: list[dict], functions: dict, rates: Rates) -> None:
    """Times, rates and memory of each provider that is in ``functions``, and the ratio to ours."""
    for row in rows:
        name = row["provider"]
        if name not in functions:
            continue
        try:
            row.update(_measure(bench, case, mode, name, functions[name]))
        except RuntimeError as error:  # out of memory, or a graph that could not be captured: shown, and the run fails
            row["status"] = f"failed: {reason(error)}"
            continue
        row["percent_of_copy"] = 100 * row["gb_per_s"] / rates.copy
        row.update(_roofline(bench, case, mode, row["ms_p50"], rates))
    timed = [row for row in rows if row["provider"] == OURS and "ms_p50" in row]
    base, wall = (timed[0]["ms_p50"], timed[0]["wall_ms"]) if timed else (None, None)
    for row in rows:
        if base is not None and "ms_p50" in row:
            row["ratio"] = row["ms_p50"] / base
            row["wall_ratio"] = row["wall_ms"] / wall


def _roofline(bench: Bench, case: Case, mode: str, milliseconds: float, rates: Rates) -> dict[str, float]:
    """Per cent of the matrix rate, and of the least time: each pass at its limit, memory or arithmetic, in turn."""
    if bench.passes is None or case.dtype == "float32" or math.isnan(rates.matmul):
        return {}
    passes = bench.passes(case, mode)
    tflop = sum(flop for flop, _ in passes) / 1e12
    least = sum(max(flop / rates.matmul / 1e9, size / rates.copy / 1e6) for flop, size in passes)
    rate = 1e3 * tflop / milliseconds
    return {
        "tflop": tflop,
        "percent_of_matmul": 100 * rate / rates.matmul,
        "percent_of_roofline": 100 * least / milliseconds,
    }


def add_backward(bench: Bench, case: Case, rows: list[dict], rates: Rates) -> None:
    """Backward alone, in the rows that hold both ways: their time less that of the forward row of the same provider."""
    times = {(r["provider"], r["mode"]): r["ms_p50"] for r in rows if r["case"] == case.name and "ms_p50" in r}
    backward = {
        name: t - times[name, "fwd"] for (name, mode), t in times.items() if mode != "fwd" and (name, "fwd") in times
    }
    size = bench.minimal_bytes(case, "fwd+bwd") - bench.minimal_bytes(case, "fwd") if backward else 0
    for row in rows:
        milliseconds = backward.get(row["provider"], 0)
        if row["case"] != case.name or row["mode"] == "fwd" or milliseconds <= 0:
            continue
        row["bwd_ms"], row["bwd_percent_of_copy"] = milliseconds, 100 * size / milliseconds / 1e6 / rates.copy
        if backward.get(OURS, 0) > 0:
            row["bwd_ratio"] = milliseconds / backward[OURS]


def _measure(bench: Bench, case: Case, mode: str, name: str, function: Callable[..., Results]) -> dict:
    from timing import gpu_time, held_mib, host_us, input_sets, peak_mib, wall_ms

    provider = bench.providers[name]
    first = make_inputs(bench, case, provider)
    sets = input_sets(sum(x.nbytes for x in _tensors(first)))
    inputs = [first, *(make_inputs(bench, case, provider, seed) for seed in range(1, sets))]
    calls = [make_call(bench, case, mode, function, x, provider.around) for x in inputs]
    taken = gpu_time(calls, provider.capturable)
    size = bench.minimal_bytes(case, mode)
    result = {"ms_p20": taken.p20, "ms_p50": taken.p50, "ms_p80": taken.p80, "timer": taken.timer}
    result.update({"minimal_bytes": size, "gb_per_s": size / taken.p50 / 1e6, "input_sets": sets})
    result.update({"peak_mib": peak_mib(calls[0]), "host_us": host_us(calls[0]), "wall_ms": wall_ms(calls)})
    if mode != "fwd":
        result["held_mib"] = held_mib(make_forward(bench, case, function, first, provider.around))
    if name == OURS:  # timed twice: what two equal programs differ by
        again = gpu_time(calls, provider.capturable)
        result["noise"] = abs(again.p50 - taken.p50) / min(again.p50, taken.p50)
    return result

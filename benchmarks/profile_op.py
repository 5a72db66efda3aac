"""Profiles one case of an op's benchmark with Nsight Compute: where the time of each of its kernels goes.

python benchmarks/profile_op.py conv0                                   # the first case, forward and backward
python benchmarks/profile_op.py ema --case "speech large*" --mode fwd --json conv0.json

Needs a GPU whose counters this user may read, and ncu. Clocks are left as they are (--clock-control none); ncu empties
the caches before each of its replays, so that all that is read comes from memory at least once. Prints a line for each
kernel, and writes the same as JSON. Times of ncu's replays are not the benchmark's: compare kernels with each other,
and bytes with the least that the benchmark's formula says.
"""

import argparse
import csv
import fnmatch
import importlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gpu_parts import BENCHMARKS, child_environment, program

OURS = "d2v_fast"
WARM_UP = 3  # calls before the one that is profiled
METRICS = {  # our name -> ncu's; several are added up
    "ns": ("gpu__time_duration.sum",),
    "read_bytes": ("dram__bytes_read.sum",),
    "written_bytes": ("dram__bytes_write.sum",),
    "dram_percent": ("dram__throughput.avg.pct_of_peak_sustained_elapsed",),
    "sm_percent": ("sm__throughput.avg.pct_of_peak_sustained_elapsed",),
    "tensor_percent": ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",),
    "occupancy_percent": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "l2_hit_percent": ("lts__t_sector_hit_rate.pct",),
    "registers": ("launch__registers_per_thread",),
    "local_bytes": ("l1tex__t_bytes_pipe_lsu_mem_local_op_ld.sum", "l1tex__t_bytes_pipe_lsu_mem_local_op_st.sum"),
}
ASKED = tuple(name for names in METRICS.values() for name in names)
SUMMED = ("ns", "read_bytes", "written_bytes", "local_bytes")  # of several launches; of others the mean by time
UNITS = {"": 1, "%": 1, "register/thread": 1, "ns": 1, "us": 1e3, "ms": 1e6, "s": 1e9, "byte": 1}
UNITS |= {"nsecond": 1, "usecond": 1e3, "msecond": 1e6, "second": 1e9}
UNITS |= {f"{prefix}byte": 10.0**power for prefix, power in (("K", 3), ("M", 6), ("G", 9), ("T", 12))}
NUMBERS = tuple(METRICS)


class ProfileError(RuntimeError):
    """Nothing was profiled, and why."""


@dataclass(frozen=True)
class Kernel:
    """All launches of a kernel in one call. A counter that ncu does not have on this GPU is None."""

    name: str
    launches: int
    ns: float | None
    read_bytes: float | None
    written_bytes: float | None
    dram_percent: float | None
    sm_percent: float | None
    tensor_percent: float | None
    occupancy_percent: float | None
    l2_hit_percent: float | None
    registers: float | None
    local_bytes: float | None

    @property
    def moved(self) -> float | None:
        """Bytes from and to memory."""
        return None if None in (self.read_bytes, self.written_bytes) else self.read_bytes + self.written_bytes


def ncu_command(ncu: str, log: Path, inner: Sequence[str], without: Sequence[str] = ()) -> list[str]:
    """ncu around the call that the inner process marks; ``without`` these metrics."""
    metrics = ",".join(name for name in ASKED if name not in without)
    options = ["--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none", "--log-file", str(log)]
    return [ncu, *options, "--profile-from-start", "off", "--metrics", metrics, sys.executable, *inner]


def parse(text: str) -> list[dict[str, float | str | None]]:
    """The launches in ncu's raw page: a line of names, one of units, then a line a launch.

    Raises:
        ProfileError: there are none; with what ncu says of it.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        said = [line for line in lines if line.startswith(("==ERROR==", "==WARNING=="))] or lines[-3:]
        raise ProfileError("ncu profiled nothing: " + (" ".join(said) or "it said nothing"))
    rows = list(csv.DictReader(line for line in lines[start:] if not line.startswith("==")))
    if not rows or rows[0]["ID"]:
        raise ProfileError("ncu's table has no line of units: another format than --page raw --csv had")
    units, launches = rows[0], rows[1:]
    if not launches:
        raise ProfileError("the call launched no kernel")
    found = []
    for row in launches:
        one: dict[str, float | str | None] = {"name": row["Kernel Name"]}
        for name, columns in METRICS.items():
            values = [number(row.get(column), units.get(column)) for column in columns]
            one[name] = None if None in values else sum(values)
        found.append(one)
    return found


def number(text: str | None, unit: str | None) -> float | None:
    """A value in base units (bytes, ns); None for a counter that is not there."""
    if not text or text.lower() in ("n/a", "nan", "(nan)"):
        return None
    unit = unit or ""
    if unit not in UNITS:
        raise ProfileError(f"ncu gives {text} in {unit!r}, expected one of {', '.join(filter(None, UNITS))}")
    return float(text.replace(",", "")) * UNITS[unit]


def by_kernel(launches: Sequence[dict]) -> list[Kernel]:
    """Launches of one name together, the longest first."""
    groups: dict[str, list[dict]] = {}
    for launch in launches:
        groups.setdefault(launch["name"], []).append(launch)
    kernels = []
    for name, group in groups.items():
        values: dict[str, float | None] = {}
        for key in NUMBERS:
            numbers = [launch[key] for launch in group]
            if None in numbers:
                values[key] = None
            elif key in SUMMED:
                values[key] = sum(numbers)
            else:
                weights = [launch["ns"] or 0.0 for launch in group]
                total = sum(weights)
                values[key] = sum(map(lambda x, w: x * w, numbers, weights)) / total if total else max(numbers)
        kernels.append(Kernel(name, len(group), **values))
    return sorted(kernels, key=lambda kernel: -(kernel.ns or 0.0))


COLUMNS: tuple[tuple[str, int, Callable[[Kernel], float | None]], ...] = (  # label, digits, number
    ("us", 1, lambda k: k.ns and k.ns / 1e3),
    ("MB", 1, lambda k: None if k.moved is None else k.moved / 1e6),
    ("DRAM %", 1, lambda k: k.dram_percent),
    ("SM %", 1, lambda k: k.sm_percent),
    ("tensor %", 1, lambda k: k.tensor_percent),
    ("occupancy %", 1, lambda k: k.occupancy_percent),
    ("L2 hit %", 1, lambda k: k.l2_hit_percent),
    ("registers", 0, lambda k: k.registers),
    ("local MB", 1, lambda k: None if k.local_bytes is None else k.local_bytes / 1e6),
)


def table(kernels: Sequence[Kernel], minimal_bytes: int) -> str:
    """For people: a line a kernel, then all of them against the least traffic."""
    lines = [f"{'kernel':40} {'n':>3} " + " ".join(f"{label:>9}" for label, *_ in COLUMNS)]
    for kernel in kernels:
        cells = []
        for label, digits, take in COLUMNS:
            value = take(kernel)
            cells.append(f"{'–' if value is None else f'{value:.{digits}f}':>{max(len(label), 9)}}")
        lines.append(f"{short(kernel.name):40} {kernel.launches:3d} {' '.join(cells)}")
    moved = [kernel.moved for kernel in kernels]
    if None not in moved and minimal_bytes > 0:
        least = f"the least is {minimal_bytes / 1e6:.1f} MB: {sum(moved) / minimal_bytes:.2f} times that"
        lines.append(f"in all {sum(moved) / 1e6:.1f} MB; {least}")
    return "\n".join(lines)


def short(name: str) -> str:
    """A kernel's name without arguments of templates and functions."""
    name = name.removeprefix("void ").split("(")[0].split("<")[0]
    return name if len(name) <= 40 else name[:37] + "..."


def pick(op: str, pattern: str | None, mode: str | None):
    """The bench of an op, its case and mode; raises :class:`ProfileError` for unknown ones."""
    if not (BENCHMARKS / f"bench_{op}.py").exists() or op == "train_step":
        known = sorted(p.stem.removeprefix("bench_") for p in BENCHMARKS.glob("bench_*.py"))
        raise ProfileError(f"OP must be one of {', '.join(n for n in known if n != 'train_step')}, got {op!r}")
    bench = importlib.import_module(f"bench_{op}").BENCH
    cases = [case for case in bench.cases if pattern is None or fnmatch.fnmatchcase(case.name, pattern)]
    if not cases:
        raise ProfileError(f"--case must fit one of {'; '.join(case.name for case in bench.cases)}; got {pattern!r}")
    mode = mode or bench.modes[-1]
    if mode not in bench.modes:
        raise ProfileError(f"--mode of {op} must be {' or '.join(bench.modes)}, got {mode!r}")
    return bench, cases[0], mode


def marked_call(bench, case, mode: str, provider: str) -> None:
    """The call of a provider, once it is warm, between marks for the profiler."""
    import torch
    from driver import make_call, make_inputs

    chosen = bench.providers[provider]
    inputs = make_inputs(bench, case, chosen)
    call = make_call(bench, case, mode, chosen.load(), inputs, chosen.around)
    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def profile(op: str, case: str, mode: str, provider: str, seconds: float) -> list[Kernel]:
    """Kernels of one call. Raises :class:`ProfileError`."""
    ncu = program("ncu")
    if ncu is None:
        raise ProfileError("ncu (Nsight Compute, part of the CUDA toolkit) is not installed, or not on PATH")
    inner = [str(Path(__file__).resolve()), op, "--case", case, "--mode", mode, "--provider", provider, "--inner"]
    status, text, said = run_ncu(ncu, inner, (), seconds)
    refused = [name for name in ASKED if any(name in line for line in text.splitlines() if line.startswith("==ERROR"))]
    if refused and '"ID"' not in text:  # other GPUs, other counters
        status, text, said = run_ncu(ncu, inner, refused, seconds)
    if status != 0 and '"ID"' not in text:
        raise ProfileError(f"ncu ended with status {status}: {' '.join((text + said).strip().splitlines()[-5:])}")
    return by_kernel(parse(text))


def run_ncu(ncu: str, inner: Sequence[str], without: Sequence[str], seconds: float) -> tuple[int, str, str]:
    """Exit status, the log of ncu, and what the process said."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = ncu_command(ncu, log, inner, without)
        environment = {**child_environment(), "LC_ALL": "C"}  # numbers with a point
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=seconds, cwd=BENCHMARKS, env=environment
            )
        except subprocess.TimeoutExpired as error:
            raise ProfileError(f"ncu took more than {seconds:.0f} s (--timeout)") from error
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return done.returncode, text, done.stdout + done.stderr


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", metavar="OP", help="of benchmarks/bench_OP.py")
    parser.add_argument("--case", help="pattern of a name (*); default: the first case")
    parser.add_argument("--mode", help='"fwd" or "fwd+bwd"; default: both ways where there are two')
    parser.add_argument("--provider", default=OURS, help="whose call; default: ours")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--commit", help="what to record where the checkout has no .git")
    parser.add_argument("--timeout", type=float, default=300, help="seconds")
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)  # the process that ncu watches
    args = parser.parse_args(argv)
    try:
        bench, case, mode = pick(args.op, args.case, args.mode)
        if args.provider not in bench.providers:
            raise ProfileError(f"--provider must be one of {', '.join(bench.providers)}, got {args.provider!r}")
        if args.inner:
            marked_call(bench, case, mode, args.provider)
            return
        kernels = profile(args.op, case.name, mode, args.provider, args.timeout)
    except ProfileError as error:
        sys.exit(f"error: {error}")
    least = bench.minimal_bytes(case, mode)
    print(f"{args.op}: {case.name}, {mode}, {args.provider}\n{table(kernels, least)}")
    if args.json:
        from common import write_json

        record = {"op": args.op, "kind": "profile", "case": case.name, "mode": mode, "provider": args.provider}
        write_json(args.json, {**record, "minimal_bytes": least, "kernels": [asdict(k) for k in kernels]}, args.commit)


if __name__ == "__main__":
    main()

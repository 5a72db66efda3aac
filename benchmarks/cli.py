"""The command line that every bench file has, its table, and its JSON."""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from common import RESULTS, device_folder, environment, names_code, write_json
from driver import OURS, Bench, Case, Rates, add_backward, ready, run_cpu, run_gpu

SCHEMA = 1
SMOKE_ROUNDS = 7
EXTRA = (  # of a row: key, label, digits, unit
    ("percent_of_matmul", "matmul", 0, " %"),
    ("percent_of_roofline", "roofline", 0, " %"),
    ("held_mib", "held", 0, " MiB"),
    ("bwd_ms", "backward", 4, " ms"),
    ("bwd_percent_of_copy", "backward of copy", 0, " %"),
    ("bwd_ratio", "backward / ours", 2, ""),
)


def parser(bench: Bench) -> argparse.ArgumentParser:
    names = list(bench.providers)
    result = argparse.ArgumentParser(description=f"Benchmark of {bench.op}; see benchmarks/README.md.")
    result.add_argument("--smoke", action="store_true", help="small sizes and ratios only: what a CPU can tell")
    result.add_argument("--providers", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    result.add_argument("--cases", default="main", help='"main", "all", or a part of the names to run')
    result.add_argument("--json", help="write the results to this file")
    result.add_argument("--out", help="or to DIR/<gpu>/<op>.json (default on a GPU: benchmarks/results)")
    result.add_argument("--budget", type=float, default=math.inf, help="seconds after which nothing new is started")
    result.add_argument("--resume", action="store_true", help="keep what the file has from an earlier run here")
    result.add_argument("--commit", help="what to record where the checkout has no .git")
    return result


def main_parts(parts: dict[str, Bench], argv: list[str] | None = None) -> None:
    """:func:`main` of several benches, one after the other: those that ``--parts`` names, or all."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--parts", nargs="+", choices=list(parts), default=list(parts), help="what to run")
    first.add_argument("--budget", type=float, default=math.inf)
    chosen, rest = first.parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        first.print_help()
    deadline = time.monotonic() + chosen.budget
    if len(chosen.parts) > 1 and any(argument.startswith("--json") for argument in rest):
        first.error("--json names the file of one part: give --out, or one of --parts")
    refused = []
    for i, name in enumerate(chosen.parts):
        share = max(deadline - time.monotonic(), 0) / (len(chosen.parts) - i)
        try:
            main(parts[name], [*rest, "--budget", str(share)])
        except SystemExit as stop:
            if not isinstance(stop.code, str):  # bad arguments, or help
                raise
            refused.append(f"{name}: {stop.code}")
    if refused:
        sys.exit("; ".join(refused))


def main(bench: Bench, argv: list[str] | None = None) -> None:
    """Run ``bench``; exit 1 when a provider other than a peer library is wrong or fails, 2 on bad arguments."""
    arguments = parser(bench)
    args = arguments.parse_args(argv)
    gpu = torch.cuda.is_available() and not args.smoke
    if not gpu and not args.smoke:
        arguments.error("no GPU here: use --smoke (small sizes, ratios only)")
    cases = select(bench, args.cases, args.smoke)
    if not cases:
        known = ", ".join(case.name for case in (bench.smoke if args.smoke else bench.cases))
        arguments.error(f"--cases must be main, all or a part of: {known}; got {args.cases!r}")
    path = result_path(bench, args.json, args.out, gpu)
    record = {"schema": SCHEMA, "op": bench.op, "kind": "gpu" if gpu else "cpu-smoke"}
    rounds = plan(bench, cases, args.providers)
    kept = earlier(path, record, environment(args.commit)) if args.resume and path else []

    def save(record: dict, rows: list[dict]) -> None:
        if path:
            write_json(path, {**record, "results": rows}, args.commit)

    rows = run(bench, rounds, record, gpu, time.monotonic() + args.budget, kept, save)
    if path:
        print(f"written: {path}")
    bad = [row for row in rows if row["status"].startswith(("wrong", "failed")) and not row["peer"]]
    if bad:
        sys.exit(f"{len(bad)} of {len(rows)} measurements were refused; see the table")


@dataclass(frozen=True)
class Round:
    """Providers that are measured side by side. Ours is always one of them; ``reported`` are those to show."""

    case: Case
    mode: str
    reported: tuple[str, ...]

    def holds(self, row: dict) -> bool:
        return (row["case"], row["mode"]) == (self.case.name, self.mode) and row["provider"] in self.reported


def plan(bench: Bench, cases: list[Case], names: list[str]) -> list[Round]:
    """All cases with plain providers, then with one compiled provider after the other, so that a budget that is
    short leaves out what takes longest."""
    compiled = [name for name in names if bench.providers[name].compiled]
    plain = [name for name in names if name not in compiled]
    groups = [tuple(plain), *((name,) for name in compiled)]
    return [Round(case, mode, group) for group in groups if group for case in cases for mode in bench.modes]


def earlier(path: Path, record: dict, here: dict) -> list[dict]:
    """Rows of ``path`` that were measured for the same code on the same device and need not be repeated."""
    if not path.exists():
        return []
    old = json.loads(path.read_text(encoding="utf-8"))
    same = all(old.get(key) == value for key, value in record.items())
    same &= all(old["environment"].get(key) == here[key] for key in ("device", "torch", "commit"))
    same &= names_code(here["commit"])
    return [row for row in old["results"] if not row["status"].startswith("skipped")] if same else []


def select(bench: Bench, which: str, smoke: bool) -> list[Case]:
    """Cases by name; "main" leaves the extra ones out."""
    cases = bench.smoke if smoke else bench.cases
    if which == "main":
        return [case for case in cases if case.main]
    return [case for case in cases if which == "all" or which in case.name]


def result_path(bench: Bench, json_file: str | None, out: str | None, gpu: bool) -> Path | None:
    """Where the JSON goes; nowhere for a smoke run without ``json_file`` or ``out``."""
    if json_file:
        return Path(json_file)
    if out or gpu:
        return Path(out or RESULTS) / (device_folder() if gpu else "cpu-smoke") / f"{bench.op}.json"
    return None


def run(
    bench: Bench, rounds: list[Round], record: dict, gpu: bool, deadline: float, kept: list[dict],
    save: Callable[[dict, list[dict]], None],
) -> list[dict]:  # fmt: skip
    """Check and measure, round by round; prints a line for each provider and saves after each round."""
    rates = Rates(math.nan)
    if gpu:
        from timing import copy_gb_per_s, l2_bytes, matmul_tflop_per_s

        rates = Rates(copy_gb_per_s(), matmul_tflop_per_s() if bench.passes else math.nan)
        record = {**record, "copy_gb_per_s": rates.copy, "l2_mib": l2_bytes() / 2**20}
        print(f"{bench.op}: copy {rates.copy:.0f} GB/s")
        if bench.passes:
            record["matmul_tflop_per_s"] = rates.matmul
            print(f"{bench.op}: matrix product {rates.matmul:.0f} TFLOP/s")
    print(header(gpu))
    all_rows: list[dict] = []
    for i, round_ in enumerate(rounds):
        case, mode, reported = round_.case, round_.mode, round_.reported
        old = [row for row in kept if round_.holds(row)]
        if len(old) == len(reported):
            all_rows += old
            continue
        later = [row for row in kept if any(other.holds(row) for other in rounds[i + 1 :])]
        names = [OURS, *(name for name in reported if name != OURS)]
        rows, functions = ready(bench, case, mode, names, deadline)
        if gpu:
            run_gpu(bench, case, mode, rows, functions, rates)
            torch.cuda.empty_cache()
        else:
            run_cpu(bench, case, mode, rows, functions, SMOKE_ROUNDS)
        rows = [row for row in rows if row["provider"] in reported]
        all_rows += rows
        add_backward(bench, case, all_rows, rates)
        for row in rows:
            print(line(row, gpu), flush=True)
            row.update({"sizes": case.sizes, "options": case.options, "dtype": case.dtype})
        measured = [row for row in all_rows + later if not row["status"].startswith("skipped")]
        complete = len(measured) == sum(len(round_.reported) for round_ in rounds)
        save({**record, "complete": complete}, all_rows + later)
    return all_rows


def header(gpu: bool) -> str:
    columns = f"{'case':34} {'mode':8} {'provider':18} {'time / ours':>11}"
    return columns + (
        f" {'ms':>9} {'GB/s':>6} {'% copy':>6} {'MiB':>8} {'host us':>8} {'wall':>6}  timer" if gpu else ""
    )


def line(row: dict, gpu: bool) -> str:
    """One row of the table; a provider that was not timed shows why."""
    start = f"{row['case']:34} {row['mode']:8} {row['provider']:18}"
    if "ratio" not in row and "ms_p50" not in row:
        return f"{start} {row['status'] if row['status'] != 'ok' else 'right, not timed: no d2v_fast to compare with'}"
    ratio = f"{row['ratio']:11.2f}" if "ratio" in row else " " * 11
    if not gpu:
        return f"{start} {ratio}  (p20 {row['p20']:.2f}, p80 {row['p80']:.2f})"
    noise = f", noise {100 * row['noise']:.1f} %" if "noise" in row else ""
    wall = f"{row['wall_ratio']:6.2f}" if "wall_ratio" in row else " " * 6
    rates = f"{row['ms_p50']:9.4f} {row['gb_per_s']:6.0f} {row['percent_of_copy']:6.1f}"
    rest = "".join(f", {label} {row[key]:.{digits}f}{unit}" for key, label, digits, unit in EXTRA if key in row)
    return f"{start} {ratio} {rates} {row['peak_mib']:8.1f} {row['host_us']:8.0f} {wall}  {row['timer']}{noise}{rest}"

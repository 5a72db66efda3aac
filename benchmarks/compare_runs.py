"""Compares two runs of the benchmarks: by how much each median moved, the worst first.

python benchmarks/compare_runs.py RUN_A/nvidia-h100-80gb-hbm3 RUN_B/nvidia-h100-80gb-hbm3 --tolerance 5

Rows are paired by op (or recipe), case, mode and provider. Exit status: 0; 1 when a row of ours (d2v_fast, with or
without a CUDA graph) moved by more than the tolerance, was timed in one run only, or is noisier than that within a run;
2 for runs that cannot be compared: of other devices, releases of PyTorch or commits (--any compares them all the same).
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from measured import GRAPH, OURS, Results, Row, UnfitResults, load

COMPARED = ("device", "torch", "commit")  # of two environments


@dataclass(frozen=True)
class Pair:
    """A row in both runs."""

    a: Row
    b: Row

    @property
    def percent(self) -> float:
        """The second median less the first, in per cent of the faster one."""
        return 100 * (self.b.ms - self.a.ms) / min(self.a.ms, self.b.ms)

    @property
    def noise(self) -> float:
        """Per cent by which equal programs differed within a run, the worse of both."""
        return 100 * max(row.get("noise") or 0.0 for row in (self.a, self.b))


def differences(a: Results, b: Results, names: tuple[str, ...] = COMPARED) -> list[str]:
    """What the two runs do not have in common."""
    pairs = [(name, a.environment.get(name), b.environment.get(name)) for name in names]
    return [f"{name}: {x} and {y}" for name, x, y in pairs if x != y]


def paired(a: Results, b: Results) -> tuple[list[Pair], list[Row]]:
    """Rows that were timed in both runs, the one that moved most first, and rows that were timed in one only."""
    timed_a, timed_b = ({row.key: row for row in run.rows if row.ms is not None} for run in (a, b))
    pairs = [Pair(timed_a[key], timed_b[key]) for key in timed_a if key in timed_b]
    alone = [row for key, row in (timed_a | timed_b).items() if not (key in timed_a and key in timed_b)]
    return sorted(pairs, key=lambda pair: -abs(pair.percent)), alone


def is_ours(row: Row) -> bool:
    return row.provider in (OURS, GRAPH)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs=2, metavar="FOLDER", help="the results of a GPU")
    parser.add_argument("--tolerance", type=float, default=5.0, help="per cent, for rows of ours")
    parser.add_argument("--common", action="store_true", help="only rows of both: a budget may have cut off the others")
    parser.add_argument("--any", action="store_true", help="compare whatever they were measured on")
    args = parser.parse_args(argv)
    if not args.tolerance > 0:
        parser.error(f"--tolerance must be > 0, got {args.tolerance:g}")
    try:
        a, b = (load(folder) for folder in args.runs)
    except UnfitResults as error:
        parser.error(str(error))
    unlike = differences(a, b)
    if unlike and not args.any:
        parser.error(f"these runs are not of one program on one device ({'; '.join(unlike)}); --any compares them")
    pairs, alone = paired(a, b)
    bad = 0
    for pair in pairs:
        wrong = ""
        if is_ours(pair.a):
            wrong = "  MOVED" if abs(pair.percent) > args.tolerance else ""
            wrong += "  NOISY" if pair.noise > args.tolerance else ""
        bad += bool(wrong)
        op, case, mode, provider = pair.a.key
        noise = f"  noise {pair.noise:.1f} %" if pair.noise else ""
        times = f"{pair.percent:+7.1f} %  {pair.a.ms:.4f} -> {pair.b.ms:.4f} ms"
        print(f"{times}  {op}: {case}, {mode}, {provider}{noise}{wrong}")
    for row in alone:
        missing = is_ours(row) and not args.common
        bad += missing
        print(f"in one run only: {', '.join(row.key)}" + ("  MISSING" if missing else ""))
    ours = [pair for pair in pairs if is_ours(pair.a)]
    worst = max((abs(pair.percent) for pair in ours), default=0.0)
    print(f"{len(pairs)} rows in both, {len(ours)} of them ours: these moved by {worst:.1f} % at most; {bad} refused")
    if not ours:
        print("error: no row of ours is in both runs", file=sys.stderr)
        return 1
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

"""Every fault of tests/faults/scenarios.py again and again, by turns; prints the table of docs/reliability.md.

    nice python benchmarks/fault_runs.py --times 20 --minutes 60

A run is the command that meets the fault and the next start after it, on two processes. ``lost`` counts runs after
which anything that has to hold did not: a checkpoint that was whole before is gone or damaged, the next start does not
come to the weights of an uninterrupted run, a process outlives its time, the message is missing.
"""

import argparse
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import checkout  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from faults.scenarios import SCENARIOS
from faults.stage import LONGEST, TIMEOUT, Server, Stage


@dataclass
class Count:
    """What came of one fault."""

    runs: int = 0
    lost: int = 0
    longest: float = 0.0  # seconds until the last process of the command that met the fault had ended


def table(counts: dict[str, Count]) -> str:
    """As Markdown."""
    lines = ["| Fault | runs | lost | longest until all had ended |", "|---|---|---|---|"]
    # nothing was measured where the fault was there before the start
    lines += [f"| {n} | {c.runs} | {c.lost} | {f'{c.longest:.1f} s' if c.longest else ''} |" for n, c in counts.items()]
    total = Count(*(sum(getattr(c, name) for c in counts.values()) for name in ("runs", "lost")))
    return "\n".join(
        [*lines, f"| all | {total.runs} | {total.lost} | {max(c.longest for c in counts.values()):.1f} s |"]
    )


def run(stage: Stage, name: str, count: Count) -> None:
    """One scenario, once."""
    stage.longest = 0.0
    try:
        SCENARIOS[name](stage)
    except Exception:
        count.lost += 1
        print(f"{name}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    count.runs += 1
    count.longest = max(count.longest, stage.longest)


def main() -> None:
    """Round by round, so that every fault has been met as often when the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="runs of each fault")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no other run after so many")
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    given = parser.parse_args()
    names = [name for name in SCENARIOS if given.only in name]
    if not names:
        parser.error(f"--only must be a part of one of {', '.join(SCENARIOS)}, got {given.only!r}")
    counts = {name: Count() for name in names}
    end, server = time.monotonic() + 60 * given.minutes, Server()
    try:
        for turn in range(given.times):
            with tempfile.TemporaryDirectory() as folder:
                stage = Stage(server, Path(folder))
                for name in names:
                    if time.monotonic() < end:
                        run(stage, name, counts[name])
            print(f"turn {turn + 1}: {sum(c.runs for c in counts.values())} runs", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("stopped; the run that was under way is not counted", file=sys.stderr)
    server.close()
    print(f"distributed.timeout = {TIMEOUT} s; a command is killed, and its run lost, after {LONGEST} s\n")
    print(table(counts))


if __name__ == "__main__":
    main()

"""The extension, GPU tests and all benchmarks in one command that ends within a budget.

python benchmarks/gpu_check.py                     # everything, under eight minutes; results in benchmarks/results
python benchmarks/gpu_check.py --part tests        # or bench (ops, steps), or a part of the names that --list prints
python benchmarks/gpu_check.py --resume            # only what has not passed yet at this commit
python benchmarks/gpu_check.py --pack FILE.tgz     # and put all results of this GPU into one small archive

Needs PyTorch for CUDA, Triton, NumPy and pytest; the package need not be installed, and without hypothesis only the
property tests are skipped. Parts run in order of importance: the extension is compiled (nvcc) and loaded, tests that
need a GPU (no synchronisation, graph capture, offsets beyond 2**31), every kernel of the extension under
compute-sanitizer (memcheck, racecheck) where that is installed, the other tests of the ops, then one benchmark after
the other, whole training steps among them. What the budget leaves no time for is listed. Exit status: 0, 1 when a part
failed, 2 without a GPU, 3 when the extension or tests were skipped or ran out of time.
Writes a JSON and a log a part to OUT/<gpu>/parts, the results to OUT/<gpu>, and summary.md.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from checkout import ROOT
from gpu_parts import (
    BENCHMARKS,
    MEASURED,
    NO_MEMORY,
    TEST_KINDS,
    WEIGHTS,
    Outcome,
    Part,
    child_environment,
    command,
    find_parts,
    select,
)
from gpu_summary import summary

NO_EXTENSION = "needs the CUDA extension"  # reason of a test that is skipped
SANITIZER_SHARE = 0.15  # of the time that tests have left, if others follow; it is stopped after twice that
TEST_SHARE = 0.45  # of the budget, when benchmarks run too
TEST_MEMORY = 0.95  # of the device's, that tests which run beside each other may need together
SHORTEST = 15  # seconds; a part is not started with less
DEVICE_LOST = "nothing can be measured"  # what a benchmark says of a device after an error that stays
RESTARTS = 3  # of a benchmark after such errors
GRACE = 20  # seconds for what a benchmark has begun when its time is up
SHOWN = 80  # lines of a failed part that are printed
LOG_HEAD, LOG_TAIL = 64 * 2**10, 192 * 2**10  # characters of a log that are kept


def run_part(part: Part, out: Path, commit: str, deadline: float, share: float = 1.0, resume: bool = False) -> Outcome:
    """Run a part until it ends, or until ``deadline``; with ``share`` it is asked to use that part of the time.

    Its whole output is in ``parts/NAME.log`` of ``out``, of a long one the beginning and the end.
    """
    left = deadline - time.monotonic()
    if part.needs:
        return Outcome(part.name, "skipped", detail=f"needs {', '.join(part.needs)}")
    if left < SHORTEST:
        return Outcome(part.name, "skipped", detail="no time left")
    start = time.monotonic()
    arguments = command(part, out, commit, max(left * share, 1), resume)
    raw = out / "parts" / f"{part.name}.out"  # a file: a pipe lasts as long as whoever else holds it
    with raw.open("wb") as stream:
        process = subprocess.Popen(
            arguments, cwd=part.file.parent, env=child_environment(), stdout=stream, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    try:
        # a benchmark looks at its budget between measurements; one that hangs must not take the others' time
        status = "passed" if process.wait(min(left, 2 * share * left + GRACE)) == 0 else "failed"
    except subprocess.TimeoutExpired:
        kill(process)
        status = "incomplete"
    output = raw.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in output.splitlines() if line.strip()]
    detail = lines[-1] if lines else ""
    if part.kind in MEASURED and status == "passed" and "out of time" in output:
        status, detail = "incomplete", f"{output.count('out of time')} measurements: no time left"
    elif status == "incomplete":
        detail = "stopped: took more than its time"
    elif part.kind.endswith("tests") and status == "passed" and NO_EXTENSION in output:
        status, detail = "incomplete", f"{detail.strip('= ')}; no CUDA extension, its tests were skipped"
    elif part.kind.endswith("tests") and status == "passed" and NO_MEMORY in output:
        status, detail = "incomplete", f"{detail.strip('= ')}; too little GPU memory, its tests were skipped"
    seconds = round(time.monotonic() - start, 1)
    header = f"$ {' '.join(arguments)}\n# {status} after {seconds} s, commit {commit}\n"
    log_file(part.name, out).write_text(without_paths(header + shortened(output)), encoding="utf-8")
    raw.unlink()
    return Outcome(part.name, status, seconds, without_paths(detail), commit)


def run_measured(part: Part, out: Path, commit: str, deadline: float, share: float, resume: bool) -> Outcome:
    """:func:`run_part`, and again where a provider left a device that only a new process can use: it goes on."""
    from common import names_code

    outcome = run_part(part, out, commit, deadline, share, resume)
    for _ in range(RESTARTS):
        lost = outcome.status == "failed" and DEVICE_LOST in outcome.detail
        if not (lost and names_code(commit) and deadline - time.monotonic() > SHORTEST):
            break
        print(f"started again: {part.name} ({outcome.detail})", flush=True)
        outcome = run_part(part, out, commit, deadline, share, resume=True)
    return outcome


def kill(process: subprocess.Popen) -> None:
    """End a process and all it started, ranks in sessions of their own among them, so that the device is free."""
    children = defaultdict(list)
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            children[int(file.read_text(errors="replace").rpartition(")")[2].split()[1])].append(int(file.parent.name))
    family = [process.pid]
    for pid in family:  # grows while it is read
        family += children[pid]
    os.killpg(process.pid, signal.SIGKILL)
    for pid in family[1:]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # one that the driver holds
        process.wait(10)


def log_file(name: str, out: Path) -> Path:
    """Where the output of a part is kept."""
    return out / "parts" / f"{name}.log"


def shortened(text: str) -> str:
    """The beginning and the end of a long text, and how much there was between them."""
    left_out = len(text) - LOG_HEAD - LOG_TAIL
    if left_out <= 0:
        return text
    return f"{text[:LOG_HEAD]}\n[... {left_out} characters left out ...]\n{text[-LOG_TAIL:]}"


def without_paths(text: str) -> str:
    """Logs are committed; where the checkout and Python are on one machine is no part of a result."""
    return text.replace(f"{ROOT}{os.sep}", "").replace(str(ROOT), ".").replace(sys.prefix + os.sep, "")


def passed_before(part: Part, out: Path, commit: str) -> bool:
    """Whether an earlier run at this commit finished the part."""
    file = out / "parts" / f"{part.name}.json"
    if not file.exists():
        return False
    old = json.loads(file.read_text(encoding="utf-8"))
    return old["status"] == "passed" and old["commit"] == commit


def run_beside(
    parts: Sequence[Part], run: Callable[[Part], Outcome], record: Callable[[Outcome], None], jobs: int, memory: float
) -> None:
    """``jobs`` parts at a time, fewer where they would need more than ``memory`` GB; each is recorded as it ends."""
    waiting, running = list(parts), dict[Future[Outcome], Part]()
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            for part in list(waiting):
                held = sum(other.memory for other in running.values())
                if len(running) < jobs and (not running or held + part.memory <= memory):
                    waiting.remove(part)
                    running[pool.submit(run, part)] = part
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                record(future.result())


def run_all(
    parts: list[Part], out: Path, commit: str, budget: float, jobs: int, resume: bool, memory: float = math.inf,
    archive: Path | None = None,
) -> list[Outcome]:  # fmt: skip
    """Tests ``jobs`` at a time, as ``memory`` (GB) allows, then benchmarks alone, each with its share of what is left.

    After each part its outcome, ``summary.md`` and ``archive`` are written: what ends this process loses one part.

    The extension is built whatever has passed before: this may be another machine, and there already it costs a second.
    """
    end = time.monotonic() + budget
    done = {part.name for part in parts if resume and part.kind != "build" and passed_before(part, out, commit)}
    outcomes = [Outcome(name, "passed before", commit=commit) for name in sorted(done)]
    parts = [part for part in parts if part.name not in done]
    measured = [part for part in parts if part.kind in MEASURED]
    tests_end = end if not measured else time.monotonic() + TEST_SHARE * budget

    def record(outcome: Outcome) -> None:
        write(out / "parts" / f"{outcome.name}.json", json.dumps(asdict(outcome), indent=1) + "\n")
        print(f"{outcome.status:11} {outcome.seconds:6.1f} s  {outcome.name:34} {outcome.detail}", flush=True)
        if outcome.status == "failed":
            print("\n".join(log_file(outcome.name, out).read_text(encoding="utf-8").splitlines()[-SHOWN:]), flush=True)
        outcomes.append(outcome)
        save(outcomes, out, archive)

    (out / "parts").mkdir(parents=True, exist_ok=True)
    for kind in TEST_KINDS:
        group = [part for part in parts if part.kind == kind]
        followed = any(part.kind == "tests" for part in parts)
        share = SANITIZER_SHARE if kind == "sanitizer" and followed else 1.0
        run_beside(group, lambda part, share=share: run_part(part, out, commit, tests_end, share), record, jobs, memory)
    weights = [WEIGHTS[part.kind] for part in measured]
    for i, part in enumerate(measured):
        record(run_measured(part, out, commit, end, weights[i] / sum(weights[i:]), resume))
    save(outcomes, out, archive)
    return outcomes


def write(file: Path, text: str) -> None:
    """Replace a file at once."""
    partial = file.with_name(file.name + ".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def save(outcomes: Sequence[Outcome], out: Path, archive: Path | None) -> None:
    """The summary, and all results in ``archive``."""
    write(out / "summary.md", summary(outcomes, out))
    if archive:
        pack(out, archive)


def pack(out: Path, file: Path) -> int:
    """All results of a device in one archive, under the folder's name; returns its size in bytes."""
    partial = file.with_name(file.name + ".part")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(partial, "w:gz") as archive:
        for path in sorted(out.rglob("*")):
            if path.suffix in (".json", ".log", ".md"):
                archive.add(path, f"{out.name}/{path.relative_to(out)}")
    partial.replace(file)
    return file.stat().st_size


def exit_status(outcomes: list[Outcome], tests: set[str]) -> int:
    """1 when a part failed, 3 when one of ``tests`` was not run to its end: nothing is proven then."""
    if any(o.status == "failed" for o in outcomes):
        return 1
    return 3 if any(o.name in tests and o.status in ("skipped", "incomplete") for o in outcomes) else 0


def main() -> None:
    description, _, details = __doc__.partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=details, formatter_class=formatter)
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results", help="folder of the results")
    parser.add_argument("--budget", type=float, default=450, help="seconds")
    parser.add_argument("--part", default="all", help='"tests", "bench", "ops", "steps", or a part of the names')
    jobs = min(max((os.cpu_count() or 1) // 2, 1), 8)  # they mostly compile
    parser.add_argument("--jobs", type=int, default=jobs, help="test processes at a time")
    parser.add_argument("--resume", action="store_true", help="leave out what passed before at this commit")
    parser.add_argument("--commit", help="what to record where the checkout has no .git")
    parser.add_argument("--pack", type=Path, metavar="FILE.tgz", help="all results of this GPU, after every part anew")
    parser.add_argument("--list", action="store_true", help="print the parts and stop")
    args = parser.parse_args()
    parts = select(find_parts(), args.part)
    if not parts:
        known = "all, tests, bench, ops, steps or a part of a name that --list prints"
        parser.error(f"--part must be {known}, got {args.part!r}")
    if args.pack and args.pack.suffix != ".tgz":
        parser.error(f"--pack must name a .tgz file, got {args.pack}")
    if args.list:
        for part in parts:
            print(f"{part.kind:10} {part.name}" + (f"  (skipped: needs {', '.join(part.needs)})" if part.needs else ""))
        return
    import torch

    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device and a PyTorch built for it; on a CPU run make test", file=sys.stderr)
        sys.exit(2)
    from common import device_folder, git_commit, names_code

    commit = git_commit(args.commit)
    out = args.out.resolve() / device_folder()
    if args.resume and not names_code(commit):
        parser.error(f"--resume needs a commit that says which code passed, got {commit}: commit first, or --commit")
    memory = TEST_MEMORY * torch.cuda.get_device_properties(0).total_memory / 2**30
    outcomes = run_all(parts, out, commit, args.budget, args.jobs, args.resume, memory, args.pack)
    counts = {status: sum(o.status == status for o in outcomes) for status in dict.fromkeys(o.status for o in outcomes)}
    print(", ".join(f"{count} {status}" for status, count in counts.items()) + f"; {out / 'summary.md'}")
    if args.pack:
        print(f"{args.pack}: {args.pack.stat().st_size / 2**20:.1f} MiB")
    sys.exit(exit_status(outcomes, {part.name for part in parts if part.kind in ("build", "gpu tests", "tests")}))


if __name__ == "__main__":
    main()

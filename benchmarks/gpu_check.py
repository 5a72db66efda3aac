"""The extension, GPU tests and all benchmarks in one command that ends within a budget.

python benchmarks/gpu_check.py                     # everything, nine minutes at most; results in benchmarks/results
python benchmarks/gpu_check.py --part tests        # or bench, or a part of the names that --list prints
python benchmarks/gpu_check.py --resume            # only what has not passed yet at this commit

Needs PyTorch for CUDA, Triton, NumPy and pytest; the package need not be installed, and without hypothesis only the
property tests are skipped. Parts run in order of importance: the extension is compiled (nvcc) and loaded, tests that
need a GPU (no synchronisation, graph capture, offsets beyond 2**31), every kernel of the extension under
compute-sanitizer (memcheck, racecheck) where that is installed, the other tests of the ops, then one benchmark after
the other. What the budget leaves no time for is listed. Exit status: 0, 1 when a part failed, 2 without a GPU, 3 when
the extension or tests were skipped or ran out of time.
Writes one JSON a part to OUT/<gpu>/parts, the results to OUT/<gpu>, and summary.md.
"""

import argparse
import ast
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS, BENCHMARKS = ROOT / "tests", ROOT / "benchmarks"
STAND_INS = BENCHMARKS / "stand_ins"  # on the path of the tests where the real module is missing
EXTENSION = BENCHMARKS / "extension_check.py"
THROUGH_TORCH = {"torch.utils.tensorboard": "tensorboard"}  # parts of PyTorch that need another package
CUDA = "/usr/local/cuda/bin"  # where the toolkit is when PATH does not say
SANITIZERS = ("memcheck", "racecheck")
TEST_KINDS = ("build", "gpu tests", "sanitizer", "tests")  # in the order in which they run
ORDER = ("data2vec_loss", "ema", "conv_encoder", "bias_attention", "attention", "encoder", "conv0", "strided_conv")
ORDER += ("pos_conv", "adamw_ema", "layer_targets")
TEST_ORDER = ("conv0", "pos_conv", "strided_conv", "speech_frontend")  # first among tests: what the extension runs
NO_EXTENSION = "needs the CUDA extension"  # reason of a test that is skipped
SANITIZER_SHARE = 0.15  # of the time that tests have left; it is stopped after twice that
TEST_SHARE = 0.45  # of the budget, when benchmarks run too
LARGE_TESTS = 2  # tests of large tensors at a time: up to 31 GB each
SHORTEST = 15  # seconds; a part is not started with less
GRACE = 20  # seconds for what a benchmark has begun when its time is up
CODE = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"  # unlike -m pytest, leaves the root off the path


@dataclass
class Part:
    """One process of the check. ``needs``: modules or programs that are not installed, so that it cannot run."""

    name: str
    kind: str  # one of TEST_KINDS, or "bench"
    file: Path
    needs: list[str]


@dataclass
class Outcome:
    """What came of a part."""

    name: str
    status: str  # passed, failed, incomplete, skipped, passed before
    seconds: float = 0.0
    detail: str = ""
    commit: str = ""
    output: str = ""


@cache
def imported_names(source: str) -> frozenset[str]:
    """Modules that the top level of ``source`` imports."""
    names: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names if node.module.startswith("d2v_fast"))
    return frozenset(names)


def missing_modules(file: Path, seen: set[Path] | None = None) -> set[str]:
    """Modules outside of this repository that importing ``file`` needs and that are not installed."""
    seen = set() if seen is None else seen
    if file in seen:
        return set()
    seen.add(file)
    missing: set[str] = set()
    for name in imported_names(file.read_text(encoding="utf-8")):
        own = own_file(name, file.parent)
        if own:
            missing |= missing_modules(own, seen)
        elif not name.startswith("d2v_fast") and not is_installed(name):
            missing.add(name.split(".")[0])
        elif name in THROUGH_TORCH and not is_installed(THROUGH_TORCH[name]):
            missing.add(THROUGH_TORCH[name])
    return missing - stand_ins()


def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module.split(".")[0]) is not None


def stand_ins() -> set[str]:
    """Modules that the tests can do without."""
    return {file.stem for file in STAND_INS.glob("*.py")}


def own_file(module: str, folder: Path) -> Path | None:
    """The source of a module of this repository, seen from a script in ``folder``."""
    parts = module.split(".")
    if parts[:2] == ["d2v_fast", "kernels"]:
        parts = parts[1:]
    elif parts[0] != "d2v_fast":
        beside = folder / f"{parts[0]}.py"
        return beside if folder in (TESTS, BENCHMARKS) and beside.exists() else None
    path = ROOT.joinpath(*parts)
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((p for p in candidates if p.exists()), None)


def program(name: str) -> str | None:
    """The path of a program of the CUDA toolkit."""
    return shutil.which(name) or shutil.which(name, path=CUDA)


def extension_parts() -> list[Part]:
    """Compiling the extension, and its kernels under compute-sanitizer."""
    missing = sorted(missing_modules(EXTENSION))
    nvcc, sanitizer = ([] if program(name) else [name] for name in ("nvcc", "compute-sanitizer"))
    build = Part("extension", "build", EXTENSION, missing + nvcc)
    return [build, *(Part(tool, "sanitizer", EXTENSION, missing + nvcc + sanitizer) for tool in SANITIZERS)]


def find_parts() -> list[Part]:
    """The extension, every test file that runs something on a GPU, and every benchmark, the most important first."""
    found = extension_parts()
    for file in sorted(TESTS.glob("test_*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        gpu = any(isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.gpu" for node in nodes)
        device = any(isinstance(node, ast.Name) and node.id == "DEVICE" for node in nodes)
        if gpu or device:
            needs = sorted(missing_modules(file) | (set() if is_installed("pytest") else {"pytest"}))
            found += [Part(f"gpu-{file.stem}", "gpu tests", file, needs)] if gpu else []
            found += [Part(file.stem, "tests", file, needs)] if device else []
    first = {f"test_{name}": i for i, name in enumerate(TEST_ORDER)}
    found.sort(key=lambda part: (TEST_KINDS.index(part.kind), first.get(part.file.stem, len(first))))
    benches = [p for p in sorted(BENCHMARKS.glob("bench_*.py")) if p.stem != "bench_train_step"]
    rank = {name: i for i, name in enumerate(ORDER)}
    benches.sort(key=lambda p: rank.get(p.stem.removeprefix("bench_"), len(ORDER)))
    for file in [*benches, BENCHMARKS / "bench_train_step.py"]:
        found.append(Part(file.stem, "bench", file, sorted(missing_modules(file))))
    return found


def select(parts: list[Part], which: str) -> list[Part]:
    """Parts of a kind or with a name like ``which``, and the extension, which they are run with."""
    kinds = {"all": (*TEST_KINDS, "bench"), "tests": TEST_KINDS, "bench": ("bench",)}.get(which, ())
    names = {part.name for part in parts if part.kind in kinds or which in part.name}
    return [part for part in parts if names and (part.kind == "build" or part.name in names)]


def command(part: Part, out: Path, commit: str, seconds: float, resume: bool) -> list[str]:
    """The command line of a part that has ``seconds``."""
    if part.kind == "build":
        return [sys.executable, str(part.file), "build"]
    if part.kind == "sanitizer":
        start = [program("compute-sanitizer"), "--tool", part.name, "--error-exitcode", "9"]
        return [*start, sys.executable, str(part.file), "run"]
    if part.kind == "bench":
        start = [sys.executable, str(part.file), "--commit", commit]
        if part.name == "bench_train_step":
            return [*start, "--budget", f"{seconds:.0f}", "--json", str(out / "train_step.json")]
        if part.name == "bench_conv_encoder":  # its other parts are files of their own
            start += ["--parts", "whole", "lengths", "--out", str(out.parent)]
        else:
            start += ["--json", str(out / f"{part.name.removeprefix('bench_')}.json")]
        start += ["--budget", f"{seconds:.0f}"]
        return [*start, "--resume"] if resume else start
    # the project's addopts name a plugin that may be missing
    options = ["-q", "-o", "addopts=", "--strict-markers", "--tb=short", "-rfEs", "-p", "no:cacheprovider"]
    if is_installed("pytest_timeout"):
        options.append("--timeout=120")
    only = "gpu" if part.kind == "gpu tests" else "not gpu"
    return [sys.executable, "-c", CODE, *options, "-m", only, str(part.file)]


def run_part(part: Part, out: Path, commit: str, deadline: float, share: float = 1.0, resume: bool = False) -> Outcome:
    """Run a part until it ends, or until ``deadline``; with ``share`` it is asked to use that part of the time."""
    left = deadline - time.monotonic()
    if part.needs:
        return Outcome(part.name, "skipped", detail=f"needs {', '.join(part.needs)}")
    if left < SHORTEST:
        return Outcome(part.name, "skipped", detail="no time left")
    start = time.monotonic()
    arguments = command(part, out, commit, max(left * share, 1), resume)
    process = subprocess.Popen(
        arguments, cwd=part.file.parent, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        # a benchmark looks at its budget between measurements; one that hangs must not take the others' time
        output, _ = process.communicate(timeout=min(left, 2 * share * left + GRACE))
        status = "passed" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = "incomplete"
    lines = [line for line in output.splitlines() if line.strip()]
    detail = lines[-1] if lines else ""
    if part.kind == "bench" and status == "passed" and "out of time" in output:
        status, detail = "incomplete", f"{output.count('out of time')} measurements: no time left"
    elif status == "incomplete":
        detail = "stopped: took more than its time"
    elif part.kind.endswith("tests") and status == "passed" and NO_EXTENSION in output:
        status, detail = "incomplete", f"{detail.strip('= ')}; no CUDA extension, its tests were skipped"
    seconds = round(time.monotonic() - start, 1)
    return Outcome(part.name, status, seconds, detail, commit, "" if status == "passed" else "\n".join(lines[-80:]))


def child_environment() -> dict[str, str]:
    """This process's, with the checkout on the path unless it is what is installed."""
    spec = importlib.util.find_spec("d2v_fast")
    path = [] if spec and spec.origin and ROOT in Path(spec.origin).resolve().parents else [str(ROOT)]
    path += [] if all(map(is_installed, stand_ins())) else [str(STAND_INS)]
    inherited = os.environ.get("PYTHONPATH")
    joined = os.pathsep.join(path + ([inherited] if inherited else []))
    result = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"), "PYTHONUNBUFFERED": "1"}
    result.pop("TRITON_INTERPRET", None)
    return {**result, **({"PYTHONPATH": joined} if joined else {})}


def passed_before(part: Part, out: Path, commit: str) -> bool:
    """Whether an earlier run at this commit finished the part."""
    file = out / "parts" / f"{part.name}.json"
    if not file.exists():
        return False
    old = json.loads(file.read_text(encoding="utf-8"))
    return old["status"] == "passed" and old["commit"] == commit


def run_all(parts: list[Part], out: Path, commit: str, budget: float, jobs: int, resume: bool) -> list[Outcome]:
    """Tests ``jobs`` at a time, then benchmarks alone, each with an equal share of the time that is left.

    The extension is built whatever has passed before: this may be another machine, and there already it costs a second.
    """
    end = time.monotonic() + budget
    done = {part.name for part in parts if resume and part.kind != "build" and passed_before(part, out, commit)}
    outcomes = [Outcome(name, "passed before", commit=commit) for name in sorted(done)]
    parts = [part for part in parts if part.name not in done]
    benches = [part for part in parts if part.kind == "bench"]
    tests_end = end if not benches else time.monotonic() + TEST_SHARE * budget

    def record(outcome: Outcome) -> None:
        (out / "parts" / f"{outcome.name}.json").write_text(json.dumps(asdict(outcome), indent=1) + "\n")
        print(f"{outcome.status:11} {outcome.seconds:6.1f} s  {outcome.name:34} {outcome.detail}", flush=True)
        if outcome.status == "failed":
            print(outcome.output, flush=True)
        outcomes.append(outcome)

    (out / "parts").mkdir(parents=True, exist_ok=True)
    for kind in TEST_KINDS:
        group = [part for part in parts if part.kind == kind]
        share = SANITIZER_SHARE if kind == "sanitizer" else 1.0
        with ThreadPoolExecutor(min(jobs, LARGE_TESTS) if kind == "gpu tests" else jobs) as pool:
            for outcome in pool.map(lambda part, share=share: run_part(part, out, commit, tests_end, share), group):
                record(outcome)
    for i, part in enumerate(benches):
        record(run_part(part, out, commit, end, 1 / (len(benches) - i), resume))
    return outcomes


def summary(outcomes: list[Outcome], out: Path) -> str:
    """Markdown: a line for each part, then the measurements of ours beside what it is compared with."""
    lines = ["# GPU check", "", "| part | status | seconds | |", "|---|---|---|---|"]
    lines += [f"| {o.name} | {o.status} | {o.seconds:.0f} | {o.detail.strip('= ')} |" for o in outcomes]
    for file in sorted(out.glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        if record.get("benchmark") == "train_step":
            lines += step_table(record)
        if record.get("kind") != "gpu":
            continue
        environment = record["environment"]
        lines += ["", f"## {record['op']}", ""]
        lines += [
            f"{environment['device']}, driver {environment['driver']}, torch {environment['torch']}, triton "
            f"{environment['triton']}, commit {environment['commit']}, copy {record['copy_gb_per_s']:.0f} GB/s"
            + (
                f", matrix product {record['matmul_tflop_per_s']:.0f} TFLOP/s" if "matmul_tflop_per_s" in record else ""
            ),
            f"Extension: {environment['extension']}.",
            "",
            "| case | mode | provider | time / ours | wall / ours | ms p20 | p50 | p80 | GB/s | % of copy | peak MiB "
            "| host us | % of matmul | % of roofline | held MiB | backward ms | % of copy | / ours |",
            "|---" * 18 + "|",
        ]
        lines += [result_line(row) for row in record["results"]]
    return "\n".join(lines) + "\n"


def step_table(record: dict) -> list[str]:
    """Whole training steps, a line for each provider."""
    columns = {
        "ratio": 2,
        "ms": 1,
        "samples_per_s": 1,
        "percent_of_matmul": 1,
        "peak_mib": 0,
        "host_ms": 2,
        "launches": 0,
    }
    lines = [
        "",
        "## training step",
        "",
        f"{record['environment']['device']}, torch {record['environment']['torch']}",
        "",
    ]
    lines += ["| case | provider | time / ours | ms | samples/s | % of matmul | peak MiB | host ms | launches |"]
    lines += ["|---" * 9 + "|"]
    for row in record["results"]:
        values = [f"{row[name]:.{digits}f}" if name in row else "" for name, digits in columns.items()]
        values[0] = values[0] or ("" if row["status"] == "ok" else row["status"])
        lines.append(f"| {row['case']} | {row['provider']} | {' | '.join(values)} |")
    return lines


def result_line(row: dict) -> str:
    """A measurement, or the reason why there is none."""
    start = f"| {row['case']} | {row['mode']} | {row['provider']} |"
    if "ms_p50" not in row:
        return f"{start} {row['status']} |" + " |" * 14
    ratio = f"{row['ratio']:.2f} | {row['wall_ratio']:.2f}" if "ratio" in row else " | "
    times = " | ".join(f"{row[name]:.4f}" for name in ("ms_p20", "ms_p50", "ms_p80"))
    rates = f"{row['gb_per_s']:.0f} | {row['percent_of_copy']:.1f} | {row['peak_mib']:.1f} | {row['host_us']:.0f}"
    optional = {"percent_of_matmul": 1, "percent_of_roofline": 1, "held_mib": 1, "bwd_ms": 4}
    optional |= {"bwd_percent_of_copy": 1, "bwd_ratio": 2}
    rest = " | ".join(f"{row[name]:.{digits}f}" if name in row else "" for name, digits in optional.items())
    return f"{start} {ratio} | {times} | {rates} | {rest} |"


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
    parser.add_argument("--budget", type=float, default=520, help="seconds")
    parser.add_argument("--part", default="all", help='"tests", "bench", or a part of the names')
    jobs = min(max((os.cpu_count() or 1) // 2, 1), 8)  # they mostly compile
    parser.add_argument("--jobs", type=int, default=jobs, help="test processes at a time")
    parser.add_argument("--resume", action="store_true", help="leave out what passed before at this commit")
    parser.add_argument("--commit", help="what to record where the checkout has no .git")
    parser.add_argument("--list", action="store_true", help="print the parts and stop")
    args = parser.parse_args()
    parts = select(find_parts(), args.part)
    if not parts:
        parser.error(f"--part must be all, tests, bench or a part of a name that --list prints, got {args.part!r}")
    if args.list:
        for part in parts:
            print(f"{part.kind:10} {part.name}" + (f"  (skipped: needs {', '.join(part.needs)})" if part.needs else ""))
        return
    import torch

    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device and a PyTorch built for it; on a CPU run make test", file=sys.stderr)
        sys.exit(2)
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    from common import device_folder, git_commit, names_code

    commit = git_commit(args.commit)
    out = args.out.resolve() / device_folder()
    if args.resume and not names_code(commit):
        parser.error(f"--resume needs a commit that says which code passed, got {commit}: commit first, or --commit")
    outcomes = run_all(parts, out, commit, args.budget, args.jobs, args.resume)
    (out / "summary.md").write_text(summary(outcomes, out), encoding="utf-8")
    counts = {status: sum(o.status == status for o in outcomes) for status in dict.fromkeys(o.status for o in outcomes)}
    print(", ".join(f"{count} {status}" for status, count in counts.items()) + f"; {out / 'summary.md'}")
    sys.exit(exit_status(outcomes, {part.name for part in parts if part.kind not in ("sanitizer", "bench")}))


if __name__ == "__main__":
    main()

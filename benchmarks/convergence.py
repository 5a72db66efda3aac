"""Do the fusions learn the same? Small pretrainings of the demo's data: bfloat16 with all fusions, and plain float32.

python benchmarks/convergence.py prepare --data data/demo --out DIR              # with the train extra, once
python benchmarks/convergence.py run --data DIR --json FILE --jobs 6             # where the GPU is; again to go on
python benchmarks/convergence.py report FILE --img docs/img/convergence.png      # 0: same, 1: not, 3: undecided
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any

import checkout  # noqa: F401

MODALITIES = ("speech", "image", "text")
ARMS = ("plain", "fused")
SEEDS = (1, 2, 3)
Key = tuple[str, int, str]  # modality, seed, arm


def prepare(args: argparse.Namespace) -> int:
    """Write the batches of each modality."""
    from convergence_prepare import prepare

    from d2v_fast.train.errors import UserError

    total = 0
    for modality in args.modality:
        file = args.out / f"{modality}.npz"
        try:
            prepare(modality, args.data, file, args.seed, args.updates, minutes=args.minutes, overrides=args.set)
        except UserError as error:
            sys.exit(f"error: {modality}: {error}")
        size = file.stat().st_size
        total += size
        print(f"{file}: {size / 2**20:.1f} MiB, {args.updates} updates of seeds {', '.join(map(str, args.seed))}")
    print(f"{total / 2**20:.1f} MiB together")
    return 0


def run(args: argparse.Namespace) -> int:
    """Run what is missing in the file, several at a time, each a process of its own with a file of its own.

    0 when all runs are there, 1 when one failed, 3 when the budget left some out.
    """
    end = time.monotonic() + args.budget
    from common import git_commit

    commit = git_commit(args.commit)
    arms = ARMS if args.arm == "both" else (args.arm,)
    wanted = list(product(args.modality, args.seed, arms))
    for modality in args.modality:
        if not (args.data / f"{modality}.npz").is_file():
            sys.exit(f"error: --data {args.data} must hold {modality}.npz: run convergence.py prepare first")
    if len(wanted) == 1 and args.alone:
        _run_here(args, wanted[0], commit)
        return 0
    done = _finished(args, commit)
    if any(_part(args.json, key).is_file() for key in done):
        _write(args.json, done, commit)
    missing = [key for key in wanted if key not in done]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are there", flush=True)
    lock, failed, left = Lock(), [], []
    longest = max((run["seconds"] for run in done.values()), default=0.0)  # what another one may take

    def one(key: Key) -> None:
        nonlocal longest
        start = time.monotonic()
        if start + longest > end:
            left.append(key)
            return
        result, error = _run_apart(args, key, commit)
        with lock:
            if result is None:
                failed.append(key)
                print(f"{_name(key)} failed:\n{error}", flush=True)
                return
            done[key] = result
            _write(args.json, done, commit)
            longest = max(longest, time.monotonic() - start)
            last = result["curves"]["loss"][-1]
            print(f"{_name(key)}: last loss {last}, {time.monotonic() - start:.0f} s", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, missing))
    with suppress(OSError):  # there is none, or runs of other settings are in it
        _part(args.json, wanted[0]).parent.rmdir()
    if left:
        print(f"no time left for {len(left)} runs, of {longest:.0f} s each: {'; '.join(map(_name, left))}")
    return 1 if failed else 3 if left else 0


def _name(key: Key) -> str:
    return "{}, seed {}, {}".format(*key)


def _part(file: Path, key: Key) -> Path:
    """Where the process of a run writes it: it may outlive the one that collects them."""
    return file.with_name(f"{file.stem}_runs") / f"{'_'.join(map(str, key))}.json"


def _finished(args: argparse.Namespace, commit: str) -> dict[Key, dict[str, Any]]:
    """Runs in the file, and in those that were not put into it, of this commit, these data and these settings."""
    from common import environment, names_code
    from convergence_data import Prepared

    parts = [_part(args.json, key) for key in product(args.modality, args.seed, ARMS)]
    files = [file for file in (args.json, *parts) if file.is_file()]
    if not files:
        return {}
    if not names_code(commit):
        print(f"{args.json} is written anew: commit {commit!r} does not say which code ran; --commit does")
        return {}
    digests = {modality: Prepared.load(args.data / f"{modality}.npz").digest for modality in args.modality}
    asked = {"updates": args.updates, "asked": [args.precision, args.graph]}
    here, kept, dropped = environment(commit), {}, 0
    for file in files:
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            runs, before = record["runs"], record["environment"]
            unlike = [name for name in ("device", "torch") if before[name] != here[name] and before["commit"] == commit]
        except (ValueError, KeyError, TypeError) as error:
            sys.exit(f"error: --json {file} holds something else than runs: {type(error).__name__}: {error}")
        for name in unlike:
            sys.exit(f"error: --json {file} has runs of {name} {before[name]}, this is {here[name]}: name another file")
        for run in runs:
            fits = before["commit"] == commit and run["data"] == digests.get(run["modality"], run["data"])
            if fits and all(run[name] == value for name, value in asked.items()):
                kept[run["modality"], run["seed"], run["arm"]] = run
            else:
                dropped += 1
    if dropped:
        print(f"{dropped} runs of another commit, data or settings are dropped from {args.json}")
    return kept


def _run_apart(args: argparse.Namespace, key: Key, commit: str) -> tuple[dict[str, Any] | None, str]:
    """The result of one run in a process of its own, or what it printed."""
    modality, seed, arm = key
    part = _part(args.json, key)
    part.unlink(missing_ok=True)
    command = [sys.executable, __file__, "run", "--alone", "--data", str(args.data), "--json", str(part)]
    command += ["--modality", modality, "--seed", str(seed), "--arm", arm, "--updates", str(args.updates)]
    command += ["--precision", args.precision, "--graph", args.graph, "--commit", commit]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
    if ended.returncode != 0 or not part.is_file():
        return None, ended.stderr[-3000:] or f"exit status {ended.returncode}"
    return json.loads(part.read_text(encoding="utf-8"))["runs"][0], ""


def _run_here(args: argparse.Namespace, key: Key, commit: str) -> None:
    from convergence_arms import run
    from convergence_data import Prepared

    modality, seed, arm = key
    prepared = Prepared.load(args.data / f"{modality}.npz")
    result = run(prepared, arm, seed, args.updates, precision=args.precision, graph=args.graph)
    result["asked"] = [args.precision, args.graph]
    _write(args.json, {key: result}, commit)


def _write(file: Path, done: dict[Key, dict[str, Any]], commit: str) -> None:
    """All finished runs in ``file``; those of their own files are not needed any more."""
    from common import environment

    runs = [done[key] for key in sorted(done)]
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".part")
    # one line a run: curves of thousands of numbers
    lines = ",\n".join(json.dumps(run, allow_nan=False) for run in runs)
    partial.write_text(
        f'{{"environment": {json.dumps(environment(commit))}, "benchmark": "convergence", "runs": [\n{lines}\n]}}\n',
        encoding="utf-8",
    )
    partial.replace(file)
    for key in done:
        _part(file, key).unlink(missing_ok=True)


def report(args: argparse.Namespace) -> int:
    """Print the comparison, draw it; 0 if all checks hold, 1 if one does not, 3 if one is undecided."""
    from convergence_report import FAILED, UNDECIDED, checks, draw, load

    found, environment = load(args.files, args.seeds)
    print(f"{environment['device']}, torch {environment['torch']}, {environment['commit'][:10]}")
    verdicts = set()
    for modality, runs in found.items():
        for check in checks(runs):
            verdicts.add(check.verdict)
            print(f"{check.verdict:9} {modality:6} {check.name}: {check.text}")
    if args.img:
        draw(found, environment, args.img)
        print(args.img)
    return 1 if FAILED in verdicts else 3 if UNDECIDED in verdicts else 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True, metavar="prepare | run | report")
    first = parts.add_parser("prepare", help="write the batches of all seeds, and what is probed")
    first.set_defaults(part=prepare)
    first.add_argument("--data", type=Path, default=Path("data/demo"), help="the demo's data: %(default)s")
    first.add_argument("--out", type=Path, required=True, help="folder for a file of each modality")
    first.add_argument("--minutes", type=float, default=10.0, help="of speech to pretrain on: %(default)s")
    first.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the demo's presets")
    second = parts.add_parser("run", help="pretrain and probe; runs that are in the file are not repeated")
    second.set_defaults(part=run)
    second.add_argument("--data", type=Path, required=True, help="folder of prepare")
    second.add_argument(
        "--json", type=Path, required=True, help="file of all runs, written after each: where results are kept"
    )
    second.add_argument("--arm", choices=(*ARMS, "both"), default="both")
    second.add_argument("--jobs", type=int, default=1, help="runs at a time: %(default)s")
    second.add_argument(
        "--budget", type=float, default=math.inf, help="seconds; no run that would take longer is begun"
    )
    second.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="of the fused arm")
    second.add_argument("--graph", choices=("auto", "on", "off"), default="auto", help="CUDA graphs, fused arm")
    second.add_argument("--commit", help="of this code, where there is no git")
    second.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # one run, in this process
    for one in (first, second):
        one.add_argument("--modality", nargs="+", choices=MODALITIES, default=list(MODALITIES))
        one.add_argument("--seed", nargs="+", type=int, default=list(SEEDS))
        one.add_argument("--updates", type=int, default=2000, help="of a run: %(default)s")
    third = parts.add_parser("report", help="compare the arms")
    third.set_defaults(part=report)
    third.add_argument("files", nargs="+", type=Path, metavar="FILE", help="of run")
    third.add_argument("--img", type=Path, help="figure of the curves")
    third.add_argument("--seeds", type=int, default=3, help="least number of seeds: %(default)s")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exits with 1 and a message where an argument or a file does not fit."""
    args = parse(arguments)
    try:
        return args.part(args)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    sys.exit(main())

"""``python -m d2v_fast.demo``: fetch data, pretrain small models, probe them, write a report.

Each modality is a process of its own with one thread, as many at a time as there are cores: tiny models gain nothing
from a second thread, and so the demo takes half as long.
"""

import argparse
import json
import logging
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from d2v_fast.demo.fetch import BUILDERS, DemoSet, FetchError
from d2v_fast.demo.one import INTERRUPTED, add_options, load_data, run_folder
from d2v_fast.demo.report import gain, load_run, write_report
from d2v_fast.train.checkpoint import checkpoints


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(prog="python -m d2v_fast.demo", description="Pretrain and probe small models.")
    parser.add_argument("--modality", choices=[*BUILDERS, "all"], default="all")
    for name in BUILDERS:
        parser.add_argument(f"--{name}", metavar="PATH", help=f"pretrain on your own {name} data instead")
    add_options(parser)
    return parser.parse_args(arguments)


def choose(options: argparse.Namespace) -> list[str]:
    """The modalities to run: the one asked for, else those with the user's own data, else all."""
    if options.modality != "all":
        return [options.modality]
    return [name for name in BUILDERS if getattr(options, name)] or list(BUILDERS)


def fetch_sets(names: list[str], options: argparse.Namespace) -> list[str]:
    """Fetch what the modalities need; returns those that have data and says what is missing for the others."""
    ready = []
    for name in names:
        try:
            load_data(name, getattr(options, name), options.data)
            ready.append(name)
        except FetchError as error:
            print(f"no data for {error}\n  give a folder of your own: --{name} PATH", file=sys.stderr)
    return ready


def readable(line: str) -> str:
    """A line of a run's output for people: metric records are shortened, other lines stay as they are."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return line
    if not isinstance(row, dict) or "update" not in row:
        return line
    return (
        f"update {row['update']:>5}  loss {row['loss']:.4f}  std of targets {row['target_var']:.3f}, "
        f"of predictions {row['pred_var']:.3f}"
    )


def run_one(name: str, options: argparse.Namespace) -> int:
    """Run one modality in its own process, its output prefixed with its name; returns the exit code."""
    command = [sys.executable, "-m", "d2v_fast.demo.one", name, "--out", str(options.out), "--data", str(options.data)]
    if own := getattr(options, name):
        command += ["--own", own]
    if options.updates is not None:
        command += ["--updates", str(options.updates)]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **os.environ}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    ) as process:
        for line in process.stdout:
            print(f"[{name}] {readable(line.rstrip())}", flush=True)
    return process.returncode


def run_all(names: list[str], options: argparse.Namespace) -> dict[str, int]:
    """Run the modalities, as many at a time as there are cores; returns their exit codes."""
    codes: dict[str, int] = {}
    with ThreadPoolExecutor(max(1, min(len(names), os.cpu_count() or 1))) as pool:
        runs = {name: pool.submit(run_one, name, options) for name in names}
        try:
            for name, run in runs.items():
                codes[name] = run.result()
        except KeyboardInterrupt:  # the processes got it too; they save and end
            pool.shutdown(wait=True, cancel_futures=True)
            codes = {name: INTERRUPTED for name in names}
    return codes


def next_steps(folder: Path, data: Path) -> str:
    """Three commands that go on from the demo, to be pasted as they are but for words in capitals."""
    name = load_run(folder).name
    checkpoint = checkpoints(folder)[-1]
    parts = [DemoSet(name, data / name).probe_part(part) for part in ("train", "test")]
    train, test = parts if parts[0].exists() else ("LABELLED_DATA", "MORE_LABELLED_DATA")
    command = Path(sys.executable).parent / "d2v-fast"
    command = command.relative_to(Path.cwd()) if command.is_relative_to(Path.cwd()) else command
    lines = (
        [command, "pretrain", f"{name}_base", "data.path=YOUR_DATA", "out=runs/mine"],
        [command, "probe", checkpoint, "--train", train, "--test", test, "--layer", "2"],
        [command, "info"],
    )
    return "What next:\n" + "\n".join(f"  {shlex.join(map(str, line))}" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the demo. Returns 0 when a modality ran and none failed in training, 130 after Ctrl-C, else 1."""
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    start = time.monotonic()
    chosen = choose(options)
    try:
        ready = fetch_sets(chosen, options)
    except KeyboardInterrupt:
        return INTERRUPTED
    codes = run_all(ready, options) if ready else {}
    done = [run_folder(name, getattr(options, name), options.out) for name in ready if codes[name] == 0]
    if done:
        report = write_report(done, options.out / "report.html")
        print(f"\nreport: {report}   ({(time.monotonic() - start) / 60:.1f} minutes)")
        for folder in done:
            run = load_run(folder)
            first, last = run.metrics[0], run.metrics[-1]
            gains = "; ".join(gain(result) for _, result in run.probes) or "not probed"
            std = f"std of targets {last['target_var']:.3f}, of predictions {last['pred_var']:.3f}"
            print(f"  {run.name}: loss {first['loss']:.3f} -> {last['loss']:.3f}, {std}\n    {gains}")
        print(next_steps(done[0], options.data))
    if INTERRUPTED in codes.values():
        print("interrupted; the same command continues from here", file=sys.stderr)
        return INTERRUPTED
    missing, failed = [n for n in chosen if n not in ready], [n for n in ready if codes[n] != 0]
    for what, names in (("no data for", missing), ("failed (see above):", failed)):
        if names:
            print(f"{what} {', '.join(names)}", file=sys.stderr)
    return 0 if done and not failed else 1


if __name__ == "__main__":
    sys.exit(main())

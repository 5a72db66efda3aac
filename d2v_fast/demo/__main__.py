"""``python -m d2v_fast.demo``: fetch data, pretrain small models, probe them, write a report."""

import argparse
import json
import logging
import sys
from pathlib import Path

from d2v_fast.demo.fetch import BUILDERS, DemoSet, FetchError, fetch
from d2v_fast.demo.report import RunSummary, gain, load_run, save_run, write_report
from d2v_fast.train import PretrainResult, TrainConfig, load_config, load_model, pretrain
from d2v_fast.train.data import DataError
from d2v_fast.train.errors import UserError
from d2v_fast.train.logging import read_metrics
from d2v_fast.train.loop import resolve_device
from d2v_fast.train.probe import ProbeResult, probe_checkpoint

PROBE_SECONDS = 3.0  # of a clip: with the limit below a probe takes about a minute on a CPU
PROBE_EXAMPLES = 600  # of each part
INTERRUPTED = 130  # exit code after Ctrl-C, as shells use it


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(prog="python -m d2v_fast.demo", description=__doc__.partition(": ")[2])
    parser.add_argument("--modality", choices=[*BUILDERS, "all"], default="all")
    for name in BUILDERS:
        parser.add_argument(f"--{name}", metavar="PATH", help=f"pretrain on your own {name} data instead")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="default: %(default)s")
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="where demo data goes: %(default)s")
    parser.add_argument("--updates", type=int, help="train for so many updates instead of the preset's number")
    return parser.parse_args(arguments)


def load_data(name: str, own: str | None, folder: Path) -> tuple[str, dict, DemoSet | None]:
    """What to pretrain on, what is known about it, and the labelled demo set, if there is one.

    Own data replaces the demo's for pretraining; the demo's labels are then used only if they are already there.
    """
    if own is None:
        found = fetch(name, folder)
        return str(found.pretrain), found.about(), found
    found = DemoSet(name, folder / name)
    about = {"title": f"{name.capitalize()}: your own data", "pretrain": own}
    return own, about, found if (found.root / "about.json").is_file() else None


def run_probes(checkpoint: Path, found: DemoSet | None) -> list[tuple[str, ProbeResult]]:
    """Every labelled task of the demo set, on the frozen features of ``checkpoint``."""
    results = []
    for folder, task in (found.about()["tasks"] if found else {}).items():
        parts = (found.probe_part(part, folder) for part in ("train", "test"))
        result = probe_checkpoint(checkpoint, *parts, max_seconds=PROBE_SECONDS, max_examples=PROBE_EXAMPLES)
        results.append((task["question"], result))
    return results


def summarise(
    name: str,
    config: TrainConfig,
    result: PretrainResult,
    about: dict,
    probes: list[tuple[str, ProbeResult]],
) -> RunSummary:
    """Collect what the report shows of a finished run."""
    model, folder = load_model(result.checkpoint), Path(config.out)
    student = (model.frontend, model.encoder, model.head)
    encoder = config.model.encoder
    earlier = folder / "run.json"  # a finished run that is only probed again keeps the memory it was trained with
    known = json.loads(earlier.read_text(encoding="utf-8"))["peak_memory"] if earlier.is_file() else 0
    return RunSummary(
        name=name,
        about={key: value for key, value in about.items() if key != "tasks"},
        parameters=sum(parameter.numel() for module in student for parameter in module.parameters()),
        architecture=f"{encoder.layers} layers of {encoder.dim}",
        device=str(resolve_device(config.device)),
        peak_memory=known or result.peak_memory,
        metrics=read_metrics(folder),
        probes=probes,
    )


def run_modality(name: str, options: argparse.Namespace) -> bool:
    """Fetch, pretrain, probe, print the outcome; False when training was interrupted."""
    path, about, found = load_data(name, getattr(options, name), options.data)
    out = options.out / name
    # JSON strings are YAML strings: a path may hold any character
    overrides = [f"data.path={json.dumps(path)}", f"out={json.dumps(str(out))}"]
    if options.updates is not None:
        overrides.append(f"updates={options.updates}")
    config = load_config(f"{name}_demo", overrides)
    print(f"\n{about['title']}: {about['pretrain']}\npretraining for {config.updates} updates into {out}", flush=True)
    result = pretrain(config)
    if not result.finished:
        return False
    print("probing", flush=True)
    run = summarise(name, config, result, about, run_probes(result.checkpoint, found))
    save_run(out, run)
    last = run.metrics[-1]
    print(
        f"{name}: loss {result.first_loss:.3f} -> {result.last_loss:.3f}, "
        f"std of targets {last['target_var']:.3f}, of predictions {last['pred_var']:.3f}"
    )
    for question, probed in run.probes:
        print(f"\n{question}\n{probed.table()}\n{gain(probed)}")
    return True


def next_steps(folder: Path, data: Path) -> str:
    """Three commands that go on from the demo."""
    name = folder.name
    checkpoint = sorted(folder.glob("checkpoint-*.pt"))[-1]
    parts = [DemoSet(name, data / name).probe_part(part) for part in ("train", "test")]
    train, test = parts if parts[0].exists() else ("LABELLED_DATA", "MORE_LABELLED_DATA")
    return f"""What next:
  d2v-fast pretrain {name}_base data.path=YOUR_DATA out=runs/mine
  d2v-fast probe {checkpoint} --train {train} --test {test} --layer 2
  d2v-fast info"""


def main(arguments: list[str] | None = None) -> int:
    """Run the demo. Returns 0 when a modality ran and none failed in training, 130 after Ctrl-C, else 1."""
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    chosen = list(BUILDERS) if options.modality == "all" else [options.modality]
    done: list[Path] = []
    missing: list[str] = []
    failed: list[str] = []
    interrupted = False
    for name in chosen:
        try:
            interrupted = not run_modality(name, options)
        except KeyboardInterrupt:
            interrupted = True
        except FetchError as error:
            missing.append(name)
            print(f"no data for {error}\n  give a folder of your own: --{name} PATH", file=sys.stderr)
            continue
        except (UserError, DataError) as error:
            failed.append(name)
            print(f"{name} failed: {error}", file=sys.stderr)
            continue
        if interrupted:
            break
        done.append(options.out / name)
    if done:
        report = write_report(done, options.out / "report.html")
        print(f"\nreport: {report}")
        for folder in done:
            run = load_run(folder)
            gains = "; ".join(gain(result) for _, result in run.probes) or "not probed"
            print(f"  {run.name}: {gains}")
        print(next_steps(done[0], options.data))
    for what, names in (("no data for", missing), ("failed (see above):", failed)):
        if names:
            print(f"{what} {', '.join(names)}", file=sys.stderr)
    if interrupted:
        print("interrupted; the same command continues from here", file=sys.stderr)
        return INTERRUPTED
    return 0 if done and not failed else 1


if __name__ == "__main__":
    sys.exit(main())

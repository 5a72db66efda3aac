"""One modality of the demo: ``python -m d2v_fast.demo.one NAME``, a process of its own (see ``d2v_fast.demo``)."""

import argparse
import hashlib
import json
import logging
import sys
from pathlib import Path

from d2v_fast.demo.fetch import BUILDERS, DemoSet, fetch
from d2v_fast.demo.report import RunSummary, gain, save_run
from d2v_fast.train import PretrainResult, TrainConfig, load_config, load_model, pretrain
from d2v_fast.train.distributed import resolve_device
from d2v_fast.train.errors import UserError
from d2v_fast.train.logging import read_metrics
from d2v_fast.train.probe import ProbeResult, probe_checkpoint

PROBE_SECONDS = 2.0  # from the middle of a clip
INTERRUPTED = 130  # exit code after Ctrl-C, as shells use it


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that the demo hands on to its parts."""
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="default: %(default)s")
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="where demo data goes: %(default)s")
    parser.add_argument("--updates", type=int, help="train for so many updates instead of the preset's number")


def run_folder(name: str, own: str | None, out: Path) -> Path:
    """Folder of the run: one for the demo's data, another for each folder of the user's own."""
    if own is None:
        return out / name
    return out / f"{name}-{hashlib.sha256(str(Path(own).resolve()).encode()).hexdigest()[:8]}"


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
        result = probe_checkpoint(checkpoint, *parts, max_seconds=PROBE_SECONDS)
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


def run_modality(name: str, own: str | None, options: argparse.Namespace) -> bool:
    """Fetch, pretrain, probe, print the outcome; False when training was interrupted."""
    path, about, found = load_data(name, own, options.data)
    out = run_folder(name, own, options.out)
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


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns 0, 1 after an error that is printed in one line, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m d2v_fast.demo.one", description="One modality of the demo.")
    parser.add_argument("name", choices=list(BUILDERS))
    parser.add_argument("--own", help="pretrain on this folder instead of the demo's data")
    add_options(parser)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return 0 if run_modality(options.name, options.own, options) else INTERRUPTED
    except KeyboardInterrupt:
        return INTERRUPTED
    except UserError as error:
        print(f"{options.name} failed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

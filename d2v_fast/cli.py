"""The ``d2v-fast`` command."""

import difflib
import logging
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError:  # the library works without the train extra, the command does not
    sys.exit("error: the d2v-fast command needs typer: pip install 'd2v-fast[train]', or [dropin] for its run")

from d2v_fast._info import info as report
from d2v_fast.errors import UserError


class Format(str, Enum):
    """Formats of checkpoints (``d2v_fast.checkpoints.convert.WRITERS``)."""

    native = "native"
    transformers = "transformers"
    fairseq = "fairseq"
    beit = "beit"


RANK = os.environ.get("RANK", "0")  # among the processes that torchrun started
INTERRUPTED = 130  # exit code of a run that Ctrl-C ended, as shells use it
SETTINGS = {"ignore_unknown_options": True}  # of commands with key=value arguments: see _refuse_options
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _setup() -> None:
    """Pretrain data2vec on speech, images or text."""
    level, name = (logging.INFO, "") if RANK == "0" else (logging.WARNING, f"rank {RANK}: ")
    logging.basicConfig(level=level, format=f"{name}%(message)s", stream=sys.stderr)


def _refuse_options(context: typer.Context, arguments: list[str]) -> None:
    """Refuse an option that ``context``'s command does not have, and say how a setting is written."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if not argument.startswith("-"):
            continue
        option, _, value = argument.partition("=")
        options = [name for p in context.command.params for name in (*p.opts, *p.secondary_opts)]
        close = difflib.get_close_matches(option, options, n=1, cutoff=0.75)
        if close:
            raise UserError(f"unknown option {option!r}: did you mean {close[0]!r}?")
        key = option.lstrip("-").replace("-", "_")
        value = value or (following if following and following[0] != "-" else "VALUE")
        raise UserError(f"unknown option {option!r}: settings are written without dashes: {key}={value}")


@app.command(context_settings=SETTINGS)
def pretrain(
    context: typer.Context,
    preset: Annotated[str, typer.Argument(help="a preset (speech_base, image_base, text_base, ...) or a YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. data.path=DIR")] = None,
    gpus: Annotated[int | None, typer.Option(help="keep the preset's batch on so many GPUs")] = None,
    lr_rule: Annotated[
        str, typer.Option(help="sqrt or linear: the learning rate where that needs another batch")
    ] = "sqrt",
    resume: Annotated[
        bool, typer.Option(help="go on from the newest checkpoint in out=..., or refuse a folder with one")
    ] = True,
) -> None:
    """Pretrain a model; run the same command again to continue it, torchrun's in front of it included."""
    from d2v_fast.train import load_config

    overrides = overrides or []
    _refuse_options(context, [preset, *overrides])
    if gpus is not None:
        from d2v_fast.train.recipes import check_processes, describe, recipe_overrides

        overrides, recipe = recipe_overrides(preset, overrides, gpus, lr_rule)
        check_processes(gpus, int(os.environ.get("WORLD_SIZE", "1")))
        if RANK == "0":
            print(describe(recipe, load_config(preset, overrides)), file=sys.stderr)
    config = load_config(preset, overrides)
    from d2v_fast.train import pretrain as run  # after the settings are known to be right, as it takes a second

    result = run(config, resume=resume)
    if RANK == "0":
        losses = f"{result.first_loss:.4f} -> {result.last_loss:.4f}"
        print(f"update {result.updates}: loss {losses}; saved {result.checkpoint}")
        if not result.finished:
            print("stopped before the end; the same command continues from there", file=sys.stderr)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


@app.command(context_settings=SETTINGS)
def recipe(
    context: typer.Context,
    preset: Annotated[str, typer.Argument(help="a preset or a YAML file")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. data.batch_size=32")
    ] = None,
    gpus: Annotated[str, typer.Option(help="numbers of GPUs, such as 1,2,4,8,16")] = "1,2,4,8,16",
    lr_rule: Annotated[str, typer.Option(help="sqrt or linear: the learning rate where the batch changes")] = "sqrt",
) -> None:
    """How a preset runs on other numbers of GPUs: accumulation, learning rate, schedules, memory."""
    from d2v_fast.train.recipes import gpu_counts, table

    overrides = overrides or []
    _refuse_options(context, [preset, *overrides])
    print(table(preset, overrides, gpu_counts(gpus), lr_rule))


@app.command()
def probe(
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint of a run: checkpoint-00100000")],
    train: Annotated[Path, typer.Option(help="labelled examples to fit on: a folder per class, or a .tsv for text")],
    test: Annotated[Path, typer.Option(help="labelled examples to score")],
    layer: Annotated[str, typer.Option(help="a layer's number, or 'average'")] = "average",
) -> None:
    """Fit a linear classifier on frozen features, beside an untrained model and a plain feature."""
    from d2v_fast.train.probe import probe_checkpoint

    print(probe_checkpoint(checkpoint, train, test, layer=layer).table())


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="a checkpoint of fairseq or the BEiT fork, or a directory")],
    target: Annotated[Path, typer.Argument(help="the file (fairseq, beit) or directory to write")],
    to: Annotated[Format, typer.Option(help="the format to write")],
    force: Annotated[bool, typer.Option("--force", help="replace what is there")] = False,
) -> None:
    """Rewrite a model's weights in another format; the source's is detected, its precision is kept."""
    from d2v_fast.checkpoints import check_target, read_any, write_as

    check_target(target, to.value, force)
    loaded = read_any(source)
    print(f"read {source}\n{loaded.report.table()}")
    print(f"wrote {target}\n{write_as(loaded.model, target, to.value, force).table()}")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint of a run: checkpoint-00100000")],
    target: Annotated[Path, typer.Argument(help="the directory (native, transformers) or file to write")],
    to: Annotated[Format, typer.Option(help="the format to write")] = Format.native,
    teacher: Annotated[bool, typer.Option("--teacher", help="the averages in place of the student")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace what is there")] = False,
) -> None:
    """Write the model of a run's checkpoint, without the state of its training."""
    from d2v_fast.checkpoints import check_target, write_as
    from d2v_fast.train.checkpoint import load_model

    check_target(target, to.value, force)
    report = write_as(load_model(checkpoint), target, to.value, force, teacher=teacher)
    print(f"wrote {target}\n{report.table()}")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
    options_metavar="[OPTIONS] COMMAND [ARGS]...",
)
def run(
    context: typer.Context,
    without: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PART,...",
            help="parts to leave, may be repeated: ema, loss, targets, attention, conv, norms, encoder, masks, metrics",
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="an error instead of leaving anything else")] = False,
) -> None:
    """Run a training command of fairseq, Transformers or BEiT with our ops in it: a script, x.py or -m module."""
    from d2v_fast.launch import launch

    launch(context.args, ",".join(without) if without else None, strict)


@app.command()
def info(
    run: Annotated[Path | None, typer.Argument(help="the folder of a run, to look at its metrics too")] = None,
) -> None:
    """Versions, devices, what each op runs on, and advice; for a run, what it waited for and what to change."""
    print(report(run))


def main() -> None:
    """Run the command; errors that the user can mend are printed in one line, with exit code 1."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except UserError as error:
        sys.exit(_one_line(error))


def _one_line(error: UserError) -> str | int:
    """What is printed of an error: on one rank only, if all have the same."""
    if RANK == "0":
        return f"error: {error}"
    return 1 if error.everywhere else f"rank {RANK}: error: {error}"

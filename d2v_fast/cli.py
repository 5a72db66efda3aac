"""The ``d2v-fast`` command."""

import logging
import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError:  # the library works without the train extra, the command does not
    sys.exit("error: the d2v-fast command needs the train extra: pip install 'd2v-fast[train]'")

from d2v_fast._info import info as report

INTERRUPTED = 130  # exit code of a run that Ctrl-C ended, as shells use it
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _setup() -> None:
    """Pretrain data2vec on speech, images or text."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)


@app.command()
def pretrain(
    preset: Annotated[str, typer.Argument(help="a preset (speech_base, image_base, text_base, ...) or a YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. data.path=DIR")] = None,
    resume: Annotated[bool, typer.Option(help="go on from the newest checkpoint in out=...")] = True,
) -> None:
    """Pretrain a model; run the same command again to continue it."""
    from d2v_fast.train import load_config
    from d2v_fast.train import pretrain as run

    result = run(load_config(preset, overrides or []), resume=resume)
    print(f"update {result.updates}: loss {result.first_loss:.4f} -> {result.last_loss:.4f}; saved {result.checkpoint}")
    if not result.finished:
        print("stopped before the end; the same command continues from there", file=sys.stderr)
        raise typer.Exit(INTERRUPTED)


@app.command()
def probe(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint-*.pt of a run")],
    train: Annotated[Path, typer.Option(help="labelled examples to fit on: a folder per class, or a .tsv for text")],
    test: Annotated[Path, typer.Option(help="labelled examples to score")],
    layer: Annotated[str, typer.Option(help="a layer's number, or 'average'")] = "average",
) -> None:
    """Fit a linear classifier on frozen features, beside an untrained model and a plain feature."""
    from d2v_fast.train.probe import probe_checkpoint

    print(probe_checkpoint(checkpoint, train, test, layer=layer).table())


@app.command()
def info() -> None:
    """Versions, devices, what each op runs on, and advice."""
    print(report())


def main() -> None:
    """Run the command; errors that the user can mend are printed in one line, with exit code 1."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except ValueError as error:
        from d2v_fast.train.errors import UserError

        if not isinstance(error, UserError):
            raise
        sys.exit(f"error: {error}")

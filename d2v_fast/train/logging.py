"""Where a run's numbers go: progress bar or JSON lines, ``metrics.jsonl``, TensorBoard, wandb, and a PNG at the end."""

import json
import logging
import math
import secrets
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from d2v_fast.train.files import replace_file

logger = logging.getLogger(__name__)

CURVES = (
    ("loss", "loss per masked position"),
    ("target_var", "std of the targets"),
    ("pred_var", "std of the predictions"),
    ("grad_norm", "gradient norm"),
    ("lr", "learning rate"),
    ("data_wait", "share of time waiting for data"),
)


class MetricLog:
    """Writes one record per logged update. On a terminal it draws a progress bar, elsewhere it prints JSON lines.

    Args:
        folder: of the run.
        updates: of the whole run; ``start``: those that are done. Records of later ones are taken out of the file.
        tensorboard: whether to write ``folder/tensorboard`` as well.
        wandb_project: of Weights & Biases, to which the records go too; "" for none. It may fail: the run goes on.
        settings: the run's configuration, for wandb.
    """

    def __init__(
        self,
        folder: Path,
        updates: int,
        start: int,
        *,
        tensorboard: bool = True,
        wandb_project: str = "",
        settings: dict[str, Any] | None = None,
    ) -> None:
        path = folder / "metrics.jsonl"
        cut_back(path, start)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1) if tensorboard else None
        self._wandb = Wandb(folder, wandb_project, settings or {}) if wandb_project else None
        self._bar = None
        if sys.stdout.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"),
            )
            self._bar = Progress(*columns, console=Console())
            self._task = self._bar.add_task("pretrain", total=updates, completed=start, status="")
            self._bar.start()

    def advance(self, update: int) -> None:
        """Move the progress bar to ``update``."""
        if self._bar is not None:
            self._bar.update(self._task, completed=update)

    def write(self, record: dict[str, Any]) -> None:
        """Record the numbers of one update; ``record["update"]`` names it."""
        line = json.dumps(record)
        self._file.write(line + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in record.items():
                if key != "update":
                    self._board.add_scalar(key, value, record["update"])
        if self._wandb is not None:
            self._wandb.write(record)
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.update(self._task, status=f"loss {record['loss']:.4f}  target std {record['target_var']:.3f}")

    def close(self) -> None:
        """Flush everything."""
        if self._bar is not None:
            self._bar.stop()
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.close()


class Wandb:
    """A run at Weights & Biases, continued by later sessions in its folder; whatever fails there is logged and ends it.

    Where it goes, and whether it goes anywhere, is up to wandb's settings (``wandb login``, ``WANDB_MODE=offline``).
    """

    TIMEOUT = 30  # seconds to wait for the server at the start

    def __init__(self, folder: Path, project: str, settings: dict[str, Any]) -> None:
        self._run = None
        try:
            import wandb

            self._run = wandb.init(
                project=project,
                name=folder.name,
                id=self._id(folder),
                resume="allow",
                dir=str(folder),
                config=settings,
                settings=wandb.Settings(init_timeout=self.TIMEOUT, console="off"),
            )
            # by update: a session that goes on from a checkpoint may repeat some, which steps of wandb's may not
            self._run.define_metric("*", step_metric="update")
        except ImportError:
            logger.warning("log.wandb_project: nothing goes to wandb, it is not installed (pip install wandb)")
        except Exception as error:  # whatever its server or network does: a run is worth more than its log
            self._give_up(error)

    @staticmethod
    def _id(folder: Path) -> str:
        """Of the run, kept in its folder."""
        path = folder / "wandb-id.txt"
        if not path.exists():
            replace_file(path, lambda file: file.write(secrets.token_hex(8).encode()))
        return path.read_text(encoding="utf-8").strip()

    def _give_up(self, error: Exception) -> None:
        logger.warning("log.wandb_project: nothing more goes to wandb: %s: %s", type(error).__name__, error)
        self._run = None

    def write(self, record: dict[str, Any]) -> None:
        """Send the numbers of one update."""
        self._call("log", record)

    def close(self) -> None:
        """Send what is left."""
        self._call("finish")

    def _call(self, name: str, *arguments: dict[str, Any]) -> None:
        if self._run is None:
            return
        try:
            getattr(self._run, name)(*arguments)
        except Exception as error:
            self._give_up(error)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Records of ``metrics.jsonl`` in ``folder``; see :func:`read_records`."""
    return read_records(folder / "metrics.jsonl")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file, of updates each, without the lines that are none; no records if there is no such file."""
    return [row for _, row in read_lines(path) if row is not None]


def read_lines(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a file and their records: JSON objects with a whole number ``"update"``, or None for what is none.

    An end that a crash has cut off is no line, and neither is an empty one.
    """
    *whole, end = path.read_bytes().split(b"\n") if path.exists() else [b""]
    lines = [(line, _record(line)) for line in [*whole, end] if line.strip()]
    return lines[:-1] if end.strip() and lines[-1][1] is None else lines


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # whatever a power failure or a bad disk has made of it
        return None
    return row if isinstance(row, dict) and type(row.get("update")) is int else None


def number(row: dict[str, Any], key: str) -> float:
    """What a record has there; NaN if that is no number."""
    value = row.get(key)
    return value if isinstance(value, (int, float)) else math.nan


def cut_back(path: Path, update: int) -> None:
    """Take out of a file, if there is one, the records of updates after ``update`` and its cut off end.

    Lines that are no records go to a file beside it, ``NAME.damaged``, so that readers of this one do not meet them.
    """
    if not path.exists():
        return
    lines = read_lines(path)
    damaged = [line + b"\n" for line, row in lines if row is None]
    if damaged:
        beside = path.with_name(f"{path.name}.damaged")
        logger.warning("%d of %d lines of %s are no records; they go to %s", len(damaged), len(lines), path, beside)
        with beside.open("ab") as file:
            file.writelines(damaged)
    kept = b"".join(line + b"\n" for line, row in lines if row is not None and row["update"] <= update)
    replace_file(path, lambda file: file.write(kept))


def plot_curves(folder: Path) -> Path | None:
    """Draw ``curves.png`` in ``folder`` from its metrics; return its path, or None if nothing was logged."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    rows = read_metrics(folder)
    if not rows:
        return None
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, 3)
    for axis, (key, title) in zip(axes.flat, CURVES, strict=True):
        axis.plot([row["update"] for row in rows], [number(row, key) for row in rows])
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
    path = folder / "curves.png"
    figure.savefig(path, dpi=100)
    return path

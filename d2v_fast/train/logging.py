"""Where a run's numbers go: progress bar or JSON lines, ``metrics.jsonl``, TensorBoard, wandb, and a PNG at the end."""

import json
import logging
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
        kept = "".join(json.dumps(row) + "\n" for row in read_metrics(folder) if row["update"] <= start)
        replace_file(path, lambda file: file.write(kept.encode()))
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
    """Records of ``metrics.jsonl`` in ``folder``; a line cut off by a crash is left out."""
    return read_records(folder / "metrics.jsonl")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The JSON values of a file, one a line, up to one that a crash has cut off; none if there is no such file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_curves(folder: Path) -> Path | None:
    """Draw ``curves.png`` in ``folder`` from its metrics; return its path, or None if nothing was logged."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    rows = read_metrics(folder)
    if not rows:
        return None
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, 3)
    for axis, (key, title) in zip(axes.flat, CURVES, strict=True):
        axis.plot([row["update"] for row in rows], [row[key] for row in rows])
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
    path = folder / "curves.png"
    figure.savefig(path, dpi=100)
    return path

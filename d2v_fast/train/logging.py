"""Where a run's numbers go: a progress bar or JSON lines, ``metrics.jsonl``, TensorBoard, and a PNG at the end."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from d2v_fast.train.files import replace_file

CURVES = (
    ("loss", "loss per masked position"),
    ("target_var", "std of the targets"),
    ("pred_var", "std of the predictions"),
    ("grad_norm", "gradient norm"),
    ("lr", "learning rate"),
    ("data_wait", "share of time waiting for data"),
)


class MetricLog:
    """Writes one record per logged update. On a terminal it draws a progress bar, elsewhere it prints JSON lines."""

    def __init__(self, folder: Path, updates: int, start: int) -> None:
        path = folder / "metrics.jsonl"
        kept = "".join(json.dumps(row) + "\n" for row in read_metrics(folder) if row["update"] <= start)
        replace_file(path, lambda file: file.write(kept.encode()))
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
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
        for key, value in record.items():
            if key != "update":
                self._board.add_scalar(key, value, record["update"])
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.update(self._task, status=f"loss {record['loss']:.4f}  target std {record['target_var']:.3f}")

    def close(self) -> None:
        """Flush everything."""
        if self._bar is not None:
            self._bar.stop()
        self._file.close()
        self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Records of ``metrics.jsonl`` in ``folder``; a line cut off by a crash is left out."""
    path = folder / "metrics.jsonl"
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

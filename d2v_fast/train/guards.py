"""What the updates since the last log came to, and when to stop a run that has gone wrong."""

import torch

from d2v_fast.train.config import TrainConfig
from d2v_fast.train.errors import TrainingStopped
from d2v_fast.train.step import StepMetrics

# how the columns of a window go together over ranks: losses and spreads are parts of a whole, the rest is the same
SHARED = {"loss": "sum", "target_var": "sum", "pred_var": "sum", "grad_norm": "max", "skipped": "max"}


class Window:
    """The updates' metrics since the last log, left on the device; reading them is the loop's only synchronisation."""

    def __init__(self) -> None:
        self._rows: list[torch.Tensor] = []
        self.nonfinite = 0  # length of the current run of skipped updates

    def add(self, m: StepMetrics) -> None:
        """Take in one update."""
        self._rows.append(torch.stack([m.loss, m.target_var, m.pred_var, m.grad_norm, m.skipped]))

    def take(self) -> list[float]:
        """This rank's numbers by the names of ``SHARED``, and a new window.

        Means over the updates that were not skipped (NaN if all were), and the number of skipped ones.
        """
        rows = torch.stack(self._rows).tolist()
        self._rows.clear()
        for row in rows:
            self.nonfinite = self.nonfinite + 1 if row[4] else 0
        kept = [row for row in rows if not row[4]]
        means = [sum(column) / len(kept) for column in zip(*kept, strict=True)] if kept else [float("nan")] * 5
        return [*means[:4], len(rows) - len(kept)]


def check_guards(window: Window, record: dict[str, float], config: TrainConfig) -> None:
    """Stop a run that cannot recover. ``record`` is the same on all ranks, and so is the decision.

    Raises:
        TrainingStopped: too many updates in a row were not finite, or targets or predictions have collapsed.
    """
    guards, update = config.guards, record["update"]
    if window.nonfinite > guards.max_nonfinite:
        raise TrainingStopped(
            f"update {update}: loss or gradient was not finite for {window.nonfinite} updates in a row "
            f"(guards.max_nonfinite = {guards.max_nonfinite}). Lower optim.lr or set optim.clip_norm."
        )
    if update <= guards.after_updates:
        return
    for name, low in (("target_var", guards.min_target_var), ("pred_var", guards.min_pred_var)):
        if record[name] < low:
            raise TrainingStopped(
                f"update {update}: the representations have collapsed: {name} {record[name]:.4f} is below "
                f"guards.min_{name} = {low}. Lower optim.lr, raise ema.decay, or mask more."
            )

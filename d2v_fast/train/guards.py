"""What the updates since the last log came to, and when to warn of a run that goes wrong, or to stop it."""

import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch

from d2v_fast.train.checkpoint import Progress
from d2v_fast.train.config import GuardConfig
from d2v_fast.train.errors import TrainingStopped
from d2v_fast.train.step import StepMetrics

logger = logging.getLogger(__name__)

# how the columns of a window go together over ranks: losses and spreads are parts of a whole, the rest is the same
SHARED = {
    "loss": "sum",
    "target_var": "sum",
    "pred_var": "sum",
    "feature_var": "sum",
    "grad_norm": "max",
    "skipped": "max",
}
SPREADS = {"target_var": "targets", "pred_var": "predictions", "feature_var": "features"}
REARM = 1.1  # a spread that was low and is so many times its threshold again may be warned of again


class Taken(NamedTuple):
    """An update as a window has it."""

    before: Progress  # where the run stood
    loss: float  # this rank's part
    skipped: bool


class Window:
    """The updates' metrics since the last log, left on the device; reading them is the loop's only synchronisation."""

    def __init__(self) -> None:
        self._rows: list[torch.Tensor] = []
        self._places: list[Progress] = []
        self.nonfinite = 0  # most updates in a row that were skipped, as of the last take
        self._in_a_row = 0  # that are skipped up to now
        self.taken: list[Taken] = []  # by the last take

    def add(self, before: Progress, m: StepMetrics) -> None:
        """Take in the update that was made at ``before``."""
        self._rows.append(torch.stack([m.loss, m.target_var, m.pred_var, m.feature_var, m.grad_norm, m.skipped]))
        self._places.append(before)

    def take(self) -> list[float]:
        """This rank's numbers by the names of ``SHARED``, and a new window.

        Means over the updates that were not skipped (NaN if all were), and the number of skipped ones.
        """
        rows = torch.stack(self._rows).tolist()
        self.taken = [Taken(p, row[0], row[-1] > 0) for p, row in zip(self._places, rows, strict=True)]
        self._rows.clear()
        self._places.clear()
        self.nonfinite = 0
        for row in rows:
            self._in_a_row = self._in_a_row + 1 if row[-1] else 0
            self.nonfinite = max(self.nonfinite, self._in_a_row)
        kept = [row[:-1] for row in rows if not row[-1]]
        means = [sum(column) / len(kept) for column in zip(*kept, strict=True)] if kept else [float("nan")] * 5
        return [*means, len(rows) - len(kept)]


class Guards:
    """Looks at what is logged, which is the same on all ranks; so are its decisions.

    They have a non-finite number of one rank from the gradient norm, which is that of all ranks together.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._low: set[str] = set()  # spreads that were warned of

    def check(self, record: Mapping[str, float], nonfinite: int) -> None:
        """Warn of a spread that has become low, once, and stop a run that cannot recover.

        Args:
            record: a row of metrics.jsonl.
            nonfinite: most updates in a row since the last log that were skipped, with those right before it.

        Raises:
            TrainingStopped: too many updates in a row were not finite, or something has collapsed.
        """
        config, update = self._config, int(record["update"])
        if nonfinite > config.max_nonfinite:
            raise TrainingStopped(
                f"update {update}: loss or gradient was not finite for {nonfinite} updates in a row "
                f"(guards.max_nonfinite = {config.max_nonfinite}). Lower optim.lr or set optim.clip_norm; spikes.jsonl "
                f"in the run's folder has their batches."
            )
        for name, what in SPREADS.items():
            value, low, lowest = record[name], getattr(config, f"warn_{name}"), getattr(config, f"min_{name}")
            if update > config.after_updates and value < lowest:
                raise TrainingStopped(
                    f"update {update}: the representations have collapsed: {name} {value:.4f} is below "
                    f"guards.min_{name} = {lowest}. {_advice(name)}"
                )
            if value < low and name not in self._low and (name != "pred_var" or update > config.after_updates):
                self._low.add(name)
                stop = f"below {lowest} from update {config.after_updates} on" if lowest > 0 else "never for that"
                logger.warning(
                    "update %d: the %s may be collapsing: %s %.4f is below guards.warn_%s = %s. The run stops %s "
                    "(guards.min_%s). %s",
                    *(update, what, name, value, name, low, stop, name, _advice(name)),
                )
            elif value > REARM * low:
                self._low.discard(name)


def _advice(name: str) -> str:
    if name == "feature_var":
        return "The front-end gives nearly the same at all positions: lower optim.lr, or look at the data."
    return "Lower optim.lr, raise ema.decay, or mask more."

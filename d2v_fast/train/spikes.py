"""Which updates had a loss out of line, and their batches, so that these can be looked at."""

import itertools
import json
import logging
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2v_fast.train.config import GuardConfig
from d2v_fast.train.data import PretrainData
from d2v_fast.train.data.base import specs
from d2v_fast.train.guards import Taken
from d2v_fast.train.logging import cut_back

logger = logging.getLogger(__name__)

ENOUGH = 30  # losses that mean and deviation are taken of, at least


class SpikeLog:
    """Writes a line of ``folder/spikes.jsonl`` for each update that was skipped or whose loss stands out.

    The losses of the updates since the last log are compared with those of ``guards.spike_window`` updates before
    them. One that stands out counts there as much as one that nearly does, so that it does not hide the next.

    A line has ``update``, ``loss`` (None if not finite), ``limit`` (what it was above; None for a skipped update) and
    ``batches``: for each micro-batch its ``rank``, ``epoch``, ``index`` and ``items``;
    ``data.load(epoch, index, tuple(items))`` reads it again.

    Args:
        folder: the run's.
        data: of the run.
        config: of the guards.
        ranks: processes of this session.
        accumulate: micro-batches of each of them in an update.
        start: updates that are done; lines of later ones are taken out of the file.
    """

    def __init__(
        self, folder: Path, data: PretrainData, config: GuardConfig, ranks: int, accumulate: int, start: int
    ) -> None:
        self._path, self._data, self._config = folder / "spikes.jsonl", data, config
        self._ranks, self._accumulate = ranks, accumulate
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        cut_back(self._path, start)

    def note(self, taken: Sequence[Taken], losses: Sequence[float]) -> None:
        """Look at the updates ``taken`` since the last log; ``losses`` are theirs, of all ranks together."""
        limit = self._limit()
        found = []
        for one, loss in zip(taken, losses, strict=True):
            if one.skipped:
                found.append(self._record(one, loss, None))
                continue
            if loss > limit:
                found.append(self._record(one, loss, limit))
            self._losses.append(min(loss, limit))
        if not found:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
        updates = ", ".join(str(row["update"]) for row in found[:5]) + (" ..." if len(found) > 5 else "")
        logger.warning("loss out of line or not finite in update %s: batches are in %s", updates, self._path)

    def _limit(self) -> float:
        count, deviations = len(self._losses), self._config.spike_deviations
        if deviations == 0 or count < min(ENOUGH, self._config.spike_window):
            return math.inf
        mean = sum(self._losses) / count
        return mean + deviations * math.sqrt(sum((x - mean) ** 2 for x in self._losses) / count)

    def _record(self, one: Taken, loss: float, limit: float | None) -> dict[str, Any]:
        start, ranks = one.before, self._ranks
        places = itertools.islice(specs(self._data, start.epoch, start.index), ranks * self._accumulate)
        return {
            "update": start.update + 1,
            "loss": loss if math.isfinite(loss) else None,
            "limit": limit,
            "batches": [
                {"rank": number % ranks, "epoch": epoch, "index": index, "items": list(items)}
                for number, (epoch, index, items) in enumerate(places)
            ],
        }

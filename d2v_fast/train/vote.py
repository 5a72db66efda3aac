"""What all ranks have to know of each other before an update changes anything."""

from collections.abc import Sequence

from d2v_fast.nn import Batch
from d2v_fast.train.distributed import Ranks
from d2v_fast.train.interrupt import Interrupt
from d2v_fast.train.step import Counts


class Abandoned(Exception):
    """This update is not made: a rank has failed, or nothing could be read for it."""


class Vote:
    """One sum of five host integers over the ranks, begun when an update's data are there.

    It is read after the first forward, when it has long arrived, and nothing waits for a device. So all ranks divide
    the loss by the same number, and stop or give up at the same update.
    """

    def __init__(self, ranks: Ranks, batches: Sequence[Batch], interrupt: Interrupt, failed: bool) -> None:
        flags = (interrupt.requested, interrupt.by_user, failed)
        self._pending = ranks.sum([*Counts.of(batches), *map(int, flags)])
        self._interrupt = interrupt
        self.failed = self.stop = False

    def counts(self) -> Counts:
        """The counts of the whole update; ``failed`` and ``stop`` are known from then on.

        Raises:
            Abandoned: a rank has failed, or there is no micro-batch at all.
        """
        masked, micro_batches, stops, by_user, failed = self._pending.read()
        self.failed, self.stop = failed > 0, stops > 0
        self._interrupt.by_user |= by_user > 0
        if self.failed or micro_batches == 0:
            raise Abandoned
        return Counts(masked, micro_batches)

"""Signals that ask a run to stop."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

PREEMPTIONS = [signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]  # as schedulers send them


class Interrupt:
    """Makes the first Ctrl-C, SIGTERM or SIGUSR1 a request to stop after the current update.

    A second Ctrl-C is immediate. ``requested`` and ``by_user`` say whether anything has come, and whether it was Ctrl-C
    (on several ranks: on any of them, once they have told each other).
    """

    def __enter__(self) -> "Interrupt":
        self.requested = self.by_user = False
        self._old = _handlers([signal.SIGINT, *PREEMPTIONS])
        for number in self._old:
            signal.signal(number, self._request)
        return self

    def _request(self, number: int, frame: object) -> None:
        self.requested, self.by_user = True, self.by_user or number == signal.SIGINT
        signal.signal(signal.SIGINT, self._old[signal.SIGINT])

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


class Preempted(SystemExit):
    """SIGTERM or SIGUSR1 has come where there is nothing to be saved; ends the process with 0."""


@contextmanager
def preemptible() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 end what has nothing to save, a run's start and end; inside, :class:`Interrupt` may save.

    Raises:
        Preempted: one has come.
    """
    old = _handlers(PREEMPTIONS)
    for number in old:
        signal.signal(number, _preempt)
    try:
        yield
    except Preempted:
        logger.warning("a signal has ended the run while no update was under way; the same command continues it")
        raise
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _preempt(number: int, frame: object) -> None:
    raise Preempted(0)


def _handlers(numbers: list[signal.Signals]) -> dict[signal.Signals, object]:
    """The handlers there are; none where they cannot be set: only the main thread may, elsewhere its owner decides."""
    main = threading.current_thread() is threading.main_thread()
    return {number: signal.getsignal(number) for number in numbers} if main else {}

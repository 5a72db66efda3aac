"""Signals that ask a run to stop."""

import signal
import threading

PREEMPTIONS = [signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]  # as schedulers send them


class Interrupt:
    """Makes the first Ctrl-C, SIGTERM or SIGUSR1 a request to stop after the current update.

    A second Ctrl-C is immediate. ``requested`` and ``by_user`` say whether anything has come, and whether it was Ctrl-C
    (on several ranks: on any of them, once they have told each other).
    """

    def __enter__(self) -> "Interrupt":
        self.requested = self.by_user = False
        # only the main thread may set handlers; elsewhere its owner decides
        main = threading.current_thread() is threading.main_thread()
        self._old = {s: signal.getsignal(s) for s in (signal.SIGINT, *PREEMPTIONS)} if main else {}
        for number in self._old:
            signal.signal(number, self._request)
        return self

    def _request(self, number: int, frame: object) -> None:
        self.requested, self.by_user = True, self.by_user or number == signal.SIGINT
        signal.signal(signal.SIGINT, self._old[signal.SIGINT])

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

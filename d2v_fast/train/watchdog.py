"""Ends a process that hangs, and says where it was: a run on many ranks would wait for it, and its GPUs with it."""

import faulthandler
import multiprocessing
import os
import threading
import time

HANGS = 124  # exit code, as of timeout(1)
LAST_WORDS = 10.0  # seconds for them: the file system that hangs may be the one that they go to


class Watchdog:
    """A thread that ends its process when the main thread has not come to a new phase within ``timeout`` seconds.

    What a phase may take includes waiting for other ranks, compiling, and the first batches of the loader's workers.
    Time during which the whole process was stopped does not count. It is there before the ranks have met, so that it
    is torchrun's environment that says which one this is.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        # a few steps that wait for the others, each with a time-out of its own and a better message
        self._place = (0, "meeting the other ranks", 3 * timeout)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def at(self, phase: str, update: int | None = None, *, limit: float | None = None) -> None:
        """Note that the main thread gets on: what it does from now on, and in which update (the last one if None).

        ``limit``: seconds that this phase may take, if not ``timeout``.
        """
        # a new tuple each time
        self._place = (self._place[0] if update is None else update, phase, self._timeout if limit is None else limit)

    def __enter__(self) -> "Watchdog":
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        interval = min(1.0, self._timeout / 20)
        seen, idle, now = None, 0.0, time.monotonic()
        while not self._stop.wait(interval):
            before, now = now, time.monotonic()
            # a gap longer than that: the process was stopped by a scheduler, a debugger or a lid
            idle += min(now - before, 2 * interval)
            if self._place is not seen:
                seen, idle = self._place, 0.0
            elif idle > seen[2]:
                self._end(*seen)

    def _end(self, update: int, phase: str, limit: float) -> None:
        last = threading.Timer(LAST_WORDS, os._exit, [HANGS])
        last.daemon = True
        last.start()
        rank, world_size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
        where = "the run" if rank is None or world_size == "1" else f"rank {rank} of {world_size}"
        whose, remedy = "", ""
        if limit == self._timeout:
            whose, remedy = " (distributed.timeout)", " If it was only slow, raise distributed.timeout."
        message = (
            f"error: {where} hangs: no progress for {limit:g} s{whose} in update {update}, {phase}. It ends now; the "
            f"same command continues from the newest checkpoint.{remedy} What its threads do:\n"
        )
        for child in multiprocessing.active_children():  # the loader's workers would outlive this process
            child.kill()
        os.write(2, message.encode())
        faulthandler.dump_traceback(2)
        os._exit(HANGS)

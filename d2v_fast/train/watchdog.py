"""Ends a process that hangs, and says where it was: a run on many ranks would wait for it, and its GPUs with it."""

import faulthandler
import multiprocessing
import os
import threading
import time

from d2v_fast.train.distributed import Ranks

HANGS = 124  # exit code, as of timeout(1)
LAST_WORDS = 10.0  # seconds for them: the file system that hangs may be the one that they go to


class Watchdog:
    """A thread that ends its process when the main thread has not come to a new phase within ``ranks.timeout`` seconds.

    What a phase may take includes waiting for other ranks, compiling, and the first batches of the loader's workers.
    Time during which the whole process was stopped does not count.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._place = (0, "starting")
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def at(self, phase: str, update: int | None = None) -> None:
        """Note that the main thread gets on: what it does from now on, and in which update (the last one if None)."""
        self._place = (self._place[0] if update is None else update, phase)  # a new tuple each time

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
        limit = self._ranks.timeout
        interval = min(1.0, limit / 20)
        seen, idle, now = None, 0.0, time.monotonic()
        while not self._stop.wait(interval):
            before, now = now, time.monotonic()
            # a gap longer than that: the process was stopped by a scheduler, a debugger or a lid
            idle += min(now - before, 2 * interval)
            if self._place is not seen:
                seen, idle = self._place, 0.0
            elif idle > limit:
                self._end()

    def _end(self) -> None:
        last = threading.Timer(LAST_WORDS, os._exit, [HANGS])
        last.daemon = True
        last.start()
        (update, phase), ranks = self._place, self._ranks
        where = f"rank {ranks.rank} of {ranks.world_size}" if ranks.world_size > 1 else "the run"
        message = (
            f"error: {where} hangs: no progress for {ranks.timeout:g} s (distributed.timeout) in update {update}, "
            f"{phase}. It ends now; the same command continues from the newest checkpoint. If it was only slow, raise "
            f"distributed.timeout. What its threads do:\n"
        )
        for child in multiprocessing.active_children():  # the loader's workers would outlive this process
            child.kill()
        os.write(2, message.encode())
        faulthandler.dump_traceback(2)
        os._exit(HANGS)

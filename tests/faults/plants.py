"""What goes wrong in a rank: functions of the package are wrapped before its command starts.

A plant is {"rank": which, or None for all, "name": a function here, and its arguments}; ``call`` counts the calls of
what is wrapped, from 1.
"""

import ctypes
import errno
import math
import multiprocessing
import os
import platform
import signal
import threading
import time

from d2v_fast.train import loop, step
from d2v_fast.train.checkpoint import shards


def plant(rank: int, plants: list[dict]) -> None:
    """Those for ``rank``."""
    for values in plants:
        values = dict(values)
        name, whom = values.pop("name"), values.pop("rank")
        if whom is None or whom == rank:
            PLANTS[name](**values)


def _before(owner: object, name: str, call: int, action, times: float = 1) -> None:
    """``action(real, *arguments)`` in place of call number ``call``, and of those after it, ``times`` in all."""
    real, calls = getattr(owner, name), 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        return action(real, *args, **kwargs) if call <= calls < call + times else real(*args, **kwargs)

    setattr(owner, name, wrapped)


def _wait_for(path: str) -> None:
    """A checkpoint, which a thread of rank 0 is writing."""
    while path and not os.path.exists(path):
        time.sleep(0.01)


def _die(*args, **kwargs) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(*args, **kwargs) -> None:
    while True:
        threading.Event().wait(3600)


def kill_in_step(call: int, after: str) -> None:
    """Between forward and backward of an update."""

    def action(*args) -> None:
        _wait_for(after)
        _die()

    _before(step, "backward", call, action)


def kill_in_save(call: int) -> None:
    """When the rank's files of a checkpoint are written, and nobody knows."""

    def action(real, *args):
        real(*args)
        _die()

    _before(shards.ShardWriter, "write", call, action)


def hang_in_step(call: int, after: str) -> None:
    def action(*args) -> None:
        _wait_for(after)
        _hang()

    _before(step, "backward", call, action)


def hang_in_save(call: int) -> None:
    """The thread that writes, as on a file system that does not answer any more."""
    _before(shards.ShardWriter, "write", call, _hang, math.inf)


def full_disk(call: int, times: float = math.inf) -> None:
    """Half of each file is written, in so many saves in a row."""

    def action(real, self, partial):
        names = real(self, partial)
        for path in [partial / name for name in names]:
            os.truncate(path, path.stat().st_size // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _before(shards.ShardWriter, "write", call, action, times)


def signal_in_save(call: int, number: str) -> None:
    """While the thread writes, which takes a while."""

    def action(real, *args):
        os.kill(os.getpid(), getattr(signal, number))
        time.sleep(0.5)
        return real(*args)

    _before(shards.ShardWriter, "write", call, action)


def signal_launcher(call: int, number: str) -> None:
    """torchrun is told to stop, in the middle of an update."""

    def action(real, *args):
        os.kill(os.getppid(), getattr(signal, number))
        time.sleep(1.0)
        return real(*args)

    _before(step, "backward", call, action)


def nan(call: int, times: int = 1) -> None:
    """A loss; in so many calls in a row."""

    def action(real, output, *args):
        return real(output._replace(loss=output.loss * math.nan), *args)

    _before(step, "backward", call, action, times)


def hang_in_loader(call: int, after: str) -> None:
    real = loop.batches

    def batches(*args, **kwargs):
        for number, one in enumerate(real(*args, **kwargs), 1):
            if number == call:
                _wait_for(after)
                _hang()
            yield one

    loop.batches = batches


def kill_worker(call: int) -> None:
    """All of the loader's, in the middle of an update."""

    def action(real, *args):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        time.sleep(0.5)
        return real(*args)

    _before(step, "backward", call, action)


def clock(seconds: float) -> None:
    """This rank's clock is wrong."""
    real = time.time
    time.time = lambda: real() + seconds


def no_privileges() -> None:
    """Permissions count for root as well."""
    if os.geteuid() != 0:
        return
    number = {"x86_64": 126, "aarch64": 91}[platform.machine()]  # capset
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if ctypes.CDLL(None, use_errno=True).syscall(number, header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def read_only_after(call: int, after: str, folder: str) -> None:
    """The run's folder can no longer be written to."""

    def action(real, *args):
        _wait_for(after)
        os.chmod(folder, 0o555)
        return real(*args)

    _before(step, "backward", call, action)


PLANTS = {
    function.__name__: function
    for function in (
        kill_in_step,
        kill_in_save,
        hang_in_step,
        hang_in_save,
        hang_in_loader,
        full_disk,
        signal_in_save,
        signal_launcher,
        nan,
        kill_worker,
        clock,
        no_privileges,
        read_only_after,
    )
}

"""One run in one folder: a lock that goes with the process that holds it."""

import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from d2v_fast.train.errors import CheckpointError

logger = logging.getLogger(__name__)

FILE = "run.lock"
# seconds: a run that was told to stop and saves, and what a file server takes to miss a machine that is gone
PATIENCE = 120.0
POLL_SECONDS = 0.5
TAKEN = (errno.EACCES, errno.EAGAIN)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)

# What this process holds, by file, and how it signs: such locks do not keep one thread from another.
_held: dict[Path, str] = {}
_one_at_a_time = threading.Lock()


@contextmanager
def locked(folder: Path, patience: float) -> Iterator[None]:
    """Keep other runs out of ``folder`` until the end; wait at most ``patience`` seconds for one that is in it.

    A record lock (``fcntl.lockf``) on ``folder/run.lock``: the system drops it when the process ends, however that
    ends. Forked processes do not have it, as they would have one of ``flock``, which filelock uses: a loader's workers
    outlive a run that was killed, by seconds or by as long as a disk does not answer. Nobody needs it for reading.

    On a system or a file system without such locks a warning says so, and nobody is kept out.

    Raises:
        CheckpointError: another run is still there.
        OSError: the lock's file cannot be written.
    """
    path, handle = folder.resolve() / FILE, None
    try:
        handle = _wait(path, folder, patience)
    except ImportError:  # fcntl is not on every system
        _warn(folder)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _warn(folder)
    try:
        yield
    finally:
        if handle is not None:
            with _one_at_a_time:
                del _held[path]
                os.close(handle)  # any descriptor of the file that is closed drops the lock


def _warn(folder: Path) -> None:
    logger.warning("%s is on a file system without locks: see to it that no other run uses it", folder)


def _wait(path: Path, folder: Path, patience: float) -> int:
    deadline = time.monotonic() + patience
    handle = _take(path)
    if handle is None:
        logger.warning(
            "%s is in use by another run (%s): waiting for its end, at most %g s", folder, _holder(path), patience
        )
    while handle is None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise CheckpointError(
                f"{folder} is in use by another run: {_holder(path)}. It did not end within {patience:g} s; wait for "
                f"it, end it, or choose another out=..."
            )
        time.sleep(min(POLL_SECONDS, left))
        handle = _take(path)
    return handle


def _take(path: Path) -> int | None:
    """A descriptor of the file at ``path`` that has the lock, signed; None if that is somebody else's."""
    import fcntl

    with _one_at_a_time:
        if path in _held:
            return None
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            now = datetime.now().astimezone()
            text = f"process {os.getpid()} on {socket.gethostname()}, since {now:%Y-%m-%d %H:%M:%S %z}"
            os.ftruncate(handle, 0)
            os.write(handle, f"{text}\n".encode())
        except OSError as error:
            os.close(handle)
            if error.errno in TAKEN:
                return None
            raise
        _held[path] = text
        return handle


def _holder(path: Path) -> str:
    """Who has the lock, as far as that is known."""
    with _one_at_a_time:
        if path in _held:  # reading the file would drop the lock
            return _held[path]
        try:
            return path.read_text(encoding="utf-8", errors="replace")[:200].strip() or "unknown"
        except OSError as error:
            return error.strerror or type(error).__name__

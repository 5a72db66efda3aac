"""One run in one folder: a lock that goes with the process that holds it."""

import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from d2v_fast.train.errors import CheckpointError

logger = logging.getLogger(__name__)

FILE = "run.lock"
# seconds: a run that was told to stop and saves, and what a file server takes to miss a machine that is gone
PATIENCE = 120.0
POLL_SECONDS = 0.5
TAKEN = (errno.EACCES, errno.EAGAIN)
# POSIX has EINVAL for a file that does not support locking
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class _Held:
    handle: int
    signed: str


# What this process holds, by file: such locks do not keep one thread from another.
_held: dict[Path, _Held] = {}
_one_at_a_time = threading.Lock()


@contextmanager
def locked(folder: Path, patience: float) -> Iterator[None]:
    """Keep other runs out of ``folder`` until the end; wait at most ``patience`` seconds for one that is in it.

    A record lock (``fcntl.lockf``) on ``folder/run.lock``: the system drops it when the process ends, however that
    ends. Forked processes do not have it, as they would have one of ``flock``, which filelock uses: a loader's workers
    outlive a run that was killed, by seconds or by as long as a disk does not answer. Nobody needs it for reading.

    On a system or a file system without such locks a warning says so, and nobody is kept out.

    Raises:
        CheckpointError: another run is still there, or the lock's file cannot be written or locked.
    """
    path, taken = folder.resolve() / FILE, False
    try:
        _wait(path, folder, patience)
        taken = True
    except ImportError:  # fcntl is not on every system
        _warn(folder, "there is no fcntl")
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise _cannot(path, error) from error
        _warn(folder, error.strerror)
    try:
        yield
    finally:
        if taken:
            with _one_at_a_time:
                os.close(_held.pop(path).handle)  # any descriptor of the file that is closed drops the lock


def check(folder: Path) -> None:
    """See to it that the lock that this process has on ``folder``, if any, keeps others out; every save asks for this.

    It does not when somebody has removed ``run.lock``, by hand or to tidy up what is old: it is then made again.

    Raises:
        CheckpointError: another run has come in since, or the file cannot be made again.
    """
    path = folder.resolve() / FILE
    with _one_at_a_time:
        held = _held.get(path)
        try:
            if held is None or _is_at(held.handle, path):
                return
            new = _open(path)
        except OSError as error:
            raise _cannot(path, error) from error
        if new is not None:
            os.close(held.handle)
            _held[path] = new
    if new is None:
        raise CheckpointError(f"{path} was removed by someone, and another run has come in since: {_signature(path)}")
    logger.warning("%s was removed by someone, and is made again; a run may have come in meanwhile and ended", path)


def _warn(folder: Path, reason: str | None) -> None:
    logger.warning(
        "%s is on a file system without locks (%s: %s): see to it that no other run uses it", folder, FILE, reason
    )


def _cannot(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot lock {path}, which keeps other runs out: {error.strerror}. See to its file system, or choose another "
        f"out=..."
    )


def _wait(path: Path, folder: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    taken = _take(path)
    if not taken:
        logger.warning(
            "%s is in use by another run (%s): waiting for its end, at most %g s", folder, _holder(path), patience
        )
    while not taken:
        left = deadline - time.monotonic()
        if left <= 0:
            raise CheckpointError(
                f"{folder} is in use by another run: {_holder(path)}. It did not end within {patience:g} s; wait for "
                f"it, end it, or choose another out=..."
            )
        time.sleep(min(POLL_SECONDS, left))
        taken = _take(path)


def _take(path: Path) -> bool:
    """Whether this process has the lock of the file at ``path`` now, and had not before."""
    with _one_at_a_time:
        held = None if path in _held else _open(path)
        if held is not None:
            _held[path] = held
    return held is not None


def _open(path: Path) -> _Held | None:
    """The file at ``path``, locked and signed; None if the lock is somebody else's."""
    import fcntl

    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(handle, path):  # removed between the two calls: whoever has made it anew comes first
            os.close(handle)
            return None
        now = datetime.now().astimezone()
        text = f"process {os.getpid()} on {socket.gethostname()}, since {now:%Y-%m-%d %H:%M:%S %z}"
        os.ftruncate(handle, 0)
        os.write(handle, f"{text}\n".encode())
    except OSError as error:
        os.close(handle)
        if error.errno in TAKEN:
            return None
        raise
    return _Held(handle, text)


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is what is at ``path``."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    """Who has the lock, as far as that is known."""
    with _one_at_a_time:
        if path in _held:  # reading the file would drop the lock
            return _held[path].signed
        return _signature(path)


def _signature(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")[:200].strip() or "unknown"
    except OSError as error:
        return error.strerror or type(error).__name__

"""Where items come from: one file each, slices of archives, members of tars, rows of tables. Items have numbers."""

import hashlib
import io
import json
import logging
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from filelock import FileLock, Timeout  # torch needs it as well

from d2v_fast.train.data.base import NO_MEMORY, UnreadableFile
from d2v_fast.train.data.names import Names
from d2v_fast.train.errors import DataError
from d2v_fast.train.files import replace_file

logger = logging.getLogger(__name__)

T = TypeVar("T")
PATIENCE = 6 * 3600.0  # seconds to wait for another process that scans, tokenizes or unpacks the data
SLICE = re.compile(r"(.+):(\d{1,18}):(\d{1,18})")  # archive:offset:length, in bytes, as fairseq's manifests name them


class Source(ABC):
    """Items by number. Immutable, pickled to workers, and read by any of them.

    Attributes:
        names: what the items are called in messages.
        skipped: (name, reason) of what turned out to be unusable while the items were listed.
        key: what the items were listed from, in plain values; None if that is not known without opening each of them.
        threads: how many threads may usefully open items at once.
    """

    names: Names
    skipped: Sequence[tuple[str, str]] = ()
    key: list[Any] | None = None
    threads = 8  # opening files waits for the disk, not for Python

    @abstractmethod
    def open(self, item: int) -> BinaryIO:
        """The item's bytes as a file that can be sought in; close it.

        Raises:
            UnreadableFile: they are not there.
        """

    def read(self, item: int, decode: Callable[[BinaryIO], T]) -> T:
        """What ``decode`` makes of the item's bytes.

        Raises:
            UnreadableFile: they are not there, or ``decode`` says so; with the item's name.
        """
        try:
            with self.open(item) as file:
                return decode(file)
        except UnreadableFile as error:
            raise UnreadableFile(self.names[item], error.reason) from error
        except MemoryError as error:
            raise UnreadableFile(self.names[item], NO_MEMORY) from error


class Files(Source):
    """Files under ``root``; with ``slices``, a name may also be ``archive:offset:length``."""

    def __init__(self, root: str | Path, names: Names, *, slices: bool = False) -> None:
        self.root, self.names, self.slices = str(root), names, slices

    def open(self, item: int) -> BinaryIO:
        """See :meth:`Source.open`."""
        path = os.path.join(self.root, self.names[item])
        part = SLICE.fullmatch(path) if self.slices else None
        if part:
            return open_slice(part[1], int(part[2]), int(part[3]))
        return open_regular(path, buffering=0)  # decoders read in large pieces


def open_regular(path: str | Path, buffering: int = -1) -> BinaryIO:
    """Open a regular file to read its bytes; ``buffering`` as for ``open``.

    Raises:
        UnreadableFile: it is missing, may not be read, or is a folder or a pipe.
    """
    try:
        if stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its other end
            return open(path, "rb", buffering=buffering)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise UnreadableFile(path, getattr(error, "strerror", None) or str(error)) from error
    raise UnreadableFile(path, "not a regular file")


def open_slice(path: str, offset: int, size: int) -> "Slice":
    """Bytes ``offset`` to ``offset + size`` of the file ``path``, as a file of its own.

    Raises:
        UnreadableFile: the file cannot be opened, or ends before the slice does.
    """
    file = open_regular(path, buffering=0)
    length = os.fstat(file.fileno()).st_size
    if offset + size > length:
        file.close()
        raise UnreadableFile(path, f"it has {length} bytes; expected bytes {offset} to {offset + size} in it")
    return Slice(file, offset, size)


class Slice(io.RawIOBase):
    """``size`` bytes of an open file from ``start`` on, as a file that closes the other one with itself."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self.file, self.start, self.size, self.position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self.size - self.position)]
        self.file.seek(self.start + self.position)
        count = self.file.readinto(view)
        self.position += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise OSError(f"cannot seek to {base + offset}")
        self.position = base + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def close(self) -> None:
        self.file.close()
        super().close()


def describe_files(paths: Sequence[str | Path]) -> list[Any]:
    """Names, sizes and times of change: what a cache is told apart by. A link that leads nowhere has a name only."""
    stats = [(Path(path).name, os.stat(path) if os.path.exists(path) else None) for path in paths]
    return [(name, found and found.st_size, found and found.st_mtime_ns) for name, found in stats]


def cache_path(folder: str | Path, kind: str, key: list[Any]) -> Path:
    """Where a cache keeps what was made from ``key``, plain values; without a suffix."""
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    return Path(folder).expanduser() / f"{kind}-{digest}"


@contextmanager
def missing(path: Path) -> Iterator[bool]:
    """Whether there is no file at ``path``; if so, no other process on this path gets the same answer until the end.

    So of the ranks that start together one makes a cache, and the others wait for it. The lock goes with its process;
    on a file system without locks everyone is told to make the file.

    Raises:
        DataError: another process has had the lock for ``PATIENCE`` seconds.
    """
    if path.is_file():
        yield False
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with ExitStack() as stack:
        try:
            stack.enter_context(lock.acquire(timeout=1))
        except Timeout:
            logger.info("waiting for another process that makes %s", path)
            try:
                stack.enter_context(lock.acquire(timeout=PATIENCE))
            except Timeout:
                raise DataError(
                    f"another process has been making {path} for more than {PATIENCE:g} s; it has the lock "
                    f"{lock.lock_file}. End it if it hangs, or use another data.cache_dir; the same command goes on."
                ) from None
        except NotImplementedError:
            logger.warning("%s is on a file system without locks: other processes may make it as well", path)
        yield not path.is_file()


def _cached_path(folder: str, kind: str, key: list[Any]) -> Path:
    return cache_path(folder, kind, key).with_suffix(".npz")


def cached(
    folder: str | None, kind: str, key: list[Any] | None, make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays that ``make`` gives, kept in ``folder`` under a digest of ``key``; just made where either is None."""
    if folder is None or key is None:
        return make()
    path = _cached_path(folder, kind, key)
    with missing(path) as is_missing:
        if is_missing:
            arrays = make()
            replace_file(path, lambda file: np.savez(file, **arrays))
    with np.load(path) as content:
        return dict(content)


Measure = Callable[[np.ndarray], tuple[np.ndarray, list[str]]]


def measured(
    folder: str | None, kind: str, key: list[Any] | None, number: int, measure: Measure
) -> tuple[np.ndarray, np.ndarray]:
    """A whole number >= 0 for each of ``number`` things, or -1 and a reason; as ``cached``, but failures are not kept.

    What failed is measured again on every start: a disk may have been at fault, and a file that is mended can have the
    size and the time that it had. Keeping it as failed would need somebody to know of the cache.

    Args:
        folder, kind, key: as of ``cached``.
        number: how many things there are.
        measure: takes which of them, int64 [n]; gives int64 [n] and n reasons, "" where there is a number.

    Returns:
        int64 [number], and the reasons [number] as objects.
    """
    if folder is None or key is None:
        values, found = measure(np.arange(number))
        return values, np.array(found, object)
    values = cached(folder, kind, key, lambda: {"values": measure(np.arange(number))[0]})["values"]
    reasons = np.full(number, "", object)
    failed = np.flatnonzero(values < 0)
    if failed.size:
        values[failed], reasons[failed] = measure(failed)
        if (values[failed] >= 0).any():
            replace_file(_cached_path(folder, kind, key), lambda file: np.savez(file, values=values))
    return values, reasons

"""What every dataset has in common: a plan per epoch, batches that depend on nothing but their place in it, resuming.

A batch is a function of (seed, epoch, index): the plan, the crops and the masks are drawn from NumPy generators keyed
by these numbers and by nothing else. So the batches do not depend on the number of workers, and a resumed run sees
exactly those that the interrupted one would have seen.
"""

import hashlib
import itertools
import logging
import multiprocessing
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from d2v_fast.nn.batch import Batch
from d2v_fast.nn.config import Data2VecConfig
from d2v_fast.train.data.bad_items import check_items
from d2v_fast.train.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

Skipped = tuple[tuple[str, str], ...]  # (file, reason)
Spec = tuple[int, int, tuple[int, ...]]  # epoch, index of the batch in the epoch, its items
UNPACK = {".gz": "gunzip", ".tgz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd"}  # by suffix
NO_MEMORY = "it takes more memory than there is; its header may be damaged"
T = TypeVar("T")


class UnreadableFile(DataError):
    """One file cannot be used; ``reason`` says why."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot use {self.args[0]}: {self.reason}"


class PretrainData(Dataset, ABC):
    """A source of pretraining batches. Subclasses define :meth:`plan`, :meth:`load` and :meth:`describe`.

    With ``static_shapes`` batches of as many and as long items have the same shapes, whatever is masked in them, as
    CUDA graphs need; masks and losses stay the same.
    """

    ORDER, CROP, MASK = range(3)  # independent random streams, see rng

    model: Data2VecConfig  # of the subclass
    static_shapes = False
    skipped: Sequence[tuple[str, str]] = ()  # (file, reason), found while scanning
    unread: Skipped = ()  # what made the last load return None
    names: Sequence[str] = ()  # of the items, where some of them may turn out to be unreadable
    max_bad_fraction = 0.01  # of the items; see bad_items

    def __init__(self, seed: int) -> None:
        require(isinstance(seed, int) and seed >= 0, "seed", "an integer >= 0", seed)
        self.seed = seed

    @abstractmethod
    def plan(self, epoch: int) -> list[tuple[int, ...]]:
        """The batches of an epoch as tuples of item ids; a function of (seed, epoch)."""

    @abstractmethod
    def load(self, epoch: int, index: int, items: tuple[int, ...]) -> Batch | None:
        """Read batch ``index`` of ``plan(epoch)``; a function of (seed, epoch, index).

        Unreadable items are left out and named in ``Batch.skipped``. None, with the names left in ``self.unread``,
        only if none of the items could be read.
        """

    @abstractmethod
    def describe(self) -> str:
        """One line for the log: how much data there is, and how many files were left out."""

    @abstractmethod
    def contents(self) -> Iterable[bytes]:
        """What the batches depend on, besides the seed and the configuration, cheap to go through."""

    def fingerprint(self) -> str:
        """A digest of :meth:`contents`: equal for equal data, wherever it lies."""
        digest = hashlib.blake2b(digest_size=16)
        for part in self.contents():
            digest.update(part)
            digest.update(b"\0")
        return digest.hexdigest()

    def augment(self, batch: Batch) -> Batch:
        """Random changes that are cheap on the batch's device; they draw from torch's global generator."""
        return batch

    def num_masked(self, mask: np.ndarray) -> int | None:
        """Rows to be computed for ``mask`` [B, T], for ``make_batch``: as many as any mask of this shape can need."""
        return mask.shape[0] * self.model.mask.most(mask.shape[1]) if self.static_shapes else None

    def rng(self, stream: int, epoch: int, index: int = 0) -> np.random.Generator:
        """A generator for one purpose (ORDER, CROP or MASK) in one batch."""
        return np.random.default_rng([self.seed, stream, epoch, index])

    def read_each(self, items: tuple[int, ...], read: Callable[[int], T]) -> tuple[list[T], Skipped]:
        """Call ``read`` on each item; an :class:`UnreadableFile` becomes (name, reason). Sets ``self.unread``."""
        found, skipped = [], []
        for item in items:
            try:
                found.append(read(item))
            except UnreadableFile as error:
                skipped.append((self.names[item], error.reason))
        self.unread = () if found else tuple(skipped)
        return found, tuple(skipped)

    def __getitem__(self, spec: Spec) -> "_Loaded":
        epoch, index, items = spec
        batch = self.load(epoch, index, items)
        return _Loaded(epoch, index, batch, self.unread if batch is None else batch.skipped)


@dataclass
class _Loaded:
    """What a worker sends back."""

    epoch: int
    index: int
    batch: Batch | None
    skipped: Skipped

    def pin_memory(self) -> "_Loaded":
        return replace(self, batch=None if self.batch is None else self.batch.pin_memory())


class _Specs:
    """The sampler: one of ``world_size`` batches from (epoch, index) on, without end.

    It is always iterated in the main process; ``ends`` has, for each batch that is under way, the epoch and index of
    the last one of its round.
    """

    def __init__(self, data: PretrainData, epoch: int, index: int, rank: int, world_size: int) -> None:
        self.data, self.epoch, self.index, self.rank, self.world_size = data, epoch, index, rank, world_size
        self.ends: deque[tuple[int, int]] = deque()

    def __iter__(self) -> Iterator[Spec]:
        everything = specs(self.data, self.epoch, self.index)
        while True:
            one_round = list(itertools.islice(everything, self.world_size))
            self.ends.append(one_round[-1][:2])
            yield one_round[self.rank]


def specs(data: PretrainData, epoch: int, index: int) -> Iterator[Spec]:
    """The batches of all ranks from batch ``index`` of ``epoch`` on, without end: (epoch, index, items).

    Raises:
        DataError: an epoch has no batches.
    """
    while True:
        plan = data.plan(epoch)
        if not plan:
            raise DataError(f"epoch {epoch} has no batches: {data.describe()}")
        for number in range(index, len(plan)):
            yield epoch, number, plan[number]
        epoch, index = epoch + 1, 0


def batches(
    data: PretrainData,
    *,
    epoch: int = 0,
    index: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch: int = 2,
    rank: int = 0,
    world_size: int = 1,
    keep_empty: bool = False,
) -> Iterator[tuple[int, int, Batch | None]]:
    """Yield (epoch, index, batch) without end, starting with batch ``index`` of ``epoch``.

    The batches are the same for every ``num_workers``, and torch's global generator is left alone. Workers start at
    once, and end when what is returned is closed, or no longer used. A batch of which nothing could be read is left
    out; its files are named in the next one's ``skipped``. More different unreadable
    items than ``data.max_bad_fraction`` of all items end the run, unless they are few (``bad_items``).

    Of every ``world_size`` batches in a row, one a rank, number ``rank`` is read and yielded, also across the end of
    an epoch; (epoch, index) is then the place of the last of these, the same for all ranks. So ranks that start at one
    place and take as many batches have read all up to there, none of them twice.

    Args:
        data: what to load.
        epoch, index: where to start; an ``index`` past the end of the epoch starts the next one.
        num_workers: processes that read ahead (each with one torch thread); 0 reads in the calling thread.
        pin_memory: page-lock the batches; needs an accelerator.
        prefetch: batches that each worker reads ahead.
        rank, world_size: which of the batches; ``rank`` from 0 to ``world_size - 1``.
        keep_empty: yield None in place of a batch of which nothing could be read.

    Raises:
        ConfigError: a negative argument, ``prefetch`` 0, or ``rank`` not below ``world_size``.
        DataError: no batch of a whole epoch could be read, or too many items could not.
    """
    for name, value in (("epoch", epoch), ("index", index), ("num_workers", num_workers)):
        require(value >= 0, name, "at least 0", value)
    require(prefetch >= 1, "prefetch", "at least 1", prefetch)
    require(0 <= rank < world_size, "rank", f"from 0 to {world_size - 1}", rank)
    specs = _Specs(data, epoch, index, rank, world_size)
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=specs,
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=_leave_stopping_to_the_main_process,
        prefetch_factor=prefetch if num_workers else None,
        generator=torch.Generator(),  # else the loader takes its workers' seed from the global generator
    )
    placed = _readable(data, _loaded(loader), specs.ends, (epoch, index))
    return placed if keep_empty else (one for one in placed if one[2] is not None)


def _leave_stopping_to_the_main_process(worker: int) -> None:
    # Schedulers send signals to the whole process group; the main process still needs its batches to stop in order.
    # Only the first SIGTERM is survived: the loader must be able to end a worker that hangs.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _unchanged(loaded: _Loaded) -> _Loaded:
    return loaded


def _loaded(loader: DataLoader) -> Iterator[_Loaded]:
    """What the loader gives; its workers start here, not when the first batch is asked for.

    Raises:
        DataError: one of its workers has died.
    """
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    before = multiprocessing.active_children()
    iterator = iter(loader)
    if handler is not None and threading.current_thread() is threading.main_thread():
        # PyTorch's would raise its error wherever the main thread is when a worker dies, in the middle of an update as
        # well. It is seen without that, when the next batch is asked for.
        signal.signal(signal.SIGCHLD, handler)
    workers = [child for child in multiprocessing.active_children() if child not in before]
    # after the iterator has ended those that can hear it; or when the process ends, which would wait for the others
    if workers:
        Finalize(iterator, _kill, [workers], exitpriority=0)
    return _told_of_dead_workers(iterator)


def _kill(workers: list[multiprocessing.Process]) -> None:
    """End those that are stuck, in a read of a file server that is gone or a lock that nobody holds any more."""
    for worker in workers:
        worker.kill()


def _told_of_dead_workers(iterator: Iterator[_Loaded]) -> Iterator[_Loaded]:
    try:
        yield from iterator
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a worker of the data loader has ended ({str(error).strip()}), often for lack of memory: lower workers or "
            f"the batch if the system's log says so. The same command continues the run."
        ) from error


def _readable(
    data: PretrainData, stream: Iterator[_Loaded], ends: deque[tuple[int, int]], start: tuple[int, int]
) -> Iterator[tuple[int, int, Batch | None]]:
    """Batches with the places in ``ends``; None for empty ones, whose files' names the next one takes along.

    Each name is logged once.
    """
    pending: Skipped = ()
    named: dict[str, str] = {}  # what could not be read, and why
    # the epoch whose batches are being counted; one that was entered in the middle is not judged, nor is one of which
    # other ranks had all batches
    current, count, tried = start[0], int(start[1] > 0), False
    for loaded in stream:
        if loaded.epoch != current:
            if count == 0 and tried:
                name, reason = pending[-1] if pending else ("?", "unknown")
                raise DataError(f"nothing readable in epoch {current} of {data.describe()}; last: {name}: {reason}")
            current, count = loaded.epoch, 0
        tried = True
        new = {name: reason for name, reason in loaded.skipped if name not in named}
        for name, reason in new.items():
            logger.warning("skipped %s: %s", name, reason)
        if new:
            named |= new
            # of all the items, not of those read so far: where a run was started or continued changes nothing
            check_items(list(named.items()), len(data.names), data.max_bad_fraction)
        if loaded.batch is None:
            pending += loaded.skipped
            yield *ends.popleft(), None
            continue
        count += 1
        yield *ends.popleft(), replace(loaded.batch, skipped=pending + loaded.batch.skipped)
        pending = ()


def list_files(path: str | Path, extensions: tuple[str, ...], what: str) -> list[Path]:
    """The files under ``path`` (or ``path`` itself, a file) with one of ``extensions``, sorted by path.

    Folders are searched to any depth, through links; hidden files and folders are left out.

    Raises:
        DataError: ``path`` does not exist or holds no such file.
    """
    root = Path(path).expanduser()
    expected = f"{what} ({', '.join(extensions)})"
    if not root.exists():
        raise DataError(f"data path {root} does not exist; expected a folder with {expected}")
    if root.is_file():
        files = [root]
    else:
        files, seen = [], {os.path.realpath(root)}
        for folder, subfolders, names in os.walk(root, followlinks=True):
            files += [Path(folder, name) for name in names if name[0] != "."]
            real = {os.path.realpath(os.path.join(folder, s)): s for s in sorted(subfolders) if s[0] != "."}
            # links may lead back up, or to a folder that is there already: each is entered once
            subfolders[:] = [name for target, name in real.items() if target not in seen]
            seen.update(real)
    fitting = sorted(f for f in files if f.suffix.lower() in extensions)
    if not fitting:
        raise DataError(f"data path {root} holds no {expected}{compressed(files, extensions)}")
    return fitting


def compressed(files: Iterable[Path], extensions: Container[str]) -> str:
    """What to do with the first of ``files`` that would be read if it were unpacked, for messages; else empty."""
    for path in sorted(files):
        program, inner = UNPACK.get(path.suffix.lower()), Path(path.stem).suffix.lower()
        if path.suffix.lower() == ".tgz":
            inner = ".tar"
        if program and inner in extensions:
            return f"; {path.name} is compressed, which is not read: {program} {path.name}"
    return ""


def relative_names(root: str | Path, files: Sequence[Path]) -> list[str]:
    """The names by which files are reported: relative to ``root``, or the bare file name if ``root`` is the file."""
    root = Path(root).expanduser()
    return [f.name if f == root else f.relative_to(root).as_posix() for f in files]


def fixed_batches(rng: np.random.Generator, num_items: int, batch_size: int) -> list[tuple[int, ...]]:
    """Shuffle ``num_items`` items into batches; a smaller last one is dropped unless it is the only one."""
    order = rng.permutation(num_items).tolist()
    end = num_items - num_items % batch_size or num_items
    return [tuple(order[i : i + batch_size]) for i in range(0, end, batch_size)]


def require(condition: bool, name: str, expected: str, value: object) -> None:
    """Raise the ConfigError (a ValueError) of a configuration field or argument."""
    if not condition:
        raise ConfigError(f"{name} must be {expected}, got {value!r}")

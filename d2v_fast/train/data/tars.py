"""webdataset's shards: tars in which consecutive members with the same name up to the first dot are one sample.

Each shard is gone through once to list where its members lie; after that any of them can be read alone, so that the
order of batches is drawn over all samples, and needs neither shuffle buffers nor shards that are dealt out.
"""

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from d2v_fast.train.data.base import UnreadableFile
from d2v_fast.train.data.names import Names
from d2v_fast.train.data.sources import Source, cached, describe_files, open_regular, open_slice

KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # as webdataset's base_plus_ext
META = re.compile(r"__[^/]*__(/|$)")  # members that webdataset leaves out
FORMAT = 2  # raise when the index changes


class Tars(Source):
    """The members of tars that have one of ``extensions`` (``flac``; also ``mic.flac``), at most one a sample.

    What is in a whole tar is kept in ``cache_dir``. One that cannot be read to its end is gone through on every start:
    it may be mended, or the disk have been at fault.
    """

    def __init__(self, root: Path, shards: Sequence[Path], extensions: Sequence[str], cache_dir: str | None) -> None:
        self.shards, wanted = [str(shard) for shard in shards], sorted(extensions)
        self.key = ["tars", FORMAT, describe_files(shards), wanted]
        self.skipped, found = [], []
        for shard in shards:
            name = shard.relative_to(root).as_posix()
            key = ["tar", FORMAT, name, describe_files([shard]), wanted]
            try:
                found.append(cached(cache_dir, "tar", key, partial(_index, str(shard), name, frozenset(wanted))))
            except _ReadInPart as error:
                found.append(error.index)
                self.skipped.append((name, error.reason))
        self.names = Names.joined([Names.from_arrays(index["text"], index["ends"]) for index in found])
        numbers = np.repeat(np.arange(len(found)), [len(index["places"]) for index in found])
        # [items, 3]: shard, offset, size
        self.places = np.column_stack([numbers, np.concatenate([index["places"] for index in found])])

    def open(self, item: int) -> BinaryIO:
        """See :meth:`Source.open`."""
        shard, offset, size = self.places[item].tolist()
        return open_slice(self.shards[shard], offset, size)


class _ReadInPart(UnreadableFile):
    """A damaged tar; ``index`` has what came before the damage, which is whole."""

    def __init__(self, path: str, reason: str, index: dict[str, np.ndarray]) -> None:
        super().__init__(path, reason)
        self.index = index


def _index(shard: str, short: str, extensions: frozenset[str]) -> dict[str, np.ndarray]:
    """Names and places [items, 2] (offset, size) of the members that are wanted.

    Raises:
        _ReadInPart: the tar cannot be read, or not to its end.
    """
    names, places = [], []
    key, found, reason = None, True, None
    try:
        for member, offset, size in _members(shard):
            split = KEY.fullmatch(member)
            if split is None or META.match(member):
                continue
            if split[1] != key:
                key, found = split[1], False
            if not found and split[2].lower() in extensions:
                found = True
                names.append(f"{short}/{member}")
                places.append((offset, size))
    except UnreadableFile as error:
        reason = error.reason
    packed = Names(names)
    index = {"text": packed.text, "ends": packed.ends, "places": np.array(places, np.int64).reshape(-1, 2)}
    if reason is not None:
        raise _ReadInPart(shard, reason, index)
    return index


def _members(path: str) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of the regular files in a tar."""
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            size = os.fstat(file.fileno()).st_size
            while (member := tar.next()) is not None:
                tar.members.clear()  # they would all be kept
                if member.size < 0:  # tarfile would go back by as much
                    raise tarfile.ReadError(f"{member.name} has a size of {member.size}")
                if member.isreg() and member.offset_data + member.size <= size:
                    yield member.name, member.offset_data, member.size
            end = tar.offset
            file.seek(end)
            block = file.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, OSError) as error:
        raise UnreadableFile(path, f"not a whole, uncompressed tar: {error}") from error
    # tarfile takes a broken header, and the end of the file, for the end of the archive
    if len(block) < tarfile.BLOCKSIZE or block.strip(b"\0"):
        raise UnreadableFile(path, f"the tar is damaged or cut short at byte {end}; what follows is not read")

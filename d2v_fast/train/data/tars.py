"""webdataset's shards: tars in which consecutive members with the same name up to the first dot are one sample.

Each shard is gone through once to list where its members lie; after that any of them can be read alone, so that the
order of batches is drawn over all samples, and needs neither shuffle buffers nor shards that are dealt out.
"""

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from d2v_fast.train.data.base import UnreadableFile
from d2v_fast.train.data.names import Names
from d2v_fast.train.data.sources import Source, cached, describe_files, open_regular, open_slice

KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # as webdataset's base_plus_ext
META = re.compile(r"__[^/]*__(/|$)")  # members that webdataset leaves out
FORMAT = 1  # raise when the index changes


class Tars(Source):
    """The members of tars that have one of ``extensions`` (``flac``; also ``mic.flac``), at most one a sample."""

    def __init__(self, root: Path, shards: Sequence[Path], extensions: Sequence[str], cache_dir: str | None) -> None:
        self.shards = [str(shard) for shard in shards]
        self.key = ["tars", FORMAT, describe_files(shards), sorted(extensions)]
        short = [shard.relative_to(root).as_posix() for shard in shards]
        index = cached(cache_dir, "tars", self.key, lambda: _index(self.shards, short, frozenset(extensions)))
        self.names = Names.from_arrays(index["text"], index["ends"])
        self.places = index["places"]  # [items, 3]: shard, offset, size
        self.skipped = list(zip(index["bad"].tolist(), index["reasons"].tolist(), strict=True))

    def open(self, item: int) -> BinaryIO:
        """See :meth:`Source.open`."""
        shard, offset, size = self.places[item].tolist()
        return open_slice(self.shards[shard], offset, size)


def _index(shards: list[str], short: list[str], extensions: frozenset[str]) -> dict[str, np.ndarray]:
    names, places, bad = [], [], []
    for number, (shard, name) in enumerate(zip(shards, short, strict=True)):
        key, found = None, True
        try:
            for member, offset, size in _members(shard):
                split = KEY.fullmatch(member)
                if split is None or META.match(member):
                    continue
                if split[1] != key:
                    key, found = split[1], False
                if not found and split[2].lower() in extensions:
                    found = True
                    names.append(f"{name}/{member}")
                    places.append((number, offset, size))
        except UnreadableFile as error:  # what came before the damage is whole
            bad.append((name, error.reason))
    packed = Names(names)
    return {
        "text": packed.text,
        "ends": packed.ends,
        "places": np.array(places, np.int64).reshape(-1, 3),
        "bad": np.array([name for name, _ in bad], np.str_),
        "reasons": np.array([reason for _, reason in bad], np.str_),
    }


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

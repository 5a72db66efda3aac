"""Reading what torch.save wrote without running any of it, also where it holds objects of libraries not installed.

torch's own reader is not used: it takes whatever memory a file asks for (``weights_only`` included), and chooses among
formats by looks. Here the pickle goes through :mod:`d2v_fast.checkpoints.pickles`, and a storage is only made if the
file has the bytes for it.
"""

import mmap
import os
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2v_fast.checkpoints.pickles import MAX_BYTES, Name, Refused, Storage, Stub, read_pickle
from d2v_fast.errors import CheckpointError

# what a pre-1.6 file starts with: torch's magic number, pickled with protocol 2
LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
LEGACY_PROTOCOL = 1001
# a few kilobytes of pickle can refer to themselves into more than any memory holds
MAX_CONFIG_SIZE, MAX_CONFIG_DEPTH = 100_000, 50  # in values, or 100 letters of one


def read_torch(path: str | Path) -> Any:
    """What ``torch.save`` wrote to ``path``, on the CPU: tensors, plain values, and ``Stub`` for other objects.

    Formats: the zip of PyTorch 1.6 and later, and the one before. Nothing that the file names is imported or called.
    Memory and time are bounded by a multiple of the file's size.

    Raises:
        CheckpointError: missing, empty, truncated or damaged; another format (TorchScript, tar, compressed zips); or it
            refers to anything but tensors, plain values and configurations, which the message names.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(len(LEGACY_MAGIC))
            file.seek(0)
            if start == LEGACY_MAGIC:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    return _read_legacy(content)
            if start.startswith(b"PK\x03\x04"):
                with zipfile.ZipFile(file) as archive:
                    return _read_zip(archive, size)
    except FileNotFoundError:
        raise CheckpointError(f"no file at {path}") from None
    except Refused as error:
        raise CheckpointError(f"{path} is refused: {error}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {first_line(error)}") from None
    except Exception as error:  # whatever a damaged file makes the readers do
        raise CheckpointError(f"{path} is damaged or not a torch file: {first_line(error)}") from error
    found = "nothing" if size == 0 else "something else"
    raise CheckpointError(f"{path} must be a file that torch.save wrote, got {found} ({size} bytes)")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


class _Storages:
    """Makes the storages that a pickle refers to, each once, all of them within the bytes that the file has."""

    def __init__(self, size: int) -> None:
        self.left = size
        self.made: dict[str, Storage] = {}

    def get(self, reference: tuple, fill: Any = None) -> Storage:
        """The storage of a persistent id; ``fill(key, memory)`` is called with a new one, as a writable array."""
        kind, dtype, key, _, count = reference[:5]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(key) is not str or type(count) is not int:
            raise ValueError("a reference to something else than a storage")
        nbytes = count * dtype.itemsize
        if key not in self.made:
            self.left -= nbytes
            if nbytes < 0 or self.left < 0:
                raise ValueError(f"a storage of {nbytes} bytes, more than the file has")
            self.made[key] = Storage(torch.UntypedStorage(nbytes), dtype)
            if fill is not None:
                fill(key, self.made[key])
        storage = self.made[key]
        if storage.memory.nbytes() != nbytes:
            raise ValueError(f"a storage of {storage.memory.nbytes()} and of {nbytes} bytes")
        return Storage(storage.memory, dtype)


def _bytes_of(storage: Storage) -> np.ndarray:
    return torch.empty(0, dtype=torch.uint8).set_(storage.memory).numpy()


def _swap(storage: Storage, order: str) -> None:
    if order != sys.byteorder:
        storage.memory.byteswap(storage.dtype)


def _read_zip(archive: zipfile.ZipFile, size: int) -> Any:
    """The pickle in ``archive``, with the storages beside it. Checksums are those that ``zipfile`` compares."""
    entries = {entry.filename: entry for entry in archive.infolist()}
    claimed = sum(entry.file_size for entry in archive.infolist())
    if claimed > size:
        raise Refused(f"it claims to hold {claimed} bytes, but has {size}")
    if any(name.endswith("/constants.pkl") for name in entries):
        raise Refused("it must hold weights, got a TorchScript program")
    for name, entry in entries.items():
        if entry.compress_type != zipfile.ZIP_STORED:
            raise Refused(f"{name:.80} is compressed, which torch.save does not do")
    pickles = [name for name in entries if name.partition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise ValueError(f"{len(pickles)} entries are called data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    if entries[pickles[0]].file_size > MAX_BYTES:
        raise Refused(f"a pickle of more than {MAX_BYTES} bytes")
    order = archive.read(f"{root}byteorder") if f"{root}byteorder" in entries else b"little"
    if order not in (b"little", b"big"):
        raise ValueError("a byte order that is neither little nor big")
    storages = _Storages(size)

    def fill(key: str, storage: Storage) -> None:
        entry = entries[f"{root}data/{key}"]
        if entry.file_size != storage.memory.nbytes():
            raise ValueError(f"storage {key:.20} has {entry.file_size} bytes, not {storage.memory.nbytes()}")
        with archive.open(entry) as content:
            target, done = memoryview(_bytes_of(storage)), 0
            while count := content.readinto(target[done : done + 2**20]):
                done += count
            if done != len(target):
                raise EOFError(f"storage {key:.20} ends early")
        _swap(storage, order.decode())

    return read_pickle(archive.read(pickles[0]), lambda reference: storages.get(reference, fill))


def _read_legacy(content: mmap.mmap) -> Any:
    """Pickles one after the other, then the storages: their number of elements, and these."""
    storages = _Storages(len(content))

    def storage(reference: tuple) -> Storage:
        if len(reference) > 5 and reference[5] is not None:
            raise ValueError("a view of a storage, as written before PyTorch 1.0")
        return storages.get(reference)

    _, protocol, _ = (read_pickle(content, storage) for _ in range(3))  # magic number, version, machine
    if protocol != LEGACY_PROTOCOL:
        raise ValueError(f"protocol {protocol!r:.20} instead of {LEGACY_PROTOCOL}")
    value = read_pickle(content, storage)
    keys = read_pickle(content, storage)
    if type(keys) is not list or sorted(keys) != sorted(storages.made):
        raise ValueError("storages are missing, or too many")
    for key in keys:
        made = storages.made[key]
        count = int.from_bytes(content.read(8), "little")
        target = _bytes_of(made)
        if count * made.dtype.itemsize != len(target) or content.tell() + len(target) > len(content):
            raise EOFError(f"storage {key:.20} of {count} elements ends early, or {len(target)} bytes were announced")
        target[:] = np.frombuffer(content.read(len(target)), np.uint8)
        _swap(made, "little")
    return value


def plain(path: str | Path, value: Any) -> Any:
    """Configurations of omegaconf, argparse and dataclasses, as :func:`read_torch` left them, as nested plain values.

    Raises:
        CheckpointError: far more values than a configuration has, or nested deeper; one that contains itself, too.
    """
    try:
        return _plain(value, [MAX_CONFIG_SIZE], 0)
    except OverflowError:
        limits = f"{MAX_CONFIG_SIZE} values, nested {MAX_CONFIG_DEPTH} deep"
        raise CheckpointError(f"{path}: a configuration must have at most {limits}") from None


def _plain(value: Any, left: list[int], depth: int) -> Any:
    left[0] -= 1 + (len(value) // 100 if isinstance(value, (str, bytes)) else 0)
    if left[0] < 0 or depth > MAX_CONFIG_DEPTH:
        raise OverflowError
    if isinstance(value, Mapping):
        return {_plain(str(key), left, depth): _plain(x, left, depth + 1) for key, x in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(x, left, depth + 1) for x in value]
    if isinstance(value, Name):
        return value.name
    if not isinstance(value, Stub):
        return value
    state = value.state
    if isinstance(state, Mapping):
        for content in ("_content", "_val"):  # omegaconf's containers and values
            if content in state:
                return _plain(state[content], left, depth + 1)
        return _plain(state, left, depth + 1)  # argparse.Namespace, dataclasses
    return _plain(value.args[0], left, depth + 1) if value.args else value.name  # members of enumerations

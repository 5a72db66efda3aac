"""Reading what torch.save wrote without running any of it, also where it holds objects of libraries not installed.

First ``torch.load(weights_only=True)``. Files that also hold a configuration (fairseq, BEiT) refer to classes that it
refuses; these are read by an unpickler of our own, which imports nothing: a name stands for a constructor of plain data
listed here, or for a stub that only keeps what it is given, or the file is refused.
"""

import collections
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from d2v_fast.errors import CheckpointError

# what a pre-1.6 file starts with: torch's magic number, pickled with protocol 2
LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
MAX_CONFIG_NODES = 100_000  # a few kilobytes of pickle can refer to themselves into more than any memory holds
# libraries whose objects are kept as stubs: configurations, and the counters that trainers save with them
STUBBED = ("argparse", "omegaconf", "fairseq", "hydra", "typing", "enum", "pathlib", "examples.data2vec")
# types that configurations name for their values
STUBBED_BUILTINS = {"bool", "int", "long", "float", "str", "unicode", "bytes", "dict", "list", "tuple", "object"}


class Stub:
    """An object of a class that is not imported: the arguments and the state it was pickled with."""

    name = ""  # of the class, as in the file
    args: tuple = ()
    state: Any = None

    def __new__(cls, *args: Any, **_: Any) -> "Stub":
        self = object.__new__(cls)
        self.args = args
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Refused(pickle.UnpicklingError):
    """A name that the file wants to use and may not."""


class _Call:
    """A function of ours for one use by a pickle, which could set attributes of the function itself."""

    __slots__ = ("function",)

    def __init__(self, function: Callable) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def _tensor(storage: Any, offset: int, size: tuple, stride: tuple, *_: Any) -> torch.Tensor:
    """``torch._utils._rebuild_tensor_v2`` for a view that lies within its storage; gradients and hooks are left out."""
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
        raise pickle.UnpicklingError(f"a tensor of size {size}, strides {stride}, offset {offset}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else -1
    held = storage._untyped_storage.nbytes() // storage.dtype.itemsize
    if last >= held:
        raise pickle.UnpicklingError(f"a tensor of size {size} at {offset} in a storage of {held} elements")
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, None)


def _parameter(data: torch.Tensor, *_: Any) -> torch.Tensor:
    return data


def _encode(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes."""
    if type(text) is not str or encoding != "latin1":
        raise _Refused("_codecs.encode of something else than bytes")
    return text.encode("latin1")


class _Dtype:
    """A NumPy dtype of plain numbers."""

    def __init__(self, code: str, *_: Any) -> None:
        if type(code) is not str or not re.fullmatch(r"[<>|=]?[biuf][1248]", code):
            raise _Refused(f"numpy.dtype {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        """The byte order, which numbers from a little-endian machine share."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


def _scalar(dtype: _Dtype, data: bytes) -> float | int | bool:
    return np.frombuffer(data, dtype.dtype, count=1)[0].item()


def _reconstructor(cls: type, *_: Any) -> Stub:
    """How protocols 0 and 1 make objects."""
    if not (isinstance(cls, type) and issubclass(cls, Stub)):
        raise _Refused("copyreg._reconstructor of a class that is not stubbed")
    return cls()


ALLOWED: dict[str, Callable] = {
    "collections.OrderedDict": collections.OrderedDict,
    "collections.defaultdict": lambda *_: {},
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": tuple,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstructor,
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}
PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class _Unpickler(pickle.Unpickler):
    """torch adds the persistent ids (storages) and the storage types to it."""

    def find_class(self, module: str, name: str) -> Any:
        module = PYTHON_2.get(module, module)
        path = f"{module}.{name}"
        if path in ALLOWED:
            return _Call(ALLOWED[path])
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        stubbed = any(module == library or module.startswith(f"{library}.") for library in STUBBED)
        if stubbed or (module == "builtins" and name in STUBBED_BUILTINS):
            return type("Stub", (Stub,), {"name": path})
        raise _Refused(f"it wants to use {path}, which is not on the list of harmless names")


def _load(file: Any, **_: Any) -> Any:
    return _Unpickler(file).load()


_PICKLE = SimpleNamespace(__name__="d2v_fast.checkpoints.safe_load", Unpickler=_Unpickler, load=_load)


def read_torch(path: str | Path) -> Any:
    """What ``torch.save`` wrote to ``path``, on the CPU: tensors, plain values, and :class:`Stub` for other objects.

    Formats: the zip of PyTorch 1.6 and later, and the one before. Nothing that the file names is imported or called.

    Raises:
        CheckpointError: missing, empty, truncated or damaged; another format (TorchScript, tar); or it refers to
            anything but tensors, plain values and configurations, which the message names.
    """
    path = Path(path)
    _check_file(path)
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # classes that torch does not know, harmless or not
            return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_PICKLE)
    except _Refused as error:
        raise CheckpointError(f"{path} is refused: {error}") from None
    except Exception as error:  # whatever a damaged file makes the readers do
        raise CheckpointError(f"{path} is damaged or not a torch file: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def _check_file(path: Path) -> None:
    """Refuse what is not a torch file, and zips that claim more than they hold, before torch looks at them."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            start = file.read(len(LEGACY_MAGIC))
    except FileNotFoundError:
        raise CheckpointError(f"no file at {path}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if start == LEGACY_MAGIC:
        return
    if not start.startswith(b"PK\x03\x04"):
        found = "nothing" if size == 0 else "something else"
        raise CheckpointError(f"{path} must be a file that torch.save wrote, got {found} ({size} bytes)")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            claimed = sum(entry.file_size for entry in entries)
            if claimed > size:
                raise CheckpointError(f"{path} claims to hold {claimed} bytes, but has {size}")
            if any(entry.filename.endswith("/constants.pkl") for entry in entries):
                raise CheckpointError(f"{path} must hold weights, got a TorchScript program")
            broken = archive.testzip()  # torch does not look at the checksums
    except (zipfile.BadZipFile, NotImplementedError, OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path} is damaged or truncated: {first_line(error)}") from error
    if broken is not None:
        raise CheckpointError(f"{path} is damaged: wrong checksum of {broken}")


def plain(path: str | Path, value: Any) -> Any:
    """Configurations of omegaconf, argparse and dataclasses, as :func:`read_torch` left them, as nested plain values.

    Raises:
        CheckpointError: far more values than a configuration has, or one that contains itself.
    """
    try:
        return _plain(value, [MAX_CONFIG_NODES])
    except OverflowError:
        raise CheckpointError(f"{path}: a configuration must have at most {MAX_CONFIG_NODES} values") from None
    except RecursionError:
        raise CheckpointError(f"{path}: a configuration must not contain itself") from None


def _plain(value: Any, left: list[int]) -> Any:
    left[0] -= 1
    if left[0] < 0:
        raise OverflowError
    if isinstance(value, Mapping):
        return {str(key): _plain(x, left) for key, x in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(x, left) for x in value]
    if not isinstance(value, Stub):
        return value
    state = value.state
    if isinstance(state, Mapping):
        for content in ("_content", "_val"):  # omegaconf's containers and values
            if content in state:
                return _plain(state[content], left)
        return {str(key): _plain(x, left) for key, x in state.items()}  # argparse.Namespace, dataclasses
    return _plain(value.args[0], left) if value.args else value.name  # members of enumerations, and types

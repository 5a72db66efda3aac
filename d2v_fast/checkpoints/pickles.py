"""A machine for pickles that can only make plain data, tensors, and stand-ins for the objects of other libraries.

The standard library reads the opcodes (``pickletools``), the machine follows them: nothing is imported, and nothing is
called but the constructors listed here. Every opcode makes at most one small object, or one as large as its own bytes,
and what the constructors are given is counted, so that neither memory nor time can exceed a multiple of the pickle's
size.
"""

import collections
import pickle
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch

MAX_BYTES = 2**24  # of a pickle; the published models' have 100 kilobytes, with their optimizer's state
MAX_BITS = 256  # of an integer; torch's and NumPy's have 64, states of random generators 128
KEY_BITS = 60  # of an integer as a key: larger ones can be made to collide
# libraries whose objects are kept as stubs: configurations, the counters that trainers save with them, other tensors
STUBBED = ("argparse", "omegaconf", "fairseq", "hydra", "typing", "enum", "pathlib", "examples.data2vec")
STUBBED += ("torch._utils", "torch.device", "torch.serialization._get_layout")
# types that configurations name for their values
STUBBED_BUILTINS = {"bool", "int", "long", "float", "str", "unicode", "bytes", "dict", "list", "tuple", "object"}
PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
DTYPES = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}
STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "Untyped": torch.uint8,
}


class Refused(pickle.UnpicklingError):
    """Something that the file wants and may not have."""


class Name:
    """A class of a library that is not imported."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Stub:
    """An object of such a class: the arguments and the state it was pickled with."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple = ()) -> None:
        self.name, self.args, self.state = name, args, None


@dataclass(frozen=True, slots=True)
class Storage:
    """The numbers that tensors are views of."""

    memory: torch.UntypedStorage
    dtype: torch.dtype


def _tensor(storage: Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> torch.Tensor:
    """``torch._utils._rebuild_tensor_v2`` for a view within its storage and not larger than it; hooks are left out."""
    if type(storage) is not Storage or not type(size) is type(stride) is tuple or len(size) != len(stride):
        raise pickle.UnpicklingError("a tensor that is no view of a storage")
    if any(type(n) is not int or not 0 <= n < 2**63 for n in (offset, *size, *stride)):
        raise pickle.UnpicklingError(f"a tensor of size {size}, strides {stride}, offset {offset}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    held, numel = storage.memory.nbytes() // storage.dtype.itemsize, 1
    for n in size:
        numel = min(numel * n, 2**63)  # of many sizes, the product would become as long as they are together
    if 0 not in size and (last >= held or numel > held):
        raise pickle.UnpicklingError(f"a tensor of size {size} at {offset} in a storage of {held} elements")
    return torch.empty(0, dtype=storage.dtype).set_(storage.memory, offset, size, stride)


def _parameter(data: torch.Tensor, *_: Any) -> torch.Tensor:
    return data


def _encode(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes."""
    if type(text) is not str or encoding != "latin1":
        raise Refused("_codecs.encode of something else than bytes")
    return text.encode("latin1")


class _Dtype:
    """A NumPy dtype of plain numbers."""

    def __init__(self, code: str, *_: Any) -> None:
        if type(code) is not str or not re.fullmatch(r"[<>|=]?[biuf][1248]", code):
            raise Refused(f"numpy.dtype {code!r:.40}")
        self.dtype = np.dtype(code)

    def order(self, state: Any) -> None:
        """The byte order, which numbers from a little-endian machine share."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


def _scalar(dtype: _Dtype, data: bytes) -> float | int | bool:
    return np.frombuffer(data, dtype.dtype, count=1)[0].item()


def _size(numbers: tuple) -> tuple:
    if not all(type(n) is int for n in numbers):
        raise Refused("torch.Size of something else than integers")
    return tuple(numbers)


def _reconstructor(cls: Name, *_: Any) -> Stub:
    """How protocols 0 and 1 make objects."""
    if type(cls) is not Name:
        raise Refused("copyreg._reconstructor of a class that is not stubbed")
    return Stub(cls.name)


def _key(key: Any) -> Any:
    """``key`` if it is quick to hash; a few nested tuples can take for ever, or the interpreter's whole stack."""
    plain = key is None or type(key) in (str, bytes, float, bool, Stub, Name)
    if not plain and not (type(key) is int and abs(key) < 2**KEY_BITS):
        raise Refused(f"a key of type {type(key).__name__}, only plain values can be keys")
    return key


def _set(values: Any = ()) -> set:
    return {_key(value) for value in values}


def _ordered(items: Any = ()) -> collections.OrderedDict:
    return collections.OrderedDict((_key(key), value) for key, value in items)


ALLOWED: dict[str, Callable] = {
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": lambda *_: {},
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstructor,
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}


@dataclass(frozen=True, slots=True)
class _Function:
    """One of ``ALLOWED``, which is no value that a file could hold otherwise."""

    call: Callable


def find(module: str, name: str) -> Any:
    """What stands for a global name.

    Raises:
        Refused: it is on none of the lists.
    """
    module = PYTHON_2.get(module, module)
    path = f"{module}.{name}"
    if path in ALLOWED:
        return _Function(ALLOWED[path])
    if module == "torch" and name in DTYPES:
        return DTYPES[name]
    if module in ("torch", "torch.cuda", "torch.storage") and name.removesuffix("Storage") in STORAGES:
        return STORAGES[name.removesuffix("Storage")]
    if any(path.startswith(f"{known}.") or path == known for known in STUBBED):
        return Name(path)
    if module == "builtins" and name in STUBBED_BUILTINS:
        return Name(path)
    raise Refused(f"it wants to use {path:.200}, which is not on the list of harmless names")


VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
VALUES |= {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
VALUES |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
MAKERS: dict[str, Callable] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """Stack and memo; ``step`` follows one opcode."""

    def __init__(self, storage: Callable[[tuple], Storage]) -> None:
        self.storage = storage
        self.budget = 0  # of values that calls may be given
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        """Raises UnpicklingError, or what a damaged pickle makes of it (IndexError, KeyError, TypeError, ...)."""
        if opcode in VALUES:
            if type(argument) is int and argument.bit_length() > MAX_BITS:
                raise Refused(f"an integer of {argument.bit_length()} bits")
            self.stack.append(argument)
        elif opcode in MAKERS:
            self.stack.append(MAKERS[opcode]())
        elif opcode in TUPLES:
            self.stack.append(tuple(self._last(TUPLES[opcode])))
        elif opcode in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if opcode == "MEMOIZE" else argument] = self.stack[-1]
        elif opcode in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif opcode in ACTIONS:
            ACTIONS[opcode](self, argument)
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            raise Refused(f"the opcode {opcode}")

    def _last(self, count: int) -> list[Any]:
        start = len(self.stack) - count
        if start < 0:
            raise IndexError("an empty stack")
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def since_mark(self) -> list[Any]:
        """What was pushed since the last mark, taken off the stack."""
        return self._last(len(self.stack) - self.marks.pop())

    def pop(self, _: Any) -> None:
        """The value on top, or the mark if there is none above it."""
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def extend(self, values: list[Any]) -> None:
        """APPEND, APPENDS."""
        if type(self.stack[-1]) is not list:
            raise TypeError("values appended to something else than a list")
        self.stack[-1].extend(values)

    def set_items(self, values: list[Any]) -> None:
        """SETITEM, SETITEMS."""
        if not isinstance(self.stack[-1], dict) or len(values) % 2:
            raise TypeError("items set in something else than a dictionary")
        self.stack[-1].update(_items(values))

    def add(self, values: list[Any]) -> None:
        """ADDITEMS."""
        if type(self.stack[-1]) is not set:
            raise TypeError("values added to something else than a set")
        self.stack[-1].update(_set(values))

    def call(self, arguments: int) -> None:
        """REDUCE, NEWOBJ, NEWOBJ_EX: the class or function, its ``arguments`` - 1 groups of arguments."""
        target, args, *_ = self._last(arguments)
        if type(args) is not tuple:
            raise TypeError("arguments that are no tuple")
        if type(target) is Name:
            self.stack.append(Stub(target.name, args))
        elif type(target) is _Function:
            # a pickle can refer to one large value as often as it likes, and each of these calls may copy it
            self.budget -= sum(len(x) for x in args if isinstance(x, (str, bytes, tuple, list, dict, set)))
            if self.budget < 0:
                raise Refused("it makes more of its values than it holds")
            self.stack.append(target.call(*args))
        else:
            raise TypeError(f"a call of a {type(target).__name__}")

    def build(self, _: Any) -> None:
        """The state of a stub; attributes of dictionaries are left out."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Stub:
            target.state = state
        elif type(target) is _Dtype:
            target.order(state)
        elif not isinstance(target, dict):
            raise TypeError(f"the state of a {type(target).__name__}")

    def named(self, pair: str | None) -> None:
        """GLOBAL with "module name", or STACK_GLOBAL."""
        module, name = self._last(2) if pair is None else pair.split(" ", 1)
        if not type(module) is type(name) is str:
            raise TypeError("a name that is no text")
        self.stack.append(find(module, name))


def _items(values: list[Any]) -> dict:
    return {_key(key): value for key, value in zip(values[::2], values[1::2], strict=True)}


ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": _Machine.pop,
    "POP_MARK": lambda m, _: m.since_mark().clear(),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.since_mark())),
    "LIST": lambda m, _: m.stack.append(m.since_mark()),
    "DICT": lambda m, _: m.stack.append(_items(m.since_mark())),
    "FROZENSET": lambda m, _: m.stack.append(_set(m.since_mark())),
    "APPEND": lambda m, _: m.extend(m._last(1)),
    "APPENDS": lambda m, _: m.extend(m.since_mark()),
    "SETITEM": lambda m, _: m.set_items(m._last(2)),
    "SETITEMS": lambda m, _: m.set_items(m.since_mark()),
    "ADDITEMS": lambda m, _: m.add(m.since_mark()),
    "GLOBAL": _Machine.named,
    "STACK_GLOBAL": _Machine.named,
    "REDUCE": lambda m, _: m.call(2),
    "NEWOBJ": lambda m, _: m.call(2),
    "NEWOBJ_EX": lambda m, _: m.call(3),
    "BUILD": _Machine.build,
    "BINPERSID": lambda m, _: m.stack.append(m.storage(m.stack.pop())),
}


def read_pickle(file: Any, storage: Callable[[tuple], Storage]) -> Any:
    """The value of the pickle that begins where ``file`` stands; afterwards it stands behind it.

    Args:
        file: bytes, or an object with ``read``, ``readline`` and ``tell`` that gives no more than it has.
        storage: what stands for a persistent id.

    Raises:
        Refused: a name that is on no list, or a pickle that is larger, or makes more of it, than any checkpoint's.
        Exception: of many kinds, for a damaged pickle.
    """
    file = BytesIO(file) if isinstance(file, bytes) else file
    start = file.tell()
    machine = _Machine(storage)
    seen = start
    for opcode, argument, position in pickletools.genops(file):
        if position - start > MAX_BYTES:
            raise Refused(f"a pickle of more than {MAX_BYTES} bytes")
        machine.budget += 8 * (position + 1 - seen)
        seen = position + 1
        machine.step(opcode.name, argument)
    (value,) = machine.stack
    return value

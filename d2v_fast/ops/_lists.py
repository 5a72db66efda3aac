"""Shared by the ops on lists of tensors: the checks of their arguments."""

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from d2v_fast.ops._dispatch import KERNEL_DTYPES, check_device, check_float


def define_in_place(name: str, schema: str) -> None:
    """Register the op ``d2v_fast::name``, which writes its arguments and returns nothing; kernels are added after.

    ``torch.library.custom_op`` would look at every tensor several times on the way: 1.3 ms for 200 parameters.
    """
    torch.library.define(f"d2v_fast::{name}", schema)
    torch.library.register_fake(f"d2v_fast::{name}", lambda *args: None)


def tensor_list(name: str, tensors: Iterable[Tensor], optional: bool = False) -> list[Tensor]:
    """``tensors`` as a list; TypeError where something else than a tensor (or None, if ``optional``) is found."""
    if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable):
        raise TypeError(f"{name} must be a list of tensors, got {type(tensors).__name__}")
    found = list(tensors)
    for i, x in enumerate(found):
        if not isinstance(x, Tensor) and not (optional and x is None):
            raise TypeError(f"{name}[{i}] must be a tensor, got {type(x).__name__}")
    return found


def number(name: str, x: Any, below: float = math.inf, include: bool = False) -> float:
    """``x`` as a float in [0, below), or [0, below] if ``include``; NumPy's scalars are numbers as well.

    Raises:
        TypeError: ``x`` is not a real number.
        ValueError: ``x`` is out of range.
    """
    if not isinstance(x, (float, int, Real)):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    if not (0 <= x < below or (include and x == below)):
        expected = "be a number >= 0" if below == math.inf else f"lie in [0, {below:g}{']' if include else ')'}"
        raise ValueError(f"{name} must {expected}, got {x}")
    return float(x)


def number_or_tensor(name: str, x: Any, below: float = math.inf, include: bool = False) -> float | Tensor:
    """Like :func:`number`, but a tensor, whose value is known on the device alone, passes unseen."""
    return x if isinstance(x, Tensor) else number(name, x, below, include)


def layout(x: Tensor) -> tuple[int, ...]:
    """() for a contiguous tensor, otherwise its strides; the same for two tensors of one shape means the same order.

    Dimensions of one element do not count.
    """
    if x.is_contiguous():
        return ()
    return tuple(stride for size, stride in zip(x.shape, x.stride(), strict=True) if size != 1)


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill the memory from the first to the last, in any order of the dimensions."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def check_lists(masters: dict[str, list[Tensor]], others: dict[str, list[Tensor]]) -> None:
    """Raise unless all lists hold tensors of the same shapes on one device, ``masters`` in float32.

    Tensors must be dense, and their dimensions in the same order in all lists: contiguous, or all channels_last.

    ``masters`` and ``others`` map names of arguments to lists of one length; ``others`` may be in any float dtype, and
    empty lists in it are skipped. Comparing whole lists first costs a fifth of looking at every tensor.
    """
    (name, first), *_ = masters.items()
    if _alike(list(masters.values()), [x for x in others.values() if x]):
        return
    for other_name, tensors in masters.items():
        _check_masters(other_name, tensors, first)
    for other_name, tensors in [*masters.items(), *others.items()]:
        _check_like(other_name, tensors, name, first)


def _alike(masters: list[list[Tensor]], others: list[list[Tensor]]) -> bool:
    everything = [x for tensors in (*masters, *others) for x in tensors]
    shapes = [x.shape for x in masters[0]]
    return (
        {x.dtype for tensors in masters for x in tensors} == {torch.float32}
        and {x.dtype for tensors in others for x in tensors}.issubset(KERNEL_DTYPES)
        and len({x.device for x in everything}) == 1
        and all([x.shape for x in tensors] == shapes for tensors in (*masters[1:], *others))
        and (all(map(Tensor.is_contiguous, everything)) or _same_order(masters[0], [*masters[1:], *others]))
    )


def _same_order(first: list[Tensor], rest: list[list[Tensor]]) -> bool:
    layouts = [layout(x) for x in first]
    return all(map(is_dense, first)) and all([layout(x) for x in tensors] == layouts for tensors in rest)


def _check_masters(name: str, tensors: list[Tensor], first: list[Tensor]) -> None:
    for i, x in enumerate(tensors):
        if not x.is_floating_point():
            raise TypeError(f"{name}[{i}] must be floating point, got {x.dtype}: copy such tensors instead")
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}[{i}] must be a float32 master, got {x.dtype}: pass it as a copy instead")
        check_float(f"{name}[{i}]", x)
        check_device(f"{name}[{i}]", x, first[0].device)
        if x.dtype != first[0].dtype:
            raise TypeError(f"{name}[{i}] must be {first[0].dtype} like the first, got {x.dtype}")


def _check_like(name: str, tensors: list[Tensor], first_name: str, first: list[Tensor]) -> None:
    for i, x in enumerate(tensors):
        want = first[i]
        check_float(f"{name}[{i}]", x)
        check_device(f"{name}[{i}]", x, want.device)
        if x.shape != want.shape:
            raise ValueError(f"{name}[{i}] must have shape {tuple(want.shape)} like {first_name}, got {tuple(x.shape)}")
        if not is_dense(x):
            raise ValueError(f"{name}[{i}] must be dense, got shape {tuple(x.shape)} strides {x.stride()}")
        if layout(x) != layout(want):
            raise ValueError(f"{name}[{i}] must have strides {want.stride()} like {first_name}, got {x.stride()}")


def check_length(name: str, found: int, length: int, like: str) -> None:
    """Raise ValueError unless the list ``name`` holds ``length`` tensors."""
    if found != length:
        raise ValueError(f"{name} must hold {length} tensors like {like}, got {found}")


def check_no_overlap(written: Sequence[Tensor], read: Sequence[Tensor], names: str) -> None:
    """Raise ValueError when a tensor of ``written`` overlaps any other tensor. Tensors that are read may be tied."""
    spans = [(tuple(map(Tensor.data_ptr, xs)), tuple(x.nbytes for x in xs)) for xs in (written, read)]
    if not _disjoint(*spans):
        raise ValueError(f"{names} must not share memory with each other or with other arguments, but some do")


_Spans = tuple[tuple[int, ...], tuple[int, ...]]  # addresses, sizes in bytes


@lru_cache(maxsize=16)
def _disjoint(written: _Spans, read: _Spans) -> bool:
    starts, ends, disjoint = _sorted(written)
    for address, nbytes in zip(*read, strict=True):
        before = bisect_left(starts, address + nbytes) - 1  # the last one that starts before the end of this one
        disjoint = disjoint and (before < 0 or ends[before] <= address or nbytes == 0)
    return disjoint


@lru_cache(maxsize=16)
def _sorted(spans: _Spans) -> tuple[list[int], list[int], bool]:
    """Starts and ends of the spans that are not empty, by address, and whether they are disjoint."""
    found = sorted((start, start + size) for start, size in zip(*spans, strict=True) if size > 0)
    disjoint = all(end <= start for (_, end), (start, _) in pairwise(found))
    return [start for start, _ in found], [end for _, end in found], disjoint


def is_plain(x: Tensor) -> bool:
    """Whether ``x`` is a tensor of its own and not a DTensor."""
    return type(x) in (Tensor, torch.nn.Parameter) or not hasattr(x, "to_local")


def local_shard(x: Tensor) -> Tensor:
    """The part of a DTensor that this process holds, to be written without gradients; other tensors as they are."""
    return x if is_plain(x) else x.to_local()

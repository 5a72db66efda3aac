"""Many tensors in one launch: a table on the device lists them, and a program finds its piece by its number.

The table holds one column per tensor: the number of its first program, its element count, then what the kernel needs
(addresses, a weight decay). It grows with the number of tensors, not with their size, so that a new gradient address
costs a small table; looking for the column costs a program one vector load from the L2 cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2v_fast.kernels import launch


@dataclass(frozen=True)
class LaunchConfig:
    """``chunk`` elements per program, ``block`` at a time; chunk is a multiple of block."""

    chunk: int
    block: int
    num_warps: int


# An H100 keeps 132 x 16 programs of four warps in flight. Chunks of 16 Ki elements make 5 700 programs of the smallest
# published model (94 M parameters), so that the last ones to finish hold up a small part of the memory system; with
# 64 Ki all would start at once, 10 on some SMs and 11 on others.
GPU_CONFIG = LaunchConfig(chunk=16384, block=1024, num_warps=4)
INTERPRETER_CONFIG = LaunchConfig(chunk=65536, block=16384, num_warps=4)

MAX_TENSORS = 1024  # per launch: every program reads their first program numbers at once
# Kernel arguments may take 4096 bytes, 8 each. The kernel compiles in a second; a multiple of 16 keeps it one kernel.
_VALUES_PER_LAUNCH, _VALUES_BLOCK = 480, 512
_ODD_LARGE = 2**62 + 1


@dataclass(frozen=True)
class Table:
    """``data`` [rows, tensors] int64 for ``programs`` programs that look through ``lanes`` columns."""

    data: Tensor
    programs: int
    lanes: int

    @property
    def tensors(self) -> int:
        """Number of columns."""
        return self.data.shape[1]


def config_for(x: Tensor) -> LaunchConfig:
    """Chunks for tensors on the device of ``x``."""
    return INTERPRETER_CONFIG if launch.interpreted(x) else GPU_CONFIG


@triton.jit
def locate(table_ptr, num_tensors, CHUNK: tl.constexpr, LANES: tl.constexpr):
    """The piece of this program: column of the table, first element (int64), element count (int32)."""
    program = tl.program_id(0)
    lanes = tl.arange(0, LANES)
    first = tl.load(table_ptr + lanes, mask=lanes < num_tensors, other=0x7FFFFFFFFFFFFFFF)
    column = tl.sum((first <= program).to(tl.int32), axis=0) - 1
    start = (program - tl.load(table_ptr + column)) * CHUNK  # int64, as the table is
    left = tl.load(table_ptr + num_tensors + column) - start
    return column, start, tl.minimum(left, CHUNK).to(tl.int32)


@triton.jit
def pointer(table_ptr, row, column, num_tensors, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in ``row`` of the table, moved to element ``start``."""
    ptr = tl.load(table_ptr + row * num_tensors + column).to(tl.pointer_type(DTYPE)) + start
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def load(ptr, offsets, live, MASKED: tl.constexpr):
    """Elements as float32. Full blocks go without a mask: one made of a loaded size turns vector accesses scalar."""
    x = tl.load(ptr + offsets, mask=live) if MASKED else tl.load(ptr + offsets)
    return x.to(tl.float32)


@triton.jit
def store(ptr, offsets, x, live, MASKED: tl.constexpr):
    """Write ``x`` in the dtype of the pointer."""
    x = x.to(ptr.dtype.element_ty)
    if MASKED:
        tl.store(ptr + offsets, x, mask=live)
    else:
        tl.store(ptr + offsets, x)


def build_table(sizes: Sequence[int], rows: Sequence[Sequence[int]], chunk: int, device: torch.device) -> Table:
    """The table of tensors with ``sizes`` elements (none of them 0) and more ``rows`` of one value per tensor."""
    ends = list(accumulate(-(-size // chunk) for size in sizes))
    values = [0, *ends[:-1], *sizes]
    for row in rows:
        values.extend(row)
    data = int_tensor(values, device).view(-1, len(sizes))
    return Table(data, ends[-1], max(triton.next_power_of_2(len(sizes)), 32))


@triton.jit
def _write_kernel(
    out_ptr,  # [>= first + len(values)] int64
    values,  # tuple of int64, twice the value plus _ODD_LARGE
    first,
    BLOCK: tl.constexpr,  # power of two >= len(values)
):
    for i in tl.static_range(len(values)):
        tl.store(out_ptr + first + i, values[i])
    tl.debug_barrier()  # then all threads together undo the coding: one by one takes three times the instructions
    lanes = tl.arange(0, BLOCK)
    inside = lanes < len(values)
    coded = tl.load(out_ptr + first + lanes, mask=inside, other=0)
    tl.store(out_ptr + first + lanes, (coded - 4611686018427387905) >> 1, mask=inside)


def int_tensor(values: Sequence[int], device: torch.device) -> Tensor:
    """``values`` [n] int64 on ``device``; on a GPU a kernel that has them as arguments writes them.

    A copy would need pinned memory, which a captured CUDA graph would read again at every replay. Odd numbers above
    2^62 are always of the same type for Triton, so that there is one kernel and not one per pattern of values.
    """
    if device.type == "cpu":
        return torch.tensor(values)
    launches = -(-len(values) // _VALUES_PER_LAUNCH)
    out = torch.empty(launches * _VALUES_PER_LAUNCH, dtype=torch.int64, device=device)
    coded = [2 * value + _ODD_LARGE for value in values]
    coded += [_ODD_LARGE] * (out.numel() - len(coded))
    with torch.cuda.device(device):
        for first in range(0, out.numel(), _VALUES_PER_LAUNCH):
            some = tuple(coded[first : first + _VALUES_PER_LAUNCH])
            _write_kernel[(1,)](out, some, first, BLOCK=_VALUES_BLOCK, num_warps=1)
    return out[: len(values)]


def current_stream(device: torch.device) -> int | None:
    """A key for what was written on the current stream; None while a CUDA graph is captured.

    A graph must not read a table that it does not write itself: nothing would keep that table alive.
    """
    if device.type == "cpu":
        return 0
    with torch.cuda.device(device):
        return None if torch.cuda.is_current_stream_capturing() else torch.cuda.current_stream().cuda_stream

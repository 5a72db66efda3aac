"""What every launcher needs: the device guard, tables of addresses, and how tiles differ under the interpreter."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

ALIGNMENT = 16  # bytes of one vector load
_POINTERS_PER_LAUNCH = 32


def interpreted(x: Tensor) -> bool:
    """CPU tensors only ever reach a launcher under TRITON_INTERPRET=1, where few, large programs are fast."""
    return x.device.type == "cpu"


def device_guard(x: Tensor) -> AbstractContextManager:
    """Make the device of ``x`` current: Triton launches on the current device, wherever its arguments live."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether every tensor starts on a vector boundary."""
    return all(x.data_ptr() % ALIGNMENT == 0 for x in tensors)


@triton.jit
def _pointer_table_kernel(
    table_ptr,  # [>= first + len(tensors)] int64
    tensors,  # tuple of pointers
    first,
):
    for i in tl.static_range(len(tensors)):
        tl.store(table_ptr + first + i, tensors[i].to(tl.int64))


def pointer_table(tensors: Sequence[Tensor]) -> Tensor:
    """The addresses of ``tensors`` as an int64 tensor on their device.

    A kernel writes it: a copy from the host would have to be staged in pinned memory, and a captured CUDA graph would
    read that memory again at every replay.
    """
    table = torch.empty(len(tensors), dtype=torch.int64, device=tensors[0].device)
    for first in range(0, len(tensors), _POINTERS_PER_LAUNCH):
        _pointer_table_kernel[(1,)](table, tuple(tensors[first : first + _POINTERS_PER_LAUNCH]), first, num_warps=1)
    return table

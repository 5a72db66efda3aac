"""Triton kernel of the teacher update: every tensor of the model in one launch, the low-precision copy included.

A table on the device lists chunks: the addresses of a piece of teacher, student and copy, and its element count.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

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


GPU_CONFIG = LaunchConfig(chunk=16384, block=1024, num_warps=4)
INTERPRETER_CONFIG = LaunchConfig(chunk=65536, block=16384, num_warps=4)


@triton.jit
def _lerp(e_ptr, p_ptr, copy_ptr, offsets, live, weight, MASKED: tl.constexpr, HAS_COPY: tl.constexpr):
    # Full blocks go without a mask: one that depends on a loaded size turns vector accesses into scalar ones.
    if MASKED:
        e = tl.load(e_ptr + offsets, mask=live)
        p = tl.load(p_ptr + offsets, mask=live).to(tl.float32)
    else:
        e = tl.load(e_ptr + offsets)
        p = tl.load(p_ptr + offsets).to(tl.float32)
    d = p - e
    e = tl.where(weight < 0.5, e + weight * d, p - d * (1.0 - weight))  # exact at both ends, like torch.lerp
    if MASKED:
        tl.store(e_ptr + offsets, e, mask=live)
    else:
        tl.store(e_ptr + offsets, e)
    if HAS_COPY:
        low = e.to(copy_ptr.dtype.element_ty)
        if MASKED:
            tl.store(copy_ptr + offsets, low, mask=live)
        else:
            tl.store(copy_ptr + offsets, low)


@triton.jit(do_not_specialize=["num_chunks"])
def _ema_update_kernel(
    table_ptr,  # [4, num_chunks] int64: addresses of teacher, student and copy, element count
    decay_ptr,  # [] fp32 or fp64
    num_chunks,
    STUDENT_DTYPE: tl.constexpr,
    COPY_DTYPE: tl.constexpr,
    HAS_COPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = table_ptr + tl.program_id(0)
    e_ptr = tl.load(row).to(tl.pointer_type(tl.float32))
    p_ptr = tl.load(row + num_chunks).to(tl.pointer_type(STUDENT_DTYPE))
    copy_ptr = tl.load(row + 2 * num_chunks).to(tl.pointer_type(COPY_DTYPE))
    size = tl.load(row + 3 * num_chunks).to(tl.int32)
    if ALIGNED:
        e_ptr = tl.multiple_of(e_ptr, 16)
        p_ptr = tl.multiple_of(p_ptr, 16)
        copy_ptr = tl.multiple_of(copy_ptr, 16)
    weight = (1.0 - tl.load(decay_ptr)).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    num_full = size // BLOCK
    for i in range(0, num_full):
        _lerp(e_ptr, p_ptr, copy_ptr, i * BLOCK + lanes, lanes < BLOCK, weight, False, HAS_COPY)
    tail = num_full * BLOCK + lanes
    if num_full * BLOCK < size:
        _lerp(e_ptr, p_ptr, copy_ptr, tail, tail < size, weight, True, HAS_COPY)


def ema_update_(
    teacher: Sequence[Tensor],  # fp32, contiguous
    student: Sequence[Tensor],  # fp32, bf16 or fp16, contiguous
    decay: Tensor,  # [] fp32 or fp64
    copies: Sequence[Tensor],  # like student, or empty
    config: LaunchConfig | None = None,
) -> None:
    """Update ``teacher`` in place and write ``copies``: one launch per combination of dtypes and alignment."""
    config = config or (INTERPRETER_CONFIG if launch.interpreted(teacher[0]) else GPU_CONFIG)
    groups = defaultdict(list)
    for i, (e, p) in enumerate(zip(teacher, student, strict=True)):
        copy = copies[i] if copies else None
        tensors = (e, p) if copy is None else (e, p, copy)
        if e.numel() > 0:
            spans = (e.data_ptr(), p.data_ptr(), 0 if copy is None else copy.data_ptr(), e.numel())
            groups[p.dtype, None if copy is None else copy.dtype, launch.aligned(tensors)].append(spans)
    for (student_dtype, copy_dtype, aligned), spans in groups.items():
        steps = (4, student_dtype.itemsize, 0 if copy_dtype is None else copy_dtype.itemsize)
        table, _ = _chunk_table(tuple(spans), steps, config.chunk, decay.device)
        with launch.device_guard(decay):
            _ema_update_kernel[(table.shape[1],)](
                table,
                decay,
                table.shape[1],
                STUDENT_DTYPE=launch.TL_DTYPES[student_dtype],
                COPY_DTYPE=launch.TL_DTYPES[copy_dtype or torch.float32],
                HAS_COPY=copy_dtype is not None,
                ALIGNED=aligned,
                BLOCK=config.block,
                num_warps=config.num_warps,
            )


@lru_cache(maxsize=64)
def _chunk_table(
    spans: tuple[tuple[int, int, int, int], ...],  # addresses of teacher, student, copy (0 for none), element count
    steps: tuple[int, int, int],  # bytes per element of the three
    chunk: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The table of :func:`_ema_update_kernel` on ``device``, and its source on the host.

    It depends on the arguments alone, addresses included, so a cached table cannot be stale. The host side is kept
    because the copy is asynchronous and would be read again by a captured CUDA graph.
    """
    columns = [
        (*(address + first * step for address, step in zip(span[:3], steps, strict=True)), min(chunk, span[3] - first))
        for span in spans
        for first in range(0, span[3], chunk)
    ]
    host = torch.tensor(columns, dtype=torch.int64).t().contiguous()
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True), host

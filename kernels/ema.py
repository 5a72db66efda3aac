"""Triton kernel of the teacher update: every tensor of the model in one launch, the low-precision copy included."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2v_fast.kernels import chunks, launch
from d2v_fast.kernels.chunks import LaunchConfig


@triton.jit
def lerp(e, p, weight):
    """``e`` moved towards ``p``, exact at both ends like torch.lerp."""
    d = p - e
    return tl.where(weight < 0.5, e + weight * d, p - d * (1.0 - weight))


@triton.jit
def _lerp_block(e_ptr, p_ptr, copy_ptr, offsets, live, weight, MASKED: tl.constexpr, HAS_COPY: tl.constexpr):
    e = chunks.load(e_ptr, offsets, live, MASKED)
    e = lerp(e, chunks.load(p_ptr, offsets, live, MASKED), weight)
    chunks.store(e_ptr, offsets, e, live, MASKED)
    if HAS_COPY:
        chunks.store(copy_ptr, offsets, e, live, MASKED)


@triton.jit(do_not_specialize=["num_tensors"])
def _ema_update_kernel(
    table_ptr,  # [5 or 4, num_tensors] int64: first program, size, addresses of teacher, student and copy
    num_tensors,
    decay_ptr,  # [] fp32 or fp64, not read without HAS_DECAY
    weight,  # 1 - decay without HAS_DECAY
    STUDENT_DTYPE: tl.constexpr,
    COPY_DTYPE: tl.constexpr,
    HAS_COPY: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column, start, size = chunks.locate(table_ptr, num_tensors, CHUNK, LANES)
    e_ptr = chunks.pointer(table_ptr, 2, column, num_tensors, start, tl.float32, ALIGNED)
    p_ptr = chunks.pointer(table_ptr, 3, column, num_tensors, start, STUDENT_DTYPE, ALIGNED)
    copy_ptr = e_ptr
    if HAS_COPY:
        copy_ptr = chunks.pointer(table_ptr, 4, column, num_tensors, start, COPY_DTYPE, ALIGNED)
    if HAS_DECAY:
        weight = (1.0 - tl.load(decay_ptr)).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    num_full = size // BLOCK
    for i in range(0, num_full):
        _lerp_block(e_ptr, p_ptr, copy_ptr, i * BLOCK + lanes, lanes < BLOCK, weight, False, HAS_COPY)
    tail = num_full * BLOCK + lanes
    if num_full * BLOCK < size:
        _lerp_block(e_ptr, p_ptr, copy_ptr, tail, tail < size, weight, True, HAS_COPY)


@dataclass(frozen=True)
class _Launch:
    """One launch: its table, and what is the same for all of its tensors."""

    table: chunks.Table
    student_dtype: torch.dtype
    copy_dtype: torch.dtype | None
    aligned: bool


def ema_update_(
    teacher: Sequence[Tensor],  # fp32, dense
    student: Sequence[Tensor],  # fp32, bf16 or fp16, strides like teacher
    decay: Tensor | None,  # [] fp32 or fp64
    weight: float,  # 1 - decay, where decay is None
    copies: Sequence[Tensor],  # like student, or empty
    config: LaunchConfig | None = None,
) -> None:
    """Update ``teacher`` in place and write ``copies``: one launch per combination of dtypes and alignment."""
    config = config or chunks.config_for(teacher[0])
    device = teacher[0].device
    key = (
        tuple(map(Tensor.numel, teacher)),
        tuple(map(Tensor.data_ptr, teacher)),
        tuple(map(Tensor.data_ptr, student)),
        tuple(x.dtype for x in student),
        tuple(map(Tensor.data_ptr, copies)),
        tuple(x.dtype for x in copies),
        config.chunk,
        device,
    )
    stream = chunks.current_stream(device)
    with launch.device_guard(teacher[0]):
        for part in _launches.__wrapped__(*key) if stream is None else _launches(*key, stream):
            _ema_update_kernel[(part.table.programs,)](
                part.table.data,
                part.table.tensors,
                part.table.data if decay is None else decay,
                weight,
                STUDENT_DTYPE=launch.TL_DTYPES[part.student_dtype],
                COPY_DTYPE=launch.TL_DTYPES[part.copy_dtype or torch.float32],
                HAS_COPY=part.copy_dtype is not None,
                HAS_DECAY=decay is not None,
                ALIGNED=part.aligned,
                LANES=part.table.lanes,
                CHUNK=config.chunk,
                BLOCK=config.block,
                num_warps=config.num_warps,
            )


@lru_cache(maxsize=16)
def _launches(
    sizes: tuple[int, ...],
    teacher: tuple[int, ...],  # addresses
    student: tuple[int, ...],
    student_dtypes: tuple[torch.dtype, ...],
    copies: tuple[int, ...],
    copy_dtypes: tuple[torch.dtype, ...],
    chunk: int,
    device: torch.device,
    stream: int | None = None,
) -> list[_Launch]:
    """Group the tensors and build the tables. They depend on the arguments alone, so cached ones cannot be stale."""
    groups = defaultdict(list)
    for i, size in enumerate(sizes):
        addresses = (teacher[i], student[i], *copies[i : i + 1])
        aligned = all(address % launch.ALIGNMENT == 0 for address in addresses)
        if size > 0:
            groups[student_dtypes[i], copy_dtypes[i] if copies else None, aligned].append((size, *addresses))
    launches = []
    for (student_dtype, copy_dtype, aligned), spans in groups.items():
        for first in range(0, len(spans), chunks.MAX_TENSORS):
            group_sizes, *rows = zip(*spans[first : first + chunks.MAX_TENSORS], strict=True)
            table = chunks.build_table(group_sizes, rows, chunk, device)
            launches.append(_Launch(table, student_dtype, copy_dtype, aligned))
    return launches

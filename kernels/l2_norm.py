"""Triton kernels of the L2 norm over many tensors: a sum of squares per chunk, then one program that adds them up.

Sums are float64: nothing overflows or vanishes that a float32 norm can hold, in the same order in every run.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2v_fast.kernels import chunks, launch
from d2v_fast.kernels.chunks import LaunchConfig

# Two loads of 16 bytes in flight per thread even in bfloat16, and few enough chunks for the one program that adds up.
GPU_CONFIG = LaunchConfig(chunk=32768, block=2048, num_warps=4)
_FINISH_BLOCK, _FINISH_WARPS = 4096, 8


def config_for(x: Tensor) -> LaunchConfig:
    """Chunks for tensors on the device of ``x``."""
    return chunks.INTERPRETER_CONFIG if launch.interpreted(x) else GPU_CONFIG


@triton.jit(do_not_specialize=["num_tensors", "first_partial"])
def _sum_of_squares_kernel(
    table_ptr,  # [3, num_tensors] int64: first program, size, address
    num_tensors,
    partials_ptr,  # [>= first_partial + programs] fp64
    first_partial,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column, start, size = chunks.locate(table_ptr, num_tensors, CHUNK, LANES)
    x_ptr = chunks.pointer(table_ptr, 2, column, num_tensors, start, DTYPE, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    num_full = size // BLOCK
    for i in range(0, num_full):
        x = tl.load(x_ptr + i * BLOCK + lanes).to(tl.float32).to(tl.float64)
        total += x * x
    if num_full * BLOCK < size:  # a mask made of a loaded size turns vector loads into scalar ones: only here
        tail = num_full * BLOCK + lanes
        x = tl.load(x_ptr + tail, mask=tail < size, other=0.0).to(tl.float32).to(tl.float64)
        total += x * x
    tl.store(partials_ptr + first_partial + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["num_partials"])
def _root_of_sum_kernel(partials_ptr, out_ptr, num_partials, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    lanes = tl.arange(0, BLOCK)
    for first in range(0, num_partials, BLOCK):
        total += tl.load(partials_ptr + first + lanes, mask=first + lanes < num_partials, other=0.0)
    tl.store(out_ptr, tl.sqrt(tl.sum(total, axis=0)).to(tl.float32))


def l2_norm(tensors: Sequence[Tensor], config: LaunchConfig | None = None) -> Tensor:
    """Norm [] fp32 of all elements of dense ``tensors`` (fp32, bf16, fp16) on one device."""
    device = tensors[0].device
    config = config or config_for(tensors[0])
    key = (
        tuple(map(Tensor.numel, tensors)),
        tuple(map(Tensor.data_ptr, tensors)),
        tuple(x.dtype for x in tensors),
        config.chunk,
        device,
    )
    stream = chunks.current_stream(device)
    out = torch.empty((), dtype=torch.float32, device=device)
    with launch.device_guard(out):
        parts = _launches.__wrapped__(*key) if stream is None else _launches(*key, stream)
        num_partials = sum(table.programs for table, _, _ in parts)
        partials = torch.empty(num_partials, dtype=torch.float64, device=device)
        first = 0
        for table, dtype, aligned in parts:
            _sum_of_squares_kernel[(table.programs,)](
                table.data,
                table.tensors,
                partials,
                first,
                DTYPE=launch.TL_DTYPES[dtype],
                ALIGNED=aligned,
                LANES=table.lanes,
                CHUNK=config.chunk,
                BLOCK=config.block,
                num_warps=config.num_warps,
            )
            first += table.programs
        _root_of_sum_kernel[(1,)](partials, out, num_partials, BLOCK=_FINISH_BLOCK, num_warps=_FINISH_WARPS)
    return out


@lru_cache(maxsize=16)
def _launches(
    sizes: tuple[int, ...],
    addresses: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    chunk: int,
    device: torch.device,
    stream: int | None = None,
) -> list[tuple[chunks.Table, torch.dtype, bool]]:
    """(table, dtype, aligned) of every launch; a function of the arguments alone, so that a cached one is not stale."""
    groups = defaultdict(list)
    for size, address, dtype in zip(sizes, addresses, dtypes, strict=True):
        if size > 0:
            groups[dtype, address % launch.ALIGNMENT == 0].append((size, address))
    launches = []
    for kind, spans in groups.items():
        for first in range(0, len(spans), chunks.MAX_TENSORS):
            group_sizes, *rows = zip(*spans[first : first + chunks.MAX_TENSORS], strict=True)
            launches.append((chunks.build_table(group_sizes, rows, chunk, device), *kind))
    return launches

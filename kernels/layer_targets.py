"""Triton kernels of the training targets: K layer results [B, T, C] -> mean of their normalised values.

Norms over time or batch take two passes: statistics of every column (layer, sequence, channel), then a kernel that
reads only the rows that are asked for. Layer norm needs one pass over those rows. The K tensors are reached through a
table of addresses and two strides, so [B, T, C], [T, B, C] and slices of either are read in place.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2v_fast.kernels import launch

WARPS_PER_SM = 16
_REGISTERS = 65536 // (32 * WARPS_PER_SM)
_STATS_REGISTERS = {2: 40, 4: 48}  # by bytes of an element: 12 or 10 programs of four warps on an SM, without spills


def register_limit(width: int) -> int | None:
    """Registers per thread that ptxas may use: without a limit it gives up warps, or spills to gain some.

    Scalar accesses, at widths that are no multiple of 16, need more than that.
    """
    return _REGISTERS if width % 16 == 0 else None


@dataclass(frozen=True)
class LaunchConfig:
    """Tiles: ``block_t`` x ``block_c_stats`` of the statistics, ``block_n`` rows x ``block_c`` of the targets."""

    block_t: int
    block_c_stats: int
    block_n: int
    block_c: int
    num_warps: int


def config_for(x: Tensor, whole_rows: bool) -> LaunchConfig:
    """Tiles for ``x`` [B, T, C]; ``whole_rows`` when a layer norm needs all C channels in one program."""
    row = triton.next_power_of_2(max(x.shape[2], 1))
    if launch.interpreted(x):
        block_t = min(triton.next_power_of_2(x.shape[1]), 64)
        return LaunchConfig(block_t, block_c_stats=min(row, 512), block_n=64, block_c=row, num_warps=4)
    if whole_rows:
        block_n = min(max(4096 // row, 1), 16)
        warps = 8 if block_n * row >= 4096 else 4
        return LaunchConfig(block_t=16, block_c_stats=64, block_n=block_n, block_c=row, num_warps=warps)
    return LaunchConfig(block_t=16, block_c_stats=64, block_n=32, block_c=64, num_warps=4)


@triton.jit
def _layer_ptr(table_ptr, k, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    ptr = tl.load(table_ptr + k).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit(do_not_specialize=["B", "T"])
def _column_stats_kernel(
    table_ptr,  # [K] addresses of [B, T, C]
    lengths_ptr,  # [B] int, not read without HAS_LENGTHS
    stats_ptr,  # [K, B, 2, C] fp32: mean, and with RSTD 1 / sqrt(var + eps), otherwise the biased variance;
    B,  # planar, because interleaving them costs scalar accesses
    T,
    C,
    stride_b,
    stride_t,
    eps,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    RSTD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    num_col_blocks = tl.cdiv(C, BLOCK_C)
    column = tl.program_id(0) // num_col_blocks  # k * B + b
    k = column // B
    b = (column % B).to(tl.int64)
    cols = (tl.program_id(0) % num_col_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    length = T
    if HAS_LENGTHS:
        length = tl.minimum(tl.maximum(tl.load(lengths_ptr + b).to(tl.int32), 0), T)

    x_ptr = _layer_ptr(table_ptr, k, DTYPE, ALIGNED) + b * stride_b + cols[None, :]
    times = tl.arange(0, BLOCK_T)
    live = (times < length)[:, None] & inside[None, :]
    x = tl.load(x_ptr + times[:, None].to(tl.int64) * stride_t, mask=live, other=0.0).to(tl.float32)
    # Sums of x - shift do not cancel when the mean is far from 0; the mean of the first tile is close enough.
    shift = tl.sum(x, axis=0) / tl.maximum(tl.minimum(length, BLOCK_T), 1)
    sum1 = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    sum2 = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for start in tl.range(0, length, BLOCK_T, num_stages=4):  # three tiles are on their way while one is added
        t = start + times
        live = (t < length)[:, None] & inside[None, :]
        x = tl.load(x_ptr + t[:, None].to(tl.int64) * stride_t, mask=live, other=0.0).to(tl.float32)
        d = tl.where(live, x - shift[None, :], 0.0)
        sum1 += d
        sum2 += d * d
    count = tl.maximum(length, 1)
    offset = tl.sum(sum1, axis=0) / count
    var = tl.sum(sum2, axis=0) / count - offset * offset
    var = tl.where(var < 0.0, 0.0, var)  # unlike maximum, NaN stays NaN
    out = stats_ptr + column.to(tl.int64) * 2 * C + cols
    tl.store(out, shift + offset, mask=inside)
    tl.store(out + C, tl.rsqrt(var + eps) if RSTD else var, mask=inside)


@triton.jit
def _layer_norm(x, inside, C, eps):
    # x: [BLOCK_N, BLOCK_C] with 0 in the lanes that are not inside
    mean = tl.sum(x, axis=1) * (1.0 / C)
    d = tl.where(inside[None, :], x - mean[:, None], 0.0)
    return d * tl.rsqrt(tl.sum(d * d, axis=1) * (1.0 / C) + eps)[:, None]


@triton.jit
def _average(
    table_ptr,
    stats_ptr,
    stats_row,  # scalar, or [BLOCK_N, 1] when the rows of the tile belong to different sequences
    stats_rows,
    offsets,  # [BLOCK_N, BLOCK_C] from the start of a layer result
    live,  # [BLOCK_N, BLOCK_C]
    cols,  # [BLOCK_C]
    C,
    K,
    eps,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    inside = cols < C
    total = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    # Two or three layer results, and their statistics, are on their way while one is normalised; rows of more than 4096
    # channels would not fit into shared memory so many times.
    STAGES: tl.constexpr = 1 if BLOCK_N * BLOCK_C > 4096 else (4 if NORM == "layer" else 3)
    for k in tl.range(0, K, num_stages=STAGES):
        x = tl.load(_layer_ptr(table_ptr, k, DTYPE, ALIGNED) + offsets, mask=live, other=0.0).to(tl.float32)
        if NORM == "layer":
            x = _layer_norm(x, inside, C, eps)
        elif NORM != "none":
            stats = stats_ptr + (k * stats_rows + stats_row) * 2 * C + cols[None, :]
            mean = tl.load(stats, mask=inside[None, :], other=0.0)
            rstd = tl.load(stats + C, mask=inside[None, :], other=0.0)
            x = (x - mean) * rstd
        total += x
    return total * (1.0 / K)


@triton.jit
def _find(frame, wanted, num_frames, T):
    """(whether a wanted flat position exists, its sequence, its frame); the latter two are 0 where it does not."""
    found = wanted & (frame >= 0) & (frame < num_frames)
    frame = tl.where(found, frame, 0).to(num_frames.dtype)  # int32 if that holds B * T: a 64-bit division is a call
    b = frame // T
    return found, b.to(tl.int64), (frame - b * T).to(tl.int64)


@triton.jit
def _target_tile(
    table_ptr,
    stats_ptr,
    b,  # [BLOCK_N] int64
    t,  # [BLOCK_N] int64
    found,  # [BLOCK_N]
    cols,  # [BLOCK_C]
    C,
    K,
    stats_rows,
    stride_b,
    stride_t,
    eps,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    NORM: tl.constexpr,
    POST_LAYER_NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Targets [BLOCK_N, BLOCK_C] of the frames (b, t); NaN in rows that are not found, 0 in columns past C."""
    inside = cols < C
    offsets = (b * stride_b + t * stride_t)[:, None] + cols[None, :]
    live = found[:, None] & inside[None, :]
    if NORM == "instance":
        # Sorted positions put nearly every tile into one sequence, where the statistics are read once per column.
        first = tl.min(tl.where(found, b, stats_rows))
        last = tl.max(tl.where(found, b, -1))
        if first == last:
            y = _average(
                table_ptr, stats_ptr, first, stats_rows, offsets, live, cols, C, K, eps,
                DTYPE, ALIGNED, NORM, BLOCK_N, BLOCK_C,
            )  # fmt: skip
        else:
            y = _average(
                table_ptr, stats_ptr, b[:, None], stats_rows, offsets, live, cols, C, K, eps,
                DTYPE, ALIGNED, NORM, BLOCK_N, BLOCK_C,
            )  # fmt: skip
    else:
        y = _average(
            table_ptr, stats_ptr, 0, stats_rows, offsets, live, cols, C, K, eps,
            DTYPE, ALIGNED, NORM, BLOCK_N, BLOCK_C,
        )  # fmt: skip
    if POST_LAYER_NORM:
        y = _layer_norm(y, inside, C, eps)
    return tl.where(found[:, None], y, float("nan"))  # a position out of range is loud instead of a memory fault


@triton.jit(do_not_specialize=["num_rows", "num_frames", "T", "K", "stats_rows"])
def _layer_targets_kernel(
    table_ptr,  # [K] addresses of [B, T, C]
    stats_ptr,  # [K, stats_rows, 2, C], not read for "layer" and "none"
    positions_ptr,  # [num_rows] int, not read without HAS_POSITIONS
    out_ptr,  # [num_rows, C] fp32
    num_rows,
    num_frames,  # B * T
    T,
    C,
    K,
    stats_rows,  # B, or 1 for "batch"
    stride_b,
    stride_t,
    eps,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    NORM: tl.constexpr,
    POST_LAYER_NORM: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    num_col_blocks = tl.cdiv(C, BLOCK_C)
    rows = (tl.program_id(0) // num_col_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = (tl.program_id(0) % num_col_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    wanted = rows < num_rows
    frame = rows
    if HAS_POSITIONS:
        frame = tl.load(positions_ptr + rows, mask=wanted, other=-1).to(tl.int64)
    found, b, t = _find(frame, wanted, num_frames, T)
    y = _target_tile(
        table_ptr, stats_ptr, b, t, found, cols, C, K, stats_rows, stride_b, stride_t, eps,
        DTYPE, ALIGNED, NORM, POST_LAYER_NORM, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    tl.store(out_ptr + rows[:, None] * C + cols[None, :], y, mask=wanted[:, None] & (cols < C)[None, :])


def layer_targets(
    layers: Sequence[Tensor],  # K x [B, T, C]
    positions: Tensor | None,  # [N] int
    lengths: Tensor | None,  # [B] int
    norm: str,
    post_norm: str,
    eps: float,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Targets in fp32: [B, T, C], or [N, C] at ``positions``."""
    if post_norm == "instance":  # its statistics need the average at every frame, so the average is materialised
        average = layer_targets(layers, None, lengths, norm, "none", eps, config)
        return layer_targets([average], positions, lengths, "instance", "none", eps, config)
    B, T, C = layers[0].shape
    shape = (B, T, C) if positions is None else (positions.numel(), C)
    out = torch.empty(shape, device=layers[0].device, dtype=torch.float32)
    if out.numel() == 0 or B * T == 0:
        return out.fill_(float("nan"))  # B * T == 0 leaves no valid position
    layers = same_strides(layers)
    whole_rows = "layer" in (norm, post_norm)
    config = config or config_for(layers[0], whole_rows)
    with launch.device_guard(out):
        table = launch.pointer_table(layers)
        num_rows = out.numel() // C
        _layer_targets_kernel[(triton.cdiv(num_rows, config.block_n) * triton.cdiv(C, config.block_c),)](
            table,
            column_stats(table, layers, lengths, norm, eps, config),
            table if positions is None else positions.contiguous(),
            out,
            num_rows,
            B * T,
            T,
            C,
            len(layers),
            1 if norm == "batch" else B,
            layers[0].stride(0),
            layers[0].stride(1),
            eps,
            DTYPE=launch.TL_DTYPES[layers[0].dtype],
            ALIGNED=launch.aligned(layers),
            NORM=norm,
            POST_LAYER_NORM=post_norm == "layer",
            HAS_POSITIONS=positions is not None,
            BLOCK_N=config.block_n,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
            maxnreg=register_limit(C) if whole_rows else None,
        )
    return out


def same_strides(layers: Sequence[Tensor]) -> Sequence[Tensor]:
    """``layers`` as one pair of strides and a unit last stride can describe them; copies where they do not agree."""
    strides = {x.stride() for x in layers}
    return layers if len(strides) == 1 and layers[0].stride(2) == 1 else [x.contiguous() for x in layers]


def column_stats(
    table: Tensor,  # [K] addresses of the layers
    layers: Sequence[Tensor],  # K x [B, T, C] of equal strides
    lengths: Tensor | None,  # [B] int
    norm: str,
    eps: float,
    config: LaunchConfig,
) -> Tensor:
    """Mean and reciprocal standard deviation of the columns, [K, B, 2, C] or [K, 1, 2, C] fp32 for "batch".

    Norms that read none get ``table``, which stands in as an argument of the kernels.
    """
    if norm not in ("instance", "batch"):
        return table
    B, T, C = layers[0].shape
    K = len(layers)
    stats = torch.empty((K, B, 2, C), device=table.device, dtype=torch.float32)
    _column_stats_kernel[(K * B * triton.cdiv(C, config.block_c_stats),)](
        table,
        table if lengths is None else lengths.contiguous(),
        stats,
        B,
        T,
        C,
        layers[0].stride(0),
        layers[0].stride(1),
        eps,
        DTYPE=launch.TL_DTYPES[layers[0].dtype],
        ALIGNED=launch.aligned(layers),
        HAS_LENGTHS=lengths is not None,
        RSTD=norm == "instance",
        BLOCK_T=config.block_t,
        BLOCK_C=config.block_c_stats,
        maxnreg=_STATS_REGISTERS[layers[0].element_size()] if C % 16 == 0 else None,
    )
    return stats if norm == "instance" else _over_batch(stats, lengths, T, eps)


def _over_batch(stats: Tensor, lengths: Tensor | None, T: int, eps: float) -> Tensor:
    """Merge mean and variance of the sequences, [K, B, 2, C] -> mean and reciprocal deviation [K, 1, 2, C].

    Chan's formula, free of cancellation.
    """
    mean, var = stats.unbind(2)  # [K, B, C]
    count = torch.full_like(stats[0, :, 0, :1], T) if lengths is None else lengths.clamp(0, T)[:, None].float()
    total = count.sum().clamp(min=1)
    shift = mean[:, :1]
    merged = shift + (count * (mean - shift)).sum(1, keepdim=True) / total
    merged_var = (count * (var + (mean - merged).square())).sum(1, keepdim=True) / total
    return torch.stack((merged, (merged_var + eps).rsqrt()), dim=2)

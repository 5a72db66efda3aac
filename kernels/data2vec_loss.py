"""Triton kernels of the fused loss: targets, regression loss, gradient of pred and spread of both in one pass.

The targets live in registers only. A program walks ``tiles`` tiles of rows and leaves, per channel, the mean and the
sum of squared deviations (M2) of targets and predictions; a second, small kernel merges them. No atomics: the result
is the same bit for bit at every run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2v_fast.kernels import launch
from d2v_fast.kernels import layer_targets as targets
from d2v_fast.kernels.layer_targets import _find, _target_tile

STD_EPS = tl.constexpr(1e-6)  # fairseq's, inside the root of the spread
_MERGE_PARTS, _MERGE_COLS, _MERGE_LOSSES = 64, 32, 1024
_SCALE_BLOCK = 2048


@dataclass(frozen=True)
class LaunchConfig:
    """A program takes ``tiles`` tiles of ``block_n`` rows x ``block_c`` channels, one after the other."""

    block_n: int
    block_c: int
    tiles: int
    num_warps: int


def config_for(pred: Tensor, layers: Sequence[Tensor], whole_rows: bool) -> LaunchConfig:
    """The tiles for ``pred`` [N, C]; ``whole_rows`` when a layer norm needs all channels in one program.

    16 elements per thread, the most that leaves registers for 16 warps, and one wave of programs where there are rows
    enough. Each row program leaves 16 C bytes of partial sums: fewer are started where these would pass 1/64 of the
    layer results, down to one per processor. Layer norms at C = 768 leave a quarter of 1024 lanes idle, which costs
    issue slots but no memory traffic.
    """
    N, C = pred.shape
    row = triton.next_power_of_2(max(C, 1))
    if launch.interpreted(pred):
        return LaunchConfig(min(triton.next_power_of_2(N), 32), row, tiles=2, num_warps=4)
    if whole_rows:
        block_n, block_c = min(max(4096 // row, 1), 32), row
    else:
        block_n, block_c = 32, min(row, 64)
    num_warps = min(max(block_n * block_c // 512, 4), 16)
    processors, col_blocks = _processors(pred.device), triton.cdiv(C, block_c)
    wave = processors * targets.WARPS_PER_SM // num_warps // col_blocks
    affordable = sum(x.nbytes for x in layers) // 64 // (16 * C)
    parts = min(wave, max(affordable, processors // col_blocks))
    return LaunchConfig(block_n, block_c, triton.cdiv(N, block_n * max(parts, 1)), num_warps)


@lru_cache
def _processors(device: torch.device) -> int:
    # without a GPU this serves offline compilation, for an H100
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@triton.jit
def _regression(d, beta, SQUARED: tl.constexpr):
    """(loss, slope) of the difference ``d``; NaN stays NaN in both."""
    if SQUARED:
        each = d * d
        slope = 2.0 * d
    else:
        size = tl.abs(d)
        each = tl.where(size < beta, d * d * (0.5 / beta), size - 0.5 * beta)
        slope = d * (1.0 / beta)
        slope = tl.where(slope > 1.0, 1.0, tl.where(slope < -1.0, -1.0, slope))
    return each, slope


@triton.jit
def _add_tile(count, mean, m2, x, live, tile_count):
    """Merge ``x`` [BLOCK_N, BLOCK_C, 2], 0 where not live, into running moments [BLOCK_C, 2] (Chan's formula).

    Of ``tile_count`` live rows; a tile without any changes nothing.
    """
    tile_mean = tl.sum(x, axis=0) * (1.0 / tl.maximum(tile_count, 1.0))
    d = tl.where(live, x - tile_mean[None, :, :], 0.0)
    delta = tile_mean - mean
    share = tile_count / tl.maximum(count + tile_count, 1.0)
    return mean + delta * share, m2 + tl.sum(d * d, axis=0) + delta * delta * (count * share)


@triton.jit(do_not_specialize=["num_rows", "num_frames", "B", "T", "K", "stats_rows", "tiles"])
def _data2vec_loss_kernel(
    table_ptr,  # [K] addresses of [B, T, C]
    stats_ptr,  # [K, stats_rows, 2, C], not read for "layer" and "none"
    positions_ptr,  # [num_rows] int; negative ones are ignored
    batch_index_ptr,  # [num_frames / T] int, not read without HAS_BATCH_INDEX
    pred_ptr,  # [num_rows, C]
    grad_ptr,  # [num_rows, C], not written without HAS_GRAD
    parts_ptr,  # [row programs, 4, C] fp32: mean and M2 of targets, mean and M2 of predictions
    counts_ptr,  # [row programs] int32: rows that are not ignored
    losses_ptr,  # [row programs, column blocks] fp32
    num_rows,
    num_frames,  # student sequences * T
    B,
    T,
    C,
    K,
    stats_rows,  # B, or 1 for "batch"
    stride_b,
    stride_t,
    stride_pred,
    eps,
    beta,
    scale,
    tiles,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    NORM: tl.constexpr,
    POST_LAYER_NORM: tl.constexpr,
    HAS_BATCH_INDEX: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    SQUARED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    num_col_blocks = tl.cdiv(C, BLOCK_C)
    part = (tl.program_id(0) // num_col_blocks).to(tl.int64)
    cols = (tl.program_id(0) % num_col_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    loss = 0.0
    count = 0
    # [BLOCK_C, 2]: target and prediction share reductions. The moments wait in memory, which is this program's alone
    # and stays in the cache: in registers they would crowd out the layer results in flight.
    out = parts_ptr + part * 4 * C + (2 * C * tl.arange(0, 2))[None, :] + cols[:, None]
    first_row = part * tiles * BLOCK_N
    last_row = tl.minimum(first_row + tiles * BLOCK_N, num_rows)
    for start in range(first_row, last_row, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        frame = tl.load(positions_ptr + rows, mask=rows < num_rows, other=-1).to(tl.int64)
        wanted = frame >= 0  # the others are past the end, or ignored
        live = wanted[:, None] & inside[None, :]
        found, b, t = _find(frame, wanted, num_frames, T)
        if HAS_BATCH_INDEX:
            b = tl.load(batch_index_ptr + b, mask=found, other=-1).to(tl.int64)
            found = found & (b >= 0) & (b < B)
            b = tl.where(found, b, 0)
        y = _target_tile(
            table_ptr, stats_ptr, b, t, found, cols, C, K, stats_rows, stride_b, stride_t, eps,
            DTYPE, ALIGNED, NORM, POST_LAYER_NORM, BLOCK_N, BLOCK_C,
        )  # fmt: skip
        y = tl.where(live, y, 0.0)
        p = tl.load(pred_ptr + rows[:, None] * stride_pred + cols[None, :], mask=live, other=0.0).to(tl.float32)
        each, slope = _regression(p - y, beta, SQUARED)
        loss += tl.sum(each)  # dead lanes give 0
        if HAS_GRAD:
            grad = (slope * scale).to(grad_ptr.dtype.element_ty)
            written = (rows < num_rows)[:, None] & inside[None, :]
            tl.store(grad_ptr + rows[:, None] * C + cols[None, :], grad, mask=written)
        tile_count = tl.sum(wanted.to(tl.int32))
        again = inside[:, None] & (start > first_row)
        mean = tl.load(out, mask=again, other=0.0)
        m2 = tl.load(out + C, mask=again, other=0.0)
        mean, m2 = _add_tile(count.to(tl.float32), mean, m2, tl.join(y, p), live[:, :, None], tile_count.to(tl.float32))
        count += tile_count
        tl.store(out, mean, mask=inside[:, None])
        tl.store(out + C, m2, mask=inside[:, None])
        tl.debug_barrier()  # the next tile may load them in other threads
    tl.store(losses_ptr + tl.program_id(0), loss * scale)
    tl.store(counts_ptr + part, count, mask=tl.program_id(0) % num_col_blocks == 0)


@triton.jit(do_not_specialize=["num_parts", "num_losses"])
def _merge_kernel(
    parts_ptr,  # [num_parts, 2, 2, C] fp32
    counts_ptr,  # [num_parts] int32
    losses_ptr,  # [num_losses] fp32
    moments_ptr,  # [2, 2, C] fp32: mean and M2 of targets and of predictions
    spread_ptr,  # [2, C] fp32: standard deviation of each channel
    loss_ptr,  # [] fp32
    num_parts,
    num_losses,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    num_col_blocks = tl.cdiv(C, BLOCK_C)
    which = tl.program_id(0) // num_col_blocks  # 0 targets, 1 predictions, 2 the loss
    if which == 2:
        losses = tl.zeros((BLOCK_L,), dtype=tl.float32)
        for start in range(0, num_losses, BLOCK_L):
            index = start + tl.arange(0, BLOCK_L)
            losses += tl.load(losses_ptr + index, mask=index < num_losses, other=0.0)
        tl.store(loss_ptr, tl.sum(losses, axis=0))
    else:
        cols = (tl.program_id(0) % num_col_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = cols < C
        source = parts_ptr + which * 2 * C + cols
        num_rows = 0
        first = num_parts  # part that is not empty
        for start in range(0, num_parts, BLOCK_P):
            parts = start + tl.arange(0, BLOCK_P)
            counts = tl.load(counts_ptr + parts, mask=parts < num_parts, other=0)
            num_rows += tl.sum(counts)
            first = tl.minimum(first, tl.min(tl.where(counts > 0, parts, num_parts)))
        # deviations from one part's mean do not cancel
        shift = tl.load(source + first.to(tl.int64) * 4 * C, mask=inside & (first < num_parts), other=0.0)
        sum1 = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
        sum2 = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
        for start in range(0, num_parts, BLOCK_P):
            parts = start + tl.arange(0, BLOCK_P).to(tl.int64)
            live = (parts < num_parts)[:, None] & inside[None, :]
            counts = tl.load(counts_ptr + parts, mask=parts < num_parts, other=0)
            count = counts.to(tl.float32)[:, None]
            part_ptr = source[None, :] + parts[:, None] * 4 * C
            mean = tl.load(part_ptr, mask=live, other=0.0)
            part_m2 = tl.load(part_ptr + C, mask=live, other=0.0)
            d = tl.where(live & (counts > 0)[:, None], mean - shift[None, :], 0.0)
            sum1 += count * d
            sum2 += part_m2 + count * d * d
        total = num_rows.to(tl.float32)
        offset = tl.sum(sum1, axis=0) / tl.maximum(total, 1.0)
        m2 = tl.sum(sum2, axis=0) - total * offset * offset
        m2 = tl.where(m2 < 0.0, 0.0, m2)  # unlike maximum, NaN stays NaN
        out = moments_ptr + which * 2 * C + cols
        tl.store(out, shift + offset, mask=inside)
        tl.store(out + C, m2, mask=inside)
        std = tl.sqrt(m2 / tl.maximum(total - 1.0, 1.0) + STD_EPS)
        tl.store(spread_ptr + which * C + cols, tl.where(num_rows > 1, std, 0.0), mask=inside)


@triton.jit(do_not_specialize=["size"])
def _scale_kernel(
    factor_ptr,  # [] fp32
    x_ptr,  # [size]
    out_ptr,  # [size]
    size,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = first + tl.arange(0, BLOCK)
    factor = tl.load(factor_ptr).to(tl.float32)
    if first + BLOCK <= size:  # a mask by an odd size would make every access a scalar one
        x = tl.load(x_ptr + offsets).to(tl.float32) * factor
        tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty))
    else:
        live = offsets < size
        x = tl.load(x_ptr + offsets, mask=live).to(tl.float32) * factor
        tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty), mask=live)


def data2vec_loss_fwd(
    pred: Tensor,  # [N, C], unit stride in the last dim
    layers: Sequence[Tensor],  # K x [B, T, C]
    positions: Tensor,  # [N] int; negative ones are ignored
    lengths: Tensor | None,  # [B] int
    batch_index: Tensor | None,  # [student sequences] int
    norm: str,
    post_norm: str,
    beta: float,
    scale: float,
    eps: float,
    needs_grad: bool,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [], gradient [N, C] in pred's dtype or [0, C], moments [2, 2, C], spread [2]); the rest fp32."""
    if post_norm == "instance":  # its statistics need the average at every frame, so the average is materialised
        layers = [targets.layer_targets(layers, None, lengths, norm, "none", eps)]
        norm, post_norm = "instance", "none"
    N, C = pred.shape
    B, T, _ = layers[0].shape
    grad = torch.empty((N if needs_grad else 0, C), device=pred.device, dtype=pred.dtype)
    if N * C == 0 or B * T == 0:
        shapes = ((), (2, 2, C), (2,))
        loss, moments, spread = (torch.zeros(shape, device=pred.device) for shape in shapes)
        grad.zero_()
        if N * C > 0:  # no frames: a position that is not ignored is out of range
            lost = (positions >= 0).any()
            loss, moments, spread = (x.masked_fill(lost, float("nan")) for x in (loss, moments, spread))
            grad.masked_fill_(lost, float("nan"))
        return loss, grad, moments, spread
    layers = targets.same_strides(layers)
    whole_rows = "layer" in (norm, post_norm)
    config = config or config_for(pred, layers, whole_rows)
    num_parts = triton.cdiv(N, config.block_n * config.tiles)
    parts = torch.empty((num_parts, 4, C), device=pred.device, dtype=torch.float32)
    counts = torch.empty(num_parts, device=pred.device, dtype=torch.int32)
    losses = torch.empty((num_parts, triton.cdiv(C, config.block_c)), device=pred.device, dtype=torch.float32)
    with launch.device_guard(pred):
        table = launch.pointer_table(layers)
        stats_config = targets.config_for(layers[0], whole_rows)
        _data2vec_loss_kernel[(losses.numel(),)](
            table,
            targets.column_stats(table, layers, lengths, norm, eps, stats_config),
            positions.contiguous(),
            positions if batch_index is None else batch_index.contiguous(),
            pred,
            grad,
            parts,
            counts,
            losses,
            N,
            T * (B if batch_index is None else batch_index.numel()),
            B,
            T,
            C,
            len(layers),
            1 if norm == "batch" else B,
            layers[0].stride(0),
            layers[0].stride(1),
            pred.stride(0),
            eps,
            beta,
            scale,
            config.tiles,
            DTYPE=launch.TL_DTYPES[layers[0].dtype],
            ALIGNED=launch.aligned(layers),
            NORM=norm,
            POST_LAYER_NORM=post_norm == "layer",
            HAS_BATCH_INDEX=batch_index is not None,
            HAS_GRAD=needs_grad,
            SQUARED=beta == 0,
            BLOCK_N=config.block_n,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
            maxnreg=targets.register_limit(C),
        )
        loss, moments, spread = _merge(parts, counts, losses)
    return loss, grad, moments, spread


def _merge(parts: Tensor, counts: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], moments [2, 2, C], spread [2]) of the partial sums."""
    num_parts, _, C = parts.shape
    block_c = triton.next_power_of_2(C) if launch.interpreted(parts) else _MERGE_COLS
    loss, moments, spread = (torch.empty(s, device=parts.device, dtype=parts.dtype) for s in ((), (2, 2, C), (2, C)))
    _merge_kernel[(2 * triton.cdiv(C, block_c) + 1,)](
        parts,
        counts,
        losses,
        moments,
        spread,
        loss,
        num_parts,
        losses.numel(),
        C,
        BLOCK_P=_MERGE_PARTS,
        BLOCK_C=block_c,
        BLOCK_L=_MERGE_LOSSES,
        num_warps=4,
    )
    return loss, moments, spread.mean(1)


def data2vec_loss_bwd(
    grad_loss: Tensor,  # []
    grad_pred: Tensor,  # [N, C] contiguous, of a loss whose upstream gradient is 1
) -> Tensor:
    """``grad_loss * grad_pred`` in a new tensor, multiplied in float32.

    PyTorch would first round the scalar to grad_pred's dtype, which is another gradient by up to 0.4 % in bf16.
    """
    out = torch.empty_like(grad_pred)
    size = out.numel()
    block = 65536 if launch.interpreted(out) else _SCALE_BLOCK
    if size > 0:
        with launch.device_guard(out):
            _scale_kernel[(triton.cdiv(size, block),)](grad_loss, grad_pred, out, size, BLOCK=block, num_warps=4)
    return out

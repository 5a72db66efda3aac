"""The path of :func:`d2v_fast.ops.pos_conv` through the CUDA extension: memory, tiles of frames, order of launches."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_fast.ops import _extension
from d2v_fast.ops.layer_norm_gelu import _bwd as norm_gelu_bwd
from d2v_fast.ops.layer_norm_gelu import _fwd as norm_gelu_fwd

TILE = 256  # frames, as in csrc/kernels/pos_conv_tiles.cuh
WIDTHS = (32, 48, 64, 80)  # channels of a group that the kernels are compiled for
_TAPS_PER_BLOCK = 8  # of the weights' gradient
_EMULATED_SM_COUNT, _EMULATED_SHARED_BYTES = 2, 163 * 1024


def fits(x: Tensor, weights: Sequence[Tensor], groups: int) -> bool:
    """Whether the extension is there and has kernels for x [B, T, C] and these weights [C, C / groups, k]."""
    width = x.shape[-1] // groups
    if x.dtype not in (torch.bfloat16, torch.float16) or width not in WIDTHS or not _extension.takes(x):
        return False
    properties = torch.cuda.get_device_properties(x.device) if x.is_cuda else None
    limit = properties.shared_memory_per_block_optin if properties else _EMULATED_SHARED_BYTES
    return all(_extension.ops(x).pos_conv_shared_bytes(width, w.shape[-1]) <= limit for w in weights)


def tile_table(segments: Tensor, rows: int) -> Tensor:
    """First row of each tile and its segment's first and last + 1, [tiles, 3] int64, computed where the segments are.

    The number of tiles is an upper bound; those to spare have no frames. Segments are cut to the ``rows`` there are.
    """
    if segments.shape[0] == 0:
        return segments.new_empty((0, 3), dtype=torch.int64)
    first, count = segments.long().clamp(0, rows).unbind(1)
    last = (first + count).clamp(max=rows)
    tiles = (last - first + TILE - 1) // TILE
    stop = tiles.cumsum(0)  # tiles of this segment and those before it
    index = torch.arange(rows // TILE + len(first), device=segments.device)
    owner = torch.searchsorted(stop, index, right=True).clamp(max=len(first) - 1)
    start = first[owner] + (index - (stop - tiles)[owner]) * TILE
    return torch.stack([torch.where(index < stop[-1], start, last[owner]), first[owner], last[owner]], dim=1)


def arrange(weight: Tensor, groups: int, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """Weights [C, D, k] as the kernels read them: [groups, k, D out, D in] in ``dtype``; transposed: out is in.

    In each 16 outputs, place 8 j + 2 q + e holds channel 4 q + 2 j + e: a lane then has four neighbours.
    """
    _, D, k = weight.shape
    w = weight.reshape(groups, D, D, k).permute((0, 3, 2, 1) if transposed else (0, 3, 1, 2))
    w = w.unflatten(2, (D // 16, 4, 2, 2)).transpose(3, 4)
    return torch.empty(w.shape, device=weight.device, dtype=dtype).copy_(w).view(groups, k, D, D)


def _rows(x: Tensor) -> Tensor:
    """[..., C] as contiguous [N, C] on a 16-byte boundary."""
    x = x.reshape(-1, x.shape[-1]).contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def forward(
    x: Tensor,  # [B, T, C]
    weights: Sequence[Tensor],
    bias: Tensor | None,  # [L, C] fp32
    groups: int,
    norm: bool,
    eps: float,
    segments: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and what backward needs if ``keep``: z [L, B, T, C], mean and 1 / deviation [L, 2, B * T]."""
    rows, last = _rows(x), len(weights) - 1
    tiles = None if segments is None else tile_table(segments, len(rows))
    z = rows.new_empty((last + 1 if keep else min(last + 1, 2), *rows.shape))
    stats = rows.new_empty((last + 1 if norm else 0, 2, len(rows)), dtype=torch.float32)
    sums = rows.new_empty((2, len(rows), groups, 2), dtype=torch.float32) if norm and last else None
    if segments is not None:  # the kernels leave rows outside alone; gelu and norm make 0 of 0
        z.zero_()
        stats.zero_()
    source = rows
    for i, weight in enumerate(weights):
        normed = norm and i > 0
        _extension.ops(x).pos_conv_fwd_cuda(
            source,
            sums[(i + 1) % 2] if normed else None,
            stats[i - 1] if normed else None,
            arrange(weight, groups, x.dtype),
            None if bias is None else bias[i],
            z[i % len(z)],
            sums[i % 2] if norm and i < last else None,
            tiles,
            x.shape[1],
            i > 0,
            eps,
        )
        source = z[i % len(z)]
    if norm:
        y, stats[last, 0], stats[last, 1] = norm_gelu_fwd(source, None, None, eps)
    else:
        y = F.gelu(source)
    if not keep:
        z, stats = z[:0].clone(), stats[:0].clone()
    return y.view(x.shape), z.view(len(z), *x.shape), stats


def backward(
    grad: Tensor,  # [B, T, C]
    x: Tensor,  # [B, T, C]
    z: Tensor,  # [L, B, T, C]
    stats: Tensor,  # [L, 2, B * T]
    weights: Sequence[Tensor],
    has_bias: bool,
    groups: int,
    norm: bool,
    segments: Tensor | None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Gradients of x, of each of the weights, and of the biases [L, C] fp32 ([0, C] without)."""
    rows, last = _rows(x), len(weights) - 1
    tiles = None if segments is None else tile_table(segments, len(rows))
    z = z.view(len(weights), *rows.shape)
    sums = rows.new_empty((2, len(rows), groups, 2), dtype=torch.float32) if norm and last else None
    grad_weights = []
    grad_biases = rows.new_empty((last + 1 if has_bias else 0, x.shape[2]), dtype=torch.float32)
    grad = _rows(grad)
    if norm:
        grad, _ = norm_gelu_bwd(grad, z[last], *stats[last], None, None)
    else:
        grad = torch.ops.aten.gelu_backward(grad, z[last])
    for i in reversed(range(last + 1)):
        inside, normed = i > 0, norm and i < last  # the input is a result of ours; `grad` is that of the normalised z
        out = torch.empty_like(rows) if inside or segments is None else torch.zeros_like(rows)
        grad_z = torch.empty_like(rows) if normed else grad
        source = torch.empty_like(rows) if inside else rows
        _extension.ops(x).pos_conv_dgrad_cuda(
            grad,
            z[i] if normed else None,
            stats[i] if normed else None,
            sums[(i + 1) % 2] if normed else None,
            grad_z if normed else None,
            arrange(weights[i], groups, x.dtype, transposed=True),
            z[i - 1] if inside else None,
            stats[i - 1] if inside and norm else None,
            out,
            sums[i % 2] if inside and norm else None,
            source if inside else None,
            tiles,
            x.shape[1],
        )
        grad_bias = grad_biases[i] if has_bias else None
        grad_weights.append(_wgrad(grad_z, source, weights[i], grad_bias, groups, tiles, x.shape[1]))
        grad = out
    return grad.view(x.shape), grad_weights[::-1], grad_biases


def _wgrad(
    grad: Tensor, x: Tensor, weight: Tensor, grad_bias: Tensor | None, groups: int, tiles: Tensor | None, frames: int
) -> Tensor:
    """Gradient of one layer's weights, like them, from grad [N, C] and the input x [N, C]; fills grad_bias [C] fp32."""
    C, D, k = weight.shape
    shares = _shares(x, -(-k // _TAPS_PER_BLOCK) * groups)
    partials = x.new_empty((shares, groups, k, D, D), dtype=torch.float32)
    bias_partials = None if grad_bias is None else x.new_empty((shares, C), dtype=torch.float32)
    grad_weight = x.new_empty(weight.shape, dtype=torch.float32)
    _extension.ops(x).pos_conv_wgrad_cuda(grad, x, partials, bias_partials, grad_weight, grad_bias, tiles, frames)
    return grad_weight.to(weight.dtype)


def _shares(x: Tensor, blocks: int) -> int:
    """Into how many shares the tiles are dealt, so that ``blocks`` blocks a share fill the device twice."""
    properties = torch.cuda.get_device_properties(x.device) if x.is_cuda else None
    count = properties.multi_processor_count if properties else _EMULATED_SM_COUNT
    return max(min(2 * count // blocks, len(x) // TILE), 1)

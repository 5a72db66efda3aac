"""What :func:`d2v_fast.ops.conv0_norm_gelu` does through the CUDA extension: what fits, and memory for the kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from d2v_fast.ops import _extension, _rows

_TILE = 64  # frames, as in csrc/kernels/conv0.cuh
_MAX_TAPS = 16
_EMULATED_SM_COUNT = 2


def fits(waveforms: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the extension is there and has kernels for these weights [C, 1, k] and results of this dtype."""
    C, _, k = weight.shape
    kinds = dtype in (torch.bfloat16, torch.float16) and torch.float64 not in (waveforms.dtype, weight.dtype)
    return kinds and C % 64 == 0 and k <= _MAX_TAPS and _extension.takes(waveforms)


@dataclass
class Call:
    """Arguments of one call as the kernels read them, and how the frames are cut."""

    tensors: list[Tensor | None]  # waveforms [B, S], weight [C, k], vectors [C], segments [U, 2], tile_start [U + 1]
    settings: tuple[int, float, bool]  # stride, eps, layer norm
    frames: int  # B * T
    segments: int  # 1 with layer norm

    @classmethod
    def of(cls, waveforms, weight, bias, norm_weight, norm_bias, segments, stride, norm, eps) -> "Call":
        """From the arguments of the op."""
        tensors = _rows.cast(torch.float32, waveforms, weight.squeeze(1), bias, norm_weight, norm_bias)
        tensors = [tensors[0] if tensors[0].stride(1) == 1 else tensors[0].contiguous(), *map(_rows.dense, tensors[1:])]
        B, S = waveforms.shape
        frames = B * ((S - weight.shape[2]) // stride + 1)
        tile_start = None
        if segments is not None:
            segments = segments.long().contiguous()
            tiles = (segments[:, 1] + _TILE - 1) // _TILE
            tile_start = torch.cat([tiles.new_zeros(1), tiles.cumsum(0)])
        layer = norm == "layer"
        count = 1 if layer else B if segments is None else segments.shape[0]
        return cls([*tensors, segments, tile_start], (stride, eps, layer), frames, count)

    @property
    def layer(self) -> bool:
        return self.settings[2]

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensors[1].shape

    @property
    def wide(self) -> bool:
        """Whether the kernels for more than 10 taps run."""
        return self.shape[1] > 10

    def programs(self, channels: int, per_sm: int) -> int:
        """Blocks that share the frames, where ``channels`` go to one and ``per_sm`` of them run at a time."""
        x = self.tensors[0]
        count = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else _EMULATED_SM_COUNT
        most = count * per_sm // -(-self.shape[0] // channels)
        rows = self.tensors[0].shape[0]
        tiles = (
            rows * -(-self.frames // (rows * _TILE))
            if self.tensors[5] is None
            else (self.frames // _TILE + self.segments)
        )
        return max(min(most, tiles), 1)

    def memory(self, shares: int) -> list[Tensor]:
        """The weights with the norm folded in, and what is needed for that: D2vConv0Fold in csrc/conv0.h."""
        x, (C, k) = self.tensors[0], self.shape
        taps, width, factor = (16, 32, 45) if self.wide else (10, 16, 21)
        table = (4, factor) if self.layer else (self.segments, taps)
        scratch = (taps + 1,) if self.layer else (self.segments, shares, (k + 1) * (k + 2) // 2)
        return [
            x.new_empty((self.segments, 2, C, width), dtype=torch.bfloat16),
            x.new_empty(table),
            x.new_empty(scratch, dtype=torch.float64),
        ]


def forward(y: Tensor, stats: Tensor, *arguments) -> None:
    """Fill ``y`` [B, T, C] and ``stats``; ``arguments``: those of the op."""
    call = Call.of(*arguments)
    if call.segments == 0:
        y.zero_()
        return
    shares = max(min(1024 // call.segments, 64), 1)
    memory = call.memory(shares)
    programs = call.programs(channels=512, per_sm=1 if call.wide else 3)
    _extension.ops(y).conv0_fwd_cuda(*call.tensors, *call.settings, programs, y, stats, *memory)


def backward(grad: Tensor, stats: Tensor, *arguments) -> Tensor:
    """Gradients of weight, bias, norm_weight and norm_bias [C, k + 3], given that of y [B, T, C]."""
    call = Call.of(*arguments)
    C, k = call.shape
    if call.segments == 0:
        return stats.new_zeros((C, k + 3), dtype=torch.float32)
    if grad.data_ptr() % 16:
        grad = grad.clone()
    programs = call.programs(channels=256 if call.wide else 512, per_sm=1 if grad.dtype == torch.float16 else 2)
    width, columns = (32, 24) if call.wide else (16, 16)
    grads, outer, outer_sum, inner, inner_sum = (
        grad.new_empty(shape, dtype=torch.float32)
        for shape in (
            (C, k + 3),
            (programs + call.segments - 1, C, columns),
            (call.segments, C, columns),
            (programs if call.layer else 0, C // 64, width, columns),
            (width, columns),
        )
    )
    memory = call.memory(shares=1)
    _extension.ops(grad).conv0_bwd_cuda(
        grad, stats, *call.tensors, *call.settings, programs, grads, *memory, outer, outer_sum, inner, inner_sum
    )
    return grads

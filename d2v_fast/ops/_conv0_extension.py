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

    tensors: list[Tensor | None]  # waveforms [B, S], weight [C, k], vectors [C], segments and their table
    settings: tuple[int, float, bool]  # stride, eps, layer norm
    tiles: int  # at most
    segments: int  # 1 with layer norm

    @classmethod
    def of(cls, waveforms, weight, bias, norm_weight, norm_bias, segments, stride, norm, eps) -> "Call":
        """From the arguments of the op; there is a segment."""
        x, *tensors = _rows.cast(torch.float32, waveforms, weight.squeeze(1), bias, norm_weight, norm_bias)
        x = x if x.stride(1) == 1 else x.contiguous()
        B, S = x.shape
        T = (S - weight.shape[2]) // stride + 1
        segments = None if segments is None else segments.long().contiguous()
        table = None if segments is None else segments.new_empty((segments.shape[0] + 1, 4))
        layer = norm == "layer"
        count = B if segments is None else segments.shape[0]
        tiles = B * -(-T // _TILE) if segments is None else B * T // _TILE + count
        tensors = [x, *map(_rows.dense, tensors), segments, table]
        return cls(tensors, (stride, eps, layer), tiles, 1 if layer else count)

    @property
    def layer(self) -> bool:
        return self.settings[2]

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensors[1].shape

    @property
    def wide(self) -> bool:
        """Whether the kernels for any number of taps run, not those for 10."""
        return self.shape[1] != 10

    @property
    def sm_count(self) -> int:
        x = self.tensors[0]
        return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else _EMULATED_SM_COUNT

    def programs(self, channels: int, per_sm: int) -> int:
        """Blocks that share the frames, where ``channels`` go to one and ``per_sm`` of them run at a time."""
        most = self.sm_count * per_sm // -(-self.shape[0] // channels)
        return max(min(most, self.tiles), 1)

    def memory(self, shares: int) -> list[Tensor]:
        """The weights with the norm folded in, and what is needed for that: D2vConv0Fold in csrc/conv0.h."""
        x, (C, k) = self.tensors[0], self.shape
        taps, width, factor = (16, 32, 60) if self.wide else (10, 16, 24)
        table = (4, factor) if self.layer else (self.segments, taps)
        scratch = (taps + 1,) if self.layer else (self.segments, shares, (k + 1) * (k + 2) // 2)
        return [
            x.new_empty((self.segments, 2, C, width), dtype=torch.bfloat16),
            x.new_empty(table),
            x.new_empty(scratch, dtype=torch.float64),
        ]


def forward(y: Tensor, stats: Tensor, *arguments) -> None:
    """Fill ``y`` [B, T, C] and ``stats``; ``arguments``: those of the op."""
    if len(stats) == 0:  # no segment
        y.zero_()
        return
    call = Call.of(*arguments)
    # of each segment's frames, for its moments: 256 frames or more to a block, and enough blocks for a GPU
    shares = max(min(6 * call.sm_count // call.segments, call.tiles // (4 * call.segments), 64), 1)
    memory = call.memory(shares)
    programs = call.programs(channels=512, per_sm=2 if call.wide else 3)
    _extension.ops(y).conv0_fwd_cuda(*call.tensors, *call.settings, programs, y, stats, *memory)


def backward(grad: Tensor, stats: Tensor, *arguments) -> Tensor:
    """Gradients of weight, bias, norm_weight and norm_bias [C, k + 3], given that of y [B, T, C]."""
    C, _, k = arguments[1].shape
    if len(stats) == 0:
        return grad.new_zeros((C, k + 3), dtype=torch.float32)
    call = Call.of(*arguments)
    grad = grad if grad.data_ptr() % 16 == 0 else grad.clone()
    programs = call.programs(channels=256 if call.wide else 512, per_sm=1 if grad.dtype == torch.float16 else 2)
    width, columns = (32, 24) if call.wide else (16, 16)
    shapes = (
        (C, k + 3),
        (programs + call.segments - 1, C, columns),
        (call.segments, C, columns),
        (programs if call.layer else 0, C // 64, width, columns),
        (width, columns),
    )
    grads, *sums = (grad.new_empty(shape, dtype=torch.float32) for shape in shapes)
    memory = call.memory(shares=1)
    _extension.ops(grad).conv0_bwd_cuda(grad, stats, *call.tensors, *call.settings, programs, grads, *memory, *sums)
    return grads

"""Waveforms of different lengths in one row, without padding: the packed lattice of the speech front-end.

Convolutions with total stride R (320 samples in the published stack) and receptive field F (400) give frame t from the
samples R t .. R t + F. A waveform that starts at a multiple of R in a row of several therefore has the frames it would
have alone, R t .. R t + F being all its own, and between two waveforms lie one or two guard frames that have seen both.
All convolutions then run over the row as over one long waveform.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_fast.nn.config import SpeechFrontEndConfig
from d2v_fast.nn.frontends.checks import check_tensor
from d2v_fast.nn.frontends.waveforms import Lengths, host_lengths


@dataclass(frozen=True, kw_only=True)
class PackedWaveforms:
    """U waveforms in a row of L samples, which the convolutions turn into M frames, N of them valid.

    Made by :func:`pack_waveforms`, in a data loader if possible: :meth:`pin_memory` and :meth:`to` then bring it to a
    device without waiting. ``lengths``, ``offsets`` and ``num_frames`` [U] stay on the host.
    """

    samples: Tensor  # [1, L]
    conv_segments: Tensor  # [U, 2] int64, first frame and number of frames of each waveform after the first convolution
    segments: Tensor  # [U, 2] int64, the same after the last one: ranges of the M frames
    rows: Tensor  # [N] int64, the valid ones among the M frames, waveform by waveform
    layers: tuple[tuple[int, int], ...]  # (kernel, stride) of the convolutions that it is made for
    lengths: tuple[int, ...]  # samples
    offsets: tuple[int, ...]  # samples
    num_frames: tuple[int, ...]

    def _map(self, function) -> "PackedWaveforms":
        changed = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in changed.items() if isinstance(v, Tensor)})

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "PackedWaveforms":
        """Copy every tensor to ``device``."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedWaveforms":
        """Page-lock every tensor (the hook that ``torch.utils.data.DataLoader(pin_memory=True)`` calls)."""
        return self._map(lambda t: t.pin_memory())

    def valid(self, frames: Tensor) -> Tensor:
        """The valid ones of frames [1, M, C], waveform by waveform: [N, C]."""
        return frames[0].index_select(0, self.rows)

    def padded(self, frames: Tensor) -> Tensor:
        """Frames [1, M, C] as a batch [U, T, C] with T the largest of ``num_frames``, zeros behind each waveform's."""
        steps = torch.arange(max(self.num_frames), device=frames.device)  # [T]
        first, count = self.segments.unsqueeze(2).unbind(1)  # [U, 1] each
        rows = (first + steps).clamp(max=frames.shape[1] - 1)  # behind a waveform: frames of others, not taken
        batch = frames[0].index_select(0, rows.flatten()).view(*rows.shape, -1)
        return torch.where((steps < count)[..., None], batch, 0)


def geometry(config: SpeechFrontEndConfig) -> tuple[tuple[int, int], ...]:
    """(kernel, stride) of each convolution."""
    return tuple([(kernel, stride) for _, kernel, stride in config.conv_layers])


def tail(config: SpeechFrontEndConfig) -> int:
    """Samples behind the last multiple of R that make a row of n R samples give n frames."""
    return max(config.min_samples - config.total_stride, 0)


def lay_rows(waveforms: Tensor, config: SpeechFrontEndConfig) -> Tensor:
    """Waveforms [B, S] of one length as a row [1, L] with B ceil(S / R) frames; differentiable, no index needed."""
    rows = F.pad(waveforms, (0, -waveforms.shape[1] % config.total_stride))
    return F.pad(rows.reshape(1, -1), (0, tail(config)))


def pack_waveforms(
    waveforms: Tensor | Sequence[Tensor],
    config: SpeechFrontEndConfig,
    lengths: Lengths | None = None,
    *,
    budget: int | None = None,
) -> PackedWaveforms:
    """Lay waveforms into one row, each at a multiple of the convolutions' total stride.

    Args:
        waveforms: a padded batch [B, S], or a sequence of [S] of one floating point dtype and device.
        config: of the front-end that will read them.
        lengths: samples of each row of a padded batch, known on the host; all of S by default.
        budget: samples L to fill the row up to, so that all rows have one shape. By default what is needed: each
            waveform rounded up to a multiple of the total stride, plus ``min_samples - total_stride`` at the end.

    Returns:
        The row, on the waveforms' device, with what says where each waveform is. Differentiable in the samples.

    Raises:
        TypeError: waveforms that are no floating point tensors or of several dtypes, or ``lengths`` or ``budget`` no
            integers.
        ValueError: no waveforms, a wrong rank, several devices, a waveform shorter than a frame needs, lengths beyond
            the tensor, lengths with a sequence, or more samples than ``budget``.
    """
    clips = _clips(waveforms, config, lengths)
    sizes = tuple(clip.shape[0] for clip in clips)
    stride = config.total_stride
    slots = [-(-size // stride) for size in sizes]  # frames, guards included
    needed = sum(slots) * stride + tail(config)
    if budget is not None and (not isinstance(budget, Integral) or isinstance(budget, bool)):
        raise TypeError(f"budget must be an integer, got {type(budget).__name__}")
    if budget is not None and budget < needed:
        raise ValueError(f"budget must be at least the {needed} samples that these waveforms need, got {budget}")
    starts = torch.tensor([0, *slots]).cumsum(0).tolist()
    gaps = [slot * stride - size for slot, size in zip(slots, sizes, strict=True)]
    gaps[-1] += (needed if budget is None else budget) - sum(slots) * stride
    pieces = [piece for clip, gap in zip(clips, gaps, strict=True) for piece in (clip, clip.new_zeros(gap))]
    frames = tuple(int(config.num_frames(size)) for size in sizes)
    _, kernel, first_stride = config.conv_layers[0]
    first = [start * stride // first_stride for start in starts[:-1]]
    after_first = [(size - kernel) // first_stride + 1 for size in sizes]
    packed = PackedWaveforms(
        samples=torch.cat(pieces)[None],
        conv_segments=torch.tensor([first, after_first]).T.contiguous(),
        segments=torch.tensor([starts[:-1], frames]).T.contiguous(),
        rows=torch.cat([torch.arange(s, s + count) for s, count in zip(starts, frames, strict=False)]),
        layers=geometry(config),
        lengths=sizes,
        offsets=tuple(start * stride for start in starts[:-1]),
        num_frames=frames,
    )
    return packed.to(packed.samples.device)


def _clips(waveforms: Tensor | Sequence[Tensor], config: SpeechFrontEndConfig, lengths: Lengths | None) -> list[Tensor]:
    """The waveforms, each [S_u], checked."""
    if isinstance(waveforms, Tensor):
        if waveforms.dim() != 2 or waveforms.shape[0] == 0:
            raise ValueError(f"waveforms must be [B, S] with at least one row, got shape {tuple(waveforms.shape)}")
        B, S = waveforms.shape
        sizes = (S,) * B if lengths is None else host_lengths(lengths, B, 1, S)
        clips = [row[:size] for row, size in zip(waveforms, sizes, strict=True)]
    else:
        if lengths is not None:
            raise ValueError("lengths must be None with a sequence of waveforms: each has its own")
        if not isinstance(waveforms, Sequence):
            raise TypeError(f"waveforms must be a tensor or a sequence of tensors, got {type(waveforms).__name__}")
        clips = list(waveforms)
    if not clips:
        raise ValueError("waveforms must have at least one waveform, got none")
    for index, clip in enumerate(clips):
        _check_clip(f"waveforms[{index}]", clip, clips[0], config)
    return clips


def _check_clip(name: str, clip: Tensor, first: Tensor, config: SpeechFrontEndConfig) -> None:
    check_tensor(name, clip)
    if not clip.is_floating_point() or clip.dtype != first.dtype:
        raise TypeError(f"{name} must be floating point, all of one dtype, got {clip.dtype}")
    if clip.dim() != 1:
        raise ValueError(f"{name} must be [S], got shape {tuple(clip.shape)}")
    if clip.device != first.device:
        raise ValueError(f"{name} must be on {first.device} like the first, got {clip.device}")
    if clip.shape[0] < config.min_samples:
        raise ValueError(f"{name} must have at least {config.min_samples} samples, got {clip.shape[0]}")

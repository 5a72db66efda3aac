"""Waveform to frames: strided convolutions, each with norm and GELU, then layer norm and projection.

fairseq: ``ConvFeatureExtractionModel``, and ``layer_norm``, ``post_extract_proj``, ``mask_emb`` of
``Data2VecAudioModel``.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.nn.config import EncoderConfig, SpeechFrontEndConfig
from d2v_fast.nn.frontends.checks import check_dtype, check_tensor
from d2v_fast.nn.frontends.lattice import PackedWaveforms, geometry, lay_rows, pack_waveforms
from d2v_fast.nn.frontends.waveforms import Lengths, check_finite
from d2v_fast.ops import bias_gelu, conv0_norm_gelu, layer_norm_gelu, strided_conv


class ConvLayer(nn.Module):
    """Convolution, then layer norm over channels, group norm with one group per channel, or nothing, then GELU."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int, stride: int, bias: bool, norm: str) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_dim, out_dim, kernel, stride, bias=bias)  # holds the parameters
        nn.init.kaiming_normal_(self.conv.weight)
        norms = {"layer": nn.LayerNorm, "group": lambda dim: nn.GroupNorm(dim, dim), "none": lambda dim: None}
        self.norm = norms[norm](out_dim)

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """x [B, S_in, C_in], in the first layer waveforms [B, S], to [B, S_out, C_out].

        ``segments`` [U, 2]: the frames that a group norm takes together, as in :func:`conv0_norm_gelu`.
        """
        weight, bias, stride, norm = self.conv.weight, self.conv.bias, self.conv.stride[0], self.norm
        if x.dim() == 2:
            kind = "layer" if isinstance(norm, nn.LayerNorm) else "group"
            return conv0_norm_gelu(
                x, weight, bias, norm.weight, norm.bias, stride=stride, norm=kind, eps=norm.eps, segments=segments
            )
        if norm is None:
            return bias_gelu(strided_conv(x, weight, stride=stride), bias)
        return layer_norm_gelu(strided_conv(x, weight, bias, stride=stride), norm.weight, norm.bias, eps=norm.eps)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x unchanged, its gradient multiplied by ``factor`` (fairseq ``GradMultiply``)."""
    return x if factor == 1 else _ScaleGradient.apply(x, factor)


class SpeechFrontEnd(nn.Module):
    """Waveforms [B, S] to frames [B, T, C]; student and teacher share the result.

    All waveforms of a batch lie in one row, at multiples of the convolutions' total stride
    (:mod:`d2v_fast.nn.frontends.lattice`), so that every convolution is one or two matrix products. With lengths, or
    as :class:`PackedWaveforms`, they may differ in length: no padding is computed, and each has the frames that it
    would have alone.

    Memory for backward, for a row of L samples, T_l frames and C_l channels behind convolution l = 0 .. n, elements of
    e bytes (2 under bfloat16 autocast), layer norm: the waveforms and 1 / deviation of convolution 0; the output of
    every convolution but the last, which is the next one's input; from convolution 1 on, what its norm reads, and mean
    and 1 / deviation of the frames::

        4 L + 4 T_0  +  sum_{l < n} e C_l T_l  +  sum_{l > 0} (e C_l + 8) T_l

    bytes, besides parameters. With a group norm, 8 U (k + k k) bytes of statistics for U waveforms and kernel k take
    the place of 4 T_0, and there are none in later layers. On the CPU small layers, and those without norm, go
    through PyTorch's autograd and keep more. ``feature_grad_mult = 0`` keeps nothing.
    """

    def __init__(self, config: SpeechFrontEndConfig, encoder: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.frozen = config.feature_grad_mult <= 0
        layers, in_dim = [], 1
        for index, (out_dim, kernel, stride) in enumerate(config.conv_layers):
            # wav2vec 2.0 "default" mode: group norm after the first convolution only
            norm = config.conv_norm if config.conv_norm == "layer" or index == 0 else "none"
            layers.append(ConvLayer(in_dim, out_dim, kernel, stride, config.conv_bias, norm))
            in_dim = out_dim
        self.convs = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(in_dim)
        self.proj = nn.Linear(in_dim, encoder.dim)
        self.mask_embedding = nn.Parameter(torch.rand(encoder.dim))

    def num_positions(self, waveforms: Tensor) -> int:
        """Frames that :meth:`features` gives for these waveforms [B, S]."""
        return self.config.num_frames(waveforms.shape[-1])

    def output_lengths(self, lengths: Tensor | Sequence[int]) -> Tensor:
        """Frames [B] int64 of waveforms of ``lengths`` [B] samples, on the device of ``lengths``; 0 if too short.

        Raises:
            TypeError: ``lengths`` are no integers.
        """
        frames = torch.as_tensor(lengths)
        if frames.is_floating_point() or frames.is_complex() or frames.dtype == torch.bool:
            raise TypeError(f"lengths must be integers, got {frames.dtype}")
        frames = frames.long()
        for _, kernel, stride in self.config.conv_layers:
            frames = (frames - kernel).div(stride, rounding_mode="floor") + 1
        return frames.clamp(min=0)

    def features(
        self,
        waveforms: Tensor,  # [B, S]
        lengths: Lengths | None = None,  # [B]
        *,
        sample_rate: int | None = None,
        check: bool = False,
    ) -> Tensor:
        """Waveforms [B, S], normalised to zero mean and unit variance each, to frames [B, T, C] before masking.

        Args:
            waveforms: [B, S] in the weights' dtype (with autocast: float32, bfloat16 or float16); see
                :func:`~d2v_fast.nn.frontends.waveforms.normalise`.
            lengths: [B] samples of each, known on the host. What lies behind them is not looked at; frames behind a
                waveform's own are 0, and T is that of the longest. By default all of S. On a GPU, small tables are
                copied there, and ``torch.compile`` cannot read lengths: :meth:`packed_features` takes what a data
                loader has prepared.
            sample_rate: of the waveforms in Hz, where it is known, to be checked.
            check: look for samples that are not finite on a GPU as well, which has to be waited for.

        Raises:
            TypeError: waveforms of another dtype, or ``lengths`` no integers.
            ValueError: waveforms not [B, S] with a row, fewer samples than one frame needs, samples that are not
                finite (on the CPU, or with ``check``), lengths not [B] or beyond S, or another sample rate.
        """
        self._check(waveforms, sample_rate)
        if lengths is not None:
            packed = pack_waveforms(waveforms, self.config, lengths)
            return packed.padded(self.packed_features(packed, check=check))
        check_finite("waveforms", waveforms, check)
        return self._project(self.convolve(waveforms))

    def packed_features(
        self, packed: PackedWaveforms, *, sample_rate: int | None = None, check: bool = False
    ) -> Tensor:
        """Frames [1, M, C] of waveforms in one row, guard frames included: ``packed.valid`` or ``packed.padded`` sorts
        them out. Arguments and errors are those of :meth:`features`; made for another stack, they are a ValueError."""
        if not isinstance(packed, PackedWaveforms):
            raise TypeError(f"packed must be PackedWaveforms, got {type(packed).__name__}")
        if packed.layers != geometry(self.config):
            raise ValueError(
                f"packed must be made for convolutions of (kernel, stride) {geometry(self.config)}, got {packed.layers}"
            )
        self._check(packed.samples, sample_rate)
        check_finite("samples", packed.samples, check)
        return self._project(self.convolve(packed))

    def _check(self, waveforms: Tensor, sample_rate: int | None) -> None:
        check_tensor("waveforms", waveforms)
        check_dtype("waveforms", waveforms, self.proj.weight)
        if waveforms.ndim != 2 or waveforms.shape[0] == 0:
            raise ValueError(f"waveforms must be [B, S] with at least one row, got {tuple(waveforms.shape)}")
        if waveforms.shape[1] < self.config.min_samples:
            raise ValueError(
                f"waveforms must have at least {self.config.min_samples} samples, got {waveforms.shape[1]}"
            )
        if sample_rate is not None and sample_rate != self.config.sample_rate:
            raise ValueError(f"sample_rate must be the model's {self.config.sample_rate} Hz, got {sample_rate}")

    def _even_segments(self, waveforms: Tensor) -> Tensor | None:
        """``PackedWaveforms.conv_segments`` of waveforms [B, S] of one length, made where they are."""
        if self.config.conv_norm != "group":
            return None
        (B, S), (_, kernel, stride) = waveforms.shape, self.config.conv_layers[0]
        apart = -(-S // self.config.total_stride) * self.config.total_stride // stride
        first = torch.arange(B, device=waveforms.device) * apart
        return torch.stack([first, torch.full_like(first, (S - kernel) // stride + 1)], 1)

    def convolve(self, waveforms: Tensor | PackedWaveforms) -> Tensor:
        """The convolutions alone, as fairseq's ``ConvFeatureExtractionModel``; arguments are not checked.

        Waveforms [B, S] to frames [B, T, 512], or packed ones to the M frames [1, M, 512] of their row.
        """
        if isinstance(waveforms, PackedWaveforms):
            return self._run(waveforms.samples, waveforms.conv_segments)
        B, S = waveforms.shape
        if B == 1:
            return self._run(waveforms, None)
        x = self._run(lay_rows(waveforms, self.config), self._even_segments(waveforms))
        return x.view(B, -1, x.shape[2])[:, : self.config.num_frames(S)]

    def _run(self, samples: Tensor, segments: Tensor | None) -> Tensor:
        """A row of samples [1, L] to frames [1, M, 512]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            first, *rest = self.convs
            x = first(samples, segments)
            for layer in rest:
                x = layer(x)
        return x if self.frozen else scale_gradient(x, self.config.feature_grad_mult)

    def _project(self, x: Tensor) -> Tensor:
        """Frames [.., 512] to [.., C]."""
        return self.proj(self.norm(x))

    def apply_mask(self, features: Tensor, mask: Tensor) -> Tensor:
        """Replace the masked rows of ``features`` [B, T, C] by the mask embedding; ``mask`` bool [B, T]."""
        features = F.dropout(features, self.config.input_dropout, self.training)
        return torch.where(mask[..., None], self.mask_embedding.to(features.dtype), features)

    def forward(self, waveforms: Tensor, mask: Tensor | None = None, padding_mask: Tensor | None = None) -> Tensor:
        """Waveforms [B, S] to encoder input [B, T, C]; padding is the encoder's business."""
        features = self.features(waveforms)
        return features if mask is None else self.apply_mask(features, mask)

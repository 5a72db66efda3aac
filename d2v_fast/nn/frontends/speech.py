"""Waveform to frames: strided convolutions, each with norm and GELU, then layer norm and projection.

fairseq: ``ConvFeatureExtractionModel``, and ``layer_norm``, ``post_extract_proj``, ``mask_emb`` of
``Data2VecAudioModel``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.nn.config import EncoderConfig, SpeechFrontEndConfig
from d2v_fast.nn.frontends.checks import check_dtype
from d2v_fast.ops import bias_gelu, layer_norm_gelu


def strided_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """``conv1d`` without padding on channels-last x [B, S, C], weight [D, C, kernel]: [B, T, D].

    A group of ``stride`` taps is one matrix product on a view of ``x`` in which a row is ``stride`` steps side by side;
    each tap that is left over is one on every ``stride``-th step. No im2col, and no transposed activations.
    """
    B, S, C = x.shape
    D, _, kernel = weight.shape
    T = (S - kernel) // stride + 1
    whole = kernel - kernel % stride
    y = None
    for tap in range(0, whole, stride):
        rows = x[:, tap : tap + T * stride].reshape(B, T, stride * C)
        part = F.linear(rows, weight[:, :, tap : tap + stride].transpose(1, 2).reshape(D, stride * C))
        y = part if y is None else y + part
    for tap in range(whole, kernel):
        part = F.linear(x[:, tap : tap + (T - 1) * stride + 1 : stride], weight[:, :, tap])
        y = part if y is None else y + part
    return y if bias is None else y + bias


class ConvLayer(nn.Module):
    """Convolution, then layer norm over channels, group norm with one group per channel, or nothing, then GELU."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int, stride: int, bias: bool, norm: str) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_dim, out_dim, kernel, stride, bias=bias)  # holds the parameters
        nn.init.kaiming_normal_(self.conv.weight)
        norms = {"layer": nn.LayerNorm, "group": lambda dim: nn.GroupNorm(dim, dim), "none": lambda dim: None}
        self.norm = norms[norm](out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S_in, C_in] -> [B, S_out, C_out]."""
        bias = self.conv.bias if self.norm is not None else None
        x = strided_conv(x, self.conv.weight, bias, self.conv.stride[0])
        if isinstance(self.norm, nn.LayerNorm):
            return layer_norm_gelu(x, self.norm.weight, self.norm.bias, eps=self.norm.eps)
        if self.norm is None:
            return bias_gelu(x, self.conv.bias)
        return bias_gelu(self.norm(x.transpose(1, 2)).transpose(1, 2))


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x unchanged, its gradient multiplied by ``factor`` (fairseq ``GradMultiply``)."""
    return x if factor == 1 else x.detach() + (x - x.detach()) * factor


class SpeechFrontEnd(nn.Module):
    """Waveforms [B, S] to frames [B, T, C]; student and teacher share the result."""

    def __init__(self, config: SpeechFrontEndConfig, encoder: EncoderConfig) -> None:
        super().__init__()
        self.config = config
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

    def features(self, waveforms: Tensor) -> Tensor:
        """Waveforms [B, S], normalised to zero mean and unit variance each, to frames [B, T, C] before masking.

        Raises:
            TypeError: not of the weights' dtype (with autocast: not float32, bfloat16 or float16).
            ValueError: not [B, S], or fewer samples than one frame needs.
        """
        check_dtype("waveforms", waveforms, self.proj.weight)
        if waveforms.ndim != 2:
            raise ValueError(f"waveforms must be [B, S], got {tuple(waveforms.shape)}")
        if waveforms.shape[1] < self.config.min_samples:
            raise ValueError(
                f"waveforms must have at least {self.config.min_samples} samples, got {waveforms.shape[1]}"
            )
        factor = self.config.feature_grad_mult
        with torch.set_grad_enabled(torch.is_grad_enabled() and factor > 0):
            x = self.convs(waveforms[:, :, None])  # [B, T, 512]
        x = scale_gradient(x, factor) if factor > 0 else x
        return self.proj(self.norm(x))

    def apply_mask(self, features: Tensor, mask: Tensor) -> Tensor:
        """Replace the masked rows of ``features`` [B, T, C] by the mask embedding; ``mask`` bool [B, T]."""
        features = F.dropout(features, self.config.input_dropout, self.training)
        return torch.where(mask[..., None], self.mask_embedding.to(features.dtype), features)

    def forward(self, waveforms: Tensor, mask: Tensor | None = None, padding_mask: Tensor | None = None) -> Tensor:
        """Waveforms [B, S] to encoder input [B, T, C]; padding is the encoder's business."""
        features = self.features(waveforms)
        return features if mask is None else self.apply_mask(features, mask)

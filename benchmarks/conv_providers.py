"""Who computes the speech convolutions: our ops with and without the extension, fairseq's code, PyTorch of today."""

import fairseq_eager
import modern_eager
from common import without_extension
from conv_shapes import channel_major
from driver import Provider, compiled, eager, ours
from torch import Tensor

from d2v_fast.ops import bias_gelu, conv0_norm_gelu, layer_norm_gelu, pos_conv, strided_conv


def conv_encoder(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], norm_weights: list[Tensor | None],
    norm_biases: list[Tensor | None], *, strides: list[int], norm: str, eps: float,
) -> dict:  # fmt: skip
    """The ops of ``SpeechFrontEnd`` on waveforms [B, S], or on x [B, S, C] in its middle: y [B, T, C]."""
    for weight, bias, gamma, beta, stride in zip(weights, biases, norm_weights, norm_biases, strides, strict=True):
        if x.dim() == 2:
            x = conv0_norm_gelu(x, weight, bias, gamma, beta, stride=stride, norm=norm, eps=eps)
        elif gamma is None:
            x = bias_gelu(strided_conv(x, weight, stride=stride), bias)
        else:
            x = layer_norm_gelu(strided_conv(x, weight, bias, stride=stride), gamma, beta, eps=eps)
    return {"y": x}


def positions(x: Tensor, weights: list[Tensor], biases: list[Tensor], *, groups: int, norm: bool, eps: float) -> dict:
    """The op of ``ConvPositions``."""
    return {"y": pos_conv(x, weights, biases, groups=groups, norm=norm, eps=eps)}


CONV_PROVIDERS: dict[str, Provider] = {
    "d2v_fast": ours(conv_encoder),
    "no extension": ours(conv_encoder, around=without_extension),
    "fairseq": eager(fairseq_eager.conv_encoder, prepare=channel_major),
    "eager": eager(modern_eager.conv_encoder, prepare=channel_major),
    "eager NHWC": eager(modern_eager.conv_encoder_nhwc),
    "eager+compile": compiled(modern_eager.conv_encoder, prepare=channel_major),
    "fairseq+compile": compiled(fairseq_eager.conv_encoder, prepare=channel_major),
}
POSITION_PROVIDERS: dict[str, Provider] = {
    "d2v_fast": ours(positions),
    "no extension": ours(positions, around=without_extension),
    "fairseq": eager(fairseq_eager.pos_conv),
    "eager": eager(modern_eager.pos_conv),
    "eager+compile": compiled(modern_eager.pos_conv),
    "fairseq+compile": compiled(fairseq_eager.pos_conv),
}

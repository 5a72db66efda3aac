"""Convolutions of fairseq's data2vec 2.0: decoders (``Decoder1d``, ``Decoder2d``) and relative positions of speech.

Each is a grouped convolution, a layer norm over channels without weights, and GELU. Channels stay last here, so that
nothing is transposed; upstream transposes twice a layer, as a copy.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.ops import layer_norm_gelu, pos_conv
from d2v_fast.patches._core import Options, Seam, fall_back
from d2v_fast.patches.fairseq.multi_attention import plain

_PARTS = (("Conv1d", "Conv2d"), ("SamePad", "SamePad2d"), ("TransposeLast",), ("LayerNorm", "FusedLayerNorm"))
_PARTS = (*_PARTS, ("TransposeLast",), ("GELU",))


def _unfit_layer(layer: nn.Module) -> str | None:
    """Why this is not one of those layers."""
    if not plain(layer, "Sequential") or len(layer) != len(_PARTS):
        return "a layer is not convolution, norm and GELU alone"
    if not all(plain(part, *kinds) for part, kinds in zip(layer, _PARTS, strict=True)):
        return "a part of a layer is of another class, or watched"
    conv, pad, _, norm, _, gelu = layer
    sizes = conv.kernel_size
    same = all(p == k // 2 for p, k in zip(conv.padding, sizes, strict=True)) and len(set(sizes)) == 1
    if not same or {*conv.stride, *conv.dilation} != {1} or conv.padding_mode != "zeros":
        return "a convolution does not keep the number of positions"
    if pad.remove != 1 - sizes[0] % 2:
        return "a convolution is cut to another number of positions"
    if norm.weight is not None or len(norm.normalized_shape) != 1 or gelu.approximate != "none":
        return "a norm has weights, or GELU is approximated"
    return None


def unfit(layers: nn.Sequential) -> str | None:
    """Why :func:`convolve` and :func:`convolve_grid` cannot run ``layers``."""
    if not plain(layers, "Sequential"):
        return "the layers are watched"
    return next((reason for reason in map(_unfit_layer, layers) if reason is not None), None)


def convolve(x: Tensor, layer: nn.Sequential) -> Tensor:
    """One layer over frames: [B, T, C] -> [B, T, C']."""
    conv, eps = layer[0], layer[3].eps
    if conv.in_channels == conv.out_channels:
        return pos_conv(x, [conv.weight], [conv.bias], groups=conv.groups, eps=eps)
    z = F.conv1d(x.mT, conv.weight, conv.bias, padding=conv.padding, groups=conv.groups)
    return layer_norm_gelu(z[..., : x.shape[1]].mT, eps=eps)


def convolve_grid(x: Tensor, layer: nn.Sequential) -> Tensor:
    """One layer over a grid: [B, Y, X, C] -> [B, Y, X, C']."""
    conv, eps = layer[0], layer[3].eps
    z = F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=conv.padding, groups=conv.groups)
    return layer_norm_gelu(z[..., : x.shape[1], : x.shape[2]].permute(0, 2, 3, 1), eps=eps)


def positions(encoder: nn.Sequential, x: Tensor) -> Tensor:
    """``relative_positional_encoder`` of speech, [B, T, C] -> [B, T, C]: all of its convolutions at once."""
    if not plain(encoder, "Sequential") or len(encoder) < 3:
        return encoder(x)
    first, *layers, last = encoder
    ends = plain(first, "TransposeLast") and plain(last, "TransposeLast")
    if not ends or any(_unfit_layer(layer) is not None for layer in layers):
        return encoder(x)
    kinds = {(layer[0].in_channels, layer[0].out_channels, layer[0].groups, layer[3].eps) for layer in layers}
    if len(kinds) > 1:
        return encoder(x)
    convs = [layer[0] for layer in layers]
    weights, biases = [c.weight for c in convs], [c.bias for c in convs]
    return pos_conv(x, weights, biases, groups=convs[0].groups, eps=layers[0][3].eps)


def _unfit_decoder(self: nn.Module) -> str | None:
    return unfit(self.blocks)


def _run(self: nn.Module, x: Tensor, layer: Callable[[Tensor, nn.Sequential], Tensor]) -> Tensor:
    for block in self.blocks:
        y = layer(x, block)
        x = y + x if self.decoder_cfg.decoder_residual and y.shape[-1] == x.shape[-1] else y
    return x


def trunk(self: nn.Module, x: Tensor) -> Tensor:
    """What a decoder computes of x [B, T, C] before its projection: [B, T, C']."""
    if hasattr(self, "h_size"):
        return _run(self, x.unflatten(1, (self.h_size, self.w_size)), convolve_grid).flatten(1, 2)
    return _run(self, x, convolve)


def _make(original: Callable, options: Options) -> Callable:
    def forward(self, x, mask_info):
        """x [B, T, C] with noise at masked positions -> predictions [B, T, C]."""
        reason = _unfit_decoder(self)
        if reason is not None:
            fall_back(self, "forward", reason, options)
            return original(self, x, mask_info)
        return self.proj(trunk(self, x))

    return forward


def _seam(known: str) -> Seam:
    return Seam(
        "conv",
        "forward",
        _make,
        "convolutions with channels last, norm and GELU in one pass",
        known=frozenset({known}),
        refuses=_unfit_decoder,
        op="pos_conv",
    )


DECODER_1D = _seam("d1f8b5024ddb4cd3")
DECODER_2D = _seam("816407a49d9816cd")

"""fairseq's speech convolutions: those over the waveform (seam S5) and the positional ones (S6).

Dims: B batch, S samples, T frames, C channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from d2v_fast.checkpoints.rules import pairs
from d2v_fast.nn.config import EncoderConfig, SpeechFrontEndConfig
from d2v_fast.nn.frontends.speech import SpeechFrontEnd
from d2v_fast.ops import pos_conv
from d2v_fast.patches._core import Options, Seam, fall_back
from d2v_fast.patches._sharing import Bypassed, Shared, live_weight, plan_of, too_precise

CONV_KINDS = (
    "ModuleList",
    "Sequential",
    "Conv1d",
    "Dropout",
    "TransposeLast",
    "Fp32LayerNorm",
    "Fp32GroupNorm",
    "GELU",
)
POSITION_KINDS = ("Sequential", "Conv1d", "SamePad", "TransposeLast", "LayerNorm", "FusedLayerNorm", "GELU")

SETTINGS = ("stride", "padding", "dilation", "groups", "padding_mode", "num_groups", "eps", "approximate", "remove")


def _plain_conv(conv: nn.Conv1d, padding: int) -> bool:
    return conv.padding == (padding,) and conv.dilation == (1,) and conv.padding_mode == "zeros"


# ---- over the waveform


class _Extractor:
    """Our convolutions with the parameters of a ``ConvFeatureExtractionModel``."""

    def __init__(self, theirs: nn.Module) -> None:
        self._bypassed = Bypassed(theirs, CONV_KINDS, settings=SETTINGS)
        self._layers = list(theirs.conv_layers)
        self._unfit = unfit_extractor(theirs)
        if self._unfit is None:
            self._share(theirs)

    def _share(self, theirs: nn.Module) -> None:
        convs = [layer[0] for layer in self._layers]
        norms = [_norm(layer) for layer in self._layers]
        config = SpeechFrontEndConfig(
            conv_layers=tuple((conv.out_channels, conv.kernel_size[0], conv.stride[0]) for conv in convs),
            conv_norm="group" if isinstance(norms[0], nn.GroupNorm) else "layer",
            conv_bias=convs[0].bias is not None,
        )
        with torch.device("meta"):
            ours = SpeechFrontEnd(config, EncoderConfig())
        for name in ("norm", "proj", "mask_embedding"):  # what follows the convolutions stays fairseq's
            delattr(ours, name)
        rules = []
        for i, (layer, norm) in enumerate(zip(ours.convs, norms, strict=True)):
            at, there = f"convs.{i}.", f"conv_layers.{i}."
            rules += pairs(at, there, {"conv": ("0",)}, kinds=("weight", "bias") if config.conv_bias else ("weight",))
            if norm is not None:
                rules += pairs(at, there, {"norm": ("2.1" if config.conv_norm == "layer" else "2",)})
                layer.norm.eps = norm.eps
        self._shared, self._min_samples = Shared(ours, theirs, rules), config.min_samples

    def valid(self) -> bool:
        """Whether modules and settings are those it was made of."""
        return self._bypassed.valid()

    def has_frames(self, x: Tensor) -> bool:
        """Whether x are waveforms [B, S] that the convolutions make frames of."""
        return x.dim() == 2 and len(x) > 0 and (self._unfit is not None or x.shape[1] >= self._min_samples)

    def reason(self, x: Tensor) -> str | None:
        """Why ``x`` goes through fairseq's own convolutions, or None."""
        if self._unfit is not None:
            return self._unfit
        found = too_precise(x) or self._bypassed.watched()
        if found is None and any(layer[1].p > 0 and layer[1].training for layer in self._layers):
            found = "there is dropout between the convolutions"
        weight = self._layers[0][0].weight
        if found is None and x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            found = f"waveforms are {x.dtype} and weights {weight.dtype}"
        return found

    def __call__(self, x: Tensor) -> Tensor:
        """[B, S] -> [B, C, T]."""
        return self._shared.module.convolve(x).mT


def _norm(layer: nn.Sequential) -> nn.Module | None:
    """The norm of a block: convolution, dropout, [norm,] GELU."""
    return None if len(layer) == 3 else layer[2][1] if isinstance(layer[2], nn.Sequential) else layer[2]


def unfit_extractor(theirs: nn.Module) -> str | None:
    """Why ours does not follow the settings of this ``ConvFeatureExtractionModel``, or None."""
    if (reason := Bypassed(theirs, CONV_KINDS).misfit()) is not None:
        return reason
    layers = list(theirs.conv_layers)
    norms = [type(_norm(layer)).__name__ for layer in layers]
    group_first = ["Fp32GroupNorm", *["NoneType"] * (len(layers) - 1)]
    if norms not in (["Fp32LayerNorm"] * len(layers), group_first):
        return f"norms are {', '.join(norms)}: neither a layer norm in every layer nor a group norm in the first"
    for i, layer in enumerate(layers):
        conv, gelu, norm = layer[0], layer[-1], _norm(layer)
        if not _plain_conv(conv, 0) or conv.groups != 1 or (conv.bias is None) != (layers[0][0].bias is None):
            return f"conv_layers.{i} is not a plain convolution: {conv}"
        if getattr(gelu, "approximate", "none") != "none":
            return f"conv_layers.{i} has GELU's approximation {gelu.approximate}"
        if norm is not None and (norm.weight is None or norm.bias is None):
            return f"conv_layers.{i} has a norm without weight and bias"
        if isinstance(norm, nn.GroupNorm) and norm.num_groups != norm.num_channels:
            return f"conv_layers.{i} has a group norm of {norm.num_groups} groups for {norm.num_channels} channels"
    return None


def _make_extractor(original: Callable, options: Options) -> Callable:
    def forward(self: Any, x: Tensor) -> Tensor:  # [B, S] -> [B, C, T]
        plan = plan_of(self, "convolutions", _Extractor)
        if not plan.has_frames(x):  # no clips, or an error that upstream has its own words for
            return original(self, x)
        reason = plan.reason(x)
        if reason is None:
            return plan(x)
        fall_back(self, "forward", reason, options)
        return original(self, x)

    return forward


EXTRACTOR = Seam(
    "conv",
    "forward",
    _make_extractor,
    "convolution, norm and GELU in one op each, channels last",
    known=frozenset({"778734b5d89d2e09"}),
    refuses=unfit_extractor,
    prepare=lambda owner: plan_of(owner, "convolutions", _Extractor),
    op="conv_encoder",
)


# ---- positions


def _blocks(module: nn.Sequential) -> list[nn.Sequential]:
    """Blocks of convolution, cut, [transpose, norm, transpose,] GELU; that of wav2vec 2.0 is one, without norm."""
    first = next(iter(module), None)
    return list(module) if isinstance(first, nn.Sequential) else [module]


def unfit_positions(module: nn.Module) -> str | None:
    """Why ours does not follow these positional convolutions, or None."""
    if (reason := Bypassed(module, POSITION_KINDS, weight_norm=True).misfit()) is not None:
        return reason
    blocks = _blocks(module)
    for block in blocks:
        names = [type(part).__name__ for part in block]
        normed = ["TransposeLast", "LayerNorm", "TransposeLast"]
        names = ["LayerNorm" if name == "FusedLayerNorm" else name for name in names]
        if names[1:] not in (["SamePad", "GELU"], ["SamePad", *normed, "GELU"]) or len(names) != len(blocks[0]):
            return f"a block of {', '.join(names)} is unknown"
        conv, norm = block[0], block[3] if len(block) > 3 else None
        kernel, channels = conv.kernel_size[0], conv.in_channels
        if not _plain_conv(conv, kernel // 2) or conv.stride != (1,) or conv.out_channels != channels:
            return f"{conv} does not keep frames and channels"
        if conv.groups != blocks[0][0].groups or block[1].remove != (kernel % 2 == 0):
            return f"groups or frames that are cut off are not the same everywhere: {conv}"
        if norm is not None and (norm.elementwise_affine or norm.eps != blocks[0][3].eps):
            return f"{norm} has weights or an eps of its own"
        if getattr(block[-1], "approximate", "none") != "none":
            return f"GELU's approximation {block[-1].approximate}"
    return None


def positions(module: nn.Sequential, x: Tensor, segments: Tensor | None = None) -> Tensor:
    """What fairseq's ``pos_conv`` adds to x [B, T, C]; its weights are read at every call."""
    blocks = _blocks(module)
    convs, first = [block[0] for block in blocks], blocks[0]
    norm = len(first) > 3
    options = {"groups": convs[0].groups, "norm": norm, "segments": segments, **({"eps": first[3].eps} if norm else {})}
    return pos_conv(x, [live_weight(conv) for conv in convs], [conv.bias for conv in convs], **options)


class Positions(nn.Module):
    """fairseq's ``pos_conv`` where our encoder has its own."""

    def __init__(self, theirs: nn.Sequential) -> None:
        super().__init__()
        self._theirs = (theirs,)  # in a tuple: not a part of ours

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """x [B, T, C] -> [B, T, C]."""
        return positions(self._theirs[0], x, segments)


class _Positions:
    """Whether fairseq's ``pos_conv`` can be computed without calling its parts."""

    def __init__(self, theirs: nn.Sequential) -> None:
        self._bypassed = Bypassed(theirs, POSITION_KINDS, weight_norm=True, settings=SETTINGS)
        self._unfit = unfit_positions(theirs)

    def valid(self) -> bool:
        """Whether modules and settings are those it was made of."""
        return self._bypassed.valid()

    def reason(self) -> str | None:
        """Why they have to be called, or None."""
        return self._unfit or self._bypassed.watched()


def _make_positions(original: Callable, options: Options) -> Callable:
    def forward(self: Any, input: Tensor) -> Tensor:  # [B, C, T] -> [B, C, T]; the name is that of nn.Sequential
        reason = too_precise(input) or plan_of(self, "positions", _Positions).reason()
        if reason is None:
            return positions(self, input.mT).mT
        fall_back(self, "forward", reason, options)
        return original(self, input)

    return forward


POSITIONS = Seam(
    "conv",
    "forward",
    _make_positions,
    "convolution, norm and GELU in one op, for calls that the encoder leaves",
    refuses=unfit_positions,
    prepare=lambda owner: plan_of(owner, "positions", _Positions),
)

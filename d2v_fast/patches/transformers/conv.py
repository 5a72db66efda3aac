"""The convolutions of Data2VecAudio, Wav2Vec2 and HuBERT: over the waveform, and those for positions."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from d2v_fast.checkpoints.rules import Rule, pairs
from d2v_fast.nn.config import EncoderConfig, SpeechFrontEndConfig
from d2v_fast.nn.frontends.speech import SpeechFrontEnd
from d2v_fast.nn.positions import ConvPositions
from d2v_fast.patches._core import Options, fall_back
from d2v_fast.patches.transformers._plan import (
    Plan,
    Survey,
    Unfit,
    around,
    is_gelu,
    make_plan,
    planned,
)

PREFIXES = ("Data2VecAudio", "Wav2Vec2", "Hubert")
CONV_FORWARDS = {
    "ConvLayer": {"280a8648313ddc64"},
    "LayerNormConvLayer": {"280a8648313ddc64"},
    "GroupNormConvLayer": {"80354caff10c3873"},
    "NoLayerNormConvLayer": {"633f0935d0bd6ae3"},
}
POSITION_FORWARDS = {
    "PositionalConvEmbedding": {"82a0c51f2f726f44", "ce1951f502e96710", "21e2cdcdebc5105f"},
    "PositionalConvLayer": {"cb4450a5eff80550"},
    "PadLayer": {"59d54f48c0e6351f"},
    "SamePadLayer": {"59d54f48c0e6351f"},
}
CONV_SOURCES, POSITION_SOURCES = (
    {prefix + name: frozenset(known) for prefix in PREFIXES for name, known in forwards.items()}
    for forwards in (CONV_FORWARDS, POSITION_FORWARDS)
)
EPS = 1e-5  # of the norms here, in ours


def build_convs(survey: Survey) -> tuple[nn.Module, Sequence[Rule]]:
    """Our front-end, the convolutions alone, for the feature encoder ``survey.root``."""
    layers = list(survey.root.conv_layers)
    convs = [layer.conv for layer in layers]
    if not all(is_gelu(layer.activation) for layer in layers):
        raise Unfit("the activation of its convolutions is not GELU")
    for name, value in (("padding", (0,)), ("dilation", (1,)), ("groups", 1)):
        if survey.same(convs, name) != value:
            raise Unfit(f"its convolutions have {name} {getattr(convs[0], name)}")
    norms = [getattr(layer, "layer_norm", None) for layer in layers]
    kinds = [type(norm).__name__ for norm in norms]
    if kinds == ["LayerNorm"] * len(layers):
        kind = "layer"
    elif kinds == ["GroupNorm"] + ["NoneType"] * (len(layers) - 1) and norms[0].num_groups == norms[0].num_channels:
        kind = "group"
    else:
        raise Unfit(f"its norms are {', '.join(kinds)}")
    survey.same(norms[: kinds.count("LayerNorm") or 1], "eps")
    if norms[0].eps != EPS:
        raise Unfit(f"its norms have an eps of {norms[0].eps}")
    sizes = tuple((conv.out_channels, conv.kernel_size[0], conv.stride[0]) for conv in convs)
    bias = [conv.bias is not None for conv in convs]
    if any(has != bias[0] for has in bias):
        raise Unfit("some convolutions have a bias and others have none")
    survey.same(layers, "gradient_checkpointing")
    config = SpeechFrontEndConfig(conv_layers=sizes, conv_norm=kind, conv_bias=bias[0])
    with torch.device("meta"):
        ours = SpeechFrontEnd(config, EncoderConfig(dim=1, heads=1))
    del ours.norm, ours.proj, ours.mask_embedding  # what follows the convolutions stays upstream's
    rules = []
    for index in range(len(layers)):
        at = f"convs.{index}.", f"conv_layers.{index}."
        rules += pairs(*at, {"conv": ("conv",)}, kinds=("weight", "bias") if bias[0] else ("weight",))
        rules += pairs(*at, {"norm": ("layer_norm",)}) if norms[index] is not None else []
    return ours, rules


def convs_plan(features: nn.Module) -> Plan:
    """Ours around a feature encoder."""
    return make_plan(features, CONV_SOURCES, build_convs)


def make_convs(original: Callable, options: Options) -> Callable:
    """``forward`` of a feature encoder: waveforms [B, S] -> features [B, C, T].

    Waveforms that upstream refuses, too short or of another dtype than the weights, are upstream's to refuse.
    """

    def forward(self, input_values: Tensor) -> Tensor:
        shared, reason = planned(self, convs_plan)
        if reason is None and self.training and self.conv_layers[0].gradient_checkpointing:
            reason = "its layers are computed again in backward (gradient checkpointing)"
        if reason is not None:
            fall_back(self, "forward", reason, options)
            return original(self, input_values)
        ours = shared.module
        if not _takes(ours, input_values):
            return original(self, input_values)
        return ours.convolve(input_values).mT

    return forward


def _takes(ours: SpeechFrontEnd, waveforms: Tensor) -> bool:
    if waveforms.dim() != 2 or waveforms.shape[0] == 0 or waveforms.shape[1] < ours.config.min_samples:
        return False
    weight = ours.convs[0].conv.weight
    alike = waveforms.dtype == weight.dtype
    return alike or (waveforms.is_floating_point() and torch.is_autocast_enabled(waveforms.device.type))


def positions(survey: Survey, embed: nn.Module) -> dict[str, int]:
    """The convolutional positions ``embed``, as settings of our encoder."""
    several = hasattr(embed, "layers")  # data2vec's; wav2vec 2.0 and HuBERT have one convolution with a weight norm
    layers = list(embed.layers) if several else [embed]
    if not all(is_gelu(layer.activation) for layer in layers):
        raise Unfit("the activation of its positions is not GELU")
    if several and len(layers) < 2:
        raise Unfit("one convolution for positions would have a weight norm in ours")
    if several and any(layer.layer_norm.eps != EPS or layer.layer_norm.elementwise_affine for layer in layers):
        raise Unfit("the norms of its positions have other settings")
    if not several and not hasattr(embed.conv, "parametrizations"):
        raise Unfit("the convolution for positions has no weight norm that ours can read")
    convs = [layer.conv for layer in layers]
    kernel, groups = survey.same(convs, "kernel_size")[0], survey.same(convs, "groups")
    if several and kernel < 3:
        raise Unfit(f"its positions have kernels of {kernel}")
    return {"pos_conv_depth": len(layers), "pos_conv_width": kernel * len(layers), "pos_conv_groups": groups}


def position_rules(embed: nn.Module, ours: str = "", theirs: str = "") -> list[Rule]:
    """Where the tensors of ``embed`` are in a ConvPositions of ours; ``ours`` and ``theirs`` are prefixes."""
    if hasattr(embed, "layers"):
        return pairs(ours, theirs, {f"convs.{i}": (f"layers.{i}.conv",) for i in range(len(embed.layers))})
    names = ("parametrizations.weight.original0", "parametrizations.weight.original1", "bias")
    return [Rule(f"{ours}convs.0.{name}", (f"{theirs}conv.{name}",)) for name in names]


def build_positions(survey: Survey) -> tuple[nn.Module, Sequence[Rule]]:
    """Our convolutional positions for those of ``survey.root``."""
    embed = survey.root
    settings = positions(survey, embed)
    first = embed.layers[0].conv if hasattr(embed, "layers") else embed.conv
    with torch.device("meta"):
        ours = ConvPositions(EncoderConfig(dim=survey.get(first, "in_channels"), heads=1, **settings))
    return ours, position_rules(embed)


def positions_plan(embed: nn.Module) -> Plan:
    """Ours around a positional embedding."""
    return make_plan(embed, POSITION_SOURCES, build_positions)


def make_positions(original: Callable, options: Options) -> Callable:
    """``forward`` of a positional embedding: [B, T, C] -> [B, T, C]."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        shared, reason = planned(self, positions_plan)
        if reason is not None:
            fall_back(self, "forward", reason, options)
            return original(self, hidden_states)
        return shared.module(hidden_states)

    return forward


FEATURES_SEAM = around(
    "conv",
    make_convs,
    "convolutions as matrix products, norms and GELU fused",
    frozenset({"5ed08171342199ad"}),
    convs_plan,
)
POSITIONS_SEAM = around(
    "conv",
    make_positions,
    "convolutions, norms and GELU fused",
    frozenset(POSITION_FORWARDS["PositionalConvEmbedding"]),
    positions_plan,
)

"""Data2VecVision: the encoder as a whole, its layers and the parts of these.

Upstream: ``transformers.models.data2vec.modeling_data2vec_vision``.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from d2v_fast.checkpoints.rules import Rule, pairs
from d2v_fast.checkpoints.transformers import IMAGE_LAYER, TABLE
from d2v_fast.nn.block import Stream, drop_path_scale
from d2v_fast.nn.config import EncoderConfig
from d2v_fast.nn.encoder import TransformerEncoder
from d2v_fast.nn.positions import RelativePositionBias
from d2v_fast.nn.self_attention import Scope
from d2v_fast.ops import residual_dropout_layer_norm
from d2v_fast.patches._core import Options, Seam, fall_back
from d2v_fast.patches.transformers._plan import (
    Plan,
    Survey,
    Unfit,
    around,
    as_upstream,
    is_gelu,
    make_plan,
    plain,
    planned,
)
from d2v_fast.patches.transformers.linear import checkpointing
from d2v_fast.patches.transformers.text import GELU, make_intermediate

LAYER, INTERMEDIATE = "1765421a31fb985d", "19b43971fdbc292e"
FORWARDS = {
    "Layer": {LAYER},
    "Attention": {"dddc6fb3095f26cc"},
    "SelfAttention": {"552cf972a1c0beee", "fa87e1ac31d7e75b"},
    "SdpaSelfAttention": {"55c62b697b4c89a1", "1dae894a4c4f0e8f"},
    "SelfOutput": {"2eec604e5365a1c6"},
    "Intermediate": {INTERMEDIATE},
    "Output": {"a7512e27b0ab37c6"},
    "DropPath": {"a1bbf9ef89b290d6", "729328c5fd83132e"},
    "RelativePositionBias": {"80b5d9906f9f8b6e"},
}
SOURCES = {"Data2VecVision" + name: frozenset(known) for name, known in FORWARDS.items()}


class ImageEncoder(TransformerEncoder):
    """Ours with a relative-position bias of its own in every layer, where ``own`` says so."""

    def __init__(self, config: EncoderConfig, grid: int, own: bool) -> None:
        super().__init__(config, grid)
        count = config.layers if own else 0
        self.biases = nn.ModuleList(RelativePositionBias(config.heads, grid) for _ in range(count))

    def _layer(self, index: int, stream: Stream, next_norm: nn.LayerNorm, scope: Scope, *options: Any) -> Any:
        if self.biases:
            scope = replace(scope, bias=self.biases[index]())
        return super()._layer(index, stream, next_norm, scope, *options)

    def bring_index(self, device: torch.device) -> None:
        """The table of offsets, which no module of theirs keeps, to ``device``."""
        for bias in (*self.biases, *([] if self.relative_bias is None else [self.relative_bias])):
            if bias.index.device != device:
                bias.index = bias.index.to(device)


def build_encoder(survey: Survey) -> tuple[nn.Module, Sequence[Rule]]:
    """Ours for ``survey.root``, an encoder, with the settings of its modules as they are."""
    encoder = survey.root
    layers = list(encoder.layer)
    if not layers:
        raise Unfit("it has no layers")
    attentions = [layer.attention.attention for layer in layers]
    if not all(is_gelu(layer.intermediate.intermediate_act_fn) for layer in layers):
        raise Unfit("its activation is not GELU")
    dropouts = [part.dropout for layer in layers for part in (layer.attention.output, layer.output)]
    norms = [norm for layer in layers for norm in (layer.layernorm_before, layer.layernorm_after)]
    scaled = [layer.lambda_1 is not None for layer in layers]
    if any(has != scaled[0] for has in scaled):
        raise Unfit("some layers have a LayerScale and others have none")
    tables = _tables(encoder)
    config = EncoderConfig(
        layers=len(layers),
        dim=survey.same(attentions, "all_head_size"),
        ffn_dim=survey.same([layer.intermediate.dense for layer in layers], "out_features"),
        heads=survey.same(attentions, "num_attention_heads"),
        norm="pre",
        norm_eps=survey.same(norms, "eps"),
        dropout=survey.same(dropouts, "p"),
        attention_dropout=_attention_dropout(survey, attentions),
        layer_scale=float(scaled[0]),
        key_bias=False,
        layer_result="block",
        relative_bias=encoder.has_relative_position_bias,
        checkpointing="full" if survey.same(layers, "gradient_checkpointing") else "none",
    )
    grid = _grid(survey, encoder, tables)
    with torch.device("meta"):
        ours = ImageEncoder(config, grid, bool(tables) and not config.relative_bias)
    _keep_index(ours, grid, config.heads)
    for block, layer in zip(ours.layers, layers, strict=True):
        block.drop_path = getattr(layer.drop_path, "drop_prob", 0.0)
        if block.drop_path:
            survey.get(layer.drop_path, "drop_prob")
    return ours, _rules(ours, config.layer_scale > 0)


def _tables(encoder: nn.Module) -> list[nn.Module]:
    """The modules of relative-position bias: that of all layers, or one a layer."""
    own = [layer.attention.attention for layer in encoder.layer]
    own = [attention.relative_position_bias for attention in own if attention.has_relative_position_bias]
    if encoder.has_relative_position_bias and own:
        raise Unfit("it has relative-position biases of all layers and of each one")
    if own and len(own) < len(encoder.layer):
        raise Unfit("some layers have a relative-position bias and others have none")
    return [encoder.relative_position_bias] if encoder.has_relative_position_bias else own


def _grid(survey: Survey, encoder: nn.Module, tables: Sequence[nn.Module]) -> int:
    if not tables:
        return 0
    height, width = survey.same(tables, "window_size")
    survey.get(encoder.config, "patch_size")
    if height != width:
        raise Unfit(f"its images have {height} x {width} patches, ours as many in both directions")
    return height


def _attention_dropout(survey: Survey, attentions: Sequence[nn.Module]) -> float:
    if all("Sdpa" in type(attention).__name__ for attention in attentions):
        return survey.same([attention.config for attention in attentions], "attention_probs_dropout_prob")
    return survey.same([attention.dropout for attention in attentions], "p")


def _keep_index(ours: ImageEncoder, grid: int, heads: int) -> None:
    """Make the table of offsets, which is no parameter of theirs, once for all biases."""
    biases = [*ours.biases, *([] if ours.relative_bias is None else [ours.relative_bias])]
    index = RelativePositionBias(heads, grid).index if biases else None
    for bias in biases:
        bias.index = index


def _rules(ours: ImageEncoder, scaled: bool) -> list[Rule]:
    # the norm behind the encoder is the model's, and nothing reads what ours would give: any of its size will do
    rules = pairs("", "layer.0.", {"norm": ("layernorm_before",)})
    if ours.relative_bias is not None:
        rules.append(Rule("relative_bias.table", (TABLE,)))
    for index in range(len(ours.layers)):
        mine, theirs = f"layers.{index}.", f"layer.{index}."
        attention = f"{theirs}attention.attention."
        weights = tuple(f"{attention}{name}.weight" for name in ("query", "key", "value"))
        rules.append(Rule(f"{mine}attention.qkv.weight", weights))
        rules += [Rule(f"{mine}attention.{n[0]}_bias", (f"{attention}{n}.bias",)) for n in ("query", "value")]
        if scaled:
            rules += [Rule(f"{mine}scale{n}", (f"{theirs}lambda_{n}",)) for n in (1, 2)]
        if ours.biases:
            rules.append(Rule(f"biases.{index}.table", (f"{attention}{TABLE}",)))
        rules += pairs(mine, theirs, IMAGE_LAYER)
    return rules


def encoder_plan(encoder: nn.Module) -> Plan:
    """Ours around ``encoder``."""
    return make_plan(encoder, SOURCES, build_encoder)


def make_encoder(original: Callable, options: Options) -> Callable:
    """``forward`` of an encoder: hidden_states [B, 1 + P, C] -> BaseModelOutput or tuple.

    Attention weights, and images of another size than the model's under a relative-position bias, are upstream's.
    """

    def forward(
        self,
        hidden_states: Tensor,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
        return_dict: bool = True,
    ) -> Any:
        shared, reason = planned(self, encoder_plan)
        reason = reason or _other_grid(self, interpolate_pos_encoding, resolution)
        if output_attentions:
            reason = "attention weights were asked for"
        if reason is not None:
            fall_back(self, "forward", reason, options)
            given = (output_attentions, output_hidden_states, interpolate_pos_encoding, resolution, return_dict)
            return original(self, hidden_states, *given)
        ours = shared.module
        ours.bring_index(hidden_states.device)
        if output_hidden_states:
            found = ours(hidden_states, hidden_states=True).hidden_states
        else:
            found = ours(hidden_states, top_k=1, results_only=True).layer_results
        *rest, last = (as_upstream(x, hidden_states) for x in found)
        states = (*rest, last) if output_hidden_states else None
        if not return_dict:
            return (last,) if states is None else (last, states)
        return sys.modules["transformers.modeling_outputs"].BaseModelOutput(
            last_hidden_state=last, hidden_states=states
        )

    return forward


def _other_grid(encoder: nn.Module, interpolates: bool, resolution: tuple[int, int] | None) -> str | None:
    tables = _tables(encoder)
    if not tables:
        return None
    patch = encoder.config.patch_size
    window = None if resolution is None else (resolution[0] // patch, resolution[1] // patch)
    if interpolates or window != tuple(tables[0].window_size):
        return "relative-position biases are interpolated"
    return None


def make_layer(original: Callable, options: Options) -> Callable:
    """``forward`` of a layer: LayerScale, DropPath, residual and second norm in one pass."""
    as_written = inspect.unwrap(original)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        if checkpointing(self):
            return self._gradient_checkpointing_func(partial(as_written, self, **kwargs), hidden_states, *args)
        norm = self.layernorm_after
        rate = getattr(self.drop_path, "drop_prob", 0.0)
        if not plain(norm, nn.LayerNorm) or not plain(self.drop_path, type(self.drop_path)):
            fall_back(self, "forward", "its norm or DropPath is another module, or has hooks", options)
            return as_written(self, hidden_states, *args, **kwargs)
        x, *rest = self.attention(self.layernorm_before(hidden_states), *args, **kwargs)
        y, h = residual_dropout_layer_norm(
            x,
            hidden_states,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            column_scale=self.lambda_1,
            row_scale=drop_path_scale(x, rate, self.training),
            return_residual=True,
        )
        x = self.output(self.intermediate(y))
        x = x if self.lambda_2 is None else self.lambda_2 * x
        return (self.drop_path(x) + h, *rest)

    return forward


ENCODER_SEAM = around(
    "encoder",
    make_encoder,
    "the whole stack in fused operators, on the same parameters",
    frozenset({"8e9bf3d1f55d8ea0"}),
    encoder_plan,
)
LAYER_SEAM = Seam(
    "norms", "forward", make_layer, "LayerScale, DropPath, residual and norm in one pass", known=frozenset({LAYER})
)
INTERMEDIATE_SEAM = Seam("norms", "forward", make_intermediate, GELU, known=frozenset({INTERMEDIATE}))

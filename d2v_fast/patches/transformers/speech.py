"""Data2VecAudio, Wav2Vec2 and HuBERT: the encoder as a whole, its layers and feed-forward parts.

Upstream: ``transformers.models.{data2vec.modeling_data2vec_audio,wav2vec2.modeling_wav2vec2,hubert.modeling_hubert}``,
which are one code under three names.
"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from d2v_fast.checkpoints.rules import Rule, pairs
from d2v_fast.checkpoints.transformers import SPEECH_LAYER
from d2v_fast.nn.checkpointing import capturing
from d2v_fast.nn.config import EncoderConfig
from d2v_fast.nn.encoder import TransformerEncoder
from d2v_fast.ops import residual_dropout_layer_norm
from d2v_fast.ops._dropout import dropout
from d2v_fast.patches._core import Options, Seam, fall_back
from d2v_fast.patches.transformers._plan import (
    Plan,
    Survey,
    Unfit,
    around,
    as_upstream,
    collected,
    is_gelu,
    make_plan,
    padding_of,
    plain,
    planned,
    record,
    unknown_argument,
)
from d2v_fast.patches.transformers.conv import POSITION_SOURCES, PREFIXES, position_rules, positions
from d2v_fast.patches.transformers.linear import checkpointing, linear_gelu

LAYER, STABLE_LAYER = "1f61dcfb34ca59f2", "550d782f31b1ac8f"
FORWARDS = {  # fingerprints of what ours was written from, by the class's name without its prefix
    "Attention": {"022aa8879f935129"},
    "FeedForward": {"4e0366e3f8ec8c25"},
    "EncoderLayer": {LAYER},
    "EncoderLayerStableLayerNorm": {STABLE_LAYER},
}
SOURCES = {
    prefix + name: frozenset(known) for prefix in PREFIXES for name, known in FORWARDS.items()
} | POSITION_SOURCES
# arguments that change nothing in these layers, or that the recorders have served
IGNORED = frozenset({"output_attentions", "output_hidden_states", "return_dict", "use_cache", "num_items_in_batch"})


def build_encoder(survey: Survey) -> tuple[nn.Module, Sequence[Rule]]:
    """Ours for ``survey.root``, an encoder, with the settings of its modules as they are."""
    encoder = survey.root
    layers = list(encoder.layers)
    if not layers:
        raise Unfit("it has no layers")
    attentions, ffns = [layer.attention for layer in layers], [layer.feed_forward for layer in layers]
    if not all(is_gelu(ffn.intermediate_act_fn) for ffn in ffns):
        raise Unfit("its activation is not GELU")
    if any(module.is_decoder or module.is_causal for module in attentions):
        raise Unfit("its attention is causal")
    stable = "StableLayerNorm" in type(encoder).__name__
    norms = [encoder.layer_norm, *(norm for layer in layers for norm in (layer.layer_norm, layer.final_layer_norm))]
    dropouts = [encoder.dropout, *(layer.dropout for layer in layers), *(ffn.output_dropout for ffn in ffns)]
    again = survey.same(layers, "gradient_checkpointing")
    config = EncoderConfig(
        layers=len(layers),
        dim=survey.same(attentions, "embed_dim"),
        ffn_dim=survey.same([ffn.intermediate_dense for ffn in ffns], "out_features"),
        heads=survey.same(attentions, "num_heads"),
        norm="pre" if stable else "post",
        norm_eps=survey.same(norms, "eps"),
        dropout=survey.same(dropouts, "p"),
        attention_dropout=survey.same(attentions, "dropout"),
        activation_dropout=survey.same([ffn.intermediate_dropout for ffn in ffns], "p"),
        layerdrop=survey.get(encoder.config, "layerdrop"),
        padding_aware=False,
        checkpointing="full" if again else "none",
        **positions(survey, encoder.pos_conv_embed),
    )
    with torch.device("meta"):
        ours = TransformerEncoder(config)
    rules = position_rules(encoder.pos_conv_embed, "pos_conv.", "pos_conv_embed.")
    rules += pairs("", "", {"norm": ("layer_norm",)})
    for index in range(len(layers)):
        rules += pairs(f"layers.{index}.", f"layers.{index}.", SPEECH_LAYER)
    return ours, rules


def encoder_plan(encoder: nn.Module) -> Plan:
    """Ours around ``encoder``."""
    return make_plan(encoder, SOURCES, build_encoder)


def kept_layers(encoder: nn.Module) -> list[int]:
    """The layers that LayerDrop leaves, drawn as upstream draws."""
    count, rate = len(encoder.layers), encoder.config.layerdrop
    if not encoder.training or rate == 0:
        return list(range(count))
    return [index for index in range(count) if not torch.rand([]) < rate]


def _in_step(encoder: nn.Module) -> str | None:
    """The reason if all ranks have to run all layers: parameters are spread over them."""
    scope = sys.modules[type(encoder).__module__].__dict__
    if scope["is_deepspeed_zero3_enabled"]() or scope["is_fsdp_managed_module"](encoder):
        return "its parameters are spread over ranks (ZeRO-3, FSDP)"
    return None


def make_encoder(original: Callable, options: Options) -> Callable:
    """``forward`` of an encoder: (hidden_states [B, T, C], attention_mask bool [B, T]) -> BaseModelOutput.

    Padding is zeroed in a copy, where upstream writes into ``hidden_states``. Every frame is computed, padding too.
    """

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        shared, reason = planned(self, encoder_plan)
        asked = collected(self.layers[0]) if len(self.layers) else {}
        reason = reason or _in_step(self) or unknown_argument(kwargs, IGNORED) or _asked_for(asked)
        padding = None
        if reason is None:
            padding, reason = padding_of(attention_mask, hidden_states)
        if reason is not None:
            fall_back(self, "forward", reason, options)
            return original(self, hidden_states, attention_mask, **kwargs)
        on_device = torch.compiler.is_compiling() or capturing(hidden_states)
        kept = None if on_device and self.training and self.config.layerdrop > 0 else kept_layers(self)
        wants_states = "hidden_states" in asked
        out = shared.module(hidden_states, padding_mask=padding, hidden_states=wants_states, kept=kept)
        if wants_states:
            ran = self.layers if kept is None else [self.layers[index] for index in kept]
            record(ran, [as_upstream(state, hidden_states) for state in out.hidden_states])
        return sys.modules["transformers.modeling_outputs"].BaseModelOutput(
            last_hidden_state=as_upstream(out.x, hidden_states)
        )

    return forward


def _asked_for(asked: Mapping[str, Any]) -> str | None:
    return "attention weights were asked for" if "attentions" in asked else None


def make_layer(original: Callable, options: Options) -> Callable:
    """``forward`` of a post-norm layer: dropout, residual and norm in one pass each."""
    as_written = inspect.unwrap(original)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if checkpointing(self):
            run = partial(as_written, self, attention_mask=attention_mask, **kwargs)
            return self._gradient_checkpointing_func(run, hidden_states)
        if not _plain_layer(self):
            fall_back(self, "forward", "its norms or dropout are other modules, or have hooks", options)
            return as_written(self, hidden_states, attention_mask, **kwargs)
        x, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        norm, last = self.layer_norm, self.final_layer_norm
        p = self.dropout.p
        y = residual_dropout_layer_norm(
            x, hidden_states, norm.weight, norm.bias, p=p, training=self.training, eps=norm.eps
        )
        return residual_dropout_layer_norm(self.feed_forward(y), y, last.weight, last.bias, eps=last.eps)

    return forward


def make_stable_layer(original: Callable, options: Options) -> Callable:
    """``forward`` of a pre-norm layer: dropout, residual and second norm in one pass."""
    as_written = inspect.unwrap(original)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if checkpointing(self):
            run = partial(as_written, self, attention_mask=attention_mask, **kwargs)
            return self._gradient_checkpointing_func(run, hidden_states)
        if not _plain_layer(self):
            fall_back(self, "forward", "its norms or dropout are other modules, or have hooks", options)
            return as_written(self, hidden_states, attention_mask, **kwargs)
        x, _ = self.attention(self.layer_norm(hidden_states), attention_mask=attention_mask, **kwargs)
        norm, p = self.final_layer_norm, self.dropout.p
        y, h = residual_dropout_layer_norm(
            x,
            hidden_states,
            norm.weight,
            norm.bias,
            p=p,
            training=self.training,
            eps=norm.eps,
            return_residual=True,
        )
        h = h + self.feed_forward(y)
        return h if self.adapter_layer is None else h + self.adapter_layer(h)

    return forward


def _plain_layer(layer: nn.Module) -> bool:
    norms = plain(layer.layer_norm, nn.LayerNorm) and plain(layer.final_layer_norm, nn.LayerNorm)
    return norms and plain(layer.dropout, nn.Dropout)


def make_ffn(original: Callable, options: Options) -> Callable:
    """``forward`` of the feed-forward part: bias and GELU in one pass, dropout without a mask in memory."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        dropouts = plain(self.intermediate_dropout, nn.Dropout) and plain(self.output_dropout, nn.Dropout)
        fits = dropouts and is_gelu(self.intermediate_act_fn) and plain(self.intermediate_dense, nn.Linear)
        if not fits:
            fall_back(self, "forward", "its parts are other modules, or have hooks", options)
            return original(self, hidden_states)
        x = linear_gelu(hidden_states, self.intermediate_dense)
        if not self.training:
            return self.output_dense(x)
        x = self.output_dense(dropout(x, self.intermediate_dropout.p))
        return dropout(x, self.output_dropout.p)

    return forward


ENCODER_SEAM = around(
    "encoder",
    make_encoder,
    "the whole stack in fused operators, on the same parameters",
    frozenset({"f4a4ddcb82ecbc45", "cb346a1a258a9835"}),
    encoder_plan,
)
NORMS = "dropout, residual and norm in one pass"
LAYER_SEAM = Seam("norms", "forward", make_layer, NORMS, known=frozenset({LAYER}))
STABLE_LAYER_SEAM = Seam("norms", "forward", make_stable_layer, NORMS, known=frozenset({STABLE_LAYER}))
FFN_SEAM = Seam("norms", "forward", make_ffn, "bias and GELU in one pass", known=SOURCES["Wav2Vec2FeedForward"])

"""Data2VecAudio, Wav2Vec2 and HuBERT: ours around an encoder, and the parts of its layers.

Upstream: ``transformers.models.{data2vec.modeling_data2vec_audio,wav2vec2.modeling_wav2vec2,hubert.modeling_hubert}``,
which are one code under three names.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from d2v_fast.checkpoints.rules import Rule, pairs
from d2v_fast.checkpoints.transformers import SPEECH_LAYER
from d2v_fast.nn.config import EncoderConfig
from d2v_fast.nn.encoder import TransformerEncoder
from d2v_fast.ops import residual_dropout_layer_norm
from d2v_fast.ops._dropout import dropout
from d2v_fast.patches._core import Options, Seam, fall_back
from d2v_fast.patches.transformers._plan import (
    Plan,
    Survey,
    Unfit,
    as_upstream,
    is_gelu,
    make_plan,
    plain,
)
from d2v_fast.patches.transformers.conv import POSITION_SOURCES, PREFIXES, position_rules, positions
from d2v_fast.patches.transformers.linear import checkpointing, linear_gelu

LAYER, STABLE_LAYER = "1f61dcfb34ca59f2", "550d782f31b1ac8f"
FORWARDS = {  # fingerprints of what ours was written from, by the class's name without its prefix
    "Attention": {
        "022aa8879f935129",
        # these give three values
        *("c498b69bbd7e677f", "695c70678e228f7a", "7f1c270594113c3e", "1375a4077b22d8ad", "d013c12a696fe4e6"),
    },
    "FeedForward": {"4e0366e3f8ec8c25"},
    "EncoderLayer": {LAYER, "3752de01138a9d52"},  # the others give tuples
    "EncoderLayerStableLayerNorm": {STABLE_LAYER, "c74fb50716a22cde", "f93ce3197a392757"},
}
SOURCES = {
    prefix + name: frozenset(known) for prefix in PREFIXES for name, known in FORWARDS.items()
} | POSITION_SOURCES


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


def make_layer(original: Callable, options: Options, *, run: Callable[..., Tensor]) -> Callable:
    """``forward`` of a layer by ``run``, where its parts are plain and it is not to be computed again in backward."""
    as_written = inspect.unwrap(original)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if checkpointing(self):
            again = partial(as_written, self, attention_mask=attention_mask, **kwargs)
            return self._gradient_checkpointing_func(again, hidden_states)
        if not _plain_layer(self):
            fall_back(self, "forward", "its norms or dropout are other modules, or have hooks", options)
            return as_written(self, hidden_states, attention_mask, **kwargs)
        return run(self, hidden_states, attention_mask=attention_mask, **kwargs)

    return forward


def _post_norm(self: nn.Module, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """Dropout, residual and norm in one pass each."""
    x, _ = self.attention(hidden_states, **kwargs)
    norm, last = self.layer_norm, self.final_layer_norm
    x, p = as_upstream(x, hidden_states), self.dropout.p
    y = residual_dropout_layer_norm(x, hidden_states, norm.weight, norm.bias, p=p, training=self.training, eps=norm.eps)
    x = as_upstream(self.feed_forward(y), y)
    return residual_dropout_layer_norm(x, y, last.weight, last.bias, eps=last.eps)


def _pre_norm(self: nn.Module, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """Dropout, residual and second norm in one pass."""
    x, _ = self.attention(self.layer_norm(hidden_states), **kwargs)
    norm, p = self.final_layer_norm, self.dropout.p
    y, h = residual_dropout_layer_norm(
        x, hidden_states, norm.weight, norm.bias, p=p, training=self.training, eps=norm.eps, return_residual=True
    )
    h = h + self.feed_forward(y)
    return h if self.adapter_layer is None else h + self.adapter_layer(h)


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


NORMS = "dropout, residual and norm in one pass"
LAYER_SEAM = Seam("norms", "forward", partial(make_layer, run=_post_norm), NORMS, known=frozenset({LAYER}))
STABLE_LAYER_SEAM = replace(LAYER_SEAM, make=partial(make_layer, run=_pre_norm), known=frozenset({STABLE_LAYER}))
FFN_SEAM = Seam("norms", "forward", make_ffn, "bias and GELU in one pass", known=SOURCES["Wav2Vec2FeedForward"])

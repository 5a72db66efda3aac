"""Data2VecText: the encoder as a whole, and the parts of its layers.

Upstream: ``transformers.models.data2vec.modeling_data2vec_text``.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2v_fast.checkpoints.rules import Rule, pairs
from d2v_fast.checkpoints.transformers import TEXT_LAYER
from d2v_fast.nn.config import EncoderConfig
from d2v_fast.nn.encoder import TransformerEncoder
from d2v_fast.ops import residual_dropout_layer_norm
from d2v_fast.patches._core import Options, Seam, fall_back, is_ours
from d2v_fast.patches.transformers._plan import (
    Plan,
    Survey,
    Unfit,
    added,
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
from d2v_fast.patches.transformers.attention import TEXT, packs
from d2v_fast.patches.transformers.linear import linear_gelu

OUTPUT, INTERMEDIATE = "c4cade7c3bed7bea", "d60f3781ad76f95d"
FORWARDS = {
    "Layer": {"b2a00087d3d71ba8", "c69b4c4e620a1a9e", "3a738e47fbc3e823"},
    "Attention": {"24dd5fe80045ff58", "cceedddcbb461110", "f3c14461042ddfa8"},
    "SelfAttention": TEXT,
    "SelfOutput": {OUTPUT},
    "Intermediate": {INTERMEDIATE},
    "Output": {OUTPUT},
}
SOURCES = {"Data2VecText" + name: frozenset(known) for name, known in FORWARDS.items()}
# arguments that change nothing in these layers, or that the recorders have served; positions are in the embeddings
IGNORED = frozenset(
    {"output_attentions", "output_hidden_states", "return_dict", "position_ids", "num_items_in_batch", "labels"}
    | {"cache_position"}  # up to transformers 5.0, of a cache that is not there
)


class TokenEncoder(TransformerEncoder):
    """Ours without positions of its own, and with padding as it comes, which upstream computes along."""

    def _positions(self, x: Tensor, *_: Any) -> Tensor:
        return x


def build_encoder(survey: Survey) -> tuple[nn.Module, Sequence[Rule]]:
    """Ours for ``survey.root``, an encoder, with the settings of its modules as they are."""
    encoder = survey.root
    layers = list(encoder.layer)
    if not layers:
        raise Unfit("it has no layers")
    attentions, outputs = [layer.attention.self for layer in layers], [layer.output for layer in layers]
    outputs += [layer.attention.output for layer in layers]
    if any(layer.is_decoder or layer.add_cross_attention for layer in layers):
        raise Unfit("it is a decoder")
    if survey.same(layers, "chunk_size_feed_forward") != 0:
        raise Unfit("its feed-forward parts are computed in chunks (chunk_size_feed_forward)")
    if not all(is_gelu(layer.intermediate.intermediate_act_fn) for layer in layers):
        raise Unfit("its activation is not GELU")
    again = survey.same(layers, "gradient_checkpointing")
    config = EncoderConfig(
        layers=len(layers),
        dim=survey.same(attentions, "all_head_size"),
        ffn_dim=survey.same([layer.intermediate.dense for layer in layers], "out_features"),
        heads=survey.same(attentions, "num_attention_heads"),
        norm_eps=survey.same([output.LayerNorm for output in outputs], "eps"),
        dropout=survey.same([output.dropout for output in outputs], "p"),
        attention_dropout=survey.same([attention.dropout for attention in attentions], "p"),
        checkpointing="full" if again else "none",
    )
    with torch.device("meta"):
        ours = TokenEncoder(config)
    return ours, [
        rule for index in range(len(layers)) for rule in pairs(f"layers.{index}.", f"layer.{index}.", TEXT_LAYER)
    ]


def encoder_plan(encoder: nn.Module) -> Plan:
    """Ours around ``encoder``."""
    return make_plan(encoder, SOURCES, build_encoder)


def make_encoder(original: Callable, options: Options) -> Callable:
    """``forward`` of an encoder: (hidden_states [B, T, C], attention_mask) -> a model output.

    The mask may be None, [B, T], or bool [B, 1, T, T] as transformers makes it for SDPA; every token is computed,
    padding too. Decoding, cross-attention and masks that may differ from query to query are upstream's.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        shared, reason = planned(self, encoder_plan)
        asked = collected(self.layer[0]) if len(self.layer) else {}
        decoding = {
            "encoder_hidden_states": encoder_hidden_states,
            "past_key_values": past_key_values,
            "use_cache": use_cache or None,
        }
        reason = reason or unknown_argument(decoding | kwargs, IGNORED) or _asked_for(asked)
        reason = reason or packs(self, kwargs)
        padding = None
        if reason is None and isinstance(attention_mask, Tensor) and attention_mask.dim() == 4:
            reason = added(self)
        if reason is None:
            padding, reason = padding_of(attention_mask, hidden_states)
        if reason is not None:
            fall_back(self, "forward", reason, options)
            if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:  # make_masks left it so
                attention_mask = _mask_as_upstream(self, hidden_states, attention_mask)
            given = (attention_mask, encoder_hidden_states, encoder_attention_mask, past_key_values, use_cache)
            return original(self, hidden_states, *given, **kwargs)
        wants_states = "hidden_states" in asked
        out = shared.module(hidden_states, padding_mask=padding, hidden_states=wants_states)
        if wants_states:
            record(self.layer, [as_upstream(state, hidden_states) for state in out.hidden_states])
        outputs = sys.modules["transformers.modeling_outputs"]
        return outputs.BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=as_upstream(out.x, hidden_states))

    return forward


def _mask_as_upstream(encoder: nn.Module, x: Tensor, mask: Tensor) -> Tensor | None:
    make = sys.modules["transformers.masking_utils"].create_bidirectional_mask
    return make(encoder.config, x, mask)


def make_masks(original: Callable, options: Options) -> Callable:
    """``_create_attention_masks`` of a model: leaves a mask [B, T] as it is where the encoder is ours."""

    def masks(self, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> tuple[Tensor | None, Any]:
        known = ("encoder_attention_mask", "encoder_hidden_states", "past_key_values")
        plain_call = not args and all(kwargs.get(name) is None for name in known)
        padding = isinstance(attention_mask, Tensor) and attention_mask.dim() == 2
        if padding and plain_call and not self.config.is_decoder and is_ours(self.encoder.forward):
            return attention_mask, None
        return original(self, attention_mask, *args, **kwargs)

    return masks


def _asked_for(asked: Mapping[str, Any]) -> str | None:
    wanted = "attentions" in asked or "cross_attentions" in asked
    return "attention weights were asked for" if wanted else None


def make_output(original: Callable, options: Options) -> Callable:
    """``forward`` of the end of a sublayer: dropout, residual and norm in one pass."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        norm = self.LayerNorm
        if not (plain(norm, nn.LayerNorm) and plain(self.dropout, nn.Dropout)):
            fall_back(self, "forward", "its norm or dropout is another module, or has hooks", options)
            return original(self, hidden_states, input_tensor)
        x, p = as_upstream(self.dense(hidden_states), input_tensor), self.dropout.p
        return residual_dropout_layer_norm(
            x, input_tensor, norm.weight, norm.bias, p=p, training=self.training, eps=norm.eps
        )

    return forward


def make_intermediate(original: Callable, options: Options) -> Callable:
    """``forward`` of the first linear layer of a feed-forward part: bias and GELU in one pass."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not (is_gelu(self.intermediate_act_fn) and plain(self.dense, nn.Linear)):
            fall_back(self, "forward", "its parts are other modules, or have hooks", options)
            return original(self, hidden_states)
        return linear_gelu(hidden_states, self.dense)

    return forward


ENCODER_SEAM = around(
    "encoder",
    make_encoder,
    "the whole stack in fused operators, on the same parameters",
    frozenset({"180e1590ecdd4658", "62f2b32e53472e23", "bbdce1797b77f985"}),
    encoder_plan,
)
MASKS_SEAM = Seam(
    "encoder",
    "_create_attention_masks",
    make_masks,
    "no mask [B, 1, T, T]: the encoder reads padding as [B, T]",
    known=frozenset({"425fd9b1ab2fc3b6", "62543df14a591b03"}),
)
OUTPUT_SEAM = Seam("norms", "forward", make_output, "dropout, residual and norm in one pass", known=frozenset({OUTPUT}))
GELU = "bias and GELU in one pass"
INTERMEDIATE_SEAM = Seam("norms", "forward", make_intermediate, GELU, known=frozenset({INTERMEDIATE}))

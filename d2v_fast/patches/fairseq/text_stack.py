"""fairseq's text Transformer (``TransformerEncoderBase``) computed by our embedding and encoder, on its parameters.

Dims: B batch, T tokens, N packed tokens, C channels.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from d2v_fast.checkpoints.fairseq import EMBEDDINGS, LAYER
from d2v_fast.checkpoints.rules import Rule, pairs
from d2v_fast.nn.block import Block
from d2v_fast.nn.config import EncoderConfig, TextFrontEndConfig
from d2v_fast.nn.encoder import TransformerEncoder
from d2v_fast.nn.frontends.text import TextEmbedding
from d2v_fast.patches._core import state_of
from d2v_fast.patches._fingerprint import fingerprint
from d2v_fast.patches._sharing import Bypassed, Shared, watched
from d2v_fast.patches.fairseq.attention import unfit_attention
from d2v_fast.patches.fairseq.norms import is_gelu
from d2v_fast.patches.fairseq.sources import not_upstreams

KINDS = (
    "Embedding",
    "LearnedPositionalEmbedding",
    "LayerNorm",
    "FusedLayerNorm",
    "FairseqDropout",
    "ModuleList",
    "LayerDropModuleList",
    "TransformerEncoderLayerBase",
    "TransformerEncoderLayer",
    "MultiheadAttention",
    "Linear",
)
SETTINGS = ("eps", "num_heads", "normalize_before", "return_fc", "scaling", "activation_fn")  # of theirs that are read
KNOWN = {  # sources that ours was written from
    "forward": frozenset({"df3c9ef6880e4440"}),
    "forward_scriptable": frozenset({"98ba7f9123013c1a", "4eef6dcf2b4f95b4"}),
    "forward_embedding": frozenset({"9a0929840856018a"}),
}
KNOWN_LAYER = frozenset({"3350163e0bcaf3a1"})


class TextStack(NamedTuple):
    """Our two modules, for one call."""

    frontend: TextEmbedding
    encoder: TransformerEncoder
    kept: list[int]  # layers that LayerDrop leaves in this call, drawn as upstream does


class _Plan:
    """Our modules around the parameters of ``theirs``, or the reason why there are none."""

    def __init__(self, theirs: nn.Module) -> None:
        self.theirs, self._layers = theirs, _all_layers(theirs)
        self._bypassed = Bypassed(theirs, KINDS, settings=SETTINGS)
        self.unfit = self._bypassed.misfit() or _unfit(theirs, self._layers)
        if self.unfit is None:
            try:
                self._share()
            except (KeyError, ValueError) as error:  # of Shared and of our configurations: other shapes, no biases
                self.unfit = str(error)

    def _share(self) -> None:
        theirs, first = self.theirs, self._layers[0]
        config = EncoderConfig(
            layers=len(self._layers),
            dim=first.fc1.in_features,
            ffn_dim=first.fc1.out_features,
            heads=first.self_attn.num_heads,
            norm_eps=first.self_attn_layer_norm.eps,
        )
        tables = TextFrontEndConfig(
            vocab_size=theirs.embed_tokens.num_embeddings,
            max_positions=theirs.embed_positions.num_embeddings - TextFrontEndConfig.pad_index - 1,
        )
        with torch.device("meta"):
            ours = nn.ModuleDict({"frontend": TextEmbedding(tables, config), "encoder": TransformerEncoder(config)})
        ours["frontend"].norm.eps = theirs.layernorm_embedding.eps
        rules = [Rule(f"frontend.{mine}.weight", (name,)) for mine, name in EMBEDDINGS.items()]
        rules += pairs("frontend.", "", {"norm": ("layernorm_embedding",)})
        for i, (layer, block) in enumerate(zip(self._layers, ours["encoder"].layers, strict=True)):
            rules += pairs(f"encoder.layers.{i}.", f"layers.{i}.", LAYER)
            block.norm1.eps, block.norm2.eps = layer.self_attn_layer_norm.eps, layer.final_layer_norm.eps
        self._shared = Shared(ours, theirs, rules)

    def valid(self) -> bool:
        """Whether the modules and their settings are those it was made of."""
        return self._bypassed.valid()

    def get(self) -> TextStack | str:
        """Ours, as they have to run now; or why theirs have to."""
        reason = self.unfit or watched(self.theirs) or self._bypassed.watched()
        if reason is not None:
            return reason
        ours, dropout = self._shared.module, self.theirs.dropout_module
        frontend, encoder = ours["frontend"], ours["encoder"]
        for layer, block in zip(self._layers, encoder.layers, strict=True):
            reason = reason or _follow(layer, block, self.theirs.training)
        if dropout.apply_during_inference:
            reason = "there is dropout although the encoder is in eval mode"
        if frontend.config.dropout != dropout.p:
            frontend.config = replace(frontend.config, dropout=dropout.p)
        return reason or TextStack(frontend, encoder, self._kept())

    def _kept(self) -> list[int]:
        """Layers to run: upstream's list of layers draws whenever it is gone through, in eval mode as well."""
        index = {id(layer): i for i, layer in enumerate(self._layers)}
        return [index[id(layer)] for layer in self.theirs.layers]


def _all_layers(theirs: nn.Module) -> list[nn.Module]:
    """Going through upstream's list itself may skip some."""
    return list(theirs.layers._modules.values())


def _follow(layer: nn.Module, block: Block, training: bool) -> str | None:
    """Give ``block`` the rates of dropout that ``layer`` has at the moment; or say why it cannot follow."""
    modules = (layer.dropout_module, layer.activation_dropout_module, layer.self_attn.dropout_module)
    if any(module.apply_during_inference or module.training != training for module in modules):
        return "there is dropout although the encoder is in eval mode, or the other way round"
    block.dropout, block.activation_dropout, block.attention.dropout = (module.p for module in modules)
    return None


def _unfit(theirs: nn.Module, layers: list[nn.Module]) -> str | None:
    """Why ours do not follow the settings of this encoder, or None."""
    if not layers:
        return "there are no layers"
    if (reason := not_upstreams(theirs, KNOWN)) is not None:
        return reason
    for kind in {type(layer) for layer in layers}:
        if fingerprint(kind.forward) not in KNOWN_LAYER:
            return f"the source of {kind.__name__}.forward is not one that ours was written from"
    if theirs.layernorm_embedding is None or theirs.layer_norm is not None or theirs.quant_noise is not None:
        return "it has no norm of the embeddings, or a final norm, or quantisation noise"
    if theirs.embed_scale != 1.0:
        return f"embeddings are scaled by {theirs.embed_scale}"
    if (reason := _unfit_tables(theirs)) is not None:
        return reason
    for i, layer in enumerate(layers):
        if (reason := _unfit_layer(layer)) is not None:
            return f"layers.{i} {reason}"
        if layer.self_attn.num_heads != layers[0].self_attn.num_heads:
            return f"layers.{i} has another number of heads than layers.0"
    return None


def _unfit_tables(theirs: nn.Module) -> str | None:
    pad = TextFrontEndConfig.pad_index
    if type(theirs.embed_positions).__name__ != "LearnedPositionalEmbedding":
        return "positions are not learned"
    for name in ("embed_tokens", "embed_positions"):
        table: Any = getattr(theirs, name)
        if table.padding_idx != pad or theirs.padding_idx != pad:
            return f"{name} has padding_idx {table.padding_idx}, not {pad}"
        if table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
            return f"{name} has max_norm, scale_grad_by_freq or sparse gradients"
    return None


def _unfit_layer(layer: nn.Module) -> str | None:
    if layer.normalize_before or not layer.return_fc:
        return "has its norms in front of sublayers, or no FFN results"
    if not is_gelu(layer.activation_fn):
        return "has another activation than GELU"
    reason = unfit_attention(layer.self_attn)
    return None if reason is None else f"self_attn: {reason}"


@torch.compiler.disable
def text_stack(owner: Any, role: str, theirs: nn.Module) -> TextStack | str:
    """Our embedding and encoder around the parameters of ``theirs``, or why there are none; kept with ``owner``."""
    cache = state_of(owner).cache
    plan = cache.get(role)
    if plan is None or plan.theirs is not theirs or not plan.valid():
        plan = cache[role] = _Plan(theirs)
    return plan.get()

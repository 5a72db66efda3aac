"""fairseq's speech Transformer (``wav2vec2.TransformerEncoder``) computed by our encoder, on its parameters (S2).

Layer results differ from upstream's in two ways. They are views [T, B, C] of tensors [B, T, C], where upstream's lie in
memory as [T, B, C]: ``reshape`` takes both, ``view`` may not. And under autocast the outputs of post-norm layers stay
in low precision, while upstream's norms make float32 of them; the encoder's own output is float32 in both.

Dims: B batch, T frames, C channels.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2v_fast.checkpoints.fairseq import LAYER
from d2v_fast.checkpoints.rules import pairs
from d2v_fast.nn.block import Block
from d2v_fast.nn.config import EncoderConfig
from d2v_fast.nn.encoder import TransformerEncoder
from d2v_fast.patches._core import Options, Seam, fall_back, is_ours
from d2v_fast.patches._fingerprint import fingerprint
from d2v_fast.patches._sharing import Bypassed, Shared, is_known, plan_of, too_precise, watched
from d2v_fast.patches.fairseq.attention import ATTENTION, unfit_attention
from d2v_fast.patches.fairseq.convolutions import POSITION_KINDS, SETTINGS, Positions, unfit_positions
from d2v_fast.patches.fairseq.norms import LAYER_NORM, NORMS, is_gelu

LAYER_KINDS = (
    "TransformerSentenceEncoderLayer",
    "fairseq.modules.multihead_attention.MultiheadAttention",
    "FairseqDropout",
    "Linear",
    "Dropout",
    "LayerNorm",
    "FusedLayerNorm",
)

LAYER_SETTINGS = ("eps", "num_heads", "layer_norm_first", "activation_fn")
PARTS = ("layers", "pos_conv", "layer_norm")
# sources of the encoder's forward, which is extract_features and the final norm
FORWARDS = frozenset({"5083d33424937fc1", "582970738967ff29"})


def is_checkpointing(forward: Any) -> bool:
    """Whether a layer's forward is what fairseq's ``checkpoint_wrapper`` makes of it, which ours does by itself."""
    function = getattr(forward, "func", None)  # of functools.partial(function, the layer's forward, offload)
    name = (getattr(function, "__module__", ""), getattr(function, "__name__", ""))
    return name == ("fairseq.modules.checkpoint_activations", "_checkpointed_forward") and not forward.args[1]


class _Encoder:
    """Our encoder with the parameters of ``theirs``, or the reason why there is none."""

    def __init__(self, theirs: nn.Module) -> None:
        self._theirs, self._layers = theirs, list(theirs.layers)
        self._bypassed = [
            Bypassed(theirs.layers, LAYER_KINDS, "layers", followed=is_checkpointing, settings=LAYER_SETTINGS)
        ]
        self._forwards = [layer.__dict__.get("forward") for layer in self._layers]
        if theirs.pos_conv is not None:
            positions = Bypassed(theirs.pos_conv, POSITION_KINDS, "pos_conv", weight_norm=True, settings=SETTINGS)
            self._bypassed.append(positions)
        self._parts = [(name, theirs._modules.get(name)) for name in PARTS]
        self._read = self._settings()
        self.has_own_forward = fingerprint(type(theirs).forward) not in FORWARDS
        self.unfit = unfit_encoder(theirs)
        if self.unfit is None:
            try:
                self._share(theirs)
            except (KeyError, ValueError) as error:  # of Shared and of our configuration: other shapes, no biases
                self.unfit = str(error)

    def _settings(self) -> tuple:
        theirs = self._theirs
        return type(theirs), theirs.dropout, theirs.layer_norm_first, getattr(theirs.layer_norm, "eps", None)

    def _share(self, theirs: nn.Module) -> None:
        first = self._layers[0]
        config = EncoderConfig(
            layers=len(self._layers),
            dim=theirs.embedding_dim,
            ffn_dim=first.fc1.out_features,
            heads=first.self_attn.num_heads,
            norm="pre" if theirs.layer_norm_first else "post",
            dropout=theirs.dropout,
            pos_conv_depth=1,  # until theirs take its place
            pos_conv_width=1,
            pos_conv_groups=1,
            padding_aware=False,
            checkpointing="full" if is_checkpointing(self._forwards[0]) else "none",
        )
        with torch.device("meta"):
            ours = TransformerEncoder(config)
        ours.pos_conv = Positions(theirs.pos_conv)
        rules = pairs("", "", {"norm": ("layer_norm",)})
        ours.norm.eps = theirs.layer_norm.eps
        for i, (layer, block) in enumerate(zip(self._layers, ours.layers, strict=True)):
            rules += pairs(f"layers.{i}.", f"layers.{i}.", LAYER)
            block.norm1.eps, block.norm2.eps = layer.self_attn_layer_norm.eps, layer.final_layer_norm.eps
        self._shared = Shared(ours, theirs, rules)
        self._followers = [_Follower(*both) for both in zip(self._layers, ours.layers, strict=True)]

    def valid(self) -> bool:
        """Whether parts and settings are those it was made of."""
        parts = self._theirs._modules
        same = all(parts.get(name) is part for name, part in self._parts)
        for layer, forward in zip(self._layers, self._forwards, strict=True):
            same = same and layer.__dict__.get("forward") is forward
        return same and self._read == self._settings() and all(x.valid() for x in self._bypassed)

    def get(self) -> TransformerEncoder | str:
        """Ours, as it has to run now; or why theirs has to."""
        reason = self.unfit or too_precise(self._theirs.layer_norm.weight)
        for name in ("pos_conv", "layer_norm"):  # those below pos_conv are among the bypassed
            if reason is None and (seen := watched(self._theirs._modules[name])) is not None:
                reason = f"{name} {seen}"
        for bypassed in self._bypassed:
            reason = reason or bypassed.watched()
        if reason is not None:
            return reason
        ours, training = self._shared.module, self._theirs.training
        for follower in self._followers:
            reason = reason or follower(training)
        return reason or ours


class _Follower:
    """Gives a block of ours the rates of dropout that a layer of theirs has at the moment."""

    def __init__(self, layer: nn.Module, block: Block) -> None:
        self._block, self._ours = block, block.attention
        self._hidden = layer.dropout1, layer.dropout2, layer.dropout3
        self._theirs, self._weights = layer.self_attn, layer.self_attn.dropout_module

    def __call__(self, training: bool) -> str | None:
        """Why ours cannot follow, or None; ``training`` is the encoder's."""
        first, hidden, second = (module.p if module.training else 0.0 for module in self._hidden)
        weights = self._weights
        attention = weights.p if self._theirs.training or weights.apply_during_inference else 0.0
        if first != second:
            return f"dropout behind attention and FFN differs: {first} and {second}"
        if not training and (attention or first or hidden):
            return "there is dropout although the encoder is in eval mode"
        block = self._block
        if (block.dropout, block.activation_dropout, self._ours.dropout) != (first, hidden, attention):
            block.dropout, block.activation_dropout, self._ours.dropout = first, hidden, attention
        return None


def unfit_encoder(theirs: nn.Module) -> str | None:
    """Why ours does not follow the settings of this encoder, or None."""
    layers = list(theirs.layers)
    if not layers:
        return "there are no layers"
    if (reason := Bypassed(theirs.layers, LAYER_KINDS, "layers").misfit()) is not None:
        return reason
    if not is_known(type(theirs.layer_norm), NORMS):
        return f"layer_norm is a {type(theirs.layer_norm).__name__}"
    if theirs.pos_conv is None:
        return "there are no positional convolutions"
    if (reason := unfit_positions(theirs.pos_conv)) is not None:
        return f"pos_conv: {reason}"
    for kind, seam in (*((type(layer), LAYER_NORM) for layer in layers), (type(layers[0].self_attn), ATTENTION)):
        if not is_ours(kind.forward) and fingerprint(kind.forward) not in seam.known:
            return f"the source of {kind.__name__}.forward is not one that ours was written from"
    for i, layer in enumerate(layers):
        if is_checkpointing(layer.__dict__.get("forward")) != is_checkpointing(layers[0].__dict__.get("forward")):
            return f"layers.{i}: activations of some layers are checkpointed, of others not"
        if layer.layer_norm_first != theirs.layer_norm_first:
            return f"layers.{i}.layer_norm_first is not the encoder's"
        if not is_gelu(layer.activation_fn):
            return f"layers.{i} has another activation than GELU"
        if layer.self_attn.num_heads != layers[0].self_attn.num_heads:
            return f"layers.{i} has another number of heads than layers.0"
        if (reason := unfit_attention(layer.self_attn)) is not None:
            return f"layers.{i}.self_attn: {reason}"
    return None


def shared_encoder(theirs: nn.Module, options: Options) -> TransformerEncoder | None:
    """Our encoder around the parameters of fairseq's, for one call; None where upstream's has to run.

    That is where the seam is not in force, or something forbids it, which upstream's call notes then; and in a subclass
    with a ``forward`` of its own, which that call runs around our ``extract_features``. Pass ``kept``, of
    :func:`kept_layers`. Its ``x`` is behind the final norm also where that is the last of a pre-norm encoder.
    """
    if "encoder" not in options.parts or not is_ours(theirs.extract_features) or watched(theirs) is not None:
        return None
    plan = plan_of(theirs, "encoder", _Encoder)
    found = None if plan.has_own_forward else plan.get()
    return None if isinstance(found, str) else found


def kept_layers(theirs: nn.Module, upto: int | None = None) -> list[int]:
    """Indices of the layers that LayerDrop leaves, up to and with ``upto``, drawn as upstream does.

    That is a number of NumPy's global generator for each layer, in eval mode as well, unless ``layerdrop`` is 0.
    """
    kept = []
    for i in range(len(theirs.layers)):
        drawn = np.random.random() if theirs.layerdrop > 0 else 1
        if not theirs.training or drawn > theirs.layerdrop:
            kept.append(i)
        if i == upto:
            break
    return kept


def _results_differ(theirs: nn.Module) -> str | None:
    """Why the layer results that ours has would not be upstream's, or None."""
    if theirs.layer_norm_first and theirs.training and any(layer.dropout3.p > 0 for layer in theirs.layers):
        return "layer results of pre-norm layers are those before dropout"
    return None


def _make(original: Callable, options: Options) -> Callable:
    def extract_features(
        self: Any,
        x: Tensor,  # [B, T, C]
        padding_mask: Tensor | None = None,  # [B, T], True = padding
        tgt_layer: int | None = None,
        min_layer: int = 0,
        corpus_key: Any = None,
    ) -> tuple[Tensor, list[tuple[Tensor, None, Tensor]]]:
        """x [B, T, C], and (output, None, result) [T, B, C] of every layer from ``min_layer`` on that was executed."""
        ours = plan_of(self, "encoder", _Encoder).get()
        reason = ours if isinstance(ours, str) else _results_differ(self)
        if reason is not None:
            fall_back(self, "extract_features", reason, options)
            more = {} if corpus_key is None else {"corpus_key": corpus_key}  # older versions do not have it
            return original(self, x, padding_mask, tgt_layer, min_layer, **more)
        if padding_mask is not None:
            padding_mask = padding_mask.bool()
            x = x.masked_fill_(padding_mask[..., None], 0)  # in place, as upstream does
        kept = kept_layers(self, tgt_layer)
        top_k = len(self.layers) - min_layer
        out = ours(x, padding_mask=padding_mask, top_k=top_k, hidden_states=True, kept=kept)
        x = out.hidden_states[-1] if self.layer_norm_first else out.x
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(self.layer_norm.weight.dtype)  # a norm's result is, there
        states = [state for i, state in zip(kept, out.hidden_states[1:], strict=True) if i >= min_layer]
        both = zip(states, out.layer_results, strict=True)
        return x, [(state.transpose(0, 1), None, result.transpose(0, 1)) for state, result in both]

    return extract_features


ENCODER = Seam(
    "encoder",
    "extract_features",
    _make,
    "all layers by our encoder: fused norms and GELU, one projection, best attention",
    known=frozenset({"6c94de3af82bd8c1", "91df2bfc51c8b3f4", "d66be511d42ce279"}),
    refuses=unfit_encoder,
    prepare=lambda owner: plan_of(owner, "encoder", _Encoder),
    op="encoder",
)

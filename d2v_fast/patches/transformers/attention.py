"""Attention: ``attn_implementation="d2v_fast"`` for every model that asks transformers' AttentionInterface, and the
attention modules of Data2Vec, Wav2Vec2 and HuBERT, whose three projections become one product."""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.nn.attention import attention
from d2v_fast.patches._core import Options, Seam, disabled, fall_back
from d2v_fast.patches.transformers._plan import added, collected, looked_over, padding_of, plain, unknown_argument

NAME = "d2v_fast"
SPEECH = frozenset({"022aa8879f935129"})
TEXT = frozenset({"bb3a4ea7b5423dd7", "bfa56dc98683bca6", "73e1f259d783944d"})
VISION = frozenset({"552cf972a1c0beee", "fa87e1ac31d7e75b", "55c62b697b4c89a1", "1dae894a4c4f0e8f"})
IGNORED = frozenset(
    {"output_attentions", "output_hidden_states", "return_dict", "position_ids", "num_items_in_batch", "use_cache"}
    | {"labels", "cache_position"}
)
# what modules give to attention functions, and the mask, or nothing but another such function, answers for
ANSWERED = IGNORED - {"output_attentions"} | {
    *("sliding_window", "past_key_values", "position_embeddings", "output_router_logits", "deterministic")
}


def register_attention() -> None:
    """Let models be loaded with ``attn_implementation="d2v_fast"``; ``patch`` and ``d2v_fast.auto`` do this as well.

    With ``D2V_FAST_DISABLE=1`` the name stands for transformers' own SDPA.

    It reaches the models that look attention up in transformers' AttentionInterface; Data2VecVision does not. A model
    that transformers does not let use SDPA (``_supports_sdpa``), or that gives attention an argument of which SDPA
    knows nothing (sinks, soft caps, selected keys), is refused with a ValueError in its forward.

    Raises:
        ImportError: transformers is not installed.
    """
    modeling = importlib.import_module("transformers.modeling_utils")
    masking = importlib.import_module("transformers.masking_utils")
    sdpa = importlib.import_module("transformers.integrations.sdpa_attention").sdpa_attention_forward
    if NAME not in modeling.AttentionInterface():
        masks = masking.AttentionMaskInterface()
        modeling.AttentionInterface.register(NAME, sdpa if disabled() else interface(sdpa))
        masking.AttentionMaskInterface.register(NAME, masks["sdpa"] if disabled() else attention_mask)


def attention_mask(*args: Any, **asked: Any) -> Tensor | None:
    """The mask as transformers' AttentionMaskInterface asks for it: bool [B, 1, Tq, Tk], True = seen, or None.

    Of bidirectional attention its rows are one row in memory, so that nothing has to look for differences; every other
    one is that of SDPA, as is that of a sequence without tokens.
    """
    masking = sys.modules["transformers.masking_utils"]
    bidirectional = getattr(masking, "bidirectional_mask_function", None)
    B, Tq, Tk = (asked.get(name) for name in ("batch_size", "q_length", "kv_length"))
    mask, plain_rows = asked.get("attention_mask"), not args and bidirectional is not None
    plain_rows = plain_rows and asked.get("mask_function") is bidirectional and isinstance(Tq, int)
    shifted = any(asked.get(name) for name in ("q_offset", "kv_offset", "use_vmap", "local_size"))
    if not plain_rows or shifted or not isinstance(mask, Tensor) or tuple(mask.shape) != (B, Tk):
        return masking.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **asked)
    seen = mask.bool()
    if asked.get("allow_is_bidirectional_skip"):
        padding, whole = looked_over(~seen)
        if padding is None:
            return None
        if whole:
            return masking.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **asked)
    return seen[:, None, None].expand(B, 1, Tq, Tk)


def interface(sdpa: Callable) -> Callable:
    """The function for transformers' AttentionInterface, with ``sdpa_attention_forward`` for what ours does not do."""
    passed = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "kwargs"}
    honoured = (*sorted(set(inspect.signature(sdpa).parameters) - passed), "output_attentions")  # the last: it warns

    def attention_forward(
        module: nn.Module,
        query: Tensor,  # [B, H, Tq, D]
        key: Tensor,  # [B, H, Tk, D]
        value: Tensor,  # like key
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """([B, Tq, H, D], None).

        To SDPA go causal attention, fewer heads of keys than of queries, masks that are not one row for all queries,
        and a bias in ``kwargs``.

        Raises:
            ValueError: upstream does not let the model use SDPA, or there is an argument that is not known here.
        """
        _check(module, kwargs, honoured)
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = causal and attention_mask is None and query.shape[2] > 1
        padding, other = _padding(attention_mask, query, key)
        more = any(kwargs.get(name) is not None for name in honoured)
        if causal or other or more or key.shape[1] != query.shape[1] or value.shape != key.shape:
            options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
            return sdpa(module, query, key, value, attention_mask, **options, **kwargs)
        D = query.shape[3]
        if scaling is not None and scaling != D**-0.5:
            query = query * (scaling * D**0.5)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return attention(q, k, v, padding_mask=padding, dropout_p=dropout), None

    return attention_forward


def _check(module: nn.Module, kwargs: Mapping[str, Any], honoured: Sequence[str]) -> None:
    given = (name for name, value in kwargs.items() if value is not None)
    unknown = [name for name in given if name not in ANSWERED and name not in honoured]
    reason = f"it does not know the argument {unknown[0]}" if unknown else _distrusted(module)
    if reason:
        text = f"attn_implementation={NAME!r} cannot serve {type(module).__name__}: {reason}"
        raise ValueError(f"{text}; load the model with attn_implementation='eager'")


def _distrusted(module: nn.Module) -> str | None:
    """The reason, if upstream does not let the model that ``module`` was written for use SDPA."""
    return _distrusts(type(module))


_distrusted._dynamo_marked_constant = True  # evaluated while torch.compile traces


@cache
def _distrusts(kind: type[nn.Module]) -> str | None:
    model = sys.modules["transformers.modeling_utils"].PreTrainedModel
    for home in dict.fromkeys(base.__module__ for base in kind.__mro__):
        there = vars(sys.modules.get(home, object)).values()
        found = [v for v in there if isinstance(v, type) and issubclass(v, model) and v.__module__ == home]
        roots = [v for v in found if v is not model and not set(found) & set(v.__bases__)]  # others are of these
        refused = next((root.__name__ for root in roots if not root._supports_sdpa), None)
        if refused:
            return f"{refused} does not support SDPA"
    return None


def _padding(mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[Tensor | None, bool]:
    """Padding [B, Tk], True = padding, and whether the mask is something else."""
    if mask is None:
        return None, False
    B, _, Tq, _ = query.shape
    rows = isinstance(mask, Tensor) and mask.dtype == torch.bool and tuple(mask.shape) == (B, 1, Tq, key.shape[2])
    if not rows or (Tq > 1 and mask.stride(2) != 0):
        return None, True
    return ~mask[:, 0, 0], False


def _projected(x: Tensor, parts: Sequence[nn.Linear], heads: int) -> tuple[Tensor, ...]:
    """What the linear layers ``parts`` make of x [B, T, C], by one product: [B, T, H, D] each."""
    weight = torch.cat([part.weight for part in parts])
    zero = parts[0].weight.new_zeros(parts[0].out_features)
    bias = torch.cat([zero if part.bias is None else part.bias for part in parts])
    return F.linear(x, weight, bias).unflatten(-1, (len(parts), heads, -1)).unbind(-3)


def _foreign(module: nn.Module, mask: Any) -> str | None:
    """The reason, if ours cannot follow the mask."""
    if mask is None:
        return None
    known = isinstance(mask, Tensor) and mask.dim() in (2, 4)
    return added(module) if known else "its mask is of an unknown kind"


def _attend(x: Tensor, qkv: tuple[Tensor, ...], mask: Tensor | None, p: float) -> Tensor:
    """Attention [B, T, H, D] of rows x; a mask of each query's own goes to SDPA as it is."""
    padding, other = padding_of(mask, x)
    if other is None:
        return attention(*qkv, padding_mask=padding, dropout_p=p)
    q, k, v = (part.transpose(1, 2) for part in qkv)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p).transpose(1, 2)


def _obstacle(module: nn.Module, parts: Sequence[nn.Linear], kwargs: dict[str, Any]) -> str | None:
    """Why ours cannot take this call."""
    if not all(plain(part, nn.Linear) for part in parts):
        return "its projections are other modules, or have hooks"
    if "attentions" in collected(module) or kwargs.get("output_attentions"):
        return "attention weights were asked for"
    if getattr(module, "is_causal", False) or getattr(module, "is_decoder", False):
        return "it is causal"
    return packs(module, kwargs) or unknown_argument(kwargs, IGNORED)


def packs(module: nn.Module, kwargs: dict[str, Any]) -> str | None:
    """The reason, if FlashAttention would take several sequences in one row apart by their positions."""
    flash = "flash" in (module.config._attn_implementation or "")
    return (
        "positions may say where packed sequences begin" if flash and kwargs.get("position_ids") is not None else None
    )


def make_speech(original: Callable, options: Options) -> Callable:
    """``forward`` of self-attention: hidden_states [B, T, C] -> ([B, T, C], None); cross-attention is upstream's."""

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        parts = (self.q_proj, self.k_proj, self.v_proj)
        reason = _obstacle(self, parts, kwargs | {"output_attentions": output_attentions})
        if key_value_states is not None:
            reason = "it is cross-attention"
        reason = reason or _foreign(self, attention_mask)
        if reason:
            fall_back(self, "forward", reason, options)
            return original(self, hidden_states, key_value_states, attention_mask, output_attentions, **kwargs)
        p = self.dropout if self.training else 0.0
        out = _attend(hidden_states, _projected(hidden_states, parts, self.num_heads), attention_mask, p)
        return self.out_proj(out.flatten(-2)), None

    return forward


def make_text(original: Callable, options: Options) -> Callable:
    """``forward`` of self-attention: hidden_states [B, T, C] -> ([B, T, C], None); decoding is upstream's."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        parts = (self.query, self.key, self.value)
        reason = _obstacle(self, parts, kwargs | {"past_key_values": past_key_values})
        reason = reason or _foreign(self, attention_mask)
        if reason:
            fall_back(self, "forward", reason, options)
            return original(self, hidden_states, attention_mask, past_key_values, **kwargs)
        p = self.dropout.p if self.training else 0.0
        qkv = _projected(hidden_states, parts, self.num_attention_heads)
        out = _attend(hidden_states, qkv, attention_mask, p)
        return out.flatten(-2), None

    return forward


def make_vision(original: Callable, options: Options) -> Callable:
    """``forward`` of self-attention, relative-position bias in the kernel: hidden_states [B, N, C] -> ([B, N, C], ...).

    ``relative_position_bias`` [1, H, N, N] is that of all layers; a bias of the layer's own is upstream's to make.
    """

    def forward(
        self,
        hidden_states: Tensor,
        output_attentions: bool = False,
        relative_position_bias: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
    ) -> tuple[Tensor, ...]:
        parts = (self.query, self.key, self.value)
        given = (output_attentions, relative_position_bias, interpolate_pos_encoding, resolution)
        reason = _obstacle(self, parts, {"output_attentions": output_attentions})
        if reason:
            fall_back(self, "forward", reason, options)
            return original(self, hidden_states, *given)
        bias = relative_position_bias
        if self.has_relative_position_bias:
            patch = self.config.patch_size
            window = (resolution[0] // patch, resolution[1] // patch)
            own = self.relative_position_bias(window, interpolate_pos_encoding, dim_size=hidden_states.shape[1])
            bias = own if bias is None else own + bias
        q, k, v = _projected(hidden_states, parts, self.num_attention_heads)
        sdpa = "Sdpa" in type(self).__name__
        p = self.config.attention_probs_dropout_prob if sdpa else self.dropout.p
        out = attention(q, k, v, bias=None if bias is None else bias[0], dropout_p=p if self.training else 0.0)
        return (out.flatten(-2), None) if sdpa else (out.flatten(-2),)

    return forward


DOES = "one product for q, k, v; the best kernel that is installed"
SPEECH_SEAM = Seam("attention", "forward", make_speech, DOES, known=SPEECH)
TEXT_SEAM = Seam("attention", "forward", make_text, DOES, known=TEXT)
VISION_SEAM = Seam(
    "attention",
    "forward",
    make_vision,
    "one product for q, k, v; position bias and its gradient in the kernel",
    known=VISION,
)

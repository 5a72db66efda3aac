"""The encoders of Data2VecAudio, Wav2Vec2 and HuBERT as a whole, as they are and as they were in older versions.

Up to transformers 5.15 they hand hidden states out themselves: what every layer reads, also one that LayerDrop skips,
and the output. Up to 5.20 they draw for LayerDrop in every call.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from d2v_fast.nn.checkpointing import capturing
from d2v_fast.nn.encoder import EncoderOutput
from d2v_fast.patches._core import Options, fall_back
from d2v_fast.patches._fingerprint import fingerprint
from d2v_fast.patches.transformers._plan import (
    around,
    as_upstream,
    collected,
    padding_of,
    planned,
    record,
    unknown_argument,
)
from d2v_fast.patches.transformers.speech import encoder_plan

NOW = frozenset({"f4a4ddcb82ecbc45", "cb346a1a258a9835"})
DRAW_ALWAYS = frozenset({"f54095c6d2ff1cff", "e78c210822d81c79"})
BEFORE = frozenset(
    {
        *("391b4bfb5f56b15a", "836a342004766668", "3d846cb6d54eb2f3", "cbbb8a9d3f92c4db"),
        *("e196ed7d3d429d08", "2e343eed640b0da4", "ef18147adb7ed3c5", "c924cad2c9457aef"),  # with a norm at the end
    }
)
# arguments that change nothing in these layers, or that the recorders have served
IGNORED = frozenset({"output_attentions", "output_hidden_states", "return_dict", "use_cache", "num_items_in_batch"})
WEIGHTS = "attention weights were asked for"


def make(original: Callable, options: Options) -> Callable:
    """``forward`` of an encoder of the version that is installed."""
    if "output_hidden_states" in inspect.signature(original).parameters:
        return _make_before(original, options)
    return _make_now(original, options, fingerprint(original) in DRAW_ALWAYS)


def _make_now(original: Callable, options: Options, draws_always: bool) -> Callable:
    """(hidden_states [B, T, C], attention_mask bool [B, T]) -> BaseModelOutput; the layers' recorders are served.

    Padding is zeroed in a copy, where upstream writes into ``hidden_states``. Every frame is computed, padding too.
    """

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        asked = collected(self.layers[0]) if len(self.layers) else {}
        reason = WEIGHTS if "attentions" in asked else unknown_argument(kwargs, IGNORED)
        wants_states = "hidden_states" in asked
        draws = draws_always or (self.training and self.config.layerdrop > 0)
        out, ran, reason = _run(self, hidden_states, attention_mask, wants_states, draws, reason)
        if out is None:
            fall_back(self, "forward", reason, options)
            return original(self, hidden_states, attention_mask, **kwargs)
        if wants_states:
            states = [as_upstream(state, hidden_states) for state in out.hidden_states]
            record([self.layers[index] for index in ran], states)
        return _output(last_hidden_state=as_upstream(out.x, hidden_states))

    return forward


def _make_before(original: Callable, options: Options) -> Callable:
    """The same with the arguments and the result of transformers up to 5.15."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> Any:
        reason = WEIGHTS if output_attentions else None
        out, ran, reason = _run(self, hidden_states, attention_mask, output_hidden_states, True, reason)
        if out is None:
            fall_back(self, "forward", reason, options)
            given = (attention_mask, output_attentions, output_hidden_states, return_dict)
            return original(self, hidden_states, *given)
        last, states = as_upstream(out.x, hidden_states), None
        if output_hidden_states:
            read = [sum(index < layer for index in ran) for layer in range(len(self.layers))]  # how many ran before it
            states = (*(as_upstream(out.hidden_states[count], hidden_states) for count in read), last)
        if not return_dict:
            return (last,) if states is None else (last, states)
        return _output(last_hidden_state=last, hidden_states=states)

    return forward


def _run(
    encoder: nn.Module, x: Tensor, mask: Any, wants_states: bool, draws: bool, reason: str | None
) -> tuple[EncoderOutput | None, list[int], str | None]:
    """What ours gives and the layers that ran, or the reason why upstream has to run."""
    shared, unfit = planned(encoder, encoder_plan)
    reason = unfit or _in_step(encoder) or reason
    padding = None
    if reason is None:
        padding, reason = padding_of(mask, x)
    if reason is not None:
        return None, [], reason
    on_device = torch.compiler.is_compiling() or capturing(x)
    all_run = list(range(len(encoder.layers)))
    kept = _kept_layers(encoder) if draws and not on_device else all_run
    if on_device and encoder.training and encoder.config.layerdrop > 0:
        kept = None  # ours draws there, and runs all of them
    out = shared.module(x, padding_mask=padding, hidden_states=wants_states, kept=kept)
    return out, all_run if kept is None else kept, None


def _kept_layers(encoder: nn.Module) -> list[int]:
    """The layers that LayerDrop leaves, drawn as upstream draws."""
    draws = [torch.rand([]) for _ in encoder.layers]
    rate = encoder.config.layerdrop if encoder.training else 0.0
    return [index for index, draw in enumerate(draws) if not draw < rate]


def _in_step(encoder: nn.Module) -> str | None:
    """The reason if all ranks have to run all layers: parameters are spread over them."""
    homes = (kind.__module__ for kind in type(encoder).__mro__)
    scope = sys.modules[next(home for home in homes if home.startswith("transformers."))]
    if scope.is_deepspeed_zero3_enabled() or scope.is_fsdp_managed_module(encoder):
        return "its parameters are spread over ranks (ZeRO-3, FSDP)"
    return None


def _output(**values: Any) -> Any:
    return sys.modules["transformers.modeling_outputs"].BaseModelOutput(**values)


ENCODER_SEAM = around(
    "encoder",
    make,
    "the whole stack in fused operators, on the same parameters",
    NOW | DRAW_ALWAYS | BEFORE,
    encoder_plan,
)

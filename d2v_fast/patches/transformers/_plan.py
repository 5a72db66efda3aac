"""Modules of ours around the parameters of transformers' modules: made once, looked over at every call.

What ours bypasses must be what ours was written from: the sources of its classes, the settings, and no hooks but those
by which transformers records hidden states, which :func:`record` serves.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.checkpoints.rules import Rule
from d2v_fast.nn.checkpointing import capturing
from d2v_fast.patches._core import Seam, is_ours, state_of
from d2v_fast.patches._fingerprint import fingerprint
from d2v_fast.patches._sharing import Bypassed, Shared, plan_of, watched

Sources = Mapping[str, frozenset[str]]  # name of a class -> fingerprints of the forward that ours was written from
PLAN = "plan"  # where it is in a State
RECORDING = "transformers.utils.output_capturing"
LEAVES = ("ModuleList", "Linear", "LayerNorm", "GroupNorm", "Dropout", "Conv1d", "Identity", "GELUActivation", "GELU")


class Unfit(Exception):
    """Why ours cannot take the place of this module."""


class Survey:
    """What was read from a module and those below it, to notice when it is no longer so."""

    def __init__(self, root: nn.Module, sources: Sources) -> None:
        self.root, self._read = root, []
        self._bypassed = Bypassed(root, (*sources, *LEAVES), weight_norm=True, followed=is_recorder)
        self.unknown = self._bypassed.misfit() or _unknown_source(root, sources)

    def get(self, owner: Any, name: str) -> Any:
        """``owner.name``, a setting."""
        value = getattr(owner, name, None)
        if value is None:
            raise Unfit(f"{type(owner).__name__}.{name} is not there")
        self._read.append((owner, name, value))
        return value

    def same(self, owners: Iterable[Any], name: str) -> Any:
        """``owner.name`` of several, which have to agree."""
        values = [self.get(owner, name) for owner in owners]
        if any(value != values[0] for value in values):
            raise Unfit(f"{name} is not the same everywhere: {', '.join(map(str, dict.fromkeys(values)))}")
        return values[0]

    def valid(self) -> bool:
        """Whether modules and settings are those that were read."""
        return self._bypassed.valid() and all(getattr(owner, name, None) == value for owner, name, value in self._read)

    def watched(self) -> str | None:
        """Who wants to see one of the modules called now."""
        return self._bypassed.watched()


class Plan:
    """Ours in the place of a module, or the reason why not."""

    def __init__(self, survey: Survey, shared: Shared | None, reason: str | None) -> None:
        self.survey, self.shared, self.reason = survey, shared, reason

    def valid(self) -> bool:
        """Whether modules and settings are as they were; not looked at again where torch.compile traces."""
        return torch.compiler.is_compiling() or self.survey.valid()


Build = Callable[[Survey], tuple[nn.Module, Sequence[Rule]]]  # ours on the meta device, and where its tensors are


def make_plan(owner: nn.Module, sources: Sources, build: Build) -> Plan:
    """Read the settings of ``owner`` and build ours around its parameters."""
    survey = Survey(owner, sources)
    if survey.unknown:
        return Plan(survey, None, survey.unknown)
    try:
        ours, rules = build(survey)
        return Plan(survey, Shared(ours, owner, rules), None)
    except (Unfit, KeyError, ValueError) as error:  # the last two: settings or tensors that ours has no place for
        return Plan(survey, None, str(error.args[0]))


def around(part: str, make: Callable, does: str, known: frozenset[str], plan: Callable[[nn.Module], Plan]) -> Seam:
    """The seam of a ``forward`` that ours takes the place of as ``plan`` says."""
    return Seam(
        part,
        "forward",
        make,
        does,
        known=known,
        refuses=lambda owner: plan(owner).reason,
        prepare=lambda owner: plan_of(owner, PLAN, plan),
    )


def planned(owner: nn.Module, plan: Callable[[nn.Module], Plan]) -> tuple[Shared | None, str | None]:
    """Ours for ``owner``, or the reason why this call has to be upstream's.

    torch.compile looks when it traces: hooks that are set later are not noticed.
    """
    if getattr(owner, "_is_replica", False):
        return None, "it is a copy that DataParallel makes for every call"
    found = plan_of(owner, PLAN, plan)
    reason = _reason(owner)
    return (found.shared, None) if reason is None else (None, reason)


def _reason(owner: nn.Module) -> str | None:
    plan = state_of(owner).cache[PLAN]
    return plan.reason or plan.survey.watched()


_reason._dynamo_marked_constant = True  # evaluated while torch.compile traces


def _unknown_source(root: nn.Module, sources: Sources) -> str | None:
    for kind in {type(module) for module in root.modules()}:
        method = kind.forward
        if kind.__name__ not in sources or is_ours(method):  # ours: it was looked at when it was replaced
            continue
        found = _fingerprint(method)
        if found not in sources[kind.__name__]:
            return f"the source of {kind.__name__}.forward is not one that ours was written from (fingerprint {found})"
    return None


_fingerprint = cache(fingerprint)


def is_gelu(activation: Any) -> bool:
    """Whether a module computes the exact GELU."""
    if type(activation) is nn.GELU:
        return activation.approximate == "none"
    return type(activation).__name__ == "GELUActivation" and getattr(activation, "act", None) is F.gelu


def plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``module`` is a ``kind`` and no other, that nobody listens to, so that its tensors are all there is."""
    return type(module) is kind and watched(module) is None


def is_recorder(hook: Any) -> bool:
    """Whether a hook is the one by which transformers collects hidden states and attention weights."""
    return getattr(hook, "__module__", "") == RECORDING


def collected(listened: nn.Module) -> Mapping[str, Any]:
    """What the forward that is under way collects, as transformers keeps it; nothing if nobody listens to a module."""
    if not listened._forward_hooks:
        return {}
    module = sys.modules.get(RECORDING)
    return {} if module is None else module._active_collector.get() or {}


def record(layers: Sequence[nn.Module], states: Sequence[Tensor]) -> None:
    """Tell the recorders of ``layers``, those that ran, what each read and gave: ``states`` is one longer."""
    for index, layer in enumerate(layers):
        for hook in layer._forward_hooks.values():
            hook(layer, (states[index],), states[index + 1])


def unknown_argument(kwargs: Mapping[str, Any], ignored: frozenset[str]) -> str | None:
    """The reason, if there are arguments that ours does not know."""
    found = [name for name, value in kwargs.items() if value is not None and name not in ignored]
    return f"ours does not know the argument {found[0]}" if found else None


def added(module: nn.Module) -> str | None:
    """The reason, if upstream adds masks to the logits as they are: bool ones too, and queries without keys see all."""
    return "eager attention adds its mask" if module.config._attn_implementation == "eager" else None


def padding_of(mask: Any, x: Tensor) -> tuple[Tensor | None, str | None]:
    """``mask`` of x [B, T, C] as padding [B, T] bool, True = padding, or the reason why it is none.

    It may be [B, T] with nonzero = valid, or bool [B, 1, T, T] whose rows are one row in memory, as ours makes it for
    ``attn_implementation="d2v_fast"``.
    """
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor):
        return None, f"the attention mask is a {type(mask).__name__}"
    (B, T), shape = x.shape[:2], tuple(mask.shape)
    if shape == (B, T):
        padding, whole = looked_over(~mask.to(x.device, torch.bool))
        return (None, "a sequence has no tokens") if whole else (padding, None)
    if mask.dtype == torch.bool and shape == (B, 1, T, T) and (T == 1 or mask.stride(2) == 0):
        return ~mask[:, 0, 0], None
    return None, f"an attention mask {list(shape)} of {mask.dtype} may be another for every query"


def looked_over(padding: Tensor) -> tuple[Tensor | None, bool]:
    """``padding`` [B, T], or None if there is none, and whether it is all there is of a sequence.

    transformers looks as well, and waits for the device there; not where it is compiled, and in no CUDA graph.
    """
    if torch.compiler.is_compiling() or capturing(padding):
        return padding, False
    counts = padding.sum(1).tolist()
    return (padding if any(counts) else None), padding.shape[1] in counts


def as_upstream(x: Tensor, given: Tensor) -> Tensor:
    """``x``, computed from ``given``, in the dtype in which upstream would leave it under autocast."""
    if not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.float32 if x.is_cuda else given.dtype)  # CUDA's layer norm gives float32, the CPU's its input's

"""Modules of ours that compute with the parameters of somebody else's module.

Nothing is copied and nothing is registered: ours refers to the same ``Parameter`` objects, so that gradients,
optimizers, ``state_dict`` and distributed wrappers see the other module alone. Three projections that are one in ours
are put behind each other at every use, a copy that is small beside the product it saves a launch for.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm

from d2v_fast.patches._core import is_ours, state_of
from d2v_fast.patches._state import outside_of_graphs

if TYPE_CHECKING:  # imports all of nn, which `import d2v_fast.auto` has no time for
    from d2v_fast.checkpoints.rules import Rule


@dataclass(frozen=True)
class Slot:
    """A tensor of a module, wherever it is at the moment."""

    owner: nn.Module
    name: str

    @property
    def tensor(self) -> Tensor:
        return getattr(self.owner, self.name)


class JoinedLinear(nn.Module):
    """Weight and bias of a linear layer as parts of other modules, behind each other along the first axis."""

    def __init__(self, weight: Sequence[Slot], bias: Sequence[Slot]) -> None:
        super().__init__()
        self._slots = {"weight": tuple(weight), "bias": tuple(bias)}  # no submodules, no parameters of its own

    @property
    def weight(self) -> Tensor:
        """[sum of rows, C]."""
        return torch.cat([slot.tensor for slot in self._slots["weight"]])

    @property
    def bias(self) -> Tensor | None:
        """[sum of rows]."""
        parts = self._slots["bias"]
        return torch.cat([slot.tensor for slot in parts]) if parts else None


class Shared:
    """A module of ours around parameters of theirs, by the rules that read their checkpoints.

    Raises:
        KeyError: a rule names a parameter that theirs does not have.
        ValueError: a parameter of ours has no rule, or theirs has another shape.
    """

    def __init__(self, ours: nn.Module, theirs: nn.Module, rules: "Sequence[Rule]") -> None:
        self.theirs = theirs
        self._ours = ours  # on the meta device
        self._aliases: list[tuple[dict, str, Slot]] = []  # where it is in ours, and where in theirs
        by_owner: dict[str, dict[str, tuple[Slot, ...]]] = {}
        for rule in rules:
            owner, _, name = rule.ours.rpartition(".")
            by_owner.setdefault(owner, {})[name] = tuple(self._slot(path) for path in rule.theirs)
        shapes = {name: x.shape for name, x in ours.named_parameters()}
        for path, slots in by_owner.items():
            self._put(path, slots, shapes)
        ruled = {rule.ours for rule in rules}
        missing = [name for name, _ in ours.named_parameters() if name not in ruled]
        if missing:
            raise ValueError(f"no rule says where these are: {', '.join(missing)}")

    def _slot(self, path: str) -> Slot:
        owner, _, name = path.rpartition(".")
        try:
            found = Slot(self.theirs.get_submodule(owner), name)
            if not isinstance(found.tensor, Tensor):
                raise AttributeError
        except AttributeError:
            raise KeyError(f"{type(self.theirs).__name__} has no tensor {path}") from None
        return found

    def _put(self, path: str, slots: dict[str, tuple[Slot, ...]], shapes: dict[str, torch.Size]) -> None:
        owner = self._ours.get_submodule(path)
        for name, parts in slots.items():
            found = (sum(slot.tensor.shape[0] for slot in parts), *parts[0].tensor.shape[1:])
            whole = f"{path}.{name}" if path else name
            if found != tuple(shapes[whole]):
                raise ValueError(f"{whole} has shape {found}, expected {tuple(shapes[whole])}")
        if any(len(parts) > 1 for parts in slots.values()):
            parent, _, child = path.rpartition(".")
            joined = JoinedLinear(slots.get("weight", ()), slots.get("bias", ()))
            setattr(self._ours.get_submodule(parent), child, joined)
            return
        for name, (slot,) in slots.items():
            self._aliases.append((owner._parameters, name, slot))
        self._refresh()

    def _refresh(self) -> None:
        # a parameter that was replaced (another device, a wrapper) is a new object
        for parameters, name, slot in self._aliases:
            tensor = slot.owner._parameters.get(slot.name)
            if parameters[name] is not tensor:
                parameters[name] = slot.tensor if tensor is None else tensor

    @property
    def module(self) -> nn.Module:
        """Ours, as up to date as theirs."""
        self._refresh()
        if self._ours.training != self.theirs.training:
            self._ours.train(self.theirs.training)
        return self._ours


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Bypassed:
    """The modules below ``root`` that are not called any more where ours is, and whether that loses something.

    Args:
        root: holds them, and is called as ever.
        kinds: classes that they may have, by :func:`is_known`, where ``home`` is the package of root's class.
        path: of root, for the reasons.
        weight_norm: weights may be computed by the hook that ``torch.nn.utils.weight_norm`` sets, or by that of
            ``torch.nn.utils.parametrizations``: ours reads them by :func:`live_weight`.
        followed: whether a hook, or a method that replaced ``forward``, is one that ours serves by itself.
        settings: attributes that ours has copied, of all modules below that have them in their ``__dict__``.
    """

    def __init__(
        self,
        root: nn.Module,
        kinds: Collection[str],
        path: str = "",
        *,
        weight_norm: bool = False,
        followed: Callable[[object], bool] = lambda hook: False,
        settings: Collection[str] = (),
    ) -> None:
        self._kinds, self._weight_norm, self._followed = frozenset(kinds), weight_norm, followed
        self._found, self._home = list(_below(root, path and f"{path}.")), _package(type(root))
        modules = [root, *(module for _, _, _, module, _ in self._found)]
        self._counts = [(module._modules, len(module._modules)) for module in modules]
        # what is looked at in every call, without the attributes on the way there
        self._insides = [(path, kind, child.__dict__) for path, _, _, child, kind in self._found]
        self._hooks = [(path, inside[name]) for path, _, inside in self._insides for name in HOOKS if name in inside]
        self._read = [(x, name, x[name]) for _, _, x in self._insides for name in settings if name in x]

    def valid(self) -> bool:
        """Whether nothing below was added, replaced or removed since, and the settings are the same."""
        for children, count in self._counts:  # plain loops: this runs once a call
            if len(children) != count:
                return False
        for _, children, name, child, kind in self._found:
            if children.get(name) is not child or child.__class__ is not kind:
                return False
        return all(inside.get(name) == value for inside, name, value in self._read)

    def misfit(self) -> str | None:
        """What below is of another class, or None."""
        for path, _, _, child, kind in self._found:
            normed = self._weight_norm and _is_weight_normed(child)
            if not normed and not is_known(kind, self._kinds, self._home):
                return f"{path} is a {kind.__name__}"
        return None

    def watched(self) -> str | None:
        """Who wants to see one of these modules called, or None; cheap enough for every call."""
        for path, hooks in self._hooks:
            if hooks and not all(map(self._serves, hooks.values())):
                return f"{path} has hooks, which want to see it called"
        for path, kind, inside in self._insides:
            if "forward" in inside and _is_foreign(kind, inside["forward"]) and not self._followed(inside["forward"]):
                return f"{path} has another forward, by somebody else"
        return None

    def _serves(self, hook: object) -> bool:
        return self._followed(hook) or (self._weight_norm and _is_weight_norm(hook))


def is_known(kind: type, names: Collection[str], home: str = "") -> bool:
    """Whether a class is one of ``names``: with its module, or alone.

    A name that ``torch.nn`` has is that class, or one of the package ``home``, unless that is PyTorch: adapters and
    quantised layers have names like "Linear" as well.
    """
    name = kind.__name__
    if f"{kind.__module__}.{name}" in names:
        return True
    return name in names and (getattr(nn, name, kind) is kind or _package(kind) == home != "torch")


def _is_foreign(kind: type, forward: Any) -> bool:
    """Whether the ``forward`` of an instance is neither ours nor the one of its class, put there by its name."""
    return not is_ours(forward) and getattr(forward, "__func__", None) is not kind.forward


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def watched(module: nn.Module, weight_norm: bool = False) -> str | None:
    """What would be lost if ``module`` were not called, hooks or a method that somebody replaced; None: nothing."""
    inside = module.__dict__
    if "forward" in inside and _is_foreign(type(module), inside["forward"]):
        return "has another forward, by somebody else"
    hooks = [hook for name in HOOKS for hook in inside.get(name, {}).values()]
    if all(weight_norm and _is_weight_norm(hook) for hook in hooks):
        return None
    return "has hooks, which want to see it called"


def too_precise(x: Tensor) -> str | None:
    """Why ours cannot compute with ``x``, or None; PyTorch's own operators take float64 everywhere."""
    if x.dtype == torch.float64 and x.device.type != "cpu":
        return f"float64 on {x.device.type}: the kernels accumulate in float32"
    return None


def _below(module: nn.Module, path: str = "") -> Iterator[tuple[str, dict, str, nn.Module, type]]:
    """Path, where it is held, name there, itself and class of all below ``module``, parametrizations left out."""
    for name, child in module.named_children():
        yield path + name, module._modules, name, child, type(child)
        if not _is_parametrized(child):
            yield from _below(child, f"{path}{name}.")


def bypassable(root: nn.Module, kinds: Collection[str]) -> str | None:
    """Why the modules below ``root`` have to be called and ours cannot take their place; None where it can.

    ``kinds`` as for :class:`Bypassed`, which is faster where this is asked at every call.
    """
    bypassed = Bypassed(root, kinds)
    return bypassed.misfit() or bypassed.watched()


def live_weight(module: nn.Module) -> Tensor:
    """``module.weight`` as its next call would use it: by weight norm, if that is how it is computed."""
    for hook in module._forward_pre_hooks.values():
        if _is_weight_norm(hook):
            return hook.compute_weight(module)
    return module.weight


def copy_memo(module: nn.Module) -> dict[int, Tensor]:
    """For ``copy.deepcopy(module, memo)``: weights by the old weight norm, which Python cannot copy by itself.

    They are results, not parameters; the copy's hook computes them again at its next call.
    """
    normed = (part for part in module.modules() if any(map(_is_weight_norm, part._forward_pre_hooks.values())))
    return {id(part.weight): part.weight.detach().clone() for part in normed}


def _is_weight_norm(hook: object) -> bool:
    return isinstance(hook, WeightNorm)


def _is_parametrized(module: nn.Module) -> bool:
    return "parametrizations" in module._modules


def _is_weight_normed(module: nn.Module) -> bool:
    """Whether a weight norm is the one parametrization of ``module``, and it of a tensor called weight."""
    if not _is_parametrized(module) or list(module.parametrizations) != ["weight"]:
        return False
    return [type(p).__name__ for p in module.parametrizations.weight] == ["_WeightNorm"]


def plan_of(owner: nn.Module, key: str, make: Callable[[nn.Module], Any]) -> Any:
    """What ``make(owner)`` gave, kept with ``owner`` while its ``valid()`` is true.

    Where ``torch.compile`` traces the first call it is made outside of what is traced.
    """
    if torch.compiler.is_compiling():
        _prepare(owner, key, make)
    cache = state_of(owner).cache
    plan = cache.get(key)
    if plan is None or not plan.valid():
        plan = cache[key] = make(owner)
    return plan


@outside_of_graphs
def _prepare(owner: nn.Module, key: str, make: Callable[[nn.Module], Any]) -> None:
    cache = state_of(owner).cache
    if key not in cache or not cache[key].valid():
        cache[key] = make(owner)

"""Modules of ours that compute with the parameters of somebody else's module.

Nothing is copied and nothing is registered: ours refers to the same ``Parameter`` objects, so that gradients,
optimizers, ``state_dict`` and distributed wrappers see the other module alone. Three projections that are one in ours
are put behind each other at every use, a copy that is small beside the product it saves a launch for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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

    def __init__(self, ours: nn.Module, theirs: nn.Module, rules: Sequence[Rule]) -> None:
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
        missing = [name for name, x in ours.named_parameters() if x.is_meta]
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
            if found != tuple(shapes[f"{path}.{name}" if path else name]):
                raise ValueError(f"{path}.{name} has shape {found}, expected {tuple(shapes[f'{path}.{name}'])}")
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

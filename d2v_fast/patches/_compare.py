"""Upstream and patched side by side: where a difference begins, and how large it is."""

import copy
import importlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from d2v_fast.patches._core import Patch, PatchError
from d2v_fast.patches._differences import Difference, differences, leaves, table
from d2v_fast.patches._sharing import copy_memo
from d2v_fast.patches._state import copies_as_upstream, has_ours

TOLERANCE = 1e-4  # relative, from which on a difference is worth a look in float32
# A gradient that is 0 but for rounding (that of a bias before a norm) is not told by its own norm.
FLOOR = 1e-3  # of the norm of all gradients together


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found; ``print`` it."""

    # of the outputs, the loss, all gradients, the state afterwards, and outputs of modules where their shapes are equal
    differences: tuple[Difference, ...]
    patch: Patch  # of the copy that ran with ours: what was replaced, and calls that went to the original

    def worst(self, *what: str) -> list[Difference]:
        """Largest relative difference first; of these kinds, or of all but the outputs of modules inside."""
        wanted = what or ("output", "loss", "gradient", "state")
        found = [d for d in self.differences if d.what in wanted]
        return sorted(found, key=lambda d: -d.relative)

    @property
    def both_upstream(self) -> bool:
        """Whether both ran as upstream wrote them; the comparison shows nothing about ours then."""
        return self._idle() is not None

    @property
    def relative(self) -> float:
        """The largest relative difference of an output, the loss, a gradient, or a tensor of the state."""
        return max((d.relative for d in self.worst()), default=0.0)

    def first(self, tolerance: float = TOLERANCE) -> Difference | None:
        """The first module, in upstream's order of calls, whose output differs by more than ``tolerance``."""
        return next((d for d in self.differences if d.what == "module" and not d.relative <= tolerance), None)

    def __str__(self) -> str:
        rows = [d for what in ("output", "loss", "state") for d in self.worst(what)[:2]] + self.worst("gradient")[:6]
        first = self.first()
        idle = f"{self._idle()}: both ran as upstream wrote them, so this comparison shows nothing"
        notice = (idle,) if self.both_upstream else ()
        return "\n".join([*notice, *table(rows), self._modules(), *(table([first]) if first else ()), str(self.patch)])

    def _idle(self) -> str | None:
        """Why ours computed nothing, where that is so."""
        if not self.patch.applied:
            return "nothing was replaced"
        if self.patch.calls == 0:
            return "nothing that was replaced was called"
        if self.patch.calls <= self.patch.calls_left:
            return "every call went to the original method"
        return None

    def _modules(self) -> str:
        """How far the outputs of modules agree, in a line."""
        seen, first = sum(d.what == "module" for d in self.differences), self.first()
        if seen == 0:
            return "no module was called by both with an output of the same shape: nothing inside was compared"
        alike = f"of {seen} outputs of modules that both called alike"
        if first is None:
            return f"{alike}, all agree within {TOLERANCE:.0e} (relative)"
        return f"{alike}, the first that differs is {first.name}"


@dataclass
class _Run:
    """Everything that is compared."""

    output: dict[str, Tensor]
    loss: dict[str, Tensor]
    gradient: dict[str, Tensor | None]
    state: dict[str, Tensor]
    modules: dict[str, Tensor]


def compare(
    model: nn.Module,
    batch: Any,
    *,
    call: Callable[[nn.Module, Any], Any] | None = None,
    seed: int = 0,
    dropout: bool = False,
    **switches: Any,
) -> Comparison:
    """Run forward and backward with and without the patch, on copies of ``model``, and compare every tensor.

    Both start from the same random state, numpy's generators without a seed (fairseq's masks) included. The loss is
    the output's ``loss``, the sum of its ``losses``, or the output itself if it is a scalar; where there is none of
    these, gradients come from a random weight for every element of the output.

    Args:
        model: in the mode (``train()`` or ``eval()``) to compare; patched already or not. It is not changed.
        batch: for ``model(**batch)``, a fairseq sample for ``model(**batch["net_input"])``, ``model(*batch)`` or
            ``model(batch)``, by its type. It is not changed.
        call: ``call(model, batch)`` runs the model instead.
        seed: of all random numbers.
        dropout: False sets every rate of dropout, LayerDrop and DropPath in the copies to 0, as ours draw others.
        switches: as for :func:`d2v_fast.patch`.

    Raises:
        PatchError: as :func:`d2v_fast.patch` does; or the model's classes are patched.
    """
    package = importlib.import_module(__package__)  # which imports this module
    model = package.unwrapped(model)
    with copies_as_upstream():
        upstream, ours = (copy.deepcopy(model, copy_memo(model)) for _ in range(2))
    classes = {type(part).__name__: has_ours(type(part)) for part in _named_parts(upstream).values()}
    if any(classes.values()):
        names = ", ".join(name for name, found in classes.items() if found)
        raise PatchError(f"{names}: patched at the class by patch_all(); revert that to compare")
    if not dropout:
        for each in (upstream, ours):
            without_dropout(each)
    patch = package.patch(ours, **switches)
    want, got = (_run(each, copy.deepcopy(batch), call or called, seed) for each in (upstream, ours))
    # ours may call a module for the rows that are read only
    both = {name: x for name, x in want.modules.items() if name in got.modules and x.shape == got.modules[name].shape}
    found = [
        *differences("output", want.output, got.output),
        *differences("loss", want.loss, got.loss),
        *differences("gradient", want.gradient, got.gradient, FLOOR),
        *differences("state", want.state, got.state),
        *differences("module", both, {name: got.modules[name] for name in both}),
    ]
    return Comparison(tuple(found), patch)


def called(model: nn.Module, batch: Any) -> Any:
    """``model`` on a batch of whatever kind."""
    if isinstance(batch, Mapping):
        return model(**batch.get("net_input", batch))
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _run(model: nn.Module, batch: Any, call: Callable[[nn.Module, Any], Any], seed: int) -> _Run:
    modules: dict[str, Tensor] = {}
    gpus = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with _seeded(seed, gpus), _recorded(model, modules):
        output = call(model, batch)
        loss, has_loss = _loss(output, seed)
        if loss is not None and loss.requires_grad:
            loss.backward()
    gradient = {name: p.grad for name, p in model.named_parameters()}
    found = {name or "output": x.clone() for name, x in leaves(_summed(output))}
    of_loss = {"loss": loss.detach()} if has_loss else {}
    return _Run(found, of_loss, gradient, dict(leaves(model.state_dict())), modules)


def _summed(output: Any) -> Any:
    """``output`` with its ``losses`` summed, as fairseq's criteria do: ours may have done so."""
    if not (isinstance(output, Mapping) and isinstance(output.get("losses"), Mapping)):
        return output
    return {**output, "losses": {name: _sum(x) for name, x in output["losses"].items()}}


def _sum(x: Tensor) -> Tensor:
    return x.sum(dtype=torch.promote_types(x.dtype, torch.float32))


def _loss(output: Any, seed: int) -> tuple[Tensor | None, bool]:
    """What to differentiate, and whether it is the model's loss."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(found, Tensor):
        return found.sum(), True
    if isinstance(output, Mapping) and isinstance(output.get("losses"), Mapping):
        return sum(map(_sum, output["losses"].values())), True
    if isinstance(output, Tensor) and output.dim() == 0:
        return output, True
    live = [x for x in _live(output) if x.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    weighted = [(x * torch.randn(x.shape, generator=generator).to(x.device)).sum() for x in live]
    return (sum(weighted), False) if weighted else (None, False)


def _live(value: Any) -> Iterator[Tensor]:
    """As :func:`leaves`, with their history."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _live(part)
    elif hasattr(value, "__dataclass_fields__"):
        yield from _live(vars(value))


def _named_parts(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by their names, those of a teacher that a plain object holds (fairseq's ``EMAModule``) among them."""
    found = dict(model.named_modules())
    for path, module in list(found.items()):
        for name, value in vars(module).items():
            kept = getattr(value, "model", None) if not isinstance(value, nn.Module) else None
            if isinstance(kept, nn.Module):
                prefix = f"{path}.{name}.model".strip(".")
                found |= {f"{prefix}.{inner}".strip("."): part for inner, part in kept.named_modules()}
    return found


@contextmanager
def _recorded(model: nn.Module, into: dict[str, Tensor]) -> Iterator[None]:
    """Outputs of modules in the order of the calls, without a hook in one of them: ours would respect that."""
    names = {id(part): name for name, part in _named_parts(model).items() if part is not model}

    def record(module: nn.Module, args: Any, output: Any) -> None:
        name = names.get(id(module))
        if name is None:
            return
        for path, tensor in leaves(output):
            key, again = f"{name} {path}".strip(), 2
            while key in into:
                key, again = f"{name} {path} (call {again})".replace("  ", " "), again + 1
            into[key] = tensor.clone()

    handle = register_module_forward_hook(record)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _seeded(seed: int, gpus: set[int]) -> Iterator[None]:
    """All random numbers from ``seed``, and the callers' generators as they were afterwards."""
    kept = random.getstate(), np.random.get_state(), np.random.default_rng
    unseeded = iter(range(seed, 2**31))

    def default_rng(found=None):
        return kept[2](next(unseeded) if found is None else found)

    with torch.random.fork_rng(sorted(gpus)):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        np.random.default_rng = default_rng
        try:
            yield
        finally:
            np.random.default_rng = kept[2]
            np.random.set_state(kept[1])
            random.setstate(kept[0])


def without_dropout(model: nn.Module) -> None:
    """Set what has "drop" in its name and is a rate to 0, in modules, their settings, and modules of dropout."""
    for module in _named_parts(model).values():
        if "drop" in type(module).__name__.lower():
            _zero(module, ("p", "drop_prob"))
        for owner in (module, *(vars(module).get(name) for name in ("config", "cfg", "args"))):
            names = owner if isinstance(owner, Mapping) else getattr(owner, "__dict__", ())
            _zero(owner, [name for name in names if "drop" in str(name).lower()])


def _zero(owner: Any, names: Iterable[str]) -> None:
    for name in names:
        if isinstance(getattr(owner, name, None), float):
            setattr(owner, name, 0.0)

"""The drop-in: our ops under models that other people's code builds and trains.

``patch(model)`` changes one model, ``patch_all()`` every supported one that is or will be imported. What was replaced,
what was not and why is in the :class:`Patch` they return.
"""

import importlib
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

from torch import nn

from d2v_fast.patches._compare import Comparison, compare
from d2v_fast.patches._core import Options, Patch, PatchError, disabled, logger
from d2v_fast.patches.all import PatchAll, patch_all, report

__all__ = ["Comparison", "Patch", "PatchAll", "PatchError", "compare", "patch", "patch_all", "report"]

# Modules with SUPPORTED (names of classes), matches(model), sites(model, patch, options) and CLASSES (for patch_all);
# none imports its framework. One with TAKES_TEACHER = True finds options.teacher itself.
FRAMEWORKS = ("fairseq", "transformers", "beit")
# classes of wrappers, told by their names; fairseq has wrappers of its own
WRAPPERS = {
    "DistributedDataParallel",
    "DataParallel",
    "LegacyDistributedDataParallel",
    "ModuleProxyWrapper",
    "DistributedTimeoutWrapper",
}
LATE_WRAPPERS = {
    "FullyShardedDataParallel": "FSDP",
    "FSDPModule": "FSDP",
    "OptimizedModule": "torch.compile",
}


def patch(
    model: Any,
    *,
    teacher: Any = None,
    ema: bool = True,
    loss: bool = True,
    targets: bool = True,
    attention: bool = True,
    conv: bool = True,
    norms: bool = True,
    encoder: bool = True,
    masks: bool = True,
    metrics: bool = True,
    strict: bool = False,
    **unknown: Any,
) -> Patch:
    """Put our ops under ``model``, an instance; a second time nothing more happens.

    Args:
        model: of a supported class, or with parts that are; in ``DistributedDataParallel`` or ``DataParallel``, or not.
            Patch before ``torch.compile`` and before FSDP.
        teacher: a teacher that ``model`` does not hold itself; patched as well.
        ema, loss, targets, attention, conv, norms, encoder, masks, metrics: False leaves this part as it is.
        strict: raise for what does not fit, here, and at calls that ours would leave to the original.
        unknown: always an error, which names the switch that was meant.

    Returns:
        What was replaced, what was not and why. It need not be kept. ``revert()`` takes all of it back.

    Raises:
        TypeError: a switch that there is not, or that is not a bool.
        PatchError: a model of no supported class; or ``strict=True``, and something was skipped.
        RuntimeError: a CUDA graph is being captured.
    """
    switches = {"ema": ema, "loss": loss, "targets": targets, "attention": attention, "conv": conv, "norms": norms}
    options = Options.of(switches | {"encoder": encoder, "masks": masks, "metrics": metrics}, strict, unknown, teacher)
    model = unwrapped(model)
    kind = type(model).__name__
    result = Patch(f"d2v_fast on {kind}")
    if disabled():
        logger.warning("D2V_FAST_DISABLE=1: %s stays as it is", kind)
        result.skip(kind, "all", "D2V_FAST_DISABLE=1", harmless=True)
        return result
    frameworks = [importlib.import_module(f"{__name__}.{name}") for name in FRAMEWORKS]
    found = list(_supported(model, "", frameworks))
    if not found:
        known = ", ".join(dict.fromkeys(name for framework in frameworks for name in framework.SUPPORTED))
        hint = "; patch_all() changes classes" if isinstance(model, type) else ""
        raise PatchError(f"model must be one of {known}, or have one of these as a part, got {_described(model)}{hint}")
    if teacher is not None and not any(getattr(framework, "TAKES_TEACHER", False) for _, _, framework in found):
        apart = list(_supported(unwrapped(teacher), "teacher", frameworks))
        if not apart:
            raise PatchError(f"teacher must be of a supported class as model is, got {_described(teacher)}")
        found += apart
    sites = [
        replace(site, path=f"{path}.{site.path}".strip("."))
        for path, part, framework in found
        for site in framework.sites(part, result, options)
    ]
    return result.apply(sites, options)


def _described(model: Any) -> str:
    return f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__


def _supported(model: Any, path: str, frameworks: list[ModuleType]) -> Iterator[tuple[str, Any, ModuleType]]:
    """The outermost parts of ``model`` that a framework knows, and where they are."""
    known = next((framework for framework in frameworks if framework.matches(model)), None)
    if known is not None:
        yield path, model, known
    elif isinstance(model, nn.Module):
        for name, child in model.named_children():
            yield from _supported(child, f"{path}.{name}".strip("."), frameworks)


def unwrapped(model: Any) -> Any:
    """The model in ``DistributedDataParallel`` and its kind.

    Raises:
        PatchError: a wrapper that has to come after the patch.
    """
    while True:
        names = {kind.__name__ for kind in type(model).__mro__}
        late = [wrapper for name, wrapper in LATE_WRAPPERS.items() if name in names]
        if getattr(model, "_compiled_call_impl", None) is not None:
            late.append("its own compile()")
        if late:
            raise PatchError(f"model went through {late[0]} already: patch it before that")
        if "Data2VecPretraining" in names:
            raise PatchError("model must be somebody else's, got Data2VecPretraining: it computes with ours already")
        if names.isdisjoint(WRAPPERS):
            return model
        model = model.module

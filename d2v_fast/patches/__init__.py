"""The drop-in: our ops under models that other people's code builds and trains.

``patch(model)`` changes one model, ``patch_all()`` every supported one that is or will be imported. What was replaced,
what was not and why is in the :class:`Patch` they return.
"""

import importlib
from typing import Any

from d2v_fast.patches._core import Options, Patch, PatchError, disabled, logger
from d2v_fast.patches.all import PatchAll, patch_all, report

__all__ = ["Patch", "PatchAll", "PatchError", "patch", "patch_all", "report"]

# modules with SUPPORTED (names of classes), matches(model) and sites(model, patch, options); none imports its framework
FRAMEWORKS = ("fairseq",)


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
) -> Patch:
    """Put our ops under ``model``, an instance; a second time nothing more happens.

    Raises:
        PatchError: a model of no supported class; or ``strict=True``, and something was skipped.
        RuntimeError: a CUDA graph is being captured.
    """
    switches = (ema, loss, targets, attention, conv, norms, encoder, masks, metrics)
    order = ("ema", "loss", "targets", "attention", "conv", "norms", "encoder", "masks", "metrics")
    options = Options(frozenset(part for part, on in zip(order, switches, strict=True) if on), strict)
    kind = type(model).__name__
    result = Patch(f"d2v_fast on {kind}")
    if disabled():
        logger.warning("D2V_FAST_DISABLE=1: %s stays as it is", kind)
        result.skip(kind, "all", "D2V_FAST_DISABLE=1", harmless=True)
        return result
    modules = [importlib.import_module(f"{__name__}.{name}") for name in FRAMEWORKS]
    for module in modules:
        if module.matches(model):
            return result.apply(module.sites(model, result, options), options)
    known = ", ".join(name for module in modules for name in module.SUPPORTED)
    raise PatchError(f"model must be one of {known}, got {kind}")

"""Our ops in every supported class that is imported or will be.

Modules are told by the end of their names: fairseq's ``user_dir`` imports ``data2vec.models.data2vec_audio``, other
code ``examples.data2vec.models.data2vec_audio``, and both define classes of their own. Models that fairseq registers
are told by the name of their class alone, in whatever module.
"""

import functools
import importlib
import os
import sys
import threading
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

from d2v_fast.launch.hooks import AfterImport, complete
from d2v_fast.launch.switches import PARTS, from_environment
from d2v_fast.patches._core import Options, Patch, PatchError, Seam, Site, disabled, logger
from d2v_fast.patches._report import summary, table

REGISTRY = "fairseq.models"  # has MODEL_REGISTRY and register_model
Seams = Callable[[type], list[Seam]]
_active: "PatchAll | None" = None
_latest: "PatchAll | None" = None  # in force or taken back


class PatchAll:
    """Record of what was swapped in classes: ``print`` it, :meth:`revert` it, or use it as a context manager.

    Made by :func:`patch_all`. ``patches`` has one :class:`Patch` for each module in which a class was looked at.
    """

    def __init__(self, frameworks: dict[str, dict[str, Seams]], options: Options) -> None:
        self.patches: list[Patch] = []
        self.disabled = disabled()
        self.options = options
        self._lock = threading.RLock()
        self._active = False
        self.reverted = False
        self._seen: weakref.WeakSet[type] = weakref.WeakSet()
        self._registries: list[tuple[ModuleType, Callable, Callable]] = []  # module, our register_model, theirs
        self._endings: dict[str, list[tuple[str, str, Seams]]] = {}  # last name -> (module, class, its seams)
        self._models: dict[str, list[Seams]] = {}  # what fairseq may register; Transformers has classes of these names
        for framework, classes in frameworks.items():
            for key, seams in classes.items():
                module, _, name = key.rpartition(".")
                self._endings.setdefault(module.rpartition(".")[2], []).append((module, name, seams))
                if framework == "fairseq":
                    self._models.setdefault(name, []).append(seams)
        self._finder = AfterImport(self._wants, self.look)

    def _matches(self, name: str) -> list[tuple[str, Seams]]:
        """The classes that a module of this name should have."""
        found = self._endings.get(name.rpartition(".")[2], ())
        return [(kind, seams) for module, kind, seams in found if name == module or name.endswith(f".{module}")]

    def _wants(self, name: str) -> bool:
        return (name == REGISTRY and bool(self._models)) or bool(self._matches(name))

    def start(self) -> None:
        """Look at what is imported, then at all that will be."""
        self._active = True
        if self._endings:
            self._finder.install()
        try:
            for name in list(sys.modules):
                if self._wants(name) and complete(name):
                    self.look(sys.modules[name])
        except BaseException:
            self.revert()
            raise

    def look(self, module: ModuleType) -> None:
        """Swap what is known in a module that was executed.

        Raises:
            PatchError: with ``strict=True``, something does not fit; this module's classes stay as they were.
        """
        name = module.__name__
        with self._lock:
            if not self._active or not self._wants(name):
                return
            patch, sites = Patch(name), []
            for kind, seams in self._matches(name):
                owner = vars(module).get(kind)
                if isinstance(owner, type):
                    sites += self._sites(owner, [seams])
                else:
                    patch.skip(kind, "all", "there is no such class in this version")
            self._apply(patch, sites)
            if name == REGISTRY:
                self._watch(module)

    def _sites(self, owner: type, makers: list[Seams]) -> list[Site]:
        if owner in self._seen:
            return []
        self._seen.add(owner)
        return [Site("", owner, seam) for seams in makers for seam in seams(owner)]

    def _apply(self, patch: Patch, sites: list[Site]) -> None:
        patch.apply(sites, self.options)
        if patch.applied or patch.skipped:
            self.patches.append(patch)

    def _registered(self, owner: type) -> None:
        with self._lock:
            makers = self._models.get(getattr(owner, "__name__", ""))
            if self._active and makers is not None:
                self._apply(Patch(f"{owner.__module__} (registered)"), self._sites(owner, makers))

    def _watch(self, models: ModuleType) -> None:
        """Look at models that are in fairseq's registry, and at those that come."""
        for owner in models.MODEL_REGISTRY.values():
            self._registered(owner)
        original = models.register_model

        @functools.wraps(original)
        def register_model(*args, **kwargs):
            register = original(*args, **kwargs)

            def register_and_look(owner):
                registered = register(owner)
                self._registered(registered)
                return registered

            return register_and_look

        models.register_model = register_model
        self._registries.append((models, register_model, original))

    def revert(self) -> None:
        """Put everything back, and look at no more imports. A second time it does nothing.

        Raises:
            PatchError: somebody replaced one of these methods after us; nothing was put back then.
        """
        global _active
        with self._lock:
            for patch in self.patches:
                patch.check_revert()
            self._active = False
            self._finder.remove()
            while self._registries:
                models, ours, original = self._registries.pop()
                if models.register_model is ours:  # else somebody wrapped ours, which now only passes calls on
                    models.register_model = original
            for patch in reversed(self.patches):
                patch.revert()
            self.reverted = True
            if _active is self:
                _active = None

    def __enter__(self) -> "PatchAll":
        return self

    def __exit__(self, *exc: object) -> None:
        self.revert()

    @property
    def calls(self) -> int:
        """Calls of all methods of ours in this process."""
        return sum(patch.calls for patch in self.patches)

    def __str__(self) -> str:
        """The table: what was replaced and how often it was called, what was not replaced and why.

        Calls that went to the original in spite of the patch are lines of their own; they are among the calls above.
        """
        if self.disabled:
            return "d2v_fast: D2V_FAST_DISABLE=1, nothing was replaced"
        title = "d2v_fast, taken back" if self.reverted else "d2v_fast"
        if not self.patches:
            return f"{title}: no supported class was imported in this process (children print their own table)"
        replaced = sum(len(patch.applied) for patch in self.patches)
        heading = summary(replaced, sum(len(patch.skipped) for patch in self.patches), self.reverted)
        if replaced and not self.calls:
            heading += "; nothing of ours was called in this process (children print their own table)"
        rows = [row for patch in self.patches for row in patch.rows()]
        # stable: what was replaced in any module comes first
        rows.sort(key=lambda row: ("replaced", "was replaced", "left", "upstream").index(row.what))
        return "\n".join([f"{title}: {heading}", *table(rows)])


def _known_classes(which: str) -> dict[str, dict[str, Seams]]:
    names = importlib.import_module("d2v_fast.patches").FRAMEWORKS  # it imports this file
    modules = {name: importlib.import_module(f"d2v_fast.patches.{name}") for name in names}
    return {name: getattr(module, which, {}) for name, module in modules.items()}


def patch_all(
    *,
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
) -> PatchAll:
    """Put our ops into every supported class of fairseq, Transformers and BEiT-style code, imported before or after.

    A second call that asks for nothing else returns the handle of the first, with the switches of the first. With
    ``D2V_FAST_DISABLE=1`` nothing happens, and the log says so.

    Args:
        ema, loss, targets, attention, conv, norms, encoder, masks, metrics: False leaves this part as it is.
        strict: raise for what does not fit, from here or from the import of the module with it.
        unknown: always an error, which names the switch that was meant.

    Raises:
        TypeError: a switch that there is not, or that is not a bool.
        PatchError: ``strict=True``, and something does not fit; or all this is in force already with other switches.
        RuntimeError: a CUDA graph is being captured.
    """
    global _active, _latest
    switches = {"ema": ema, "loss": loss, "targets": targets, "attention": attention, "conv": conv, "norms": norms}
    options = Options.of(switches | {"encoder": encoder, "masks": masks, "metrics": metrics}, strict, unknown)
    if _active is not None:
        _check_same(options, _active.options)
        logger.info("patch_all() is in force already%s", _described(_active.options))
        return _active
    handle = PatchAll(_known_classes("NAMES" if disabled() else "CLASSES"), options)
    if handle.disabled:
        logger.warning("D2V_FAST_DISABLE=1: all classes stay as they are")
    else:
        _active = _latest = handle
    handle.start()
    return handle


def patch_all_as_told() -> PatchAll:
    """:func:`patch_all` with the switches that ``D2V_FAST_WITHOUT`` and ``D2V_FAST_STRICT`` name.

    Raises:
        UserError: these name what there is not; or as :func:`patch_all` does.
    """
    return patch_all(**from_environment(os.environ))


def _check_same(wanted: Options, found: Options) -> None:
    """Raise where a second call asks for what the first did not. A call without any switch asks for nothing."""
    other_parts = wanted.parts not in (found.parts, frozenset(PARTS))
    if other_parts or (wanted.strict and not found.strict):
        asked, there = (_described(options) or " without switches" for options in (wanted, found))
        raise PatchError(f"patch_all() is in force{there} and was called{asked}: revert it first")


def _described(options: Options) -> str:
    """What differs from the defaults, e.g. `` with encoder=False, strict=True``."""
    found = [f"{part}=False" for part in PARTS if part not in options.parts] + ["strict=True"] * options.strict
    return f" with {', '.join(found)}" if found else ""


def look(module: ModuleType) -> None:
    """What a module that was executed gets from the :func:`patch_all` in force, if one is."""
    if _active is not None:
        _active.look(module)


def report() -> str:
    """What :func:`patch_all` replaced so far, how often that was called, and what it left and why."""
    if disabled() and _active is None:
        return "d2v_fast: D2V_FAST_DISABLE=1, nothing was replaced"
    return "d2v_fast: patch_all() is off" if _latest is None else str(_latest)

"""Our ops in every supported class that is imported or will be.

Modules are told by the end of their names: fairseq's ``user_dir`` imports ``data2vec.models.data2vec_audio``, other
code ``examples.data2vec.models.data2vec_audio``, and both define classes of their own. Models that fairseq registers
are told by the name of their class alone, in whatever module.
"""

import functools
import importlib
import sys
import threading
import weakref
from collections.abc import Callable
from types import ModuleType

from d2v_fast.launch.hooks import AfterImport, complete
from d2v_fast.patches._core import Options, Patch, PatchError, Seam, Site, disabled, logger, table

REGISTRY = "fairseq.models"  # has MODEL_REGISTRY and register_model
Seams = Callable[[type], list[Seam]]
_active: "PatchAll | None" = None


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
            if _active is self:
                _active = None

    def __enter__(self) -> "PatchAll":
        return self

    def __exit__(self, *exc: object) -> None:
        self.revert()

    def __str__(self) -> str:
        """The table: what was replaced, what was not and why, and calls that went to the original."""
        if self.disabled:
            return "d2v_fast: D2V_FAST_DISABLE=1, nothing was replaced"
        if not self.patches:
            return "d2v_fast: no supported class was imported in this process (children print their own table)"
        rows = [row for patch in self.patches for row in patch.rows()]
        replaced = sum(len(patch.applied) for patch in self.patches)
        left = sum(len(patch.skipped) for patch in self.patches)
        # stable: what was replaced in any module comes first
        rows.sort(key=lambda row: ("replaced", "left", "upstream").index(row[0]))
        return "\n".join([f"d2v_fast: {replaced} replaced, {left} left as they were", *table(rows)])


def _known_classes(which: str) -> dict[str, dict[str, Seams]]:
    names = importlib.import_module("d2v_fast.patches").FRAMEWORKS  # it imports this file
    modules = {name: importlib.import_module(f"d2v_fast.patches.{name}") for name in names}
    return {name: getattr(module, which, {}) for name, module in modules.items()}


def patch_all(strict: bool = False) -> PatchAll:
    """Put our ops into every supported class of fairseq, Transformers and BEiT-style code, imported before or after.

    A second call returns the handle of the first. With ``D2V_FAST_DISABLE=1`` nothing happens, and the log says so.

    Args:
        strict: raise for what does not fit, from here or from the import of the module with it.

    Raises:
        PatchError: ``strict=True``, and something does not fit, or all this is in force already without it.
        RuntimeError: a CUDA graph is being captured.
    """
    global _active
    if _active is not None:
        if strict and not _active.options.strict:
            raise PatchError("patch_all() is in force without strict=True: revert it first")
        logger.info("patch_all() is in force already")
        return _active
    handle = PatchAll(_known_classes("NAMES" if disabled() else "CLASSES"), Options(strict=strict))
    if handle.disabled:
        logger.warning("D2V_FAST_DISABLE=1: all classes stay as they are")
    else:
        _active = handle
    handle.start()
    return handle


def look(module: ModuleType) -> None:
    """What a module that was executed gets from the :func:`patch_all` in force, if one is."""
    if _active is not None:
        _active.look(module)


def report() -> str:
    """What :func:`patch_all` replaced so far, what it left and why, and calls that went to the original."""
    if _active is None:
        return "d2v_fast: D2V_FAST_DISABLE=1, nothing was replaced" if disabled() else "d2v_fast: patch_all() is off"
    return str(_active)

"""Looking at modules right after they were imported.

Standard library only: child interpreters of ``d2v-fast run`` load this at their start, long before torch, and most of
them never need more. (The hooks of wrapt know whole names only, end after one import and cannot be taken back.)
"""

import importlib
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Loader:
    """A loader that says when a module was executed; nobody sees it in the module afterwards."""

    def __init__(self, loader: Any, done: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._done = done

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._done(module)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # a copy that is being made has no _loader yet
            raise AttributeError(name)
        return getattr(self._loader, name)


class AfterImport:
    """A finder that calls ``done(module)`` after the execution, again after a reload, of modules it ``wants``.

    A module that fails to import is none of its business. What ``done`` raises fails the import.
    """

    def __init__(self, wants: Callable[[str], bool], done: Callable[[ModuleType], None]) -> None:
        self._wants = wants
        self._done = done
        self._searching = threading.local()

    def install(self) -> None:
        """Be asked before all other finders."""
        sys.meta_path.insert(0, self)

    def remove(self) -> None:
        """Be asked no more; modules that are being executed are still looked at."""
        with suppress(ValueError):  # it is not there any more
            sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """What the other finders find, with the loader watched."""
        names = self._searching.__dict__.setdefault("names", set())
        if name in names or not self._wants(name):  # finders of this kind ask each other
            return None
        names.add(name)
        try:
            found = (f.find_spec(name, path, target) for f in list(sys.meta_path) if f is not self)
            spec = next((s for s in found if s is not None), None)
        finally:
            names.discard(name)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader, self._done)
        return spec


def complete(name: str) -> bool:
    """Whether a module is imported, to its end."""
    module = sys.modules.get(name)
    return module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False)


def start_with_torch() -> None:
    """``import d2v_fast.auto`` in this interpreter as soon as torch is there; if it never is, nothing happens."""

    def wants(name: str) -> bool:
        top = name.partition(".")[0]
        return name == "torch" or (top not in sys.stdlib_module_names and top not in ("torch", "d2v_fast"))

    def done(module: ModuleType) -> None:
        if module.__name__ != "torch" and not complete("torch"):
            return
        finder.remove()
        importlib.import_module("d2v_fast.auto")
        # a module that imports torch is found before torch, and complete after it
        importlib.import_module("d2v_fast.patches.all").look(module)

    finder = AfterImport(wants, done)
    finder.install()

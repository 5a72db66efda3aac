"""Modules with one class, and a seam for it: what the tests of :mod:`d2v_fast.patches.all` import."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from d2v_fast.patches._core import Seam, fall_back, state_of

MODEL = """
class ToyModel:
    def forward(self, x):
        return x

class Helper:
    def forward(self, x):
        return -x
"""


def doubled(original, options):
    def forward(self, x):
        state_of(self).cache["calls"] = state_of(self).cache.get("calls", 0) + 1
        if x < 0:
            fall_back(self, "forward", "negative", options)
            return original(self, x)
        return 2 * original(self, x)

    return forward


SEAM = Seam("encoder", "forward", doubled, "twice as much")
CLASSES = {"fairseq": {"toy_model.ToyModel": lambda kind: [SEAM]}}


@contextmanager
def importable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``folder`` is on sys.path: toy_model.py, and the same file in packages a and b.models; forgotten afterwards."""
    for name in ("toy_model", "a/toy_model", "b/models/toy_model", "not_toy_model"):
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(MODEL)
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            del sys.modules[name]


def load(name: str) -> ModuleType:
    return importlib.import_module(name)

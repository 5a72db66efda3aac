"""Imported for its effect: scripts beside it find the package of this checkout, whether it is installed or not."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def installed_from_here() -> bool:
    """Whether ``import d2v_fast`` gives the package of this checkout."""
    spec = importlib.util.find_spec("d2v_fast")
    return bool(spec and spec.origin and ROOT in Path(spec.origin).resolve().parents)


ADDED = not installed_from_here()  # to the path, which processes started from here do not inherit
if ADDED:
    sys.path.insert(1, str(ROOT))  # behind the script's folder, before what else is installed

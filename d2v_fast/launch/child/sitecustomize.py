"""Every interpreter below ``d2v-fast run`` executes this at its start: the user's own sitecustomize, then our hook."""

import importlib.util
import os
import sys
from importlib.machinery import PathFinder

here = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [p for p in sys.path if os.path.abspath(p) != here]  # children get it from the environment

try:
    hidden = PathFinder.find_spec("sitecustomize", sys.path)
    if hidden is not None and hidden.loader is not None:
        module = importlib.util.module_from_spec(hidden)
        sys.modules["sitecustomize"] = module
        hidden.loader.exec_module(module)
finally:
    if importlib.util.find_spec("d2v_fast") is not None:
        from d2v_fast.launch.hooks import start_with_torch

        start_with_torch()
    elif os.environ.get("D2V_FAST_REPORT") == str(os.getpid()):  # helpers in other Pythons are not worth a word
        print(f"d2v_fast is not installed for {sys.executable}: the command runs as it is", file=sys.stderr)

"""Runs all cases of ``emulated_cases_*.py`` on a library of launchers: ``python emulated_cases.py LIBRARY [NAME ...]``.

Each of those files has ``cases(library)``, which yields (name, function); a function calls launchers through ctypes on
NumPy arrays of exactly the right size and checks what they wrote. No torch: a sanitizer's runtime is loaded. Prints the
names of the cases, and at the end those of the functions that they called.
"""

import ctypes
import importlib
import sys
from pathlib import Path

SEEDS = (1, 2)


class Observed:
    """A library that remembers which of its functions were asked for."""

    def __init__(self, path: str):
        self._library = ctypes.CDLL(path)
        self._library.d2v_error_text.restype = ctypes.c_char_p
        self.used: set[str] = set()

    def __getattr__(self, name: str):
        self.used.add(name)
        return getattr(self._library, name)


def main() -> int:
    library = Observed(sys.argv[1])
    wanted = tuple(sys.argv[2:]) or ("",)
    for path in sorted(Path(__file__).parent.glob("emulated_cases_*.py")):
        for name, case in importlib.import_module(path.stem).cases(library):
            if name.startswith(wanted):
                for seed in SEEDS:
                    library.d2v_emulator_seed(ctypes.c_uint64(seed))
                    case()
                print(name, flush=True)
    print(*sorted(library.used))
    return 0


if __name__ == "__main__":
    sys.exit(main())

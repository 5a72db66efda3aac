"""Runs all cases of ``emulated_cases_*.py`` on a library: ``python emulated_cases.py LIBRARY [NAME ...] [--seeds N]``.

Each of those files has ``cases(library)``, which yields (name, function); a function calls launchers through ctypes on
NumPy arrays of exactly the right size and checks what they wrote. No torch: a sanitizer's runtime is loaded. Prints the
names of the cases, and at the end those of the functions that they called.
"""

import argparse
import ctypes
import importlib
from pathlib import Path


class Observed:
    """A library that remembers which of its functions were asked for."""

    def __init__(self, path: str):
        self._library = ctypes.CDLL(path)
        self._library.d2v_error_text.restype = ctypes.c_char_p
        self.used: set[str] = set()

    def __getattr__(self, name: str):
        self.used.add(name)
        return getattr(self._library, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("library", help="with the launchers of csrc, emulated")
    parser.add_argument("names", nargs="*", default=[""], help="beginnings of the cases' names")
    parser.add_argument("--seeds", type=int, default=2, help="orders of the threads to run each case in")
    options = parser.parse_args()
    library = Observed(options.library)
    for path in sorted(Path(__file__).parent.glob("emulated_cases_*.py")):
        for name, case in importlib.import_module(path.stem).cases(library):
            if name.startswith(tuple(options.names)):
                for seed in range(options.seeds):
                    library.d2v_emulator_seed(ctypes.c_uint64(seed + 1))
                    case()
                print(name, flush=True)
    print(*sorted(library.used))


if __name__ == "__main__":
    main()

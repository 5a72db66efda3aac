"""Runs every case of ``emulated_cases_*.py`` on a library of launchers: ``python emulated_cases.py LIBRARY [NAME]``.

Each of those files has ``cases(library)``, which yields (name, function); a function calls launchers through ctypes on
NumPy arrays of exactly the right size and checks what they wrote. No torch: a sanitizer's runtime is loaded.
"""

import ctypes
import importlib
import sys
from pathlib import Path

SEEDS = (1, 2)


def main() -> int:
    library = ctypes.CDLL(sys.argv[1])
    library.d2v_error_text.restype = ctypes.c_char_p
    count = 0
    for path in sorted(Path(__file__).parent.glob("emulated_cases_*.py")):
        for name, case in importlib.import_module(path.stem).cases(library):
            if name.startswith(tuple(sys.argv[2:])) or len(sys.argv) == 2:
                for seed in SEEDS:
                    library.d2v_emulator_seed(ctypes.c_uint64(seed))
                    case()
                print(name, flush=True)
                count += 1
    return count == 0


if __name__ == "__main__":
    sys.exit(main())

"""The switches of the drop-in: their names, what they may be, and the environment variables that child processes read.

Standard library only, as ``d2v-fast run`` looks at them before anything is imported.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from d2v_fast.errors import UserError

PARTS = ("ema", "loss", "targets", "attention", "conv", "norms", "encoder", "masks", "metrics")
WITHOUT = "D2V_FAST_WITHOUT"  # parts that stay as they are, with commas between
STRICT = "D2V_FAST_STRICT"  # 1: an error instead of leaving anything
DISABLE = "D2V_FAST_DISABLE"  # 1: nothing is replaced, whatever the others say


def check(switches: Mapping[str, Any]) -> None:
    """Whether these are switches of :func:`d2v_fast.patch`, ``strict`` included.

    Raises:
        TypeError: a name that there is not, or a value that is not a bool.
    """
    for name, value in switches.items():
        if name not in (*PARTS, "strict"):
            raise TypeError(f"{_unknown(name, (*PARTS, 'strict'))}; and strict")
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__})")


def parse(names: str, source: str) -> list[str]:
    """``encoder,masks`` as a list; ``source`` is what errors call it.

    Raises:
        UserError: a name that there is not.
    """
    found = [name for name in (part.strip() for part in names.split(",")) if name]
    for name in found:
        if name not in PARTS:
            raise UserError(f"{source}: {_unknown(name, PARTS)}")
    return found


def from_environment(environment: Mapping[str, str]) -> dict[str, bool]:
    """Arguments of :func:`d2v_fast.patch_all`, as ``D2V_FAST_WITHOUT`` and ``D2V_FAST_STRICT`` say.

    With ``D2V_FAST_DISABLE=1`` these are not read.

    Raises:
        UserError: a name that there is not, or another value than 1 or 0.
    """
    if environment.get(DISABLE, "") == "1":
        return {}
    switches = dict.fromkeys(parse(environment.get(WITHOUT, ""), WITHOUT), False)
    strict = environment.get(STRICT, "")
    if strict not in ("", "0", "1"):
        raise UserError(f"{STRICT} must be 1 or 0, got {strict!r}")
    return {**switches, "strict": strict == "1"}


def _unknown(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f" (nearest: {near[0]})" if near else ""
    return f"{name!r} is no switch{hint}; switches are {', '.join(PARTS)}"

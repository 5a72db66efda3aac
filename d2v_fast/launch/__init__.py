"""``d2v-fast run COMMAND``: the command itself, with ``import d2v_fast.auto`` in every Python below it.

Child interpreters (``torchrun``, ``mp.spawn``, data loaders, ``subprocess``) get it through PYTHONPATH, which they
inherit: a folder with a ``sitecustomize`` in front. Nothing is written anywhere. Interpreters that ignore PYTHONPATH
(``python -I``, ``-E``) or ``sitecustomize`` (``-S``), or are started with an environment of their own, are not reached.
"""

import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from d2v_fast.errors import UserError
from d2v_fast.launch.switches import STRICT, WITHOUT, from_environment, parse

FOLDER = Path(__file__).parent / "child"
UNREACHED = {"I": "ignores PYTHONPATH", "E": "ignores PYTHONPATH", "S": "imports no sitecustomize"}


def resolve(command: Sequence[str]) -> list[str]:
    """What to execute: a script of this Python's or on PATH, ``script.py`` or ``-m module``, with its arguments.

    Raises:
        UserError: no command, or there is none of that name.
    """
    if not command or (command[0] == "-m" and len(command) == 1):
        raise UserError("COMMAND is missing: d2v-fast run fairseq-hydra-train ... | script.py ... | -m module ...")
    first = command[0]
    if first == "-m":
        return [sys.executable, *command]
    if first.startswith("-"):
        raise UserError(f"{first} is no option of d2v-fast run: there are --without PART,PART... and --strict")
    if first.endswith(".py"):
        if not Path(first).is_file():
            raise UserError(f"COMMAND {first}: there is no such file")
        return [sys.executable, *command]
    scripts = sysconfig.get_path("scripts")
    found = shutil.which(first, path=scripts) or shutil.which(first)
    if found is None:
        raise UserError(f"COMMAND {first} was not found, neither in {scripts} nor on PATH")
    return [found, *command[1:]]


def child_environment(
    environment: Mapping[str, str], without: str | None = None, strict: bool = False
) -> dict[str, str]:
    """``environment`` with our folder in front of PYTHONPATH, the switches, and who this process is.

    This process prints the report. Switches that are not given stay as the environment has them.

    Raises:
        UserError: a switch that there is not, here or in the environment.
    """
    paths = [str(FOLDER), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    paths = [p for i, p in enumerate(paths) if i == 0 or p != str(FOLDER)]
    added = {"PYTHONPATH": os.pathsep.join(paths), "D2V_FAST_REPORT": str(os.getpid())}
    if without is not None:
        added[WITHOUT] = ",".join(parse(without, "--without"))
    if strict:
        added[STRICT] = "1"
    child = {**environment, **added}
    from_environment(child)
    return child


def unreached(command: Sequence[str]) -> str | None:
    """Why this command, a Python with such options, would not run our ``sitecustomize``; None where it would."""
    if re.fullmatch(r"(python|pypy)[\d.]*t?(\.exe)?", Path(command[0]).name) is None:
        return None
    arguments = iter(command[1:])
    for argument in arguments:
        if argument == "--check-hash-based-pycs":
            next(arguments, None)
        elif not argument.startswith("-") or argument in ("-", "--"):
            return None
        elif not argument.startswith("--"):
            flags = re.match(r"-([^cmWX]*)(.?)(.*)", argument)
            if (found := next((flag for flag in flags[1] if flag in UNREACHED), None)) is not None:
                return f"{command[0]} -{found} {UNREACHED[found]}"
            if flags[2] in ("c", "m"):  # what follows belongs to the program
                return None
            if flags[2] and not flags[3]:  # -W and -X: their argument is apart
                next(arguments, None)
    return None


def launch(command: Sequence[str], without: str | None = None, strict: bool = False) -> NoReturn:
    """Become the command: same process, so that exit code, signals, standard input and output are its own.

    Args:
        without: parts that stay as they are, with commas between.
        strict: an error in the command instead of leaving anything.

    Raises:
        UserError: no command, there is none of that name, or it cannot be executed; or a switch that there is not.
    """
    environment = child_environment(os.environ, without, strict)
    resolved = resolve(command)
    if (reason := unreached(resolved)) is not None:
        print(f"d2v_fast: {reason}, so that nothing is replaced in it", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(resolved[0], resolved, environment)
    except OSError as error:
        raise UserError(f"COMMAND {resolved[0]} cannot be executed: {error.strerror}") from error

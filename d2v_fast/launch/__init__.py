"""``d2v-fast run COMMAND``: the command itself, with ``import d2v_fast.auto`` in every Python below it.

Child interpreters (``torchrun``, ``mp.spawn``, data loaders, ``subprocess``) get it through PYTHONPATH, which they
inherit: a folder with a ``sitecustomize`` in front. Nothing is written anywhere. Interpreters that ignore PYTHONPATH
(``python -I``, ``-E``) or are started with an environment of their own are not reached.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from d2v_fast.errors import UserError

FOLDER = Path(__file__).parent / "child"


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
    if first.endswith(".py"):
        if not Path(first).is_file():
            raise UserError(f"COMMAND {first}: there is no such file")
        return [sys.executable, *command]
    scripts = sysconfig.get_path("scripts")
    found = shutil.which(first, path=scripts) or shutil.which(first)
    if found is None:
        raise UserError(f"COMMAND {first} was not found, neither in {scripts} nor on PATH")
    return [found, *command[1:]]


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` with our folder in front of PYTHONPATH, and who this process is, which prints the report."""
    paths = [str(FOLDER), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    paths = [p for i, p in enumerate(paths) if i == 0 or p != str(FOLDER)]
    return {**environment, "PYTHONPATH": os.pathsep.join(paths), "D2V_FAST_REPORT": str(os.getpid())}


def launch(command: Sequence[str]) -> NoReturn:
    """Become the command: same process, so that exit code, signals, standard input and output are its own.

    Raises:
        UserError: no command, there is none of that name, or it cannot be executed.
    """
    resolved = resolve(command)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(resolved[0], resolved, child_environment(os.environ))
    except OSError as error:
        raise UserError(f"COMMAND {resolved[0]} cannot be executed: {error.strerror}") from error

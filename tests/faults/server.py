"""Runs ``d2v-fast`` commands on several ranks again and again: a process that has imported everything, and forks.

A request is a line of JSON on the standard input: ``arguments`` of the command, ``ranks``, ``of_rank`` (more arguments
for some), ``plants`` (see plants.py) and ``seconds``, after which all are killed. The answer is a line on the standard
output: for each rank its exit code (negative: the signal), seconds, and what it printed. Nothing else ends a rank: here
is no launcher that kills the others when one has failed.
"""

import atexit
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import plants
import torch
import torch._dynamo  # by optimizers; here and below: imported once
import torch.distributed.fsdp
import typer  # noqa: F401

from d2v_fast.train import loop

torch.set_num_threads(1)
loop.plot_curves = lambda folder: None  # takes longer than all the rest of such a run


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def be_rank(rank: int, request: dict, port: int, folder: Path) -> None:
    """Never returns."""
    os.setsid()  # as torchrun does
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if request["ranks"] > 1:
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["ranks"], "LOCAL_WORLD_SIZE": request["ranks"]}
        os.environ |= {name: str(value) for name, value in world.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    plants.plant(rank, request["plants"])
    sys.argv = ["d2v-fast", "pretrain", "text_demo", *request["arguments"], *request["of_rank"].get(str(rank), [])]
    code = 0
    try:
        from d2v_fast.cli import main  # here: it reads the rank

        main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(request: dict) -> list[dict]:
    port, start = free_port(), time.monotonic()
    folder = Path(tempfile.mkdtemp())  # no TemporaryDirectory: the first child to end would remove it
    pids: dict[int, int] = {}
    for rank in range(request["ranks"]):
        pids[rank] = os.fork()
        if pids[rank] == 0:
            be_rank(rank, request, port, folder)
    running, found, late = {pid: rank for rank, pid in pids.items()}, {}, False
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            code = os.waitstatus_to_exitcode(status)
            found[running.pop(pid)] = {"code": code, "seconds": time.monotonic() - start, "late": late}
        elif not late and time.monotonic() - start > request["seconds"]:
            late = True
            for leader in running:
                os.killpg(leader, signal.SIGKILL)
        else:
            time.sleep(0.02)
    for rank, result in found.items():
        result |= {name: (folder / f"{name}-{rank}").read_text(encoding="utf-8") for name in ("out", "err")}
        result["left"] = _group_lives(pids[rank])
    shutil.rmtree(folder)
    return [found[rank] for rank in sorted(found)]


def _group_lives(leader: int) -> bool:
    """Whether anything of a rank's session is left a while after its end; it is killed then."""
    for _ in range(100):
        try:
            os.killpg(leader, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    os.killpg(leader, signal.SIGKILL)
    return True


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers)


if __name__ == "__main__":
    main()

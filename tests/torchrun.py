"""Starts a script of this folder on several ranks, as a process of its own with a time-out."""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LAST_WORDS = 10.0  # seconds for what is told to end
MARK = "D2V_FAST_TEST_LAUNCH"  # in the environment of all processes of a launch


def launch(script: str, cases: dict[str, dict], folder: Path, ranks: int, timeout: float = 240) -> dict[str, Any]:
    """What ``script`` found for ``cases``: it is given them as JSON, and the file to write its results to."""
    target = folder / f"{Path(script).stem}-{ranks}.json"
    done = torchrun(ranks, str(HERE / script), json.dumps(cases), str(target), timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-20000:]
    return json.loads(target.read_text(encoding="utf-8"))


def torchrun(ranks: int, *arguments: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess:
    """``torchrun --nproc_per_node=ranks arguments`` on this machine, one thread a rank.

    After ``timeout`` seconds all of its processes end, and write what their threads did to the standard error that is
    returned; the return code is -6 then. What is left of them in any case (a loader's worker whose rank has ended) is
    killed, and holds nobody up: they write to files, not to pipes.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *arguments]
    path, mark = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]), secrets.token_hex(8)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1", **environment}
    environment[MARK] = mark
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            # ranks first: their loaders' workers then die with stacks of their own, not because torchrun has ended them
            _signal(mark, signal.SIGABRT, last=process.pid)
            end = time.monotonic() + LAST_WORDS
            while _marked(mark) and time.monotonic() < end:
                time.sleep(0.1)
                process.poll()
        finally:
            _signal(mark, signal.SIGKILL, last=process.pid)
            process.kill()
            process.wait()
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, out.read(), err.read())


def _marked(mark: str) -> list[int]:
    """The processes of a launch, whose parents may have ended, as Linux tells of them; the oldest first."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or belongs to somebody else
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return sorted(found)


def _signal(mark: str, number: signal.Signals, last: int) -> None:
    for pid in sorted(_marked(mark), key=lambda pid: pid == last):
        with suppress(ProcessLookupError):
            os.kill(pid, number)

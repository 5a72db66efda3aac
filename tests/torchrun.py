"""Starts a script of this folder on several ranks, as a process of its own with a time-out."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def launch(script: str, cases: dict[str, dict], folder: Path, ranks: int, timeout: float = 240) -> dict[str, Any]:
    """What ``script`` found for ``cases``: it is given them as JSON, and the file to write its results to."""
    target = folder / f"{Path(script).stem}-{ranks}.json"
    done = torchrun(ranks, str(HERE / script), json.dumps(cases), str(target), timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-20000:]
    return json.loads(target.read_text(encoding="utf-8"))


def torchrun(ranks: int, *arguments: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess:
    """``torchrun --nproc_per_node=ranks arguments`` on this machine, one thread a rank.

    After ``timeout`` seconds all of its processes end, and write what their threads did to the standard error that is
    returned; the return code is -6 then.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *arguments]
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1", **environment}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        import psutil  # here, as a machine that is only there for its GPU may not have it

        # ranks first: their loaders' workers then die with stacks of their own, not because torchrun has ended them
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                one.send_signal(signal.SIGABRT)
        out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)

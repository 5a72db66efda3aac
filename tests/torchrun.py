"""Starts a script of this folder on several ranks, as a process of its own with a time-out."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def launch(script: str, cases: dict[str, dict], folder: Path, ranks: int, timeout: float = 240) -> dict[str, Any]:
    """What ``script`` found for ``cases``: it is given them as JSON, and the file to write its results to."""
    target = folder / f"{Path(script).stem}-{ranks}.json"
    done = torchrun(ranks, str(HERE / script), json.dumps(cases), str(target), timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(target.read_text(encoding="utf-8"))


def torchrun(ranks: int, *arguments: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess:
    """``torchrun --nproc_per_node=ranks arguments`` on this machine, one thread a rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *arguments]
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, env=environment)

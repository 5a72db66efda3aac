"""What happens to long runs, done to short ones: the whole command on two ranks, and the next start after it.

The scenarios are in faults/scenarios.py. Every command ends within its time by itself, leaves no process behind, and
says in words what went wrong; the last whole checkpoint stays, and the next start comes to the weights of a run that
nothing happened to, bit for bit.
"""

import json
import subprocess
from pathlib import Path

import pytest
import torch.distributed as dist
from checks import INTERPRET
from faults.scenarios import SCENARIOS
from faults.stage import HERE, Server, Stage, first, on, saved
from torchrun import torchrun

pytestmark = pytest.mark.skipif(INTERPRET or not dist.is_gloo_available(), reason="needs gloo; on the reference")


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    server = Server()
    yield Stage(server, tmp_path_factory.mktemp("faults"))
    server.close()


@pytest.mark.parametrize("name", SCENARIOS)
def test_fault(stage, name):
    SCENARIOS[name](stage)


def launched(stage: Stage, out: Path, *plants: dict, **environment: str) -> subprocess.CompletedProcess:
    """The same under torchrun, which ends the other ranks when one has failed, and hands signals on."""
    command = (str(HERE / "command.py"), json.dumps(plants), "text_demo", *stage.arguments(out))
    return torchrun(2, *command, timeout=120, **environment)


def test_killed_under_torchrun(stage):
    out = stage.new()
    done = launched(stage, out, on(1, "kill_in_step", call=5, after=first(out)))
    assert done.returncode != 0 and saved(out) == [3], done.stderr
    stage.continues(out, 3)


def test_torchrun_is_told_to_stop(stage):
    """It hands the signal on; the ranks save and end with 0. Its own exit code is not 0."""
    out = stage.new()
    asked = on(0, "signal_launcher", call=4, number="SIGUSR1")
    done = launched(stage, out, asked, PET_SIGNALS_TO_HANDLE="SIGTERM,SIGINT,SIGUSR1")
    assert done.returncode != 0 and "stopped before the end; the same command continues" in done.stderr, done.stderr
    assert saved(out) == [3, saved(out)[-1]] and 4 <= saved(out)[-1] <= 6
    stage.continues(out, saved(out)[-1])

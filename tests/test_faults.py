"""What happens to long runs, done to short ones: the whole command on two ranks, and the next start after it.

The scenarios are in faults/scenarios.py. Every command ends within its time by itself, leaves no process behind, and
says in words what went wrong; the last whole checkpoint stays, and the next start comes to the weights of a run that
nothing happened to, bit for bit.
"""

import pytest
import torch.distributed as dist
from checks import INTERPRET
from faults.scenarios import SCENARIOS, Server, Stage

pytestmark = pytest.mark.skipif(INTERPRET or not dist.is_gloo_available(), reason="needs gloo; on the reference")


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    server = Server()
    yield Stage(server, tmp_path_factory.mktemp("faults"))
    server.close()


@pytest.mark.parametrize("name", SCENARIOS)
def test_fault(stage, name):
    SCENARIOS[name](stage)

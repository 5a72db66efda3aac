"""The launcher of tests: whatever its processes do, it ends, and nothing of them is left."""

import signal
import sys
import time

import pytest
import torch.distributed as dist
from checks import INTERPRET
from test_watchdog import alive
from torchrun import torchrun

pytestmark = [
    pytest.mark.skipif(INTERPRET or not dist.is_available(), reason="needs torchrun; on the reference"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes as Linux lists them"),
]

# A rank with a child that hears nothing but SIGKILL; it ends, or hangs as well.
SCRIPT = """
import os, signal, sys, time
def the_place_that_hangs():
    time.sleep(600)
if (pid := os.fork()) == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGABRT, signal.SIG_IGN)
    time.sleep(600)
print(f"child {pid}", flush=True)
if sys.argv[1] == "hangs":
    the_place_that_hangs()
"""


@pytest.mark.parametrize(("rank", "timeout", "code"), [("ends", 120, 0), ("hangs", 15, -signal.SIGABRT)])
def test_a_child_that_hears_nothing(tmp_path, monkeypatch, rank, timeout, code):
    monkeypatch.setattr("torchrun.LAST_WORDS", 1.0)
    script = tmp_path / "rank.py"
    script.write_text(SCRIPT, encoding="utf-8")
    start = time.monotonic()
    done = torchrun(1, str(script), rank, timeout=timeout)
    assert done.returncode == code, done.stderr
    assert time.monotonic() - start < 100
    pid = int(done.stdout.removeprefix("child "))
    while alive(pid) and time.monotonic() - start < 100:  # it was killed, which takes a moment
        time.sleep(0.05)
    assert not alive(pid) and ("in the_place_that_hangs" in done.stderr) == (rank == "hangs")

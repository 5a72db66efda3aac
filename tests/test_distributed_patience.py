"""Whom ranks wait for longer than ``distributed.timeout``, and how that ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from checks import INTERPRET
from patience_ranks import LATE, PATIENCE, TIMEOUT

pytestmark = pytest.mark.skipif(INTERPRET or not dist.is_gloo_available(), reason="needs gloo; on the reference")
CASES = ["late-0", "late-1", "dies-0", "dies-1", "fails-1", "fails_alone-0", "fails_alone-1", "fail-0"]


@pytest.fixture(scope="module")
def ends() -> dict[str, dict[int, dict]]:
    script = Path(__file__).parent / "patience_ranks.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *CASES], capture_output=True, text=True, check=False, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[int, dict]] = {}
    for line in done.stdout.splitlines():
        one = json.loads(line)
        found.setdefault(one["case"], {})[one["rank"]] = one
    return found


@pytest.mark.parametrize("late", [0, 1])
def test_any_rank_may_be_late(ends, late):
    """The others wait for longer than their time-out, whichever it is."""
    both = ends[f"late-{late}"]
    assert [one["end"] for one in both.values()] == ["[2]", "[2]"]
    assert min(one["seconds"] for one in both.values()) > TIMEOUT < LATE


@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_that_dies_is_not_waited_for(ends, dead):
    (other,) = ends[f"dies-{dead}"].values()
    assert other["rank"] == 1 - dead and other["seconds"] < PATIENCE / 3
    assert other["end"].startswith(f"RankLost: rank {1 - dead} waited for opening in vain, at most 60 s: a rank has")


def test_a_rank_that_fails_says_so_before_the_others_are_there(ends):
    both = ends["fails-1"]
    assert both[1]["logged"] == ["opening failed: no such folder; waiting for the other ranks"]
    assert both[1]["end"] == "DataError: no such folder" and not both[1]["everywhere"] and not both[0]["logged"]
    assert both[0]["end"] == "TrainingStopped: opening failed on rank 1: no such folder"


@pytest.mark.parametrize("failed", [0, 1])
def test_its_error_is_not_lost_with_the_others(ends, failed):
    (left,) = ends[f"fails_alone-{failed}"].values()
    assert left["rank"] == failed and left["end"] == "DataError: no such folder" and not left["everywhere"]


def test_an_error_that_all_ranks_meet_is_printed_once(ends):
    for one in ends["fail-0"].values():
        assert one["end"] == "DataError: no such folder" and one["everywhere"] and not one["logged"]

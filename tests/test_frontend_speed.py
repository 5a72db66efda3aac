"""The speech convolutions are faster than fairseq's on the CPU: both in this process, taking turns."""

import sys
from pathlib import Path

import pytest
import torch
from checks import INTERPRET

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import cpu_frontend

TARGET = 1.6  # on two idle cores; printed
LEAST = 1.15  # whatever else the machine does meanwhile

pytestmark = pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not to be timed")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_faster_than_fairseq(two_threads, capsys):
    name, best = cpu_frontend.measure(clips=4, seconds=5.0, budget=1.0)
    ratio = best["fairseq"] / best["d2v_fast"]
    with capsys.disabled():
        print(
            f"\nspeech convolutions, 4 x 5 s, both ways, 2 threads: {name} / d2v_fast = {ratio:.2f} (target {TARGET})"
        )
    assert ratio > LEAST


def test_nothing_is_timed_that_computes_something_else():
    _, sides = cpu_frontend.build(width=16)
    waveforms = torch.randn(1, 1600)
    cpu_frontend.check(sides, waveforms)
    sides["d2v_fast"][1][4].data.mul_(1.001)
    with pytest.raises(ValueError, match="nothing was timed"):
        cpu_frontend.check(sides, waveforms)

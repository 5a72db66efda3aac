"""The start and the end of a run, when nothing is there to be saved: signals, and what the watchdog is told."""

import logging
import signal
from functools import partial
from itertools import groupby
from pathlib import Path

import pytest
import torch.distributed as dist
from checks import INTERPRET
from text_runs import overrides, write_text
from torchrun import torchrun

from d2v_fast.train import checkpoint, load_config, loop, pretrain, start
from d2v_fast.train.checkpoint.shards import ShardReader
from d2v_fast.train.watchdog import Watchdog

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("start") / "text")


def spied(monkeypatch, owner: object, name: str, first) -> None:
    real = getattr(owner, name)

    def call(*args, **kwargs):
        first()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def test_a_signal_without_an_update_ends_with_0(text, tmp_path, monkeypatch, caplog):
    """And lets go of the folder; the same command continues."""
    monkeypatch.setattr(loop, "plot_curves", lambda folder: None)
    out = tmp_path / "run"
    config = load_config("text_demo", overrides(text, out, "stop_after=1", "log.tensorboard=false"))
    before = [signal.getsignal(number) for number in NUMBERS]
    for number, owner, name, saved in (
        (signal.SIGUSR1, start, "build_data", []),
        (signal.SIGTERM, loop, "plot_curves", [1]),
        (signal.SIGTERM, checkpoint, "newest_valid", [1]),
        (signal.SIGUSR1, loop, "plot_curves", [1, 2]),
    ):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end, caplog.at_level(logging.WARNING):
            spied(patch, owner, name, partial(signal.raise_signal, number))
            pretrain(config)
        assert end.value.code == 0 and "the same command continues it" in caplog.messages[-1]
        assert [signal.getsignal(number) for number in NUMBERS] == before
        assert checkpoint.checkpoints(out) == [checkpoint.checkpoint_path(out, update) for update in saved]
    assert pretrain(config).updates == 3


# Ranks that are asked to stop when one opens the data and the other one waits for it.
ASKED = """
import os, signal, sys, time
from pathlib import Path
from d2v_fast.cli import main
from d2v_fast.train import start
rank = int(os.environ["RANK"])
pid = Path(f"{sys.argv[0]}-pid")
real = start.build_data
def build_data(*args, **kwargs):
    if rank == 0:
        data = real(*args, **kwargs)
        pid.write_text(str(os.getpid()))
        return data
    while not pid.exists() or not pid.read_text():
        time.sleep(0.1)
    time.sleep(1)
    for number in (int(pid.read_text()), os.getpid()):
        os.kill(number, signal.SIGUSR1)
    time.sleep(600)
start.build_data = build_data
try:
    main()
except SystemExit as end:
    Path(f"{sys.argv[0]}-{rank}").write_text(str(end.code))
    raise
"""


@pytest.mark.skipif(INTERPRET or not dist.is_gloo_available(), reason="needs gloo; on the reference")
def test_ranks_that_are_asked_to_stop_before_an_update(text, tmp_path):
    script = tmp_path / "asked.py"
    script.write_text(ASKED, encoding="utf-8")
    done = torchrun(2, str(script), "pretrain", "text_demo", *overrides(text, tmp_path / "run"))
    ends = [path.read_text(encoding="utf-8") for path in (Path(f"{script}-0"), Path(f"{script}-1"))]
    assert ends == ["0", "0"] and done.returncode == 0, done.stderr
    assert checkpoint.checkpoints(tmp_path / "run") == []


def test_a_check_of_checkpoints_that_gets_on_is_no_hang(text, tmp_path, monkeypatch):
    """The watchdog is told of every piece that is read."""
    monkeypatch.setattr(loop, "plot_curves", lambda folder: None)
    config = load_config("text_demo", overrides(text, tmp_path / "run", "stop_after=1", "log.tensorboard=false"))
    path = pretrain(config).checkpoint
    monkeypatch.setattr(checkpoint.folder, "_CHUNK", 1 << 10)
    pieces = sum(file.stat().st_size // (1 << 10) for file in path.glob("*.safetensors"))
    phases = []
    real = Watchdog.at

    def at(self, phase, *args, **kwargs):
        phases.append(phase)
        real(self, phase, *args, **kwargs)

    monkeypatch.setattr(Watchdog, "at", at)
    pretrain(config)
    assert phases.count("checking the newest checkpoint") > pieces > 10
    tensors = len(ShardReader(path).tensors)
    assert phases.count("reading the checkpoint") == 1 + tensors > 10  # it begins, and every piece
    parts = [name for name, _ in groupby(phases)]
    waiting = "waiting for the other ranks, "
    assert parts[: parts.index("loading data")] == [
        "starting",
        "checking the newest checkpoint",
        "opening the data",
        f"{waiting}opening the data",
        "starting",
        "building the model",
        "reading the checkpoint",
        f"{waiting}reading the checkpoint",
        "starting",
    ]

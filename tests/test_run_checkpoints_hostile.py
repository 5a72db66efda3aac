"""Checkpoints that are right about their checksums and wrong in what they say: refused in words, passed over."""

import os
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from run_folders import ALONE, Run, save_file

from d2v_fast.train import checkpoint
from d2v_fast.train.checkpoint import Progress, folder
from d2v_fast.train.distributed import Ranks
from d2v_fast.train.errors import CheckpointError, RankLost


@pytest.fixture(scope="module")
def trained() -> Run:
    """Not to be changed."""
    return Run(updates=1)


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("saved")
    for update in (1, 2):
        trained.save(out, update)
    return out


@pytest.fixture
def two(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


# a place in the manifest, what is put there, and what is said of it
WRONG = [
    ("files", [], "files: .*dict"),
    ("files", None, "files: .*dict"),
    ("files.x", "y", r"files\.x: "),
    ("files.x", {"bytes": 1}, r"files\.x\.sha256: Field required$"),
    ("files.x", {"bytes": "1", "sha256": ""}, r"files\.x\.bytes: .*integer, got '1'"),
    ("files.a\0b", {"bytes": 1, "sha256": ""}, r"is no name of a file in it"),
    ("files.", {"bytes": 4096, "sha256": ""}, "not a regular file"),
    ("files...", {"bytes": 4096, "sha256": ""}, "not a regular file"),
    ("progress", "x", "progress: "),
    ("progress.more", 1, r"progress\.more: Extra inputs"),
    ("progress.update", "2", r"progress\.update: .*integer, got '2'"),
    ("progress.epoch", -1, r"progress\.epoch: .*greater than or equal to 0, got -1"),
    ("progress.update", 1, "its name must say update 1, which it holds"),
    ("world_size", "2", r"world_size: .*integer, got '2'"),
    ("world_size", 0, r"world_size: .*greater than or equal to 1, got 0"),
    ("config", None, "config: "),
    ("config.model", None, r"config\.model: "),
    ("config.accumulate", "x", r"config\.accumulate: "),
    ("data", {}, r"data\.fingerprint: Field required$"),
    ("same", [1], "same: "),
]


def put(content: dict, place: str, value: object) -> None:
    *groups, key = place.split(".", 1) if place.startswith("files") else place.split(".")
    for group in groups:
        content = content[group]
    content[key] = value


@pytest.mark.parametrize(("place", "value", "said"), WRONG, ids=[ascii(f"{w[0]}={w[1]}") for w in WRONG])
def test_a_wrong_manifest_is_passed_over(place, value, said, two, caplog):
    first, second = checkpoint.checkpoints(two)
    content = folder.read_manifest(second)
    put(content, place, value)
    folder.write_manifest(second, content)
    assert checkpoint.newest_valid(two, ALONE) == first
    (message,) = caplog.messages
    assert str(second) in message and re.search(said, message), message


def test_pipes_are_not_waited_for(two):
    """As a file of tensors, as the manifest, and as a file of earlier versions."""
    first, second = checkpoint.checkpoints(two)
    file = next(second.glob("*.safetensors"))
    content = folder.read_manifest(second)
    content["files"][file.name]["bytes"] = 0
    folder.write_manifest(second, content)
    file.unlink()
    os.mkfifo(file)
    (first / "manifest.json").unlink()
    os.mkfifo(first / "manifest.json")
    os.mkfifo(two / "checkpoint-00000003.pt")
    for path, said in (
        (second, f"{file.name} is not a regular file"),
        (first, "manifest.json is not a regular file"),
        (two / "checkpoint-00000003.pt", "no checkpoint at"),
    ):
        with pytest.raises(CheckpointError, match=said):
            checkpoint.read(path)
    with pytest.raises(CheckpointError, match="none is whole"):
        checkpoint.newest_valid(two, ALONE)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [("same.x", "nothing", "cannot be read: 'nothing'"), ("config.model.encoder.dim", 2**40, "cannot be read: ")],
)
def test_a_model_that_cannot_be_built(place, value, said, two):
    path = checkpoint.checkpoints(two)[-1]
    content = folder.read_manifest(path)
    put(content, place, value)
    folder.write_manifest(path, content)
    with pytest.raises(CheckpointError, match=said):
        checkpoint.load_model(path)


def test_wrong_files_of_earlier_versions(trained, tmp_path, caplog):
    good = save_file(tmp_path, trained.model, trained.optimizer, Progress(1), trained.config)
    content = torch.load(good, weights_only=True)
    for place, value, said in WRONG:
        if place.startswith(("progress", "config", "data")) and place != "progress.update":
            changed = {**content, **{key: dict(content[key]) for key in ("progress", "config", "data")}}
            put(changed, place, value)
            torch.save(changed, good)
            with pytest.raises(CheckpointError, match="none is whole"):
                checkpoint.newest_valid(tmp_path, ALONE)
            assert re.search(said, caplog.messages[-1]), caplog.messages[-1]
    torch.save(content, good.rename(tmp_path / "checkpoint-00000002.pt"))
    with pytest.raises(CheckpointError, match="its name must say update 1"):
        checkpoint.newest_valid(tmp_path, ALONE)


class Pair:
    """Two ranks in two threads, which wait for each other for as long as ranks do."""

    def __init__(self, timeout: float) -> None:
        self.timeout, self.met, self.told = timeout, threading.Barrier(2), [None, None]

    def rank(self, number: int) -> Ranks:
        def gather(value):
            self.told[number] = value
            try:
                self.met.wait(self.timeout)
                told = list(self.told)
                self.met.wait(self.timeout)
            except threading.BrokenBarrierError:
                raise RankLost("waited in vain") from None
            return told

        return SimpleNamespace(rank=number, timeout=self.timeout, gather=gather)


def test_a_check_may_take_longer_than_the_time_out(two, monkeypatch):
    """As long as it gets on, which all ranks' watchdogs are told."""
    timeout = 1.0
    (size,) = (file.stat().st_size for file in (two / "checkpoint-00000002").glob("*.safetensors"))
    monkeypatch.setattr(folder, "_CHUNK", size // 15 + 1)  # 15 ticks
    pair, start = Pair(timeout), time.monotonic()
    told = [[start], [start]]

    def tick(rank: int) -> None:
        told[rank].append(time.monotonic())
        if rank == 0:
            time.sleep(timeout / 8)

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(checkpoint.newest_valid, two, pair.rank(i), partial(tick, i)) for i in (0, 1)]
    assert [one.result() for one in both] == [two / "checkpoint-00000002"] * 2
    end = time.monotonic()
    assert end - start > 1.5 * timeout
    for times in told:
        assert max(later - before for before, later in pairwise([*times, end])) < timeout

"""Damaged checkpoints of runs: passed over with the reason, replaced, refused; those of earlier versions too."""

import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_folders import ALONE, Run, assert_same, flipped, hidden, names, save_file

from d2v_fast.train import checkpoint
from d2v_fast.train.checkpoint import Progress, folder
from d2v_fast.train.errors import CheckpointError


@pytest.fixture(scope="module")
def trained() -> Run:
    """Not to be changed."""
    return Run(updates=1)


@pytest.fixture(scope="module")
def two(trained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("two")
    for update in (1, 2):
        trained.save(out, update)
    return out


def missing(path: Path) -> None:
    next(path.glob("*.safetensors")).unlink()


def empty(path: Path) -> None:
    next(path.glob("*.safetensors")).write_bytes(b"")


def cut(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size // 2)


def foreign(path: Path) -> None:
    (path / "more.safetensors").write_bytes(b"x")


def outside(path: Path) -> None:
    """A manifest of somebody else that is right about itself."""
    content = folder.read_manifest(path)
    content["files"]["../secret"] = {"bytes": 1, "sha256": "x"}
    folder.write_manifest(path, content)


def no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def cut_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 200)


def changed_manifest(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"seed": 1', '"seed": 2'))


def other_format(path: Path) -> None:
    content = folder.read_manifest(path)
    folder.write_manifest(path, {**content, "format": 3})


FAULTS = {
    missing: "shard-00001.*: No such file",
    empty: r"shard-00001.* must have \d+ bytes, got 0",
    cut: r"shard-00001.* must have \d+ bytes, got \d+",
    flipped: "wrong checksum of shard-00001",
    foreign: r"more\.safetensors is not in manifest\.json",
    outside: r"'\.\./secret' is no name of a file in it",
    no_manifest: r"no file at .*manifest\.json",
    cut_manifest: r"cannot read .*manifest\.json",
    changed_manifest: r"wrong checksum of manifest\.json",
    other_format: "not a d2v_fast checkpoint of format 2",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_damaged_checkpoint_is_passed_over(fault, two, tmp_path, caplog):
    out = shutil.copytree(two, tmp_path / "run")
    first, second = checkpoint.checkpoints(out)
    fault(second)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest_valid(out, ALONE) == first
    (record,) = caplog.records
    assert str(second) in record.getMessage()
    with pytest.raises(CheckpointError, match=FAULTS[fault]):
        checkpoint.read(second)
    fault(first)
    with pytest.raises(CheckpointError, match=r"holds checkpoints, but none is whole.* to start afresh"):
        checkpoint.newest_valid(out, ALONE)


def test_a_damaged_checkpoint_is_replaced(two, tmp_path):
    """The run comes from the one before to the same update again; until then the damaged one costs no whole one."""
    out = shutil.copytree(two, tmp_path / "run")
    first, second = checkpoint.checkpoints(out)
    flipped(second)
    run = Run()
    run.config = replace(run.config, keep_checkpoints=1)
    run.restore(first)
    assert run.save(out, update=1) == first and first.exists()
    run.save(out, update=2)
    assert names(out) == ["checkpoint-00000002"] and hidden(out) == []
    assert checkpoint.newest_valid(out, ALONE) == second


def test_clocks_do_not_matter(two, tmp_path, monkeypatch):
    """Files from the future or from 1970 are as good; a save takes as long as it may by a clock that only goes on."""
    out = shutil.copytree(two, tmp_path / "run")
    for path, when in zip(checkpoint.checkpoints(out), (4e9, 0), strict=True):
        for file in (path, *path.iterdir()):
            os.utime(file, (when, when))
    assert checkpoint.newest_valid(out, ALONE) == out / "checkpoint-00000002"
    monkeypatch.setattr("time.time", lambda: 0.0)
    run = Run()
    run.config = replace(run.config, keep_checkpoints=1)
    run.save(out, 3)
    assert names(out) == ["checkpoint-00000003"]


LATER = ("cuda_graph", "keep_every", "data.max_bad_fraction")


@pytest.mark.parametrize("one_pass", [False, True])
def test_files_of_earlier_versions(one_pass, tmp_path):
    """One file of everything, without the keys that came later; the run goes on from it, and saves folders."""
    run = Run(updates=2)
    path = save_file(tmp_path, run.model, run.optimizer, Progress(2, 0, 2), run.config, leave_out=LATER)
    assert checkpoint.newest_valid(tmp_path, ALONE) == path
    other = Run(one_pass=one_pass)
    assert other.restore(path) == Progress(2, 0, 2)
    assert_same(run, other)
    for each in (run, other):
        each.update(2)
    state = run.model.state_dict()
    for name, x in other.model.state_dict().items():
        torch.testing.assert_close(x, state[name], rtol=1e-5, atol=1e-6)
    content = checkpoint.read(path)
    assert content["config"]["cuda_graph"] == "off" and content["config"]["data"]["max_bad_fraction"] == 0.01
    assert checkpoint.load_model(path).config == run.config.model
    other.config = replace(other.config, keep_checkpoints=1)
    other.save(tmp_path, 3)
    assert names(tmp_path) == ["checkpoint-00000003"]


def test_damaged_files_of_earlier_versions(trained, tmp_path, caplog):
    for junk in (b"", b"not a checkpoint"):
        (tmp_path / "junk.pt").write_bytes(junk)
        with pytest.raises(CheckpointError, match=r"junk\.pt is damaged or not a checkpoint"):
            checkpoint.read(tmp_path / "junk.pt")
    for content in ({"model": {}}, {"format": 1}, [1]):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match="not a d2v_fast checkpoint"):
            checkpoint.read(tmp_path / "other.pt")
    good = save_file(tmp_path, trained.model, trained.optimizer, Progress(1), trained.config)
    bad = save_file(tmp_path, trained.model, trained.optimizer, Progress(2), trained.config)
    content = bytearray(bad.read_bytes())
    content[len(content) // 2] ^= 1
    bad.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"00000002\.pt is damaged: wrong checksum"):
        checkpoint.read(bad)
    assert checkpoint.newest_valid(tmp_path, ALONE) == good and str(bad) in caplog.text

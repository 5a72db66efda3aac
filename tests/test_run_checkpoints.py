"""Checkpoints of runs on one process: what is in them, when they are written, which ones stay, who may go on."""

import dataclasses
import errno
import json
import logging
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_folders import ALONE, DATA, Run, assert_same, hidden, names, save, writing_held
from safetensors import safe_open

from d2v_fast.train import checkpoint
from d2v_fast.train.checkpoint import Progress, folder, shards
from d2v_fast.train.errors import CheckpointError


@pytest.fixture(scope="module")
def trained() -> Run:
    """Not to be changed."""
    return Run(updates=1)


NAMES = ("step", "exp_avg", "exp_avg_sq")


@pytest.mark.parametrize("modality", ["speech", "image", "text"])
def test_a_run_goes_on_bit_for_bit(modality, tmp_path):
    run = Run(modality, updates=2, one_pass=modality == "image")
    other = Run(modality, one_pass=modality == "image")
    assert other.restore(run.save(tmp_path)) == Progress(1, 2, 3)
    assert_same(run, other)
    for each in (run, other):
        each.update(2)
    assert_same(run, other)


def test_what_is_in_the_folder(trained, tmp_path):
    """Safetensors and JSON, nothing that a reader would have to execute; what student and teacher share once."""
    path = trained.save(tmp_path)
    (file,) = [p for p in path.iterdir() if p.suffix == ".safetensors"]
    assert {p.name for p in path.iterdir()} == {file.name, "manifest.json"}
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["progress"] == {"update": 1, "epoch": 2, "index": 3}
    assert (manifest["format"], manifest["world_size"], manifest["data"]) == (2, 1, DATA)
    assert manifest["config"]["model"]["modality"] == "text"
    assert manifest["files"].keys() == {file.name} and manifest["files"][file.name]["bytes"] == file.stat().st_size

    state = trained.model.state_dict()
    shared = {name for name in state if name.startswith("teacher.module.frontend.")}
    assert manifest["same"] == {name: name.removeprefix("teacher.module.") for name in shared} and shared
    moments = {
        f"optimizer.{name}.{key}" for name, p in trained.model.named_parameters() for key in NAMES if p.requires_grad
    }
    with safe_open(file, framework="pt") as content:
        assert set(content.keys()) == (state.keys() - shared) | moments
    read = checkpoint.read(path)["model"]
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)


def test_many_files(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FILE_BYTES", 50_000)
    path = trained.save(tmp_path)
    assert len(list(path.glob("*.safetensors"))) > 2
    other = Run()
    other.restore(path)
    assert_same(trained, other)


def test_the_run_goes_on_while_its_state_is_written(tmp_path, monkeypatch):
    """What is saved is the state at the call; there is no checkpoint before all of it is on the disk."""
    run, out = Run(updates=1), tmp_path
    before = {name: x.clone() for name, x in run.model.state_dict().items()}
    writer, progress = run.writer(out), Progress(1)
    with writing_held(monkeypatch) as go:
        writer.save(progress)
        progress.update = 7  # the caller's own
        run.update(1)
        assert names(out) == [] and len(hidden(out)) == 1
        second = threading.Thread(target=writer.save, args=(Progress(2),))  # at most one is under way: this one waits
        second.start()
        second.join(0.2)
        assert second.is_alive() and len(hidden(out)) == 1
        go.set()
        second.join()
    writer.wait()
    assert names(out) == ["checkpoint-00000001", "checkpoint-00000002"] and hidden(out) == []
    read = checkpoint.read(out / "checkpoint-00000001")
    assert read["progress"]["update"] == 1
    assert all(torch.equal(read["model"][name], x) for name, x in before.items())
    after = run.model.state_dict()
    assert all(torch.equal(after[name], x) for name, x in checkpoint.read(out / "checkpoint-00000002")["model"].items())
    assert not torch.equal(before["head.0.weight"], after["head.0.weight"])


def test_an_update_is_saved_once(trained, tmp_path):
    writer = trained.writer(tmp_path)
    for _ in range(2):
        writer.save(Progress(1))
    writer.wait()
    manifest = tmp_path / "checkpoint-00000001" / "manifest.json"
    written = manifest.stat().st_mtime_ns
    again = trained.writer(tmp_path, newest=checkpoint.newest_valid(tmp_path, ALONE))
    again.save(Progress(1))
    again.wait()
    assert manifest.stat().st_mtime_ns == written


def test_nothing_there(tmp_path):
    assert checkpoint.newest_valid(tmp_path, ALONE) is None
    for path in (tmp_path / "checkpoint-00000001", tmp_path / "none.pt"):
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            checkpoint.read(path)
    (tmp_path / "checkpoint-of-mine").mkdir()
    (tmp_path / "checkpoint-00000001.txt").touch()
    assert checkpoint.checkpoints(tmp_path) == []


def test_which_ones_stay(trained, tmp_path, caplog, monkeypatch):
    run = Run()
    run.config = replace(run.config, keep_checkpoints=2, keep_every=4)
    writer = run.writer(tmp_path)
    for update in range(1, 8):
        writer.save(Progress(update))
    writer.wait()
    assert names(tmp_path) == [f"checkpoint-{update:08d}" for update in (4, 6, 7)]

    def refused(self, target):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:  # what cannot be removed stops no run
        patch.setattr(Path, "rename", refused)
        folder.prune(tmp_path, 7, 1, 0)
    assert "could not remove" in caplog.text and len(names(tmp_path)) == 3
    for other in (".checkpoint-00000002.pt.x.tmp", ".checkpoint-00000009.x.tmp"):  # of earlier versions, and ours
        (tmp_path / other).mkdir() if "9" in other else (tmp_path / other).write_bytes(b"cut off")
    assert len(hidden(tmp_path)) == 2
    run.writer(tmp_path)
    assert hidden(tmp_path) == [] and len(names(tmp_path)) == 3


def test_another_run_is_refused(trained, tmp_path):
    path = trained.save(tmp_path)
    run = Run()

    def refused(match: str, config=run.config, ranks=ALONE, data=DATA) -> None:
        with pytest.raises(CheckpointError, match=match):
            checkpoint.restore(path, run.model, run.optimizer, ranks, config, data)

    refused(r"another configuration \(seed: 1 -> 2\).* to start afresh\.$", replace(run.config, seed=2))
    refused(
        r"\(updates: .*give all of them from the start, and stop_after=N to do a part", replace(run.config, updates=9)
    )
    refused("the data has changed since .* Then: y. Now: z.", data={"fingerprint": "other", "description": "z"})
    refused(
        "was written by 1 rank with accumulate=1, 1 micro-batch an update; 1 rank with accumulate=3 would take 3. "
        "To continue it, set accumulate=1",
        replace(run.config, accumulate=3),
    )
    refused(
        "2 ranks with accumulate=1 would take 2.*use a number of ranks that divides 1",
        ranks=replace(ALONE, world_size=2),
    )
    four = replace(run.config, accumulate=4)
    saved = save(tmp_path, run.model, run.optimizer, Progress(2), four)
    two_ranks = replace(ALONE, world_size=2)
    with pytest.raises(CheckpointError, match="set accumulate=2"):
        checkpoint.restore(saved, run.model, run.optimizer, two_ranks, four, DATA)
    assert checkpoint.restore(saved, run.model, run.optimizer, two_ranks, replace(four, accumulate=2), DATA).update == 2


def test_what_changes_when_a_run_goes_on_is_said(trained, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run, two = Run(), replace(trained.config, accumulate=2)
    path = save(tmp_path, trained.model, trained.optimizer, Progress(1), two)
    for ranks, config, words in (
        (ALONE, two, ""),
        (replace(ALONE, mode="fsdp2"), two, ", with another layout: mode none -> fsdp2"),
        (
            replace(ALONE, world_size=2, mode="ddp"),
            replace(two, accumulate=1),
            ", with another layout: ranks 1 -> 2, mode none -> ddp, accumulate 2 -> 1",
        ),
    ):
        checkpoint.restore(path, run.model, run.optimizer, ranks, config, DATA)
        assert caplog.messages[-1] == f"continuing from {path} (update 1){words}"


def test_averages_of_micro_batches_depend_on_the_ranks(trained, tmp_path, caplog):
    """The teacher steps as often as a rank has micro-batches, which a warning says where their number has changed."""
    ema = replace(trained.config.model.ema, per="micro_batch")
    for config, warned in (
        (trained.config, 0),
        (replace(trained.config, model=replace(trained.config.model, ema=ema)), 1),
    ):
        out = tmp_path / config.model.ema.per
        out.mkdir()
        path = save(out, trained.model, trained.optimizer, Progress(1), replace(config, accumulate=2))
        two = replace(ALONE, world_size=2)
        for ranks, micro_batches, count in ((ALONE, 2, 0), (two, 1, warned), (replace(two, rank=1), 1, 0)):
            caplog.clear()
            run = Run()
            how = replace(config, accumulate=micro_batches)
            checkpoint.restore(path, run.model, run.optimizer, ranks, how, DATA)
            said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
            assert len(said) == count and all("was written by 1 rank and goes on with 2" in one for one in said)


def test_another_model_is_refused(trained, tmp_path):
    """Where the configuration does not tell."""
    path = trained.save(tmp_path)
    run = Run()
    run.model.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(CheckpointError, match=r"does not fit the model; missing: \['extra'\]"):
        run.restore(path)
    del run.model.extra
    run.model.head = torch.nn.Sequential(torch.nn.Linear(32, 33))
    with pytest.raises(CheckpointError, match=r"checkpoint-00000001 (cannot be read: .*head|does not fit)"):
        run.restore(path)


def test_a_configuration_of_another_time(trained, tmp_path):
    path = trained.save(tmp_path)
    content = folder.read_manifest(path)
    content["config"]["model"]["encoder"]["flux"] = 1
    folder.write_manifest(path, content)
    with pytest.raises(CheckpointError, match=r"holds a configuration that this version cannot read: .*flux"):
        checkpoint.load_model(path)


def test_a_run_is_not_a_checkpoint(trained, tmp_path):
    trained.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"is the folder of a run; .* the newest is .*checkpoint-00000001$"):
        checkpoint.load_model(tmp_path)


def test_a_loaded_model(trained, tmp_path):
    model = checkpoint.load_model(trained.save(tmp_path))
    assert not model.training and model.config == trained.config.model
    state = trained.model.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert dataclasses.asdict(model.config) == checkpoint.read(tmp_path / "checkpoint-00000001")["config"]["model"]

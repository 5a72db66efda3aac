"""Checkpoints of runs on one process: what is in them, faults in writing and reading, those of earlier versions."""

import dataclasses
import errno
import json
import logging
import os
import resource
import shutil
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_folders import DATA, restore, save, save_file
from safetensors import safe_open
from tiny import tiny_batch, tiny_config

from d2v_fast.nn import Data2Vec
from d2v_fast.train import checkpoint, load_config
from d2v_fast.train.checkpoint import Progress, Writer, folder, shards
from d2v_fast.train.distributed import Ranks
from d2v_fast.train.errors import CheckpointError
from d2v_fast.train.optim import build_optimizer
from d2v_fast.train.step import train_step

ALONE = Ranks.alone()
NAMES = ("step", "exp_avg", "exp_avg_sq")


class Run:
    """A model in training without a loop."""

    def __init__(self, modality: str = "text", updates: int = 0, **optim) -> None:
        config = load_config(f"{modality}_demo", ["data.path=x"])
        self.config = replace(config, model=tiny_config(modality), optim=replace(config.optim, **optim))
        torch.manual_seed(1)
        self.model = Data2Vec(self.config.model).train()
        self.optimizer = build_optimizer(self.model, self.config.optim)
        for update in range(updates):
            self.update(update)

    def update(self, update: int) -> None:
        torch.manual_seed(update)
        train_step(self.model, [tiny_batch(self.config.model, update)], self.optimizer, lr=1e-3, update=update)

    def writer(self, out: Path, **how) -> Writer:
        return Writer(out, self.model, self.optimizer, ALONE, self.config, DATA, **how)

    def save(self, out: Path, update: int = 1) -> Path:
        return save(out, self.model, self.optimizer, Progress(update, 2, 3), self.config)

    def restore(self, path: Path) -> Progress:
        return restore(path, self.model, self.optimizer, self.config)


@pytest.fixture(scope="module")
def trained() -> Run:
    """Not to be changed."""
    return Run(updates=1)


def assert_same(a: Run, b: Run) -> None:
    state = b.model.state_dict()
    for name, x in a.model.state_dict().items():
        assert torch.equal(x, state[name]), name
    parameters = dict(b.model.named_parameters())
    for name, p in a.model.named_parameters():
        mine, theirs = a.optimizer.state.get(p, {}), b.optimizer.state.get(parameters[name], {})
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert torch.equal(value, theirs[key]), (name, key)
            assert (value.dtype, value.stride()) == (theirs[key].dtype, theirs[key].stride()), (name, key)


def names(out: Path) -> list[str]:
    return [path.name for path in checkpoint.checkpoints(out)]


def hidden(out: Path) -> list[str]:
    return [path.name for path in out.iterdir() if path.name.startswith(".")]


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


@contextmanager
def writing_held(monkeypatch):
    """Inside, the files of a save are not written yet; yields what lets them be."""
    go, real = threading.Event(), shards.ShardWriter.write

    def write(self, partial):
        assert go.wait(60)
        return real(self, partial)

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "write", write)
        try:
            yield go
        finally:
            go.set()


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


def missing(path: Path) -> None:
    next(path.glob("*.safetensors")).unlink()


def empty(path: Path) -> None:
    next(path.glob("*.safetensors")).write_bytes(b"")


def cut(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size // 2)


def flipped(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


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


@pytest.fixture(scope="module")
def two(trained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("two")
    for update in (1, 2):
        trained.save(out, update)
    return out


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


def test_nothing_there(tmp_path):
    assert checkpoint.newest_valid(tmp_path, ALONE) is None
    for path in (tmp_path / "checkpoint-00000001", tmp_path / "none.pt"):
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            checkpoint.read(path)
    (tmp_path / "checkpoint-of-mine").mkdir()
    (tmp_path / "checkpoint-00000001.txt").touch()
    assert checkpoint.checkpoints(tmp_path) == []


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


def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


WHERE = {
    "folder": lambda patch: patch.setattr(Path, "mkdir", full),
    "shards": lambda patch: patch.setattr(shards.ShardWriter, "write", full),
    "note": lambda patch: patch.setattr("d2v_fast.train.checkpoint.writer.replace_file", full),
    "manifest": lambda patch: patch.setattr(folder, "replace_file", full),
    "rename": lambda patch: patch.setattr(Path, "rename", full),
}


@pytest.mark.parametrize("where", WHERE)
def test_a_save_that_fails(where, two, trained, tmp_path, monkeypatch):
    """Told at the next save or at the end; earlier ones are whole, nothing is left beside them, saving can go on."""
    out = shutil.copytree(two, tmp_path / "run")
    writer = trained.writer(out)
    message = r"could not write .*checkpoint-00000003: .*No space left on device; the last whole one is .*-00000002$"
    for tell in (lambda: writer.save(Progress(4)), writer.wait):
        with monkeypatch.context() as patch:
            WHERE[where](patch)
            if where == "folder":
                with pytest.raises(CheckpointError, match=message):
                    writer.save(Progress(3))
                continue
            writer.save(Progress(3))
            writer._thread.join()
        with pytest.raises(CheckpointError, match=message):
            tell()
    assert names(out) == ["checkpoint-00000001", "checkpoint-00000002"] and hidden(out) == []
    assert checkpoint.newest_valid(out, ALONE) == out / "checkpoint-00000002"
    writer.save(Progress(3))
    writer.wait()
    assert checkpoint.newest_valid(out, ALONE) == out / "checkpoint-00000003"


def test_a_run_that_ends_logs_a_failed_save(trained, tmp_path, monkeypatch, caplog):
    writer = trained.writer(tmp_path)
    monkeypatch.setattr(shards.ShardWriter, "write", full)
    writer.save(Progress(3))
    writer.close()
    assert "No space left on device; there is no earlier one" in caplog.text


def test_files_that_do_not_fit_on_the_disk(trained, tmp_path):
    """By the limit on the size of files, a fault of the system's own."""
    trained.save(tmp_path)
    writer, old = trained.writer(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    try:
        writer.save(Progress(2))
        writer._thread.join()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    with pytest.raises(CheckpointError, match=r"could not write .*-00000002: .*File too large; .* is .*-00000001$"):
        writer.wait()
    assert names(tmp_path) == ["checkpoint-00000001"] and hidden(tmp_path) == []


def test_a_disk_that_does_not_answer(trained, tmp_path, monkeypatch):
    writer = trained.writer(tmp_path, timeout=0.2)
    with writing_held(monkeypatch):
        writer.save(Progress(2))
        thread = writer._thread
        with pytest.raises(CheckpointError, match=r"-00000002: not done in 0\.15 s \(distributed\.timeout\)"):
            writer.wait()
    thread.join()


def test_folders_that_cannot_be_synced(trained, tmp_path, monkeypatch):
    """Some network file systems refuse that; an error of the disk is one."""
    real = os.fsync

    def refuse(number):
        def fsync(handle):
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                raise OSError(number, os.strerror(number))
            real(handle)

        return fsync

    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    trained.save(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(CheckpointError, match=r"-00000002: .*Input/output error"):
        trained.save(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-00000001"]


def test_a_folder_that_cannot_be_written(trained, tmp_path, monkeypatch):
    def read_only(self, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(CheckpointError, match=r"could not write .*-00000003: .*Read-only file system"):
        trained.writer(tmp_path).save(Progress(3))


def test_a_rank_that_does_not_write(trained, tmp_path):
    """The others' time is limited; nothing of the save is left."""
    trained.save(tmp_path)
    ranks = replace(ALONE, world_size=2)  # the other one is there for the plan, and then no more
    run = (trained.model, trained.optimizer)
    writer = Writer(tmp_path, *run, ranks, trained.config, DATA, timeout=0.2)
    writer.save(Progress(2))
    writer._thread.join()
    message = r"rank 1 of 2 did not write its part within 0\.1 s \(half of distributed\.timeout\).* is .*-00000001$"
    with pytest.raises(CheckpointError, match=message):
        writer.wait()
    assert names(tmp_path) == ["checkpoint-00000001"] and hidden(tmp_path) == []


# Each child process saves update 2 and is killed at one point of it: argument 2 says at which.
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
from test_run_checkpoints import Progress, Run, folder, replace, shards
from d2v_fast.train.checkpoint import writer as module

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def half(self, partial):
    (partial / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    die()

def point(name):
    if name == "copied":
        shards.ShardWriter.write = die
    elif name == "half a file":
        shards.ShardWriter.write = half
    elif name == "written":
        module._tell = die
    elif name == "no manifest":
        module.write_manifest = die
    elif name == "no name":
        module.sync_folder = die
    elif name == "named":
        module.prune = die
    elif name == "half removed":
        folder.remove = die

run = Run()
for name in sys.argv[3:]:
    out = Path(sys.argv[2]) / name
    out.mkdir()
    run.save(out, 1)
    child = os.fork()
    if child == 0:
        point(name)
        run.config = replace(run.config, keep_checkpoints=1)
        run.save(out, 2)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
POINTS = {
    "copied": 1,
    "half a file": 1,
    "written": 1,
    "no manifest": 1,
    "no name": 1,
    "named": 2,
    "half removed": 2,
}


def test_kill_9_in_a_save(tmp_path):
    """At any point of it there is a whole checkpoint; the next start takes it and removes what was left."""
    here = Path(__file__).parent
    command = [sys.executable, "-c", KILLED, str(here), str(tmp_path), *POINTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.split() == ["-9"] * len(POINTS), done.stderr
    run = Run()
    for name, update in POINTS.items():
        out = tmp_path / name
        assert hidden(out) or name == "named", name
        found = checkpoint.newest_valid(out, ALONE)
        assert found == out / f"checkpoint-{update:08d}", name
        run.writer(out)
        assert hidden(out) == [], name
        assert run.restore(found).update == update


# Trains, and asks itself to end while a save is under way, as a scheduler would.
ENDED = """
import os, signal, sys, time
from d2v_fast.train import load_config, pretrain
from d2v_fast.train.checkpoint import shards
real = shards.ShardWriter.write
def write(self, partial):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
    return real(self, partial)
shards.ShardWriter.write = write
result = pretrain(load_config("text_demo", sys.argv[1:]))
print(result.checkpoint.name, result.updates, result.finished)
"""


def test_sigterm_in_a_save(tmp_path):
    """The save is finished, the state at the end is saved as well, and nothing is left beside them."""
    (tmp_path / "a.txt").write_text("one two three four five\n" * 400)
    out = tmp_path / "run"
    small = ["updates=100000", "checkpoint_every=3", "workers=0", "device=cpu", "log_every=1000", "data.batch_size=4"]
    small += ["model.frontend.vocab_size=270", "model.encoder.dim=32", "model.encoder.ffn_dim=48"]
    small += ["model.encoder.heads=2", "model.encoder.layers=2", "model.targets.top_k=2"]
    command = [sys.executable, "-c", ENDED, f"data.path={tmp_path / 'a.txt'}", f"out={out}", *small]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    name, updates, finished = done.stdout.splitlines()[-1].split()
    assert int(updates) > 3 and finished == "False"
    assert names(out) == ["checkpoint-00000003", name] and name == f"checkpoint-{int(updates):08d}"
    assert hidden(out) == [] and checkpoint.newest_valid(out, ALONE) == out / name


def test_another_run_is_refused(trained, tmp_path):
    path = trained.save(tmp_path)
    run = Run()

    def refused(match: str, config=run.config, ranks=ALONE, data=DATA) -> None:
        with pytest.raises(CheckpointError, match=match):
            checkpoint.restore(path, run.model, run.optimizer, ranks, config, data)

    refused(r"another configuration \(seed: 1 -> 2\)", replace(run.config, seed=2))
    refused("the data has changed since .* Then: y. Now: z.", data={"fingerprint": "other", "description": "z"})
    refused(
        "was written by 1 ranks with accumulate=1, 1 micro-batches an update; 1 ranks with accumulate=3 would take 3. "
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


def test_a_configuration_of_another_time(trained, tmp_path):
    path = trained.save(tmp_path)
    content = folder.read_manifest(path)
    content["config"]["model"]["encoder"]["flux"] = 1
    folder.write_manifest(path, content)
    with pytest.raises(CheckpointError, match=r"holds a configuration that this version cannot read: .*flux"):
        checkpoint.load_model(path)


def test_a_loaded_model(trained, tmp_path):
    model = checkpoint.load_model(trained.save(tmp_path))
    assert not model.training and model.config == trained.config.model
    state = trained.model.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert dataclasses.asdict(model.config) == checkpoint.read(tmp_path / "checkpoint-00000001")["config"]["model"]

"""Saves of runs that fail, are killed, or must wait: what is said, and what is left on the disk."""

import errno
import os
import resource
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from run_folders import ALONE, DATA, Run, hidden, names, writing_held

from d2v_fast.train import checkpoint
from d2v_fast.train.checkpoint import Progress, Writer, folder, shards
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
from dataclasses import replace
from run_folders import Run
from d2v_fast.train.checkpoint import folder, shards, writer as module

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

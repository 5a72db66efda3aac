"""One run in one folder: who is kept out, for how long, with which words; and what the end of a process frees."""

import errno
import fcntl
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch.distributed as dist
from checks import INTERPRET
from text_runs import write_text
from torchrun import torchrun

from d2v_fast._info import info
from d2v_fast.train import checkpoint, load_config, load_model, lock, loop, pretrain, run_folder, start
from d2v_fast.train.distributed import Ranks
from d2v_fast.train.errors import CheckpointError, ConfigError, DataError

SIGNED = rf"process \d+ on {re.escape(socket.gethostname())}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{{4}}"


def free(folder: Path) -> bool:
    """Whether another process would get the lock."""
    code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    done = subprocess.run([sys.executable, "-S", "-c", code, str(folder / lock.FILE)], capture_output=True, timeout=60)
    return done.returncode == 0


@contextmanager
def elsewhere(folder: Path):
    """Another thread has the lock; it gives it back when it is told to, and at the end."""
    taken, told = threading.Event(), threading.Event()

    def hold():
        with lock.locked(folder, 0):
            taken.set()
            told.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(60)
    yield told
    told.set()
    thread.join()


def test_a_lock_ends_with_the_block(tmp_path):
    for _ in range(2):
        with lock.locked(tmp_path, 0):
            assert not free(tmp_path)
            assert re.fullmatch(SIGNED, (text := lock._held[tmp_path.resolve() / lock.FILE].signed)), text
        assert free(tmp_path)
    with pytest.raises(KeyError), lock.locked(tmp_path, 0):
        raise KeyError
    assert free(tmp_path)


def test_threads_of_a_process_keep_each_other_out(tmp_path):
    """Being refused does not take the lock from the other one, which closing any descriptor of its file would do."""
    linked = tmp_path / "linked"
    linked.symlink_to(tmp_path)
    refused = rf"^{linked} is in use by another run: process {os.getpid()} on .* within 0 s; .* another out="
    with elsewhere(tmp_path):
        with pytest.raises(CheckpointError, match=refused), lock.locked(linked, 0):
            pass
        assert not free(tmp_path)
    assert free(tmp_path)


def test_a_run_that_ends_is_waited_for(tmp_path, caplog):
    with elsewhere(tmp_path) as told:
        threading.Timer(0.2, told.set).start()
        with lock.locked(tmp_path, 60):
            assert not free(tmp_path)
    (told,) = caplog.messages
    assert re.search(rf"in use by another run \({SIGNED}\): waiting for its end, at most 60 s$", told), told


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, None])
def test_without_locks_nobody_is_kept_out(tmp_path, caplog, monkeypatch, number):
    """On a file system without them, or a system without fcntl."""

    def lockf(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setitem(sys.modules, "fcntl", None) if number is None else monkeypatch.setattr(fcntl, "lockf", lockf)
    with lock.locked(tmp_path, 0), lock.locked(tmp_path, 0):
        pass
    reason = "there is no fcntl" if number is None else os.strerror(number)
    said = f"{tmp_path} is on a file system without locks (run.lock: {reason}): "
    assert [text.startswith(said) for text in caplog.messages] == [True, True]


def test_errors_of_the_disk_are_not_taken_for_somebody(tmp_path, monkeypatch):
    for owner, name, number in ((os, "ftruncate", errno.ENOSPC), (fcntl, "lockf", errno.EIO)):

        def failing(*args, number=number):
            raise OSError(number, os.strerror(number))

        said = rf"^cannot lock {tmp_path}/run\.lock, .* out: {os.strerror(number)}\. .* choose another out=\.\.\.$"
        with monkeypatch.context() as patched, pytest.raises(CheckpointError, match=said):
            patched.setattr(owner, name, failing)
            lock.locked(tmp_path, 0).__enter__()
        with lock.locked(tmp_path, 0):  # nothing is held on to
            pass
    with (
        pytest.raises(CheckpointError, match=r"nowhere/run\.lock, .*: No such file"),
        lock.locked(tmp_path / "nowhere", 0),
    ):
        pass


def test_a_lock_that_is_removed_while_it_is_taken(tmp_path, monkeypatch):
    """The file that was locked is nobody's any more; the next try has the new one."""
    real, removed = fcntl.lockf, []

    def lockf(handle, *args):
        real(handle, *args)
        if not removed:
            removed.append((tmp_path / lock.FILE).unlink())

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with lock.locked(tmp_path, 60):
        assert removed and not free(tmp_path)
    assert free(tmp_path)


def test_a_lock_that_is_removed_is_made_again(tmp_path, caplog):
    with lock.locked(tmp_path, 0):
        lock.check(tmp_path)
        (tmp_path / lock.FILE).unlink()
        lock.check(tmp_path)
        assert not free(tmp_path)
        (told,) = caplog.messages
        assert "run.lock was removed by someone, and is made again" in told
        lock.check(tmp_path)
    assert free(tmp_path) and len(caplog.messages) == 1 and not lock._held
    lock.check(tmp_path)  # nobody has it
    assert len(caplog.messages) == 1


def test_a_run_that_came_in_is_left_alone(tmp_path, monkeypatch):
    """Somebody has removed the lock, and another run has the new one: the next save says so, and touches nothing."""
    monkeypatch.setattr(loop, "plot_curves", lambda folder: None)
    out, other = tmp_path / "run", []
    code = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write("somebody else")
file.flush()
print("locked", flush=True)
sys.stdin.read()
"""
    real = start.train_step

    def step(*args, **kwargs):
        if kwargs["update"] == 4:  # after the checkpoint of update 3
            (out / lock.FILE).unlink()
            command = [sys.executable, "-S", "-c", code, str(out / lock.FILE)]
            other.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            assert other[0].stdout.readline() == "locked\n"
            (out / ".checkpoint-00000099.tmp").mkdir()  # what it writes
        return real(*args, **kwargs)

    monkeypatch.setattr(start, "train_step", step)
    said = (
        r"could not write .*checkpoint-00000006: .*run\.lock was removed by someone, and another run .*: somebody else"
    )
    try:
        with pytest.raises(CheckpointError, match=said):
            pretrain(load_config("text_demo", overrides(tmp_path, out, "workers=0")))
        assert (out / ".checkpoint-00000099.tmp").exists() and not free(out)
        assert [path.name for path in checkpoint.checkpoints(out)] == ["checkpoint-00000003"]
    finally:
        for process in other:
            process.communicate()


def test_a_folder_that_is_a_link_to_nowhere(tmp_path):
    (tmp_path / "link").symlink_to("gone")
    for out in ("link", "link/run"):
        said = rf"out: cannot make the folder .*{out}: .*link is a link to gone, which does not exist"
        config = load_config("text_demo", overrides(tmp_path, tmp_path / out))
        with pytest.raises(ConfigError, match=said):
            run_folder.open_run(config, Ranks.alone(), resume=True).__enter__()


def overrides(folder: Path, out: Path, *more: str) -> list[str]:
    if not (folder / "text").exists():
        write_text(folder / "text", lines=60)
    return [
        f"data.path={folder / 'text'}",
        f"out={out}",
        "model.frontend.vocab_size=270",
        "model.frontend.max_positions=16",
        "model.encoder.dim=16",
        "model.encoder.ffn_dim=16",
        "model.encoder.heads=2",
        "model.encoder.layers=2",
        "model.targets.top_k=2",
        "data.batch_size=4",
        "data.tokens_per_sample=16",
        "updates=100000",
        "checkpoint_every=3",
        "log.tensorboard=false",
        "device=cpu",
        "distributed.timeout=120",
        *more,
    ]


def test_a_start_waits_for_less_than_its_time_out(tmp_path):
    config = load_config("text_demo", overrides(tmp_path, tmp_path))
    with elsewhere(tmp_path), pytest.raises(CheckpointError, match=r"did not end within 0\.1 s"):
        run_folder.open_run(config, Ranks.alone(timeout=0.2), resume=True).__enter__()


def test_the_start_is_watched(tmp_path, monkeypatch):
    """And all of the rest, by one watchdog."""
    seen = {}

    def spy(owner, name):
        real = getattr(owner, name)

        def spied(*args, **kwargs):
            watchdogs = [thread for thread in threading.enumerate() if thread.name == "watchdog"]
            seen[name] = len(watchdogs)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, spied)

    for owner, name in (
        (lock, "locked"),
        (checkpoint, "newest_valid"),
        (start, "build_data"),
        (start, "Data2Vec"),
        (checkpoint, "restore"),
        (checkpoint, "Writer"),
        (loop, "plot_curves"),
    ):
        spy(owner, name)
    for _ in range(2):
        pretrain(load_config("text_demo", overrides(tmp_path, tmp_path / "run", "stop_after=1", "workers=0")))
    names = ["locked", "newest_valid", "build_data", "Data2Vec", "restore", "Writer", "plot_curves"]
    assert seen == dict.fromkeys(names, 1)


def test_a_run_lets_its_folder_go_however_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "plot_curves", lambda folder: None)
    out = tmp_path / "run"
    arguments = overrides(tmp_path, out, "stop_after=1", "workers=0")
    for update in (1, 2):
        assert pretrain(load_config("text_demo", arguments)).updates == update
        assert free(out)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError) as _failed:  # in the start; who keeps the error, as notebooks do, keeps its frames
        pretrain(load_config("text_demo", [*arguments, f"data.path={empty}"]))
    assert free(out)
    kept = []

    def step(*args, **kwargs):
        kept.append(free(out))
        raise KeyError

    monkeypatch.setattr(start, "train_step", step)
    with pytest.raises(KeyError) as _also:  # in an update
        pretrain(load_config("text_demo", arguments))
    assert kept == [False] and free(out)


# The command as its user types it, but slow, and with the numbers of its workers said.
SLOW = """
import multiprocessing, time
from d2v_fast.cli import main
from d2v_fast.train import start
real = start.train_step
def step(*args, **kwargs):
    time.sleep(0.2)
    print("workers", *(child.pid for child in multiprocessing.active_children()), flush=True)
    return real(*args, **kwargs)
start.train_step = step
main()
"""
# The same for somebody who does not wait. How a rank ends is written down, as torchrun ends one for the other.
IMPATIENT = """
import os, sys, time
from pathlib import Path
from d2v_fast.cli import main
from d2v_fast.train import lock
lock.PATIENCE = 0.0
try:
    main()
except SystemExit as end:
    one, other = (Path(f"{sys.argv[0]}-{rank}") for rank in (os.environ["RANK"], 1 - int(os.environ["RANK"])))
    one.write_text(str(end.code))
    for _ in range(600):
        if other.exists():
            break
        time.sleep(0.1)
    raise
"""


@pytest.fixture
def running(tmp_path):
    """A run with a worker and a checkpoint: its process, its worker's number, its folder and its arguments."""
    out = tmp_path / "run"
    arguments = overrides(tmp_path, out, "workers=1", "keep_every=3")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "pretrain", "text_demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    worker = None
    try:
        for line in process.stdout:
            if line.startswith("workers "):
                worker = int(line.split()[1])
                if checkpoint.checkpoints(out):
                    break
        threading.Thread(target=process.stdout.read, daemon=True).start()  # the pipe never fills up
        yield process, worker, out, arguments
    finally:
        process.kill()
        process.wait()
        if worker is not None:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)


@pytest.mark.skipif(INTERPRET or not dist.is_gloo_available(), reason="needs gloo; on the reference")
def test_a_folder_in_use(running, tmp_path, monkeypatch, caplog):
    """Refused on all ranks, read by all; a run that was killed is in nobody's way, even if a worker of it lives."""
    monkeypatch.setattr(loop, "plot_curves", lambda folder: None)
    process, worker, out, arguments = running
    said = rf"{out} is in use by another run: process {process.pid} on {re.escape(socket.gethostname())}, since 2"
    with monkeypatch.context() as patched, pytest.raises(CheckpointError, match=rf"{said}.* did not end within 0.5 s"):
        patched.setattr(lock, "PATIENCE", 0.5)
        pretrain(load_config("text_demo", arguments))
    script = tmp_path / "impatient.py"
    script.write_text(IMPATIENT, encoding="utf-8")
    done = torchrun(2, str(script), "pretrain", "text_demo", *arguments)
    ends = [Path(f"{script}-{rank}").read_text(encoding="utf-8") for rank in (0, 1)]
    assert re.fullmatch(f"error: {said}.*; wait for it, end it, or choose another out=...", ends[0]), done.stderr
    assert ends[1] == "1" and done.returncode != 0  # rank 0 speaks for all
    # whoever only reads needs no lock
    assert str(out) in info(out)
    load_model(checkpoint.checkpoints(out)[-1])
    assert process.poll() is None and not free(out)

    os.kill(worker, signal.SIGSTOP)  # as if its disk did not answer: it does not see that its parent is gone
    process.kill()
    process.wait()
    caplog.clear()
    caplog.set_level(logging.INFO)
    result = pretrain(load_config("text_demo", [*arguments, "workers=0", "stop_after=1"]))
    assert result.updates > 3 and not any("in use" in text for text in caplog.messages)
    os.kill(worker, 0)  # it was there all the time

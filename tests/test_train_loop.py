"""The loop: exact resume after kill -9, guards, checkpoints that survive, interruptions, bad input, the command."""

import errno
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import text_runs
import torch

from d2v_fast.cli import app
from d2v_fast.train import checkpoint, load_config, load_model, loop, pretrain, start
from d2v_fast.train.checkpoint.shards import ShardWriter
from d2v_fast.train.distributed import resolve_device
from d2v_fast.train.errors import CheckpointError, ConfigError, DataError, TrainingStopped, UserError
from d2v_fast.train.logging import plot_curves, read_metrics


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """To draw them takes longer than a run of these; ``test_run_folder`` has them drawn."""
    monkeypatch.setattr(loop, "plot_curves", lambda folder: None)


@pytest.fixture
def text_folder(tmp_path) -> Path:
    return text_runs.write_text(tmp_path / "text", lines=120)


def overrides(folder: Path, out: Path, *more: str) -> list[str]:
    return text_runs.overrides(folder, out, "updates=12", "log_every=3", "checkpoint_every=4", *more)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(path)["model"]


# runs the command and kills itself with SIGKILL in the middle of update 18
KILLED = """
import os, signal, sys
from d2v_fast.train import load_config, pretrain, start
real, count = start.train_step, 0
def step(*args, **kwargs):
    global count
    count += 1
    if count == 18:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
start.train_step = step
pretrain(load_config("text_demo", sys.argv[1:]))
"""


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("workers", [0, 1])
def test_resume_after_kill_is_bit_equal(text_folder, tmp_path, workers):
    """SIGKILL somewhere after a checkpoint, run the same command again: the weights of an uninterrupted run."""
    more = (f"workers={workers}", "accumulate=2", "updates=40", "checkpoint_every=5")
    whole = pretrain(load_config("text_demo", overrides(text_folder, tmp_path / "whole", *more)))
    out = tmp_path / "killed"
    arguments = overrides(text_folder, out, *more)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as conftest sets for this process: sums depend on it
    command = [sys.executable, "-c", KILLED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    saved = [int(p.name.removeprefix("checkpoint-")) for p in checkpoint.checkpoints(out)]
    assert saved in ([5, 10], [10, 15])  # that of update 15 may have been under way
    resumed = pretrain(load_config("text_demo", arguments))
    assert resumed.finished and resumed.updates == 40
    assert equal(weights(whole.checkpoint), weights(resumed.checkpoint))
    logged = [(row["update"], row["loss"]) for row in read_metrics(out)]
    assert [update for update, _ in logged] == sorted({update for update, _ in logged})
    assert logged[-1] == [(row["update"], row["loss"]) for row in read_metrics(tmp_path / "whole")][-1]


@pytest.fixture
def image_folder(tmp_path) -> Path:
    from PIL import Image

    rng = np.random.default_rng(0)
    (tmp_path / "image").mkdir()
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (30, 34), dtype=np.uint8)).save(tmp_path / "image" / f"{i:02d}.png")
    return tmp_path / "image"


@pytest.fixture
def speech_folder(tmp_path) -> Path:
    import soundfile

    rng = np.random.default_rng(0)
    (tmp_path / "speech").mkdir()
    for i in range(12):
        wave = 0.1 * rng.standard_normal(16_000 + 1_000 * i)
        soundfile.write(tmp_path / "speech" / f"{i:02d}.wav", wave, 16_000)
    return tmp_path / "speech"


SMALL = {
    "text": ("data.batch_size=8",),
    "image": ("data.batch_size=6", "data.color_jitter=0.4", "data.hflip=0.5"),
    "speech": ("data.max_tokens=60000", "data.min_seconds=1", "data.crop_multiple=1"),
}


@pytest.mark.parametrize("modality", SMALL)
def test_sessions_add_up(modality, request, tmp_path):
    """``stop_after`` ends a session as an interruption would; three sessions give the weights of one run."""
    folder = request.getfixturevalue(f"{modality}_folder")
    common = [f"data.path={folder}", "updates=6", "checkpoint_every=4", "workers=0", "device=cpu", *SMALL[modality]]
    if modality == "text":
        common += [o for o in overrides(folder, tmp_path, "updates=6") if o.startswith(("model.", "data.tokens"))]
    common += ["model.encoder.dropout=0.1", "model.encoder.layers=3", "model.targets.top_k=2"]
    whole = pretrain(load_config(f"{modality}_demo", [*common, f"out={tmp_path / 'whole'}"]))
    for _ in range(3):
        result = pretrain(load_config(f"{modality}_demo", [*common, f"out={tmp_path / 'parts'}", "stop_after=2"]))
    assert result.finished
    assert equal(weights(whole.checkpoint), weights(result.checkpoint))


def test_changed_data_is_refused(text_folder, image_folder, tmp_path):
    """Another text under the same path must neither change the tokenizer nor be trained on."""
    out = tmp_path / "run"
    pretrain(load_config("text_demo", overrides(text_folder, out, "stop_after=2")))
    tokenizer = (out / "tokenizer.json").read_bytes()
    (text_folder / "b.txt").write_text("something else entirely\n" * 50, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"the data has changed since .* Then: .* 1 files.* Now: .* 2 files"):
        pretrain(load_config("text_demo", overrides(text_folder, out)))
    assert (out / "tokenizer.json").read_bytes() == tokenizer
    (text_folder / "b.txt").unlink()
    moved = text_folder.rename(tmp_path / "moved")  # the same data elsewhere is fine
    assert pretrain(load_config("text_demo", overrides(moved, out))).finished

    common = [f"data.path={image_folder}", "data.batch_size=6", "updates=4", "workers=0", f"out={tmp_path / 'images'}"]
    pretrain(load_config("image_demo", [*common, "stop_after=2"]))
    next(image_folder.iterdir()).unlink()
    with pytest.raises(CheckpointError, match="the data has changed"):
        pretrain(load_config("image_demo", common))


def test_errors_between_updates_keep_the_state(text_folder, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def broken(self, record):
        if record["update"] == 6:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop.MetricLog, "write", broken)
    with pytest.raises(CheckpointError, match=r"cannot write to the run's folder .*No space left on device"):
        pretrain(load_config("text_demo", overrides(text_folder, out, "checkpoint_every=100")))
    assert [p.name for p in checkpoint.checkpoints(out)] == ["checkpoint-00000006"]


def test_a_log_that_cannot_be_closed(text_folder, tmp_path, monkeypatch):
    """As on a disk that is full by then; what was trained is saved."""
    out = tmp_path / "run"
    real = loop.MetricLog.close

    def close(self):
        real(self)
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(loop.MetricLog, "close", close)
    with pytest.raises(CheckpointError, match=r"cannot write to the run's folder .*quota exceeded"):
        pretrain(load_config("text_demo", overrides(text_folder, out, "checkpoint_every=100", "stop_after=2")))
    assert [p.name for p in checkpoint.checkpoints(out)] == ["checkpoint-00000002"]


def test_workers_start_before_the_threads_of_logs(text_folder, tmp_path, monkeypatch):
    """A lock that such a thread holds when a worker is forked is held for ever in there."""
    real, seen = loop.MetricLog, []

    def opened(*args, **kwargs):
        seen.append(len(multiprocessing.active_children()))
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "MetricLog", opened)
    pretrain(load_config("text_demo", overrides(text_folder, tmp_path / "run", "workers=2", "updates=1")))
    assert seen == [2] and multiprocessing.active_children() == []


@pytest.mark.parametrize("failures", [1, 2])
def test_disk_that_is_full(text_folder, tmp_path, monkeypatch, caplog, failures):
    """For one save: nothing is lost. For the next one as well: the run ends, and says so."""
    real, calls = ShardWriter.write, []

    def write(self, partial):
        calls.append(partial)
        if len(calls) <= failures:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, partial)

    monkeypatch.setattr(ShardWriter, "write", write)
    config = load_config("text_demo", overrides(text_folder, tmp_path / "run"))
    if failures == 1:
        assert pretrain(config).updates == 12
        words = "checkpoint-00000004: [Errno 28] No space left on device; there is no earlier one; trying again"
        assert words in caplog.text
        assert [path.name[-1] for path in checkpoint.checkpoints(tmp_path / "run")] == ["8", "2"]
    else:
        with pytest.raises(CheckpointError, match=r"checkpoint-00000008: .* No space left on device"):
            pretrain(config)


def test_timeout_of_one_process(text_folder, tmp_path, monkeypatch):
    """The watchdog takes the configured one, and sees every micro-batch."""
    places = []
    monkeypatch.setattr(
        start.Watchdog, "at", lambda self, phase, *_, **how: places.append((how.get("limit", self._timeout), phase))
    )
    settings = ("updates=1", "accumulate=2", "distributed.timeout=77")
    pretrain(load_config("text_demo", overrides(text_folder, tmp_path / "run", *settings)))
    limits = {77, math.inf, start.PATIENCE + 77}  # alone, the data may take as long as they need
    assert {seconds for seconds, _ in places} == limits
    phases = ["starting", *["loading data"] * 2, *["forward and backward"] * 3]
    begin = max(i for i, (_, phase) in enumerate(places) if phase == "starting")
    assert places[begin : begin + len(phases)] == [(77, phase) for phase in phases]
    assert places[-1] == (77, "leaving")


def test_failed_start_leaves_no_run(text_folder, tmp_path, monkeypatch):
    """Else the next try, with the settings mended, would be refused as another run."""
    out = tmp_path / "run"
    config = load_config("text_demo", overrides(text_folder, out))

    def unreadable(*args, **kwargs):
        raise DataError("nothing readable")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(loop, "batches", unreadable)
        with pytest.raises(DataError, match="nothing readable"):
            pretrain(config)
    assert checkpoint.checkpoints(out) == []
    assert pretrain(load_config("text_demo", overrides(text_folder, out, "optim.lr=0.002"))).finished


def test_errors_inside_an_update_save_nothing(text_folder, tmp_path, monkeypatch):
    """The weights may be half updated then; the earlier checkpoint stays the newest."""
    out = tmp_path / "run"
    pretrain(load_config("text_demo", overrides(text_folder, out, "stop_after=4")))

    def broken(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(start, "train_step", broken)
    with pytest.raises(KeyboardInterrupt):
        pretrain(load_config("text_demo", overrides(text_folder, out)))
    assert [p.name for p in checkpoint.checkpoints(out)] == ["checkpoint-00000004"]


def test_something_in_the_way_of_a_file(text_folder, tmp_path):
    out = tmp_path / "run"
    (out / "config.yaml").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="cannot write to the run's folder"):
        pretrain(load_config("text_demo", overrides(text_folder, out)))


def test_run_folder(text_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "plot_curves", plot_curves)
    out = tmp_path / "run"
    result = pretrain(load_config("text_demo", overrides(text_folder, out)))
    assert result.checkpoint == out / "checkpoint-00000012"
    assert [p.name for p in checkpoint.checkpoints(out)] == ["checkpoint-00000008", "checkpoint-00000012"]
    for name in ("config.yaml", "metrics.jsonl", "tokenizer.json", "curves.png", "tensorboard"):
        assert (out / name).exists(), name
    rows = read_metrics(out)
    assert [row["update"] for row in rows] == [1, 3, 6, 9, 12]
    assert {"loss", "target_var", "pred_var", "grad_norm", "lr", "ema_decay", "data_wait"} <= rows[0].keys()
    assert load_config(str(out / "config.yaml")) == load_config(
        "text_demo", overrides(text_folder, out, "precision=fp32")
    )
    model = load_model(result.checkpoint)
    assert not model.training and equal(model.state_dict(), weights(result.checkpoint))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_cuda_graphs_fall_back_visibly(text_folder, tmp_path):
    """Without a CUDA device: counted in the metrics, or refused."""
    out = tmp_path / "run"
    arguments = overrides(text_folder, out, "cuda_graph=auto", "updates=4")
    pretrain(load_config("text_demo", arguments))
    assert [(row["graph_replays"], row["graph_fallbacks"]) for row in read_metrics(out)] == [(0, 1), (0, 3), (0, 4)]
    with pytest.raises(ConfigError, match="needs a CUDA device and accumulate = 1, got cpu and 1"):
        pretrain(load_config("text_demo", overrides(text_folder, tmp_path / "other", "cuda_graph=strict")))


def test_training_reduces_the_loss(text_folder, tmp_path):
    more = ("updates=60", "log_every=20", "schedule.warmup_updates=5", "model.ema.decay=0.99")
    result = pretrain(load_config("text_demo", overrides(text_folder, tmp_path / "run", *more)))
    assert result.last_loss < 0.9 * result.first_loss


def test_collapse_guard_stops_with_a_reason(text_folder, tmp_path):
    """Looked at after more than ``after_updates`` updates; the state is saved, and other guards may continue it."""
    more = ("guards.after_updates=6", "guards.min_target_var=50")
    out = tmp_path / "run"
    with pytest.raises(TrainingStopped, match=r"update 9: the representations have collapsed: target_var .* below"):
        pretrain(load_config("text_demo", overrides(text_folder, out, *more)))
    assert checkpoint.checkpoints(out)[-1].name == "checkpoint-00000009"
    assert pretrain(load_config("text_demo", overrides(text_folder, out, "guards.min_target_var=0"))).finished


def test_nan_guard_stops_with_a_reason(text_folder, tmp_path, monkeypatch):
    real = start.train_step

    def poisoned(model, *args, **kwargs):
        with torch.no_grad():
            model.head[0].bias.fill_(float("nan"))
        return real(model, *args, **kwargs)

    monkeypatch.setattr(start, "train_step", poisoned)
    with pytest.raises(TrainingStopped, match="not finite for 6 updates in a row"):
        pretrain(load_config("text_demo", overrides(text_folder, tmp_path / "run", "guards.max_nonfinite=5")))


def test_changed_config_is_refused(text_folder, tmp_path):
    out = tmp_path / "run"
    pretrain(load_config("text_demo", overrides(text_folder, out, "stop_after=4")))
    with pytest.raises(CheckpointError, match=r"another configuration \(optim.lr: .* -> 0.5\)"):
        pretrain(load_config("text_demo", overrides(text_folder, out, "optim.lr=0.5")))
    with pytest.raises(CheckpointError, match=r"model\.encoder\.layers: 3 -> 2"):
        pretrain(load_config("text_demo", overrides(text_folder, out, "model.encoder.layers=2")))
    with pytest.raises(CheckpointError, match="already holds a run"):
        pretrain(load_config("text_demo", overrides(text_folder, out)), resume=False)


def cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "d2v_fast", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGUSR1, 0)])
def test_signals_save_and_say_where(text_folder, tmp_path, number, code):
    """The signal goes to the whole process group, the loader's workers included, as terminals and schedulers do it.

    To be preempted is no failure.
    """
    out = tmp_path / "run"
    arguments = overrides(text_folder, out, "updates=100000", "checkpoint_every=100000", "log_every=1", "workers=1")
    process = subprocess.Popen(
        [sys.executable, "-m", "d2v_fast", "pretrain", "text_demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    json.loads(process.stdout.readline())  # the first update is done
    os.killpg(process.pid, number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    saved = checkpoint.checkpoints(out)
    assert len(saved) == 1 and str(saved[0]) in stdout
    assert "the same command continues from there" in stderr


def test_command_errors_are_one_line(tmp_path):
    done = cli("pretrain", "speech_bse", "data.path=x")
    assert done.returncode == 1 and done.stderr.startswith("error: unknown preset 'speech_bse'")
    done = cli("pretrain", "text_demo", f"data.path={tmp_path / 'nothing'}", f"out={tmp_path / 'run'}")
    assert done.returncode == 1 and "does not exist" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["pretrain", "recipe"])
def test_settings_are_no_options(name):
    how = "settings are written without dashes"
    for arguments, message in (
        ("text_demo data.path=x --out runs/x", f"unknown option '--out': {how}: out=runs/x"),
        ("--out runs/x text_demo", f"unknown option '--out': {how}: out=runs/x"),
        ("text_demo --batch-size=4 updates=1", f"unknown option '--batch-size': {how}: batch_size=4"),
        ("text_demo --compile", f"unknown option '--compile': {how}: compile=VALUE"),
        ("text_demo --gpu 2", "unknown option '--gpu': did you mean '--gpus'?"),
    ):
        with pytest.raises(UserError) as refusal:
            app([name, *arguments.split()], standalone_mode=False)
        assert str(refusal.value) == message


def test_unusable_device_and_folders(text_folder, tmp_path):
    with pytest.raises(ConfigError, match="device must be auto, cpu or cuda"):
        resolve_device("warp drive")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no CUDA device"):
            resolve_device("cuda")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match="out: cannot make the folder"):
        pretrain(load_config("text_demo", overrides(text_folder, blocked / "run")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no"):
        pretrain(load_config("text_demo", overrides(tmp_path / "empty", tmp_path / "run")))

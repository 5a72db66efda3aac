"""Checkpoints of runs for tests: of a model in training without a loop; saved by this process alone, or as earlier
versions wrote them; what is in a folder, and changes to it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_batch, tiny_config

from d2v_fast.nn import Data2Vec
from d2v_fast.train import checkpoint, load_config
from d2v_fast.train.checkpoint import Progress, Writer, shards
from d2v_fast.train.config import TrainConfig, config_to_dict
from d2v_fast.train.distributed import Ranks
from d2v_fast.train.optim import build_optimizer
from d2v_fast.train.step import train_step

ALONE = Ranks.alone()
DATA = {"fingerprint": "x", "description": "y"}


def save(
    folder: Path,
    model: Data2Vec,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    config: TrainConfig,
    data: dict[str, str] = DATA,
) -> Path:
    """A whole checkpoint in ``folder``."""
    writer = Writer(folder, model, optimizer, ALONE, config, data)
    writer.save(progress)
    writer.wait()
    return checkpoint.checkpoint_path(folder, progress.update)


def restore(
    path: Path,
    model: Data2Vec,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    data: dict[str, str] = DATA,
) -> Progress:
    """``checkpoint.restore`` into a run of one process."""
    return checkpoint.restore(path, model, optimizer, ALONE, config, data)


def save_file(
    folder: Path,
    model: Data2Vec,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    config: TrainConfig,
    data: dict[str, str] = DATA,
    leave_out: tuple[str, ...] = (),  # keys of the configuration that came later
) -> Path:
    """The single file of earlier versions."""
    values: dict[str, Any] = config_to_dict(config)
    for key in leave_out:
        group, _, name = key.rpartition(".")
        del (values[group] if group else values)[name]
    content = {"format": 1, "d2v_fast": "0.1", "config": values, "data": data, "progress": vars(progress)}
    content |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    path = folder / f"checkpoint-{progress.update:08d}.pt"
    torch.save(content, path)
    return path


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


def flipped(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@contextmanager
def writing_held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
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

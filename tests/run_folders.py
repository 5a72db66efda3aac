"""Checkpoints of runs for tests: saved at once by this process alone, or as earlier versions wrote them."""

from pathlib import Path
from typing import Any

import torch

from d2v_fast.nn import Data2Vec
from d2v_fast.train import checkpoint
from d2v_fast.train.config import TrainConfig, config_to_dict
from d2v_fast.train.distributed import Ranks

DATA = {"fingerprint": "x", "description": "y"}


def save(
    folder: Path,
    model: Data2Vec,
    optimizer: torch.optim.Optimizer,
    progress: checkpoint.Progress,
    config: TrainConfig,
    data: dict[str, str] = DATA,
) -> Path:
    """A whole checkpoint in ``folder``."""
    writer = checkpoint.Writer(folder, model, optimizer, Ranks.alone(), config, data)
    writer.save(progress)
    writer.wait()
    return checkpoint.checkpoint_path(folder, progress.update)


def restore(
    path: Path,
    model: Data2Vec,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    data: dict[str, str] = DATA,
) -> checkpoint.Progress:
    """``checkpoint.restore`` into a run of one process."""
    return checkpoint.restore(path, model, optimizer, Ranks.alone(), config, data)


def save_file(
    folder: Path,
    model: Data2Vec,
    optimizer: torch.optim.Optimizer,
    progress: checkpoint.Progress,
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

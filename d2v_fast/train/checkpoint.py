"""Checkpoints on disk: written beside and renamed, so that there is always a whole one."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from d2v_fast import __version__
from d2v_fast.nn import Data2Vec
from d2v_fast.train.config import TrainConfig, complete_model, config_to_dict, differences, model_config
from d2v_fast.train.data import PretrainData
from d2v_fast.train.errors import CheckpointError
from d2v_fast.train.files import replace_file

FORMAT = 1
KEYS = {"format", "d2v_fast", "config", "data", "progress", "model", "optimizer"}


@dataclass
class Progress:
    """Where a run is: completed updates and the position in the data."""

    update: int = 0
    epoch: int = 0
    index: int = 0  # next batch of the epoch


def checkpoint_path(folder: Path, update: int) -> Path:
    """Name of the checkpoint after ``update`` updates."""
    return folder / f"checkpoint-{update:08d}.pt"


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in ``folder``, oldest first."""
    return sorted(folder.glob("checkpoint-*.pt"))


def save(
    folder: Path,
    model: Data2Vec,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    config: TrainConfig,
    data: dict[str, str],  # of the data: fingerprint, description
) -> Path:
    """Write a checkpoint of everything a run needs to go on exactly; return its path.

    Random numbers need no state of their own: every update draws from a seed made of the run's seed and the update.

    Raises:
        CheckpointError: it could not be written (disk full, no permission); earlier ones are untouched.
    """
    path = checkpoint_path(folder, progress.update)
    content = {
        "format": FORMAT,
        "d2v_fast": __version__,
        "config": config_to_dict(config),
        "data": data,
        "progress": vars(progress),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    try:
        replace_file(path, lambda file: torch.save(content, file))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        earlier = checkpoints(folder)
        kept = f"the last whole one is {earlier[-1]}" if earlier else "there is no earlier one"
        raise CheckpointError(f"could not write {path}: {error}; {kept}") from error
    return path


def describe_data(data: PretrainData) -> dict[str, str]:
    """What :func:`save` keeps of the data, to notice on a later start that it has changed."""
    return {"fingerprint": data.fingerprint(), "description": data.describe()}


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints, and what interrupted writes left behind."""
    for path in [*checkpoints(folder)[:-keep], *folder.glob(".checkpoint-*.tmp")]:
        path.unlink()


def read(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint (tensors and plain values only, nothing is executed).

    Raises:
        CheckpointError: missing, damaged, or not written by d2v_fast.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # torch does not look at the checksums
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}") from None
    except Exception as error:  # whatever a damaged file makes the readers do
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {reason}") from error
    if broken is not None:
        raise CheckpointError(f"{path} is damaged: wrong checksum of {broken}")
    if not isinstance(content, dict) or content.get("format") != FORMAT or not content.keys() >= KEYS:
        raise CheckpointError(f"{path} is not a d2v_fast checkpoint of format {FORMAT}")
    content["config"]["model"] = complete_model(content["config"]["model"])
    content["config"].setdefault("cuda_graph", "off")  # of older ones
    return content


def restore(
    content: dict[str, Any],
    path: Path,
    model: Data2Vec,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    data: dict[str, str],
) -> Progress:
    """Put a checkpoint back into a run of the same configuration on the same data; return where it was.

    Raises:
        CheckpointError: configuration or data differ from the checkpoint's in anything that changes what is computed.
    """
    changed = differences(content["config"], config_to_dict(config))
    if changed:
        raise CheckpointError(
            f"{path} belongs to a run with another configuration ({'; '.join(changed[:6])}). "
            "Use the same settings to continue it, or another out=... to start afresh."
        )
    if content["data"]["fingerprint"] != data["fingerprint"]:
        raise CheckpointError(
            f"the data has changed since {path} was written. Then: {content['data']['description']}. "
            f"Now: {data['description']}. Restore it to continue the run, or use another out=... to start afresh."
        )
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    return Progress(**content["progress"])


def load_model(path: str | Path) -> Data2Vec:
    """The model of a checkpoint, on the CPU and in eval mode.

    Raises:
        CheckpointError: see :func:`read`.
    """
    content = read(path)
    model = Data2Vec(model_config(content["config"]["model"]))
    model.load_state_dict(content["model"])
    return model.eval()

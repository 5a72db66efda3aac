"""``checkpoint-*.pt``, as earlier versions wrote them: one file of one process."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from d2v_fast.nn import Data2Vec
from d2v_fast.train.checkpoint.schema import Content, check_content
from d2v_fast.train.checkpoint.state import OPTIMIZER
from d2v_fast.train.checkpoint.together import reason
from d2v_fast.train.errors import CheckpointError

FORMAT = 1
KEYS = {"format", "d2v_fast", "config", "data", "progress", "model", "optimizer"}


def read_single_file(path: Path) -> dict[str, Any]:
    """Everything in the file, on the CPU (tensors and plain values only, nothing is executed).

    Raises:
        CheckpointError: missing, damaged, or not written by d2v_fast.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"no checkpoint at {path}")
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # torch does not look at the checksums
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged file makes the readers do
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {reason(error)}") from error
    if broken is not None:
        raise CheckpointError(f"{path} is damaged: wrong checksum of {broken}")
    if not isinstance(content, dict) or content.get("format") != FORMAT or not content.keys() >= KEYS:
        raise CheckpointError(f"{path} is not a d2v_fast checkpoint of format {FORMAT}")
    content = {**content, "world_size": 1}
    check_content(Content, content, str(path))
    return content


def named_optimizer(content: dict[str, Any], model: Data2Vec, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors in a file's ``content`` by name; there they have the number of their parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    saved = content["optimizer"]
    found = {}
    for old, new in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        for number, p in zip(old["params"], new["params"], strict=True):
            for key, value in saved["state"].get(number, {}).items():
                found[f"{OPTIMIZER}{names[id(p)]}.{key}"] = torch.as_tensor(value)
    return found


@torch.no_grad()
def fill(state: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    """Copy the tensors of ``whole`` into those of ``state``: of sharded ones, what this rank has."""
    for name, x in state.items():
        value = whole[name].to(x.device, x.dtype)
        if isinstance(x, DTensor):
            value = distribute_tensor(value, x.device_mesh, x.placements, src_data_rank=None)  # every rank has all
        x.copy_(value)

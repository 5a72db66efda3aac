"""A run's tensors by name: the model's as in its ``state_dict``, the optimizer's under ``optimizer.<parameter>.<key>``.

Names of parameters, unlike the numbers in an optimizer's own ``state_dict``, are the same for every way of splitting a
model over ranks. Sharded ones are DTensors, which know their part of the whole.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from d2v_fast.nn import Data2Vec

OPTIMIZER = "optimizer."


def same_tensors(model: Data2Vec) -> dict[str, str]:
    """Parameters of the teacher that are the student's after every update -> their names in the student.

    They are not saved.
    """
    averages = {id(average) for average in model.teacher.averages().values()}
    teacher = model.teacher.module.named_parameters()
    return {f"teacher.module.{name}": name for name, p in teacher if id(p) not in averages}


def model_tensors(model: Data2Vec) -> dict[str, Tensor]:
    """What is saved of a model, by name; the tensors are the model's own."""
    state, same = model.state_dict(), same_tensors(model)
    return {name: x for name, x in state.items() if name not in same}


def optimizer_tensors(model: Data2Vec, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What is saved of an optimizer: moments and steps by name; the tensors are its own.

    Its settings are the configuration's, and a parameter that had no gradient yet has no state.
    """
    return {
        f"{OPTIMIZER}{name}.{key}": value
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
    }


def start_optimizer(
    model: Data2Vec,
    optimizer: torch.optim.Optimizer,
    shapes: Mapping[str, tuple[torch.Size, torch.dtype]],  # what a checkpoint holds, by name
) -> dict[str, Tensor]:
    """Give ``optimizer`` unset tensors for what a checkpoint holds of it; they are returned by name, to be filled."""
    state: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        prefix = f"{OPTIMIZER}{name}."
        own = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if prefix + key in shapes:
                shape, dtype = shapes[prefix + key]
                like = torch.empty_like(p, dtype=dtype, requires_grad=False)  # strides and shards of the parameter
                own[key] = like if key != "step" else torch.empty(shape, dtype=dtype, device=p.device)
        if own:
            optimizer.state[p] = own
            state |= {prefix + key: value for key, value in own.items()}
    return state

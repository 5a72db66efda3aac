"""One update: forward and backward over its micro-batches, optimizer step, teacher step. No host synchronisation."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from d2v_fast.nn import Batch, Data2Vec
from d2v_fast.ops import clip_factor, l2_norm
from d2v_fast.optim import AdamWEMA


class StepMetrics(NamedTuple):
    """What an update leaves behind; the tensors are 0-d and stay on the device."""

    loss: Tensor  # per masked position (or mean of the micro-batches' means)
    target_var: Tensor
    pred_var: Tensor
    grad_norm: Tensor  # before clipping
    skipped: Tensor  # 1.0 if the update was skipped because the gradient is not finite
    ema_decay: float
    num_masked: int


def train_step(
    model: Data2Vec,
    batches: Sequence[Batch],  # the micro-batches of this update, on the model's device
    optimizer: torch.optim.AdamW | AdamWEMA,  # the latter moves the teacher's averages itself
    *,
    lr: float,
    update: int,  # updates completed before this one
    clip_norm: float = 0.0,
    autocast: bool = False,  # bf16
) -> StepMetrics:
    """Make update ``update + 1``. A non-finite gradient leaves weights, optimizer state and averages untouched.

    ``train.graph.CapturedStep`` is the same from a CUDA graph.
    """
    config = model.config
    total = max(1, sum(batch.num_masked for batch in batches))
    outputs = []
    for index, batch in enumerate(batches):
        if index > 0 and config.ema.per == "micro_batch":  # data2vec 1.0 as released; see docs/numerics.md
            model.teacher.update_(update, again=True)
        weight = 1 / total if config.loss.token_weighted else 1 / (len(batches) * max(1, batch.num_masked))
        outputs.append(accumulate(model, batch, weight, len(batches), autocast))

    for group in optimizer.param_groups:
        group["lr"] = lr
    grad_norm, skipped = apply(model, optimizer, update + 1, clip_norm)
    loss, target_var, pred_var = torch.stack(outputs).sum(0)
    decay = config.ema.decay_at(update + 1)
    return StepMetrics(loss, target_var, pred_var, grad_norm, skipped, decay, total)


def accumulate(model: Data2Vec, batch: Batch, weight: float | Tensor, count: int, autocast: bool) -> Tensor:
    """Add the gradient of ``weight`` times the loss of one of ``count`` micro-batches; loss and spreads [3]."""
    with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=autocast):
        output = model(batch)
    loss = output.loss * weight
    loss.backward()
    return torch.stack([loss.detach(), output.target_var / count, output.pred_var / count])


def apply(
    model: Data2Vec,
    optimizer: torch.optim.AdamW | AdamWEMA,
    update: int,  # updates completed with this one
    clip_norm: float,
    decay: Tensor | None = None,  # [] fp64 on the device, for a CUDA graph, which steps the teacher at every replay
) -> tuple[Tensor, Tensor]:
    """Optimise with the gradients that are there, step the teacher; gradient norm and 1.0 if it is not finite."""
    one_pass = _one_pass if isinstance(optimizer, AdamWEMA) else _one_by_one
    result = one_pass(model, optimizer, update, clip_norm, decay)
    optimizer.zero_grad(set_to_none=True)
    return result


def _one_by_one(
    model: Data2Vec, optimizer: torch.optim.AdamW, update: int, clip_norm: float, decay: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Clip, optimise, then step the teacher."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    if clip_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, grad_norm, foreach=True)
    optimizer.found_inf = (~torch.isfinite(grad_norm)).float()  # the fused kernel reads it on the device
    optimizer.step()
    model.teacher.update_(update, again=decay is not None, skip=optimizer.found_inf, decay=decay)
    return grad_norm, optimizer.found_inf


def _one_pass(
    model: Data2Vec, optimizer: AdamWEMA, update: int, clip_norm: float, decay: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same in one pass over the gradients for their norm, and one over everything."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = l2_norm([p.grad for p in parameters if p.grad is not None])
    found_inf = (~torch.isfinite(grad_norm)).float()
    optimizer.step(
        grad_scale=clip_factor(grad_norm, clip_norm) if clip_norm > 0 else None,
        found_inf=found_inf,
        ema_decay=model.teacher.schedule.decay_at(update) if decay is None else decay,
    )
    model.teacher.update_(update, again=decay is not None, averaged=True)  # copies what is not averaged
    return grad_norm, found_inf

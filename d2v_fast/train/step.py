"""One update: forward and backward over its micro-batches, optimizer step, teacher step. No device synchronisation."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2v_fast.nn import Batch, Data2Vec
from d2v_fast.ops import clip_factor, l2_norm
from d2v_fast.ops._lists import local_shard
from d2v_fast.ops.data2vec_loss import LossOutput
from d2v_fast.optim import AdamWEMA
from d2v_fast.train.parallel import Parallel


class StepMetrics(NamedTuple):
    """What an update leaves behind; the tensors are 0-d and stay on the device.

    With several ranks the first four are this rank's part: their sum over the ranks is the update's.
    """

    loss: Tensor  # per masked position (or mean of the micro-batches' means)
    target_var: Tensor
    pred_var: Tensor
    feature_var: Tensor  # of what the encoder reads
    grad_norm: Tensor  # before clipping
    skipped: Tensor  # 1.0 if the update was skipped because the gradient is not finite
    ema_decay: float
    num_masked: int  # of all ranks


class Counts(NamedTuple):
    """What an update has in all, over micro-batches and ranks."""

    masked: int  # positions
    micro_batches: int  # those with masked positions

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> "Counts":
        """Of these micro-batches alone."""
        return cls(sum(b.num_masked for b in batches), sum(b.num_masked > 0 for b in batches))


def train_step(
    model: Data2Vec,
    batches: Sequence[Batch],  # the micro-batches of this update, on the model's device
    optimizer: torch.optim.AdamW | AdamWEMA,  # the latter moves the teacher's averages itself
    *,
    lr: float,
    update: int,  # updates completed before this one
    clip_norm: float = 0.0,
    autocast: bool = False,  # bf16
    parallel: Parallel | None = None,
    counts: Callable[[], Counts] | None = None,
    prepare: Callable[[int, Batch], Batch] | None = None,
) -> StepMetrics:
    """Make update ``update + 1``. A non-finite gradient leaves weights, optimizer state and averages untouched.

    ``train.graph.CapturedStep`` is the same from a CUDA graph. A micro-batch whose ``num_masked`` is 0 has no part in
    the result; on several ranks such a one stands in where nothing could be read.

    Args:
        parallel: how ``model`` was spread over ranks; by default it was not.
        counts: what the update has on all ranks. It is asked after the first forward, so that the answer may take its
            time until then; what it raises ends the update before anything has changed. By default ``batches`` are all.
        prepare: applied to each micro-batch and its number before its forward, such as what draws random numbers.
    """
    config, parallel = model.config, parallel or Parallel(model)
    total: Counts | None = None
    outputs = []
    for index, batch in enumerate(batches):
        if index > 0 and config.ema.per == "micro_batch":  # data2vec 1.0 as released; see docs/numerics.md
            model.teacher.update_(update, again=True)
        batch = batch if prepare is None else prepare(index, batch)
        with parallel.syncing(index == len(batches) - 1):
            output = forward(parallel.forward, batch, autocast)
            total = total or (Counts.of(batches) if counts is None else counts())
            part = 1 / max(1, total.micro_batches) if batch.num_masked else 0.0
            weight = 1 / max(1, total.masked) if config.loss.token_weighted else part / max(1, batch.num_masked)
            outputs.append(backward(output, weight if batch.num_masked else 0.0, part, parallel.world_size))

    for group in optimizer.param_groups:
        group["lr"] = lr
    grad_norm, skipped = apply(model, optimizer, update + 1, clip_norm, shards=parallel.shards)
    decay = config.ema.decay_at(update + 1)
    return StepMetrics(*torch.stack(outputs).sum(0), grad_norm, skipped, decay, max(1, total.masked))


def forward(model: Callable[[Batch], LossOutput], batch: Batch, autocast: bool) -> LossOutput:
    """The loss of one micro-batch, under autocast to bfloat16 if asked for."""
    with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=autocast):
        return model(batch)


def backward(output: LossOutput, weight: float | Tensor, part: float, world_size: int = 1) -> Tensor:
    """Add the gradient of ``weight`` times the loss; that, and ``part`` of the spreads, as [4].

    Gradients are averaged over ``world_size`` ranks; what is returned is not.
    """
    loss = output.loss * weight
    (loss if world_size == 1 else loss * world_size).backward()
    spreads = torch.stack([output.target_var, output.pred_var, output.feature_var])
    return torch.cat([loss.detach()[None], spreads * part])


def apply(
    model: Data2Vec,
    optimizer: torch.optim.AdamW | AdamWEMA,
    update: int,  # updates completed with this one
    clip_norm: float,
    decay: Tensor | None = None,  # [] fp64 on the device, for a CUDA graph, which steps the teacher at every replay
    shards: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Optimise with the gradients that are there, step the teacher; gradient norm and 1.0 if it is not finite."""
    one_pass = _one_pass if isinstance(optimizer, AdamWEMA) else _one_by_one
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [local_shard(p.grad) for p in parameters if p.grad is not None]
    result = one_pass(model, optimizer, grads, update, clip_norm, decay, shards)
    optimizer.zero_grad(set_to_none=True)
    return result


def _norm(grads: Sequence[Tensor], shards: dist.ProcessGroup | None) -> Tensor:
    """The norm of all gradients, over the ranks that have shards of them."""
    norm = l2_norm(grads)
    if shards is None:
        return norm
    squared = norm.double().square()
    dist.all_reduce(squared, group=shards)
    return squared.sqrt().float()


def _one_by_one(
    model: Data2Vec,
    optimizer: torch.optim.AdamW,
    grads: Sequence[Tensor],
    update: int,
    clip_norm: float,
    decay: Tensor | None,
    shards: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Clip, optimise, then step the teacher."""
    grad_norm = nn.utils.get_total_norm(grads, foreach=True) if shards is None else _norm(grads, shards)
    if clip_norm > 0:
        torch._foreach_mul_(grads, clip_factor(grad_norm, clip_norm))
    optimizer.found_inf = (~torch.isfinite(grad_norm)).float()  # the fused kernel reads it on the device
    optimizer.step()
    model.teacher.update_(update, again=decay is not None, skip=optimizer.found_inf, decay=decay)
    return grad_norm, optimizer.found_inf


def _one_pass(
    model: Data2Vec,
    optimizer: AdamWEMA,
    grads: Sequence[Tensor],
    update: int,
    clip_norm: float,
    decay: Tensor | None,
    shards: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """The same in one pass over the gradients for their norm, and one over everything."""
    grad_norm = _norm(grads, shards)
    found_inf = (~torch.isfinite(grad_norm)).float()
    optimizer.step(
        grad_scale=clip_factor(grad_norm, clip_norm) if clip_norm > 0 else None,
        found_inf=found_inf,
        ema_decay=model.teacher.schedule.decay_at(update) if decay is None else decay,
    )
    model.teacher.update_(update, again=decay is not None, averaged=True)  # copies what is not averaged
    return grad_norm, found_inf

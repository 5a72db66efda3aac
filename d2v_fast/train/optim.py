"""The optimizer and its learning rate (AdamW; fairseq ``tri_stage`` and ``cosine``). Needs PyTorch only."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from d2v_fast.nn import Data2Vec
from d2v_fast.optim import AdamWEMA


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW."""

    lr: float = 5e-4  # peak
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.01
    decay_vectors: bool = True  # False: no weight decay on biases, norms and other parameters of one dimension
    clip_norm: float = 0.0  # 0 = no clipping
    one_pass: bool = False  # one kernel for AdamW and the teacher's average (optim.AdamWEMA); not yet timed on a GPU

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name} must be a number >= 0, got {getattr(self, name)}")
        if not 0 < self.eps < math.inf:  # with 0, what has had no gradient yet becomes NaN
            raise ValueError(f"optim.eps must be a number above 0, got {self.eps}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas must be in [0, 1), got {self.betas}")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over updates: "tri_stage" (warm-up, hold, exponential decay) or "cosine" (warm-up, cosine)."""

    kind: Literal["tri_stage", "cosine"] = "tri_stage"
    warmup_updates: int = 0
    decay_updates: int = 0  # tri_stage: length of the final decay
    init_scale: float = 0.01  # tri_stage: start of the warm-up, as a share of the peak; cosine starts at 0
    final_scale: float = 0.01  # end of the schedule, as a share of the peak

    def __post_init__(self) -> None:
        for name in ("warmup_updates", "decay_updates", "init_scale", "final_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"schedule.{name} must be >= 0, got {getattr(self, name)}")


def build_optimizer(model: Data2Vec, config: OptimConfig) -> torch.optim.AdamW | AdamWEMA:
    """AdamW over the student; parameters of one dimension go without weight decay if the configuration says so.

    The mask embedding decays in either case, as in both released code bases. With ``one_pass`` the optimizer moves the
    teacher's averages as well.
    """
    decayed, free = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = config.decay_vectors or p.ndim > 1 or name.endswith("mask_embedding")
            (decayed if decays else free).append(p)
    groups = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
    settings = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    if config.one_pass:
        return AdamWEMA(groups, **settings, ema=model.teacher.averages())
    return torch.optim.AdamW(groups, **settings, fused=True)


def learning_rate(update: int, updates: int, optim: OptimConfig, schedule: ScheduleConfig) -> float:
    """Learning rate of the optimizer step that completes update ``update + 1`` of ``updates``.

    tri_stage: linear from ``init_scale`` of the peak over ``warmup_updates``, constant, exponential to ``final_scale``
    over the last ``decay_updates``. cosine: linear from 0 (the first step has rate 0, as in the published runs), then
    half a cosine down to ``final_scale`` of the peak.
    """
    peak, warmup = optim.lr, schedule.warmup_updates
    if schedule.kind == "cosine":
        if update < warmup:
            return peak * update / warmup
        low = peak * schedule.final_scale
        progress = min(1.0, (update - warmup) / max(1, updates - warmup))
        return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * progress))
    if update < warmup:
        return peak * (schedule.init_scale + (1 - schedule.init_scale) * update / warmup)
    into_decay = update - (updates - schedule.decay_updates)
    if into_decay <= 0 or schedule.decay_updates == 0:
        return peak
    return peak * schedule.final_scale ** min(1.0, into_decay / schedule.decay_updates)

"""Learning-rate schedules (fairseq ``tri_stage`` and ``cosine``)."""

import math

from d2v_fast.train.config import OptimConfig, ScheduleConfig


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

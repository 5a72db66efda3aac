"""The teacher's step of timm (``ModelEmaV2._update``): one pass over all tensors.

timm computes ``d e + (1 - d) m``, here it is ``e + (1 - d) (m - e)``: rounding apart. Integer buffers, such as the
index of relative positions, are copied: timm averages them too, and rounds the result down, so that for some decays the
teacher's table is read at other entries than the student's.
"""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from d2v_fast.ops import ema_update_
from d2v_fast.ops._lists import is_dense, is_plain, layout
from d2v_fast.patches._core import Options, Seam, fall_back


def decay_of(update_fn: Callable) -> float | None:
    """The decay d of an update ``d e + (1 - d) m``, by what it makes of numbers; None if it is another function."""
    try:
        found = [float(update_fn(e, m)) for e, m in ((1.0, 0.0), (0.0, 1.0), (3.0, 5.0))]
    except (TypeError, ValueError, AttributeError, RuntimeError):  # it wants tensors
        return None
    decay, rest, both = found
    linear = abs(decay + rest - 1) <= 1e-9 and abs(3 * decay + 5 * rest - both) <= 1e-9
    return decay if linear and 0 <= decay <= 1 else None


def _unfit(averages: list[Tensor], values: list[Tensor]) -> str | None:
    """Why upstream's code has to take the step, or None."""
    if len(averages) != len(values) or any(e.shape != m.shape for e, m in zip(averages, values, strict=True)):
        return "teacher and student differ in tensors"
    if not all(map(is_plain, chain(averages, values))):
        return "parameters are DTensors"
    moved = [(e, m) for e, m in zip(averages, values, strict=True) if e.is_floating_point()]
    if {e.dtype for e, _ in moved} - {torch.float32}:
        return "the averages are in another dtype than float32"
    if {m.dtype for _, m in moved} - {torch.float32}:
        return "the student is in another dtype than float32, and timm rounds its share to that"
    if not all(is_dense(e) and layout(e) == layout(m) for e, m in moved):
        return "a tensor's memory has gaps, or another order in the teacher"
    if len({e.data_ptr() for e, _ in moved}) < len(moved):
        return "a tensor of the teacher has two names, or no elements"
    return "teacher and student are on different devices" if len({x.device for x in (*averages, *values)}) > 1 else None


def make_update(original: Callable, options: Options) -> Callable:
    """``_update``: (student, function of average and value)."""

    @torch.no_grad()
    def _update(self: Any, model: nn.Module, update_fn: Callable) -> None:
        decay = decay_of(update_fn)
        averages, values = list(self.module.state_dict().values()), list(model.state_dict().values())
        if self.device is not None:
            values = [value.to(device=self.device) for value in values]
        reason = "its update is no average of two numbers" if decay is None else _unfit(averages, values)
        if reason is not None:
            fall_back(self, "_update", reason, options)
            original(self, model, update_fn)
            return
        pairs = list(zip(averages, values, strict=True))
        moved = [pair for pair in pairs if pair[0].is_floating_point()]
        if decay > 0:
            ema_update_([e for e, _ in moved], [m for _, m in moved], decay)
        copied = [pair for pair in pairs if decay == 0 or not pair[0].is_floating_point()]
        if copied:
            torch._foreach_copy_([e for e, _ in copied], [m for _, m in copied])

    return _update


STEP = Seam("ema", "_update", make_update, "all averages in one pass; integer buffers are copied, not averaged")

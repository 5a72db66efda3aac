"""fairseq's stop of a run whose targets or predictions have collapsed, without waiting for the device.

On the CPU it comes in the call that upstream raises in. On a device it comes one call later: the values are copied to
the host in the background, and read when the next call has something to compare.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from d2v_fast.ops.data2vec_loss import LossOutput
from d2v_fast.patches._core import state_of

FIRST_UPDATE = 5000  # upstream looks from the update after this one on


class _OnItsWay:
    """A small tensor whose copy to the host has been queued."""

    def __init__(self, x: Tensor) -> None:
        self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def values(self) -> list[float]:
        """Waits for the copy alone, not for what was queued after it."""
        self._copied.synchronize()
        return self._host.tolist()


@torch.compiler.disable
def check_spread(model: Any, out: LossOutput, logger: logging.Logger) -> None:
    """Compare ``out``'s spreads with ``min_target_var`` and ``min_pred_var`` of the model's options.

    Raises:
        Exception: upstream's, with its text, where one of them is too small.
    """
    if model.num_updates <= FIRST_UPDATE or out.num_masked < 2:  # of fewer than two rows there is no spread
        return
    both = torch.stack((out.target_var, out.pred_var))
    if both.device.type == "cuda":
        cache = state_of(model).cache
        before, cache["spread"] = cache.get("spread"), _OnItsWay(both)
        values = None if before is None else before.values()
    else:
        values = both.tolist()
    if values is not None:
        for name, value, least in zip(
            ("target", "pred"), values, (model.cfg.min_target_var, model.cfg.min_pred_var), strict=True
        ):
            if value < least:
                message = f"{name} var is {value} < {least}, exiting"
                logger.error(message)
                raise Exception(message)

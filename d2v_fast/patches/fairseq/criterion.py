"""fairseq's ``ModelCriterion``, whose values to log stay on the device until the update is logged (seam S13).

Upstream reads each of ``log_keys`` on the host between forward and backward, which the device has to finish for. The
trainer sums such values and its meters average them as tensors, as they do with the loss; what it logs is the same, in
float32 instead of float64.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from d2v_fast.patches._core import Options, Patch, Seam, Site
from d2v_fast.patches.fairseq.masks import original_globals


def _losses(criterion: Any, model: nn.Module, output: Any, sample: dict, logger: Any) -> dict[str, Tensor]:
    """The model's losses by name, each a sum with its weight."""
    if hasattr(model, "get_losses"):
        losses = model.get_losses(output, sample)
    elif isinstance(output, dict) and "losses" in output:
        losses = output["losses"]
    else:
        raise Exception("Could not retrieve losses")
    weights = criterion.loss_weights
    scaled = {}
    for name, loss in losses.items():
        if len(weights) > 0 and name not in weights:
            logger.error(f"weight for loss {name} is not in loss_weights ({weights})")
        weight = 1.0 if len(weights) == 0 else weights[name]
        if weight != 0 and loss is not None:
            scaled[name] = weight * loss.float().sum()
    return scaled


def _logged(output: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    """What is logged of a model's output: numbers, and tensors [] that are not read."""
    found = {}
    for key in keys:
        value = output.get(key)
        if value is None:
            continue
        if not torch.is_tensor(value):
            found[key] = float(value)
        elif value.numel() == 1:
            found[key] = value.detach().float().reshape(())
        elif key.startswith("_"):
            found[key] = value
        else:
            found.update((f"{key}_{i}", x.detach().float()) for i, x in enumerate(value))
    return found


def _make_forward(original: Callable, options: Options) -> Callable:
    logger = original_globals(original)["logger"]

    def forward(self, model, sample, reduce=True):
        """Upstream's forward; losses and values to log are tensors [] float32 on the device."""
        output = model(**sample["net_input"])
        scaled = _losses(self, model, output, sample, logger)
        output = output if isinstance(output, dict) else {}
        loss = sum(scaled.values())
        sample_size = output["sample_size"] if "sample_size" in output else loss.numel()
        if reduce and loss.numel() > 1:
            loss = loss.sum()
        logged = {
            "loss": loss.data,
            "ntokens": sample_size,
            "nsentences": sample["id"].numel(),
            "sample_size": sample_size,
            "_world_size": 1,
            **_logged(output, self.log_keys),
        }
        if len(scaled) > 1:
            logged.update((f"loss_{name}", x.detach()) for name, x in scaled.items())
        logged.update(output.get("logs", {}))
        return loss, sample_size, logged

    return forward


FORWARD = Seam(
    "metrics",
    "forward",
    _make_forward,
    "values to log are read at the end of the update, not between forward and backward",
    frozenset({"a014499e6bb3c98f"}),
)


def sites(model: nn.Module, patch: Patch, options: Options) -> list[Site]:
    """None: a criterion is no part of a model. :func:`d2v_fast.patch_all` has it at its class."""
    return []


def seams(kind: type) -> list[Seam]:
    """The forward, at the class."""
    return [FORWARD]

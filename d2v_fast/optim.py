"""AdamW that moves the teacher's average in the same pass over memory."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from d2v_fast.ops._dispatch import check_scalar
from d2v_fast.ops._lists import is_dense, layout, local_shard, number, number_or_tensor
from d2v_fast.ops.adamw_ema import EpsMode, adamw_ema_arguments, check_numbers
from d2v_fast.ops.ema import ema_arguments

# Settings of torch.optim.AdamW that a saved state carries along. The first four change the result: other values than
# these are refused. The rest says how torch does it.
_ADAMW = {
    "amsgrad": False,
    "maximize": False,
    "differentiable": False,
    "decoupled_weight_decay": True,
    "foreach": None,
    "capturable": False,
    "fused": True,
}
_MATHS = list(_ADAMW)[:4]


class AdamWEMA(torch.optim.Optimizer):
    """AdamW (decoupled weight decay) and the teacher's average in one launch; see :func:`d2v_fast.ops.adamw_ema_`.

    Same results as ``torch.optim.AdamW`` followed by ``EMATeacher.update_``, up to rounding. ``state_dict`` is that of
    ``torch.optim.AdamW(fused=True)``: either loads the other's. A step waits for nothing on the device; with learning
    rates and decays in device tensors it can be captured in a CUDA graph (after one step outside of it, and with
    gradients that stay where they are).

    Args:
        params: dense float32 parameters (contiguous, channels_last), or groups of them. Gradients are float32, bfloat16
            or float16.
        lr: a number >= 0, or a float32 / float64 tensor of shape [] on the parameters' device.
        betas: in [0, 1).
        eps: >= 0.
        weight_decay: >= 0.
        ema: parameter -> its float32 average of the same strides, such as ``EMATeacher.averages()`` gives. Parameters
            without one are only optimised.
        eps_mode: "torch", or "fairseq" for fairseq's place of eps.

    Raises:
        ValueError: a number is out of range, ``ema`` has a key that is not a parameter of this optimizer, an average
            does not fit its parameter, a parameter is not dense, or a group asks for amsgrad or maximize.
        TypeError: a parameter or average is not float32 (float64 is taken on CPU), or a setting is not a number.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        ema: Mapping[Tensor, Tensor] | None = None,
        eps_mode: EpsMode = "torch",
    ) -> None:
        self.ema, self.eps_mode = dict(ema or {}), eps_mode  # first: groups are checked against them
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **_ADAMW})
        unknown = len(self.ema.keys() - {p for group in self.param_groups for p in group["params"]})
        if unknown:
            raise ValueError(f"ema must map parameters of this optimizer, got {unknown} tensors that are not")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own; they are checked as those of the constructor."""
        super().add_param_group(param_group)
        try:
            self._check_group(len(self.param_groups) - 1)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, index: int) -> None:
        group = self.param_groups[index]
        _check_settings(group, self.eps_mode)
        for i, p in enumerate(group["params"]):
            _check_master(f"parameter {i} of group {index}", local_shard(p.detach()))
            if p in self.ema:
                _check_average(f"ema of parameter {i} of group {index}", self.ema[p], p)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "ema": self.ema, "eps_mode": self.eps_mode}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            _check_settings({**_ADAMW, **group}, state.get("eps_mode", "torch"))
        super().__setstate__(state)
        for group in self.param_groups:
            group.update(_ADAMW)
        for p, values in self.state.items():  # AdamW may count on the host, and a saved model be laid out otherwise
            values["step"] = torch.as_tensor(values["step"], dtype=torch.float32, device=p.device)
            for name in ("exp_avg", "exp_avg_sq"):
                values[name] = _laid_out_like(p, values[name])

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        ema_decay: float | Tensor | None = None,
    ) -> Any:
        """Update all parameters that have a gradient, and every average.

        An average follows its parameter also when that got no gradient (a layer that LayerDrop left out): it moves
        towards the value the parameter has, as if it were averaged after the step. Without gradient the parameter and
        its moments stay as they are, as in ``torch.optim.AdamW``.

        Args:
            closure: evaluates the model again and returns the loss.
            grad_scale: [] fp32 or fp64 on the device, multiplied into the gradients, such as ``ops.clip_factor``.
            found_inf: [] fp32 or fp64 on the device; unless it is 0, nothing changes: no parameter, moment, step count
                or average.
            ema_decay: number in [0, 1] or [] tensor on the device; None or the number 1 leave the averages alone.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            ValueError, TypeError: see :func:`d2v_fast.ops.adamw_ema_`. All arguments are checked before anything
                changes, memory that tensors share apart.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        device = next((p.device for group in self.param_groups for p in group["params"]), None)
        for name, x in (("grad_scale", grad_scale), ("found_inf", found_inf)):
            if x is not None and device is not None:
                _check_flag(name, x, device)
        if ema_decay is not None:
            ema_decay = number_or_tensor("ema_decay", ema_decay, below=1, include=True)
        started: dict[Tensor, dict[str, Tensor]] = {}  # states of parameters that take their first step
        calls = self._adamw_calls(grad_scale, found_inf, ema_decay, started)
        still = self._still_arguments(found_inf, ema_decay)
        self.state.update(started)
        for call in calls:
            torch.ops.d2v_fast.adamw_ema_(*call)
        if still is not None:
            torch.ops.d2v_fast.ema_update_(*still)
        return loss

    def _adamw_calls(
        self,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        ema_decay: float | Tensor | None,
        started: dict[Tensor, dict[str, Tensor]],  # filled
    ) -> list[tuple]:
        averages = {} if _keeps(ema_decay) else self.ema
        calls = []
        for (lr, betas, eps), rows in self._rows().items():
            params, decays = [p for p, _ in rows], [decay for _, decay in rows]
            for p in params:
                if not self.state.get(p):
                    started[p] = _start(p)
            state = [started[p] if p in started else self.state[p] for p in params]
            arguments = adamw_ema_arguments(
                _local(params),
                [_laid_out_like(local_shard(p), local_shard(p.grad)) for p in params],
                _local(values["exp_avg"] for values in state),
                _local(values["exp_avg_sq"] for values in state),
                [values["step"] for values in state],
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=decays,
                ema=_local(averages.get(p) for p in params) if averages else None,
                ema_decay=ema_decay,
                grad_scale=grad_scale,
                skip=found_inf,
                eps_mode=self.eps_mode,
            )
            calls.append(arguments)
        return calls

    def _still_arguments(self, found_inf: Tensor | None, ema_decay: float | Tensor | None) -> tuple | None:
        """For the averages of parameters without a gradient."""
        still = [p for group in self.param_groups for p in group["params"] if p.grad is None and p in self.ema]
        if not still or _keeps(ema_decay):
            return None
        if found_inf is not None:
            ema_decay = torch.where(found_inf == 0, ema_decay, torch.ones_like(found_inf, dtype=torch.float64))
        return ema_arguments(_local(self.ema[p] for p in still), _local(still), ema_decay)

    def _rows(self) -> dict[tuple, list[tuple[Tensor, float]]]:
        """Parameters with a gradient and their weight decay, by (lr, betas, eps), each of which is one call."""
        rows = defaultdict(list)
        for group in self.param_groups:
            settings = (group["lr"], tuple(group["betas"]), group["eps"])
            for p in group["params"]:
                if p.grad is not None:
                    rows[settings].append((p, group["weight_decay"]))
        return rows


def _start(p: Tensor) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), dtype=torch.float32, device=p.device),
        "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
    }


def _keeps(ema_decay: float | Tensor | None) -> bool:
    """Whether averages stay as they are."""
    return ema_decay is None or (not isinstance(ema_decay, Tensor) and ema_decay == 1)


def _local(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else local_shard(x) for x in tensors]


def _laid_out_like(p: Tensor, x: Tensor) -> Tensor:
    """``x``, or a copy of it with the strides of ``p``."""
    if x.shape != p.shape or layout(x) == layout(p):
        return x
    return torch.empty_like(p, dtype=x.dtype).copy_(x)


def _check_settings(group: dict[str, Any], eps_mode: EpsMode) -> None:
    check_numbers(group["lr"], group["betas"], group["eps"], eps_mode)
    number("weight_decay", group["weight_decay"])
    for name in _MATHS:
        if bool(group[name]) != _ADAMW[name]:
            raise ValueError(f"{name} must be {_ADAMW[name]}, got {group[name]}: AdamWEMA is plain AdamW")


def _check_master(name: str, x: Tensor) -> None:
    if x.dtype != torch.float32 and not (x.dtype == torch.float64 and x.device.type == "cpu"):
        raise TypeError(f"{name} must be a float32 master (float64 on CPU), got {x.dtype} on {x.device.type}")
    if not is_dense(x):
        raise ValueError(f"{name} must be dense, got shape {tuple(x.shape)} strides {x.stride()}")


def _check_average(name: str, average: Tensor, p: Tensor) -> None:
    if not isinstance(average, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(average).__name__}")
    average, p = local_shard(average.detach()), local_shard(p.detach())
    if average.dtype != p.dtype:
        raise TypeError(f"{name} must be {p.dtype} like the parameter, got {average.dtype}")
    for what in ("shape", "device"):
        if getattr(average, what) != getattr(p, what):
            raise ValueError(f"{name} must have {what} {getattr(p, what)}, got {getattr(average, what)}")
    if layout(average) != layout(p):
        raise ValueError(f"{name} must have strides {p.stride()} like the parameter, got {average.stride()}")


def _check_flag(name: str, x: Tensor, device: torch.device) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    check_scalar(name, x, device)

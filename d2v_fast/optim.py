"""AdamW that moves the teacher's average in the same pass over memory."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from d2v_fast.ops import adamw_ema_, ema_update_
from d2v_fast.ops._lists import local_shard
from d2v_fast.ops.adamw_ema import EpsMode

# Settings of torch.optim.AdamW that a saved state carries along; other values than these are not offered here.
_ADAMW = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": True,
    "decoupled_weight_decay": True,
}


class AdamWEMA(torch.optim.Optimizer):
    """AdamW (decoupled weight decay) and the teacher's average in one launch; see :func:`d2v_fast.ops.adamw_ema_`.

    Same results as ``torch.optim.AdamW`` followed by ``EMATeacher.update_``, up to rounding. ``state_dict`` is that of
    ``torch.optim.AdamW(fused=True)``: either loads the other's. A step waits for nothing on the device; with learning
    rates and decays in device tensors it can be captured in a CUDA graph (after one step outside of it, and with
    gradients that stay where they are).

    Args:
        params: contiguous float32 parameters, or groups of them. Gradients are float32, bfloat16 or float16.
        lr: a number >= 0, or a float32 / float64 tensor of shape [] on the parameters' device.
        betas: in [0, 1).
        eps: >= 0.
        weight_decay: >= 0.
        ema: parameter -> its float32 average, such as ``EMATeacher.averages()`` gives. Parameters without one are only
            optimised.
        eps_mode: "torch", or "fairseq" for fairseq's place of eps.

    Raises:
        ValueError: a number is out of range, or ``ema`` has a key that is not a parameter of this optimizer.
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
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        adamw_ema_([], [], [], [], [], eps_mode=eps_mode, **settings)  # raises for what is out of range
        super().__init__(params, {**settings, **_ADAMW})
        self.ema, self.eps_mode = dict(ema or {}), eps_mode
        unknown = len(self.ema.keys() - {p for group in self.param_groups for p in group["params"]})
        if unknown:
            raise ValueError(f"ema must map parameters of this optimizer, got {unknown} tensors that are not")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "ema": self.ema, "eps_mode": self.eps_mode}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            for name in ("amsgrad", "maximize"):
                if group.get(name):
                    raise ValueError(f"{name} must be off, got a state that was saved with it")
        super().__setstate__(state)
        for group in self.param_groups:
            group.update(_ADAMW)
        for p, values in self.state.items():  # AdamW may count on the host
            values["step"] = torch.as_tensor(values["step"], dtype=torch.float32, device=p.device)

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
            ValueError, TypeError: see :func:`d2v_fast.ops.adamw_ema_`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        averages = self.ema if isinstance(ema_decay, Tensor) or (ema_decay is not None and ema_decay != 1) else {}
        still = [p for group in self.param_groups for p in group["params"] if p.grad is None and p in averages]
        for (lr, betas, eps), rows in self._rows().items():
            params, decays = [p for p, _ in rows], [decay for _, decay in rows]
            state = [self.state[p] for p in params]
            adamw_ema_(
                _local(params),
                _local(p.grad.contiguous() for p in params),
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
        if still:
            if found_inf is not None:
                ema_decay = torch.where(found_inf == 0, ema_decay, torch.ones_like(found_inf, dtype=torch.float64))
            ema_update_(_local(averages[p] for p in still), _local(still), ema_decay)
        return loss

    def _rows(self) -> dict[tuple, list[tuple[Tensor, float]]]:
        """Parameters with a gradient and their weight decay, by (lr, betas, eps), each of which is one call."""
        rows = defaultdict(list)
        for group in self.param_groups:
            settings = (group["lr"], tuple(group["betas"]), group["eps"])
            for p in group["params"]:
                if p.grad is not None:
                    rows[settings].append((p, group["weight_decay"]))
                    if not self.state[p]:
                        self._start(p)
        return rows

    def _start(self, p: Tensor) -> None:
        self.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
        }


def _local(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else local_shard(x) for x in tensors]

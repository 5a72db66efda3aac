"""Arguments of adamw_ema_, and the textbook update."""

import torch
from checks import DEVICE

from d2v_fast.ops import adamw_ema_

F32 = torch.float32

# scalar, empty, below / at / above a block and a chunk of the GPU and of the interpreter configuration
SHAPES = [(), (0,), (7,), (1024,), (33, 31), (16, 1024), (16385,), (70000,)]
SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.05}
WRITTEN = ("params", "exp_avgs", "exp_avg_sqs", "ema", "param_copies", "ema_copies")


def make(shapes=SHAPES, grad_dtype=F32, copy_dtype=None, step=0.0):
    """Arguments of a call, in the middle of a training if ``step`` is not 0."""
    full = {
        "params": [torch.randn(s, device=DEVICE) for s in shapes],
        "grads": [torch.randn(s).to(DEVICE, grad_dtype) for s in shapes],
        "exp_avgs": [torch.randn(s, device=DEVICE) * (step > 0) for s in shapes],
        "exp_avg_sqs": [torch.rand(s, device=DEVICE) * (step > 0) for s in shapes],
        "step": torch.full((), step, device=DEVICE),
        "ema": [torch.randn(s, device=DEVICE) for s in shapes],
        "ema_decay": 0.3,  # so that the average's step is not hidden by rounding
    }
    if copy_dtype is not None:
        full["param_copies"] = [torch.full(s, float("nan"), dtype=copy_dtype, device=DEVICE) for s in shapes]
        full["ema_copies"] = [torch.full(s, float("nan"), dtype=copy_dtype, device=DEVICE) for s in shapes]
    return full


def clone(full, dtype=None):
    def one(x):
        return x.clone() if dtype is None else x.to(dtype, copy=True)

    return {
        k: [one(x) for x in v] if isinstance(v, list) else v.clone() if isinstance(v, torch.Tensor) else v
        for k, v in full.items()
    }


def by_formula(full, settings, dtype, scale=1.0, eps_mode="torch"):
    """The textbook update in ``dtype``: new parameters, moments and averages of every tensor."""
    (beta1, beta2), t = settings["betas"], full["step"].item() + 1
    c1, c2 = 1 - beta1**t, 1 - beta2**t
    out = []
    for p, g, m, v, e in zip(*(full[k] for k in ("params", "grads", "exp_avgs", "exp_avg_sqs", "ema")), strict=True):
        p, g, m, v, e = (x.to(dtype) for x in (p, g, m, v, e))
        g = g * scale
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        if eps_mode == "torch":
            change = settings["lr"] / c1 * m / (v.sqrt() / c2**0.5 + settings["eps"])
        else:
            change = settings["lr"] * c2**0.5 / c1 * m / (v.sqrt() + settings["eps"])
        p = p * (1 - settings["lr"] * settings["weight_decay"]) - change
        out.append((p, m, v, e + (1 - full["ema_decay"]) * (p - e)))
    return out


def call(full, **more):
    full = {**full, **more}
    lists = [full.pop(k) for k in ("params", "grads", "exp_avgs", "exp_avg_sqs", "step")]
    return adamw_ema_(*lists, **{**SETTINGS, **full})

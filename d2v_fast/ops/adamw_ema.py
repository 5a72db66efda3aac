"""AdamW with decoupled weight decay, the teacher's average and low-precision copies, in one pass over many tensors.

``m = lerp(m, g, 1 - beta1)``; ``v = beta2 v + (1 - beta2) g^2``; ``p = (1 - lr wd) p - lr m' / (sqrt(v') + eps)`` with
``m' = m / (1 - beta1^t)``, ``v' = v / (1 - beta2^t)``; then ``e += (1 - decay) (p - e)``. Loshchilov & Hutter,
"Decoupled weight decay regularization", algorithm 2; torch: ``torch.optim.AdamW``; fairseq (``optim/adam.py``) adds
eps before the correction of the second moment: ``p -= lr sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps)``.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Literal, get_args

import torch
from torch import Tensor

from d2v_fast.ops._dispatch import check_device, check_scalar, cpu_runs_triton, has_triton
from d2v_fast.ops._lists import (
    check_length,
    check_lists,
    check_no_overlap,
    define_in_place,
    number,
    number_or_tensor,
    tensor_list,
)

EpsMode = Literal["torch", "fairseq"]


def adamw_ema_ref(
    params: Sequence[Tensor],  # updated in place, as is everything but the gradients
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],  # [] fp32, one for all parameters or one each
    weight_decays: Sequence[float],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    ema: Sequence[Tensor | None] = (),
    ema_decay: float | Tensor = 1.0,
    param_copies: Sequence[Tensor] = (),
    ema_copies: Sequence[Tensor | None] = (),
    grad_scale: Tensor | None = None,
    skip: Tensor | None = None,
    eps_mode: EpsMode = "torch",
) -> None:
    """The definition of the op in plain PyTorch; nothing is read back from the device."""
    dtype, device = params[0].dtype, params[0].device
    live = torch.ones((), dtype=torch.bool, device=device) if skip is None else skip == 0
    lr, weight = (
        x.double() if isinstance(x, Tensor) else torch.full((), x, dtype=torch.float64, device=device)
        for x in (lr, 1 - ema_decay)
    )

    def update(old: Tensor, new: Tensor) -> None:
        old.copy_(torch.where(live, new.to(old.dtype), old))

    for step in steps:
        step += live
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        t = steps[min(i, len(steps) - 1)].double().clamp(min=1)
        correction1, correction2 = 1 - betas[0] ** t, (1 - betas[1] ** t).sqrt()
        step_size, divisor = lr / correction1, correction2
        if eps_mode == "fairseq":
            step_size, divisor = step_size * correction2, torch.ones_like(correction2)
        g = g.to(dtype) if grad_scale is None else g.to(dtype) * grad_scale.to(dtype)
        new_m = m.lerp(g, 1 - betas[0])
        new_v = (v * betas[1]).addcmul(g, g, value=1 - betas[1])
        change = step_size.to(dtype) * (new_m / (new_v.sqrt() / divisor.to(dtype) + eps))
        new_p = p * (1 - lr * weight_decays[i]).to(dtype) - change
        update(m, new_m), update(v, new_v), update(p, new_p)
        if param_copies:
            update(param_copies[i], new_p)
        if ema and ema[i] is not None:
            update(ema[i], ema[i].lerp(new_p, weight.to(dtype)))
            if ema_copies:
                update(ema_copies[i], ema[i])


define_in_place(
    "adamw_ema_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
    "Tensor(e!)[] ema, Tensor(f!)[] param_copies, Tensor(g!)[] ema_copies, int[] ema_index, float[] weight_decays, "
    "float[] scalars, Tensor? lr, Tensor? ema_decay, Tensor? grad_scale, Tensor? skip, str eps_mode) -> ()",
)


def _op_cpu(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],  # one, or like params
    ema: list[Tensor],  # for those params that ema_index lists
    param_copies: list[Tensor],  # like params, or empty
    ema_copies: list[Tensor],  # like ema, or empty
    ema_index: list[int],
    weight_decays: list[float],
    scalars: list[float],  # lr, ema_decay, beta1, beta2, eps
    lr: Tensor | None,  # goes before the number, as does ema_decay
    ema_decay: Tensor | None,
    grad_scale: Tensor | None,
    skip: Tensor | None,
    eps_mode: str,
) -> None:
    lists = (params, grads, exp_avgs, exp_avg_sqs, steps, ema, param_copies, ema_copies)
    interpreted = all(cpu_runs_triton(x.dtype) for x in chain(*lists))
    _run(interpreted, lists, ema_index, weight_decays, scalars, (lr, ema_decay, grad_scale, skip), eps_mode)


def _op_cuda(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    ema: list[Tensor],
    param_copies: list[Tensor],
    ema_copies: list[Tensor],
    ema_index: list[int],
    weight_decays: list[float],
    scalars: list[float],
    lr: Tensor | None,
    ema_decay: Tensor | None,
    grad_scale: Tensor | None,
    skip: Tensor | None,
    eps_mode: str,
) -> None:
    lists = (params, grads, exp_avgs, exp_avg_sqs, steps, ema, param_copies, ema_copies)
    _run(has_triton(), lists, ema_index, weight_decays, scalars, (lr, ema_decay, grad_scale, skip), eps_mode)


torch.library.impl("d2v_fast::adamw_ema_", "cpu", _op_cpu)
torch.library.impl("d2v_fast::adamw_ema_", "cuda", _op_cuda)


def _run(
    use_triton: bool,
    lists: tuple[list[Tensor], ...],
    ema_index: list[int],
    weight_decays: list[float],
    scalars: list[float],
    tensors: tuple[Tensor | None, ...],
    eps_mode: str,
) -> None:
    params, grads, exp_avgs, exp_avg_sqs, steps, ema, param_copies, ema_copies = lists
    written = [*params, *exp_avgs, *exp_avg_sqs, *steps, *ema, *param_copies, *ema_copies]
    check_no_overlap(written, grads, "tensors that are updated")
    torch.autograd.graph.increment_version(written)
    ema, ema_copies = (_spread(xs, ema_index, len(params)) for xs in (ema, ema_copies))
    lr, ema_decay, beta1, beta2, eps = scalars
    lr_tensor, ema_decay_tensor, grad_scale, skip = tensors
    if use_triton:
        from d2v_fast.kernels import adamw_ema as kernels

        hyper = kernels.Hyper(lr, ema_decay, beta1, beta2, eps, eps_mode == "fairseq", *tensors)
        lists = kernels.Tensors(params, grads, exp_avgs, exp_avg_sqs, ema, param_copies, ema_copies)
        kernels.adamw_ema_(lists, steps, weight_decays, hyper)
        return
    adamw_ema_ref(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        weight_decays,
        lr=lr if lr_tensor is None else lr_tensor,
        betas=(beta1, beta2),
        eps=eps,
        ema=ema,
        ema_decay=ema_decay if ema_decay_tensor is None else ema_decay_tensor,
        param_copies=param_copies,
        ema_copies=ema_copies,
        grad_scale=grad_scale,
        skip=skip,
        eps_mode=eps_mode,
    )


def _spread(tensors: list[Tensor], index: list[int], length: int) -> list[Tensor | None]:
    """A list of ``length`` with ``tensors`` at ``index``; empty for none."""
    found: list[Tensor | None] = [None] * length if tensors else []
    for i, x in zip(index, tensors, strict=bool(tensors)):
        found[i] = x
    return found


@torch.no_grad()
def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor | Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 0.01,
    ema: Sequence[Tensor | None] | None = None,
    ema_decay: float | Tensor | None = None,
    param_copies: Sequence[Tensor] | None = None,
    ema_copies: Sequence[Tensor | None] | None = None,
    grad_scale: Tensor | None = None,
    skip: Tensor | None = None,
    eps_mode: EpsMode = "torch",
) -> None:
    """One AdamW update of many parameters and, in the same pass over memory, of their moving averages; in place.

    Every list holds one tensor per parameter: dense, of the parameter's shape and strides (contiguous or not, such as
    channels_last), all on one device. Tensors without elements are fine, and no tensor that is written may share memory
    with another one.

    Args:
        params: float32 (float64 is taken on CPU, for the masters of all lists at once).
        grads: float32, bfloat16 or float16; they stay as they are.
        exp_avgs: float32, first moments.
        exp_avg_sqs: float32, second moments.
        step: updates so far, float32 of shape []; the op counts this one. One tensor for all parameters, or a list with
            one each, as ``torch.optim.AdamW`` keeps them.
        lr: a number >= 0, or a float32 / float64 tensor of shape [] on the device, which is read there.
        betas: in [0, 1).
        eps: >= 0.
        weight_decay: >= 0, decoupled from the gradient; one number, or one per parameter.
        ema: float32 averages that follow the new parameters; None, also for single parameters, where there is none.
        ema_decay: like ``decay`` of :func:`ema_update_`; needed with ``ema``.
        param_copies: tensors that receive the new parameters in their own dtype.
        ema_copies: tensors that receive the new averages in their own dtype, for every one in ``ema``.
        grad_scale: float32 / float64 tensor of shape [] that gradients are multiplied by, such as a clip factor.
        skip: float32 / float64 tensor of shape []; unless it is 0, nothing changes, ``step`` included.
        eps_mode: "torch" adds eps to the corrected ``sqrt(v)``, "fairseq" to the one that is not corrected.

    Raises:
        ValueError: lengths, shapes, strides or devices differ, a tensor is not dense, memory is shared, or a number or
            ``eps_mode`` is out of range.
        TypeError: a master is not float32, another tensor not floating point, or a scalar tensor not float32 / float64;
            a list holds something else than tensors, or a number is none.
    """
    args = adamw_ema_arguments(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        step,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        ema=ema,
        ema_decay=ema_decay,
        param_copies=param_copies,
        ema_copies=ema_copies,
        grad_scale=grad_scale,
        skip=skip,
        eps_mode=eps_mode,
    )
    if args is not None:
        torch.ops.d2v_fast.adamw_ema_(*args)


def adamw_ema_arguments(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor | Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float | Sequence[float],
    ema: Sequence[Tensor | None] | None = None,
    ema_decay: float | Tensor | None = None,
    param_copies: Sequence[Tensor] | None = None,
    ema_copies: Sequence[Tensor | None] | None = None,
    grad_scale: Tensor | None = None,
    skip: Tensor | None = None,
    eps_mode: EpsMode = "torch",
) -> tuple | None:
    """What :func:`adamw_ema_` passes to the registered op once all is checked; None if there is nothing to do.

    Apart from the op, so that a step of several calls can check all of them before the first one changes anything.
    """
    params = tensor_list("params", params)
    masters = {
        "params": params,
        "exp_avgs": tensor_list("exp_avgs", exp_avgs),
        "exp_avg_sqs": tensor_list("exp_avg_sqs", exp_avg_sqs),
    }
    others = {
        "grads": tensor_list("grads", grads),
        "param_copies": tensor_list("param_copies", () if param_copies is None else param_copies),
    }
    lr, betas, eps = check_numbers(lr, betas, eps, eps_mode)
    decays = _weight_decays(weight_decay, len(params))
    for name, tensors in {**masters, **others, "weight_decay": decays}.items():
        if tensors or name != "param_copies":
            check_length(name, len(tensors), len(params), "params")
    if ema_decay is not None:
        ema_decay = number_or_tensor("ema_decay", ema_decay, below=1, include=True)
    index, averages, average_copies = _averages(params, ema, ema_decay, ema_copies)
    if not params:
        return None
    device = params[0].device
    if len(index) == len(params):
        check_lists({**masters, "ema": averages}, {**others, "ema_copies": average_copies})
    else:
        check_lists(masters, others)
    if 0 < len(index) < len(params):
        check_lists({"params": [params[i] for i in index], "ema": averages}, {"ema_copies": average_copies})
    for name, x in {"lr": lr, "ema_decay": ema_decay, "grad_scale": grad_scale, "skip": skip}.items():
        if isinstance(x, Tensor):
            check_scalar(name, x, device)
        elif x is not None and name in ("grad_scale", "skip"):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    return (
        params,
        others["grads"],
        masters["exp_avgs"],
        masters["exp_avg_sqs"],
        _steps(step, len(params), device),
        averages,
        others["param_copies"],
        average_copies,
        index,
        decays,
        [0.0 if x is None or isinstance(x, Tensor) else x for x in (lr, ema_decay, *betas, eps)],
        lr if isinstance(lr, Tensor) else None,
        ema_decay if isinstance(ema_decay, Tensor) else None,
        grad_scale,
        skip,
        eps_mode,
    )


def check_numbers(
    lr: float | Tensor, betas: tuple[float, float], eps: float, eps_mode: str
) -> tuple[float | Tensor, tuple[float, float], float]:
    """``lr``, ``betas`` and ``eps`` as plain floats; raises for what is out of range."""
    lr, eps = number_or_tensor("lr", lr), number("eps", eps)
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    betas = number("betas[0]", betas[0], below=1), number("betas[1]", betas[1], below=1)
    if eps_mode not in get_args(EpsMode):
        raise ValueError(f"eps_mode must be one of {', '.join(get_args(EpsMode))}, got {eps_mode!r}")
    return lr, betas, eps


def _weight_decays(weight_decay: float | Sequence[float], length: int) -> list[float]:
    """One per parameter."""
    if isinstance(weight_decay, Sequence) and not isinstance(weight_decay, str):
        return [number(f"weight_decay[{i}]", x) for i, x in enumerate(weight_decay)]
    return [number("weight_decay", weight_decay)] * length


def _averages(
    params: list[Tensor],
    ema: Sequence[Tensor | None] | None,
    ema_decay: float | Tensor | None,
    ema_copies: Sequence[Tensor | None] | None,
) -> tuple[list[int], list[Tensor], list[Tensor]]:
    """The parameters that have an average, the averages, and their copies."""
    if ema is None:
        if ema_copies is not None:
            raise ValueError("ema_copies needs ema, got None")
        return [], [], []
    ema = tensor_list("ema", ema, optional=True)
    copies = tensor_list("ema_copies", () if ema_copies is None else ema_copies, optional=True)
    check_length("ema", len(ema), len(params), "params")
    if ema_decay is None:
        raise ValueError("ema_decay must be given with ema, got None")
    index = [i for i, e in enumerate(ema) if e is not None]
    if not copies:
        return index, [ema[i] for i in index], []
    check_length("ema_copies", len(copies), len(params), "params")
    if index != [i for i, e in enumerate(copies) if e is not None]:
        raise ValueError("ema_copies must have tensors exactly where ema has them")
    return index, [ema[i] for i in index], [copies[i] for i in index]


def _steps(step: Tensor | Sequence[Tensor], length: int, device: torch.device) -> list[Tensor]:
    steps = [step] if isinstance(step, Tensor) else tensor_list("step", step)
    if not isinstance(step, Tensor):
        check_length("step", len(steps), length, "params")
    if (
        {x.dtype for x in steps} == {torch.float32}
        and not any(x.dim() for x in steps)
        and len({x.device for x in steps} | {device}) == 1
    ):
        return steps
    for i, x in enumerate(steps):
        if x.dtype != torch.float32:
            raise TypeError(f"step[{i}] must be float32, got {x.dtype}")
        if x.dim() != 0:
            raise ValueError(f"step[{i}] must have shape [], got {tuple(x.shape)}")
        check_device(f"step[{i}]", x, device)
    return steps

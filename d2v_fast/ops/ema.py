"""Exponential moving average of the teacher: ``teacher += (1 - decay) * (student - teacher)``, many tensors at once.

Paper section 3.3 (teacher parameterization); fairseq: ``EMAModule._step_internal``. The linear-interpolation form
leaves ``teacher == student`` exactly where it is, and decay 0 and 1 copy and freeze exactly. fairseq's two-step form
``e * (1 - (1 - d)) + (1 - d) * p`` agrees up to rounding.
"""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from d2v_fast.ops._dispatch import check_device, check_float, cpu_runs_triton


def ema_update_ref(
    teacher: Sequence[Tensor],  # masters, updated in place
    student: Sequence[Tensor],
    decay: Tensor,  # [] float
    copies: Sequence[Tensor] = (),  # overwritten with the new masters; empty for none
) -> None:
    """The definition of the op in plain PyTorch."""
    weight = 1 - decay
    for e, p in zip(teacher, student, strict=True):
        e.lerp_(p.to(e.dtype), weight.to(e.dtype))
    if copies:
        torch._foreach_copy_(copies, teacher)


@torch.library.custom_op("d2v_fast::ema_update_", mutates_args={"teacher", "copies"}, device_types="cpu")
def _op(teacher: list[Tensor], student: list[Tensor], decay: Tensor, copies: list[Tensor]) -> None:
    if all(cpu_runs_triton(x.dtype) for x in chain(teacher, student, copies)):
        _op_triton(teacher, student, decay, copies)
    else:
        check_no_overlap(teacher, student, copies)
        ema_update_ref(teacher, student, decay, copies)


@_op.register_kernel("cuda")
def _op_triton(teacher: list[Tensor], student: list[Tensor], decay: Tensor, copies: list[Tensor]) -> None:
    from d2v_fast.kernels import ema as kernels

    check_no_overlap(teacher, student, copies)
    kernels.ema_update_(teacher, student, decay, copies)


@_op.register_fake
def _(teacher, student, decay, copies):
    return None


@torch.no_grad()
def ema_update_(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    decay: float | Tensor,
    *,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """Move every teacher tensor towards its student tensor, in place: ``e += (1 - decay) * (p - e)``.

    Args:
        teacher: contiguous float32 masters (float64 is taken on CPU), all on one device.
        student: contiguous tensors of the same shapes in float32, bfloat16 or float16; dtypes may differ.
        decay: a number in [0, 1], or a float32 / float64 tensor of shape [] on the same device. A tensor is read on
            the device, which is what a captured CUDA graph needs; its range is not checked. float64 keeps
            ``1 - decay`` exact to float32 precision: a float32 0.9999 is already 0.02 % off in ``1 - decay``.
        copies: low-precision tensors of the same shapes that receive the new teacher values in the same pass.

    Empty lists and tensors without elements are fine. No tensor that is written may share memory with another one.

    Raises:
        ValueError: list lengths, shapes or devices differ, a tensor is not contiguous, memory is shared, or
            ``decay`` is outside [0, 1].
        TypeError: a teacher tensor is not float32 (integer buffers must be copied, not averaged), another tensor is
            not floating point, or float64 on a GPU.
    """
    teacher, student, copies = list(teacher), list(student), list(copies or ())
    if len(student) != len(teacher):
        raise ValueError(f"student must hold {len(teacher)} tensors like teacher, got {len(student)}")
    if copies and len(copies) != len(teacher):
        raise ValueError(f"copies must hold {len(teacher)} tensors like teacher, got {len(copies)}")
    if not isinstance(decay, Tensor) and not 0 <= decay <= 1:
        raise ValueError(f"decay must lie in [0, 1], got {decay}")
    if not teacher:
        return
    _check_teacher(teacher)
    _check_like_teacher("student", student, teacher)
    _check_like_teacher("copies", copies, teacher)
    _op(teacher, student, _decay_tensor(decay, teacher[0].device), copies)


def _decay_tensor(decay: float | Tensor, device: torch.device) -> Tensor:
    if not isinstance(decay, Tensor):
        return torch.full((), decay, dtype=torch.float64, device=device)
    if decay.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"decay must be a float32 or float64 tensor, got {decay.dtype}")
    if decay.dim() != 0:
        raise ValueError(f"decay must have shape [], got {tuple(decay.shape)}")
    check_device("decay", decay, device)
    return decay


def _check_teacher(teacher: list[Tensor]) -> None:
    for i, e in enumerate(teacher):
        if not e.is_floating_point():
            raise TypeError(f"teacher[{i}] must be floating point, got {e.dtype}: copy such tensors instead")
        if e.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"teacher[{i}] must be a float32 master, got {e.dtype}: pass it in copies instead")
        check_float(f"teacher[{i}]", e)
        check_device(f"teacher[{i}]", e, teacher[0].device)
        if e.dtype != teacher[0].dtype:
            raise TypeError(f"teacher[{i}] must be {teacher[0].dtype} like the first, got {e.dtype}")
        if not e.is_contiguous():
            raise ValueError(f"teacher[{i}] must be contiguous, got shape {tuple(e.shape)} strides {e.stride()}")


def _check_like_teacher(name: str, tensors: list[Tensor], teacher: list[Tensor]) -> None:
    for i, x in enumerate(tensors):
        e = teacher[i]
        check_float(f"{name}[{i}]", x)
        check_device(f"{name}[{i}]", x, e.device)
        if x.shape != e.shape:
            raise ValueError(f"{name}[{i}] must have shape {tuple(e.shape)} like teacher, got {tuple(x.shape)}")
        if not x.is_contiguous():
            raise ValueError(f"{name}[{i}] must be contiguous, got shape {tuple(x.shape)} strides {x.stride()}")


def check_no_overlap(teacher: Sequence[Tensor], student: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    """Raise ValueError when memory that is written overlaps any other tensor. Tied student tensors are fine."""
    spans = [
        (x.data_ptr(), x.data_ptr() + x.nbytes, written)
        for x, written in chain(
            ((x, True) for x in teacher), ((x, False) for x in student), ((x, True) for x in copies)
        )
        if x.numel() > 0
    ]
    end_of_any = end_of_written = 0
    for start, end, written in sorted(spans):
        if start < (end_of_any if written else end_of_written):
            raise ValueError("teacher and copies must not share memory with each other or with student, but some do")
        end_of_any = max(end_of_any, end)
        end_of_written = max(end_of_written, end) if written else end_of_written

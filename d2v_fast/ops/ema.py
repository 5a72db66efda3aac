"""Exponential moving average of the teacher: ``teacher += (1 - decay) * (student - teacher)``, many tensors at once.

Paper section 3.3 (teacher parameterization); fairseq: ``EMAModule._step_internal``. The linear-interpolation form
leaves ``teacher == student`` exactly where it is, and decay 0 and 1 copy and freeze exactly. fairseq's two-step form
``e * (1 - (1 - d)) + (1 - d) * p`` agrees up to rounding.
"""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from d2v_fast.ops._dispatch import check_scalar, cpu_runs_triton, has_triton
from d2v_fast.ops._lists import (
    check_length,
    check_lists,
    check_no_overlap,
    define_in_place,
    number_or_tensor,
    tensor_list,
)


def ema_update_ref(
    teacher: Sequence[Tensor],  # masters of one dtype, at least one, updated in place
    student: Sequence[Tensor],
    decay: float | Tensor,  # in [0, 1], a tensor is float []
    copies: Sequence[Tensor] = (),  # overwritten with the new masters; empty for none
) -> None:
    """The definition of the op in plain PyTorch, with its multi-tensor functions."""
    student = [p.to(e.dtype) for e, p in zip(teacher, student, strict=True)]
    if not isinstance(decay, Tensor):
        torch._foreach_lerp_(teacher, student, 1 - decay)
    else:
        weight = (1 - decay).to(teacher[0].dtype)
        for e, p in zip(teacher, student, strict=True):
            e.lerp_(p, weight)
    if copies:
        torch._foreach_copy_(copies, teacher)


define_in_place(
    "ema_update_",
    "(Tensor(a!)[] teacher, Tensor[] student, Tensor? decay, float decay_value, Tensor(b!)[] copies) -> ()",
)


def _op_cpu(
    teacher: list[Tensor], student: list[Tensor], decay: Tensor | None, decay_value: float, copies: list[Tensor]
) -> None:
    interpreted = all(cpu_runs_triton(x.dtype) for x in chain(teacher, student, copies))
    _run(interpreted, teacher, student, decay, decay_value, copies)


def _op_cuda(
    teacher: list[Tensor], student: list[Tensor], decay: Tensor | None, decay_value: float, copies: list[Tensor]
) -> None:
    _run(has_triton(), teacher, student, decay, decay_value, copies)


torch.library.impl("d2v_fast::ema_update_", "cpu", _op_cpu)
torch.library.impl("d2v_fast::ema_update_", "cuda", _op_cuda)


def _run(
    use_triton: bool,
    teacher: list[Tensor],
    student: list[Tensor],
    decay: Tensor | None,  # None: decay_value counts
    decay_value: float,
    copies: list[Tensor],
) -> None:
    written = [*teacher, *copies]
    check_no_overlap(written, student, "teacher and copies")
    torch.autograd.graph.increment_version(written)
    if use_triton:
        from d2v_fast.kernels import ema as kernels

        kernels.ema_update_(teacher, student, decay, 1 - decay_value, copies)
    else:
        ema_update_ref(teacher, student, decay_value if decay is None else decay, copies)


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
        teacher: dense float32 masters (float64 is taken on CPU), all on one device.
        student: tensors of the same shapes and strides in float32, bfloat16 or float16; dtypes may differ. Contiguous
            or not (channels_last) does not matter as long as all lists agree.
        decay: a number in [0, 1], or a float32 / float64 tensor of shape [] on the same device. A tensor is read on
            the device, which is what a captured CUDA graph needs; its range is not checked. float64 keeps
            ``1 - decay`` exact to float32 precision: a float32 0.9999 is already 0.02 % off in ``1 - decay``.
        copies: low-precision tensors of the same shapes and strides that receive the new teacher values in the same
            pass.

    Empty lists and tensors without elements are fine. No tensor that is written may share memory with another one.

    Raises:
        ValueError: list lengths, shapes, strides or devices differ, a tensor is not dense, memory is shared, or
            ``decay`` is outside [0, 1].
        TypeError: a teacher tensor is not float32 (integer buffers must be copied, not averaged), another tensor is
            not floating point, or float64 on a GPU; a list holds something else, or ``decay`` is no number.
    """
    args = ema_arguments(teacher, student, decay, copies)
    if args is not None:
        torch.ops.d2v_fast.ema_update_(*args)


def ema_arguments(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    decay: float | Tensor,
    copies: Sequence[Tensor] | None = None,
) -> tuple | None:
    """What :func:`ema_update_` passes to the registered op once all is checked; None if there is nothing to do."""
    teacher, student = tensor_list("teacher", teacher), tensor_list("student", student)
    copies = tensor_list("copies", () if copies is None else copies)
    check_length("student", len(student), len(teacher), "teacher")
    if copies:
        check_length("copies", len(copies), len(teacher), "teacher")
    decay = number_or_tensor("decay", decay, below=1, include=True)
    if not teacher:
        return None
    check_lists({"teacher": teacher}, {"student": student, "copies": copies})
    if isinstance(decay, Tensor):
        check_scalar("decay", decay, teacher[0].device)
        return teacher, student, decay, 0.0, copies
    return teacher, student, None, decay, copies

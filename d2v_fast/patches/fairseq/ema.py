"""The teacher's step of fairseq (``EMAModule._step_internal``): one pass over the averages and their copies.

fairseq computes ``e (1 - (1 - d)) + (1 - d) p`` with a rounding after each of two steps, here it is
``e + (1 - d) (p - e)``: one unit in the last place of the larger of ``e`` and ``p`` apart at most. What is copied, the
teacher's own parameters among it, is equal bit for bit.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from d2v_fast.ops import ema_update_, l2_norm
from d2v_fast.ops._lists import is_dense, is_plain, layout
from d2v_fast.patches._core import Options, Patch, Seam, Site, fall_back, state_of


@dataclass
class _Copies:
    """Tensors that become others' values, whatever the dtypes."""

    to: list[Tensor] = field(default_factory=list)
    of: list[Tensor] = field(default_factory=list)

    def add(self, to: Tensor, of: Tensor) -> None:
        if to.data_ptr() != of.data_ptr() or to.numel() == 0:
            self.to.append(to)
            self.of.append(of)

    def run(self) -> None:
        if self.to:
            torch._foreach_copy_(self.to, self.of)


@dataclass
class _Plan:
    """Which tensor goes where, and what it was found from."""

    objects: list[Tensor | None]
    values: tuple
    reason: str | None = None  # why upstream's code has to do it
    # (averages, the student's parameters, the teacher's; none of these where they are the averages themselves)
    averaged: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = field(default_factory=list)
    copied: _Copies = field(default_factory=_Copies)  # into the averages
    loaded: _Copies = field(default_factory=_Copies)  # into the teacher, afterwards

    def still(self, objects: list[Tensor | None], values: tuple) -> bool:
        """Whether these are the tensors and options that the plan was made for."""
        return values == self.values and all(map(_same, objects, self.objects))


def _same(a: Any, b: Any) -> bool:
    return a is b


def _tensors(module: nn.Module) -> Iterator[Tensor | None]:
    for each in module.modules():
        yield from each._parameters.values()
        yield from each._buffers.values()


def _found(ema: Any, student: nn.Module) -> tuple[list[Tensor | None], tuple]:
    """All tensors, which are compared by identity, and what else a plan depends on.

    That is also where the tensors are, which conversions exchange within the same object.
    """
    teachers, students, averages = list(_tensors(ema.model)), list(_tensors(student)), list(ema.fp32_params.values())
    memory = [x.data_ptr() for x in chain(teachers, averages) if isinstance(x, Tensor) and is_plain(x)]
    trained = [x is not None and x.requires_grad for x in students]
    options = (ema.config.ema_fp32, frozenset(ema.skip_keys), tuple(ema.fp32_params))
    counts = (len(teachers), len(students))
    return [*teachers, *students, *averages], (*options, counts, tuple(memory), tuple(trained))


def _plan(ema: Any, student: nn.Module, objects: list[Tensor | None], values: tuple) -> _Plan:
    plan = _Plan(objects, values)
    own = ema.model.state_dict(keep_vars=True)
    averages = ema.fp32_params if ema.config.ema_fp32 else own
    adds = getattr(ema, "add_missing_params", True)  # an option of 2022-12 and later
    pairs = [(name, p) for name, p in student.named_parameters() if name in averages or adds]
    plan.reason = _unfit(ema, averages, pairs)
    if plan.reason is not None:
        return plan
    apart, same = ([], [], []), ([], [], [])
    for name, p in pairs:
        if "version" in name:  # of the layout; upstream leaves such parameters alone
            continue
        average, teacher = averages[name], own.get(name)
        is_apart = teacher is not None and teacher.data_ptr() != average.data_ptr()
        if name in ema.skip_keys or not p.requires_grad:
            plan.copied.add(average, p)
            if is_apart:
                plan.loaded.add(teacher, average)
            continue
        for tensors, x in zip(apart if is_apart else same, (average, p, teacher), strict=True):
            tensors.append(x)
    plan.averaged = [(apart[0], apart[1], apart[2]), (same[0], same[1], [])]
    for name, buffer in student.named_buffers():
        if name in own:
            plan.loaded.add(own[name], buffer)
    return plan


def _log_norms(ema: Any, plan: _Plan) -> None:
    """Norms of all that is averaged, [1] each as apex has them, where ``log_norms`` asks for them and apex is there."""
    if not getattr(ema, "log_norms", False):  # an option of 2022-12 and later
        return
    if "model_norm" in ema.logs:
        ema.prev_model_norm = ema.logs["model_norm"]
    (averages, students, _), (others, of_others, _) = plan.averaged
    ema.logs["model_norm"] = l2_norm(students + of_others).reshape(1)
    ema.logs["ema_norm"] = l2_norm(averages + others).reshape(1)


def _unfit(ema: Any, averages: dict[str, Tensor], pairs: list[tuple[str, Tensor]]) -> str | None:
    """Why upstream's code has to take the step, or None."""
    if any(name not in averages for name, _ in pairs):
        return "the student has parameters that the teacher lacks, and upstream adds them"
    if any(averages[name].shape != p.shape for name, p in pairs):
        return "parameters of student and teacher differ in shape"
    moved = [(averages[name], p) for name, p in pairs if p.requires_grad]
    if not all(is_plain(x) for x in chain.from_iterable(moved)):
        return "parameters are DTensors"
    if {average.dtype for average, _ in moved} - {torch.float32}:
        return "averages are kept in another dtype than float32"
    if not {p.dtype for _, p in moved} <= {torch.float32, torch.float16, torch.bfloat16}:
        return "the student has parameters of another dtype than float32, float16 and bfloat16"
    if len({x.device for x in chain.from_iterable(moved)}) > 1:
        return "student and teacher are on different devices"
    if not all(is_dense(average) and layout(average) == layout(p) for average, p in moved):
        return "a parameter's memory has gaps, or another order in the teacher"
    return None


def _make_step(original: Callable, options: Options) -> Callable:
    @torch.no_grad()
    def _step_internal(self, new_model):
        """Move the averages of ``self`` towards ``new_model``; see :mod:`d2v_fast.patches.fairseq.ema`."""
        cache = state_of(self).cache
        plan, found = cache.get("plan"), _found(self, new_model)
        if plan is None or not plan.still(*found):
            plan = cache["plan"] = _plan(self, new_model, *found)
        if plan.reason is not None:
            fall_back(self, "_step_internal", plan.reason, options)
            original(self, new_model)
            return
        for averages, students, teachers in plan.averaged:
            ema_update_(averages, students, self.decay, copies=teachers)
        plan.copied.run()
        plan.loaded.run()
        _log_norms(self, plan)

    return _step_internal


STEP = Seam(
    "ema",
    "_step_internal",
    _make_step,
    "averages and the teacher's copy of them in one pass over the memory",
    frozenset({"059ab232f9fdf593", "826ff62a16d56f8d"}),  # of 2022-12, of 2022-05
)


def _make_teacher(original: Callable, options: Options, *, patch: Patch) -> Callable:
    def make_ema_teacher(self, *args, **kwargs):
        """Make the teacher as upstream does, and replace its step."""
        result = original(self, *args, **kwargs)
        patch.apply([Site("ema", self.ema if result is None else result, STEP)], options)
        return result

    return make_ema_teacher


def _teacher_to_come(patch: Patch) -> Seam:
    """The method that makes a teacher, which then belongs to ``patch`` as well."""
    return Seam("ema", "make_ema_teacher", partial(_make_teacher, patch=patch), "the teacher it makes gets a fast step")


def sites(model: nn.Module, patch: Patch, options: Options) -> list[Site]:
    """The step of every teacher in ``model``, or of that which a part of it will make before the first update."""
    found = []
    for path, module in model.named_modules():
        if not hasattr(module, "make_ema_teacher"):
            continue
        teacher = getattr(module, "ema", None)
        if teacher is None:
            found.append(Site(path, module, _teacher_to_come(patch)))
        else:
            found.append(Site(f"{path}.ema".lstrip("."), teacher, STEP))
    return found


def seams(kind: type) -> list[Seam]:
    """The step, at ``EMAModule`` itself."""
    return [STEP]

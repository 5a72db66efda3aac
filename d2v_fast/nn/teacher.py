"""The teacher: an exponential moving average of the student (paper section 3.2; fairseq ``EMAModule``)."""

import copy

import torch
from torch import Tensor, nn

from d2v_fast.nn.config import EMAConfig
from d2v_fast.ops import ema_update_


class EMATeacher(nn.Module):
    """A frozen fp32 copy of ``student``, always in eval mode, that follows it.

    ``module`` is the copy. Parameters whose name starts with one of ``skip``, frozen parameters and buffers are copied;
    the others are averaged. Being a submodule of the model, it moves, saves and loads with it.

    Raises:
        ValueError: a prefix of ``skip`` matches no parameter.
    """

    def __init__(self, student: nn.Module, schedule: EMAConfig, skip: tuple[str, ...] = ()) -> None:
        super().__init__()
        names = [name for name, _ in student.named_parameters()]
        for prefix in skip:
            if not any(name.startswith(prefix) for name in names):
                raise ValueError(f"skip: no parameter of the student starts with {prefix!r}; it has {names[:3]} ...")
        self._student = (student,)  # in a tuple, so that it is not registered as a part of the teacher
        self.schedule, self.skip = schedule, tuple(skip)
        self.module = copy.deepcopy(student).float().requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "EMATeacher":
        """Stay in eval mode: the teacher has no dropout, DropPath or LayerDrop."""
        return super().train(False)

    def _pairs(self) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        """(teacher, student) tensors to average, and those to copy."""
        student = self._student[0]
        averaged, copied = [], []
        for (name, mine), (_, theirs) in zip(self.module.named_parameters(), student.named_parameters(), strict=True):
            follow = theirs.requires_grad and not name.startswith(self.skip)
            (averaged if follow else copied).append((mine, theirs))
        copied += zip(self.module.buffers(), student.buffers(), strict=True)
        return averaged, copied

    @torch.no_grad()
    def update_(self, update: int) -> float:
        """Move towards the student as it is after ``update`` optimizer updates; return the decay that was used.

        A decay of 1 leaves the averaged parameters as they are (fairseq), and still copies the others.
        """
        decay = self.schedule.decay_at(update)
        averaged, copied = self._pairs()
        if decay < 1 and averaged:
            mine, theirs = zip(*averaged, strict=True)
            ema_update_(list(mine), list(theirs), decay)
        for mine, theirs in copied:
            mine.copy_(theirs)
        return decay

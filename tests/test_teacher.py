"""The EMA teacher: schedule, what is averaged and what is copied, device moves, deep copies, saving."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import tiny_config
from torch import nn

from d2v_fast.nn import Data2Vec, EMATeacher
from d2v_fast.nn.config import EMAConfig


def test_schedule_is_the_published_one():
    """Linear from .999 to .9999 over 30 000 updates; d(1) = 0.99900003."""
    schedule = EMAConfig(decay=0.999, end_decay=0.9999, anneal_updates=30_000)
    assert schedule.decay_at(0) == pytest.approx(0.999, abs=1e-12)
    assert schedule.decay_at(1) == pytest.approx(0.99900003, abs=1e-12)
    assert schedule.decay_at(15_000) == pytest.approx(0.99945, abs=1e-12)
    assert schedule.decay_at(30_000) == schedule.decay_at(10**9) == 0.9999
    assert EMAConfig(decay=0.9998, end_decay=0.9998, anneal_updates=0).decay_at(0) == 0.9998


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.copied = nn.Linear(3, 3)
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.register_buffer("counter", torch.arange(5))
        self.register_buffer("scale", torch.ones(2))


def moved(student: nn.Module) -> None:
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p))


def test_recurrence_in_float64():
    """E_u = d(u) E_{u-1} + (1 - d(u)) W_u for averaged parameters; the rest is copied, integer buffers unharmed."""
    student = Student()
    schedule = EMAConfig(decay=0.5, end_decay=0.9, anneal_updates=4)
    teacher = EMATeacher(student, schedule, skip=("copied.",))
    exact = student.body.weight.detach().double()
    for update in range(1, 7):
        moved(student)
        student.scale.mul_(1.5)
        student.counter.add_(1)
        decay = teacher.update_(update)
        assert decay == schedule.decay_at(update)
        exact = decay * exact + (1 - decay) * student.body.weight.detach().double()
        torch.testing.assert_close(teacher.module.body.weight.double(), exact, rtol=1e-5, atol=1e-6)
        assert torch.equal(teacher.module.copied.weight, student.copied.weight)
        assert torch.equal(teacher.module.frozen, student.frozen)
        assert torch.equal(teacher.module.counter, student.counter) and teacher.module.counter.dtype == torch.int64
        assert torch.equal(teacher.module.scale, student.scale)


def test_decay_of_one_freezes():
    student = Student()
    teacher = EMATeacher(student, EMAConfig(decay=1.0, end_decay=1.0, anneal_updates=0), skip=("copied.",))
    before = teacher.module.body.weight.clone()
    moved(student)
    assert teacher.update_(1) == 1.0
    assert torch.equal(teacher.module.body.weight, before)
    assert torch.equal(teacher.module.copied.weight, student.copied.weight)


def test_low_precision_student_has_fp32_teacher():
    student = Student().bfloat16()
    teacher = EMATeacher(student, EMAConfig(decay=0.999, end_decay=0.999, anneal_updates=0))
    assert teacher.module.body.weight.dtype == torch.float32
    start = teacher.module.body.weight.clone()
    with torch.no_grad():
        student.body.weight.add_(1)
    teacher.update_(1)
    want = start.double() + 0.001 * (student.body.weight.double() - start.double())
    torch.testing.assert_close(teacher.module.body.weight.double(), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("modality", "copied"), [("speech", "encoder.pos_conv."), ("text", "frontend."), ("image", None)]
)
def test_what_each_recipe_copies(modality, copied):
    """Speech copies the positional convolutions, text the embeddings, images average everything."""
    model = Data2Vec(tiny_config(modality))
    moved(model.frontend), moved(model.encoder)
    model.teacher.update_(1)
    students = {"frontend": model.frontend, "encoder": model.encoder}
    for name, mine in model.teacher.module.named_parameters():
        part, _, rest = name.partition(".")
        theirs = students[part].get_parameter(rest)
        assert torch.equal(mine, theirs) == (copied is not None and name.startswith(copied)), name


def test_moves_saves_and_copies_with_the_model():
    model = Data2Vec(tiny_config("text"))
    twin = copy.deepcopy(model)
    moved(twin.encoder)
    twin.teacher.update_(1)  # follows its own student
    assert not torch.equal(twin.teacher.module["encoder"].layers[0].fc1.weight, model.encoder.layers[0].fc1.weight)
    name = "encoder.layers.0.fc1.weight"
    assert f"teacher.module.{name}" in model.state_dict()
    assert not any(p.requires_grad for p in model.teacher.parameters())
    assert model.double().teacher.module.get_parameter(name).dtype == torch.float64
    other = Data2Vec(replace(model.config)).double()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.teacher.module.get_parameter(name), model.teacher.module.get_parameter(name))


def test_unknown_skip_prefix():
    with pytest.raises(ValueError, match="no parameter of the student starts with 'nothing'"):
        EMATeacher(Student(), EMAConfig(), skip=("nothing",))

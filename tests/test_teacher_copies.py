"""The teacher's low-precision matrices under autocast: bit-equal to casting at every use, and never out of date."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import NO_DROPOUT, tiny_batch, tiny_config
from torch import nn

from d2v_fast.nn import Data2Vec, EMATeacher
from d2v_fast.nn.config import EMAConfig, PruneConfig
from d2v_fast.train.optim import OptimConfig, build_optimizer
from d2v_fast.train.step import train_step

HALF = EMAConfig(decay=0.5, end_decay=0.5, anneal_updates=0)
AUTOCAST = {"device_type": "cpu", "dtype": torch.bfloat16}


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.shared = nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 4)
        self.patch, self.table = nn.Conv2d(3, 4, 2), nn.Embedding(7, 4)

    def forward(self, x):
        return self.shared(self.norm(self.first(x)))


def teacher_of(student: nn.Module) -> EMATeacher:
    return EMATeacher(student, HALF, skip=("shared",), copies=torch.bfloat16)


def network(teacher: EMATeacher) -> nn.Module:
    with torch.autocast(**AUTOCAST):
        return teacher.network("cpu")


def assert_current(teacher: EMATeacher) -> None:
    """The copies are the averages, rounded."""
    found = network(teacher)
    for name, master in teacher.module.named_parameters():
        mine = found.get_parameter(name)
        if name in ("first.weight", "patch.weight"):
            assert mine.dtype == torch.bfloat16 and torch.equal(mine, master.to(torch.bfloat16)), name
        else:
            assert mine is master, name


@torch.no_grad()
def moved(module: nn.Module) -> None:
    for p in module.parameters():
        p.add_(torch.randn_like(p))


def test_matrices_are_copies_and_the_rest_is_the_same():
    student = Student()
    teacher = teacher_of(student)
    assert teacher.network("cpu") is teacher.module and teacher._low is None  # costs nothing without autocast
    with torch.autocast("cpu", torch.float16):
        assert teacher.network("cpu") is teacher.module
    plain = EMATeacher(student, HALF)
    assert network(plain) is plain.module
    assert_current(teacher)
    assert not any(p.requires_grad for p in network(teacher).parameters())
    assert teacher.state_dict().keys() == EMATeacher(Student(), HALF).state_dict().keys()


def test_an_update_writes_them_in_place():
    student = Student()
    teacher, plain = teacher_of(student), EMATeacher(student, HALF, skip=("shared",))
    before = network(teacher).first.weight.data_ptr()
    for update in range(1, 4):
        moved(student)
        for each in (teacher, plain):
            each.update_(update)
        low = teacher._low
        assert not low.stale()  # written by the update, not on the next use
        assert_current(teacher)
        for mine, want in zip(teacher.module.parameters(), plain.module.parameters(), strict=True):
            assert torch.equal(mine, want)
    teacher.update_(4, skip=torch.tensor(1.0))
    assert_current(teacher)
    with torch.no_grad():  # an optimizer that moves the averages itself
        teacher.module.first.weight.add_(1)
    assert low.stale()
    teacher.update_(5, averaged=True)
    assert not low.stale()
    assert_current(teacher)
    assert network(teacher).first.weight.data_ptr() == before and teacher._low is low


def test_they_follow_whatever_happens_to_the_averages():
    student = Student()
    teacher = teacher_of(student)
    assert_current(teacher)
    moved(teacher.module)  # by the user
    assert_current(teacher)

    state = {name: x + 1 for name, x in teacher.state_dict().items()}
    pointer = network(teacher).first.weight.data_ptr()
    teacher.load_state_dict(state)
    assert not teacher._low.stale()  # at once: a captured graph reads them without asking
    assert torch.equal(network(teacher).first.weight, state["module.first.weight"].to(torch.bfloat16))
    assert network(teacher).first.weight.data_ptr() == pointer
    teacher.load_ema_state({name: x - 2 for name, x in teacher.ema_state().items()})
    assert not teacher._low.stale()
    assert_current(teacher)
    teacher.load_state_dict({name: x + 3 for name, x in state.items()}, assign=True)
    assert_current(teacher)

    twin = copy.deepcopy(nn.ModuleDict({"student": student, "teacher": teacher}))
    assert twin["teacher"]._low is None  # made again, not copied along
    moved(twin["student"])
    twin["teacher"].update_(1)
    assert_current(twin["teacher"])
    assert_current(teacher)
    student.first.weight.requires_grad_(False)  # a copy of the student's from now on, not an average
    teacher.update_(2)
    assert network(teacher).first.weight is teacher.module.first.weight
    student.first.weight.requires_grad_(True)
    teacher.update_(3)
    assert_current(teacher)


def test_made_in_inference_mode():
    """By a validation loss before the first update: what trains afterwards can write them."""
    student = Student()
    teacher = teacher_of(student)
    for _ in range(2):
        with torch.inference_mode():
            assert_current(teacher)
        assert not any(x.is_inference() for x in teacher._low.copies)
        moved(student)
        teacher.update_(1, again=True)
        assert_current(teacher)
        moved(teacher.module)  # made anew in inference mode
    teacher.load_state_dict(teacher.state_dict())
    assert_current(teacher)


def test_other_precisions():
    student = Student()
    model = nn.ModuleDict({"student": student, "teacher": teacher_of(student)})
    assert_current(model["teacher"])
    model.double()  # autocast leaves float64 alone
    assert all(p.dtype == torch.float64 for p in network(model["teacher"]).parameters())
    model.float()
    assert_current(model["teacher"])


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("modality", ["speech", "image", "text"])
def test_training_is_bit_equal(modality, one_pass):
    config = tiny_config(modality, **NO_DROPOUT)
    if modality == "text":
        config = replace(config, frontend=replace(config.frontend, dropout=0.0))
    seen = []
    for copies in (True, False):
        torch.manual_seed(0)
        model = Data2Vec(replace(config, prune=PruneConfig(teacher_copy=copies)))
        optimizer = build_optimizer(model, OptimConfig(lr=0.1, one_pass=one_pass))
        batch = tiny_batch(config, padded=modality != "image")
        metrics = [train_step(model, [batch], optimizer, lr=0.1, update=i, autocast=True) for i in range(3)]
        assert (model.teacher._low is not None) == copies
        seen.append(([m.loss for m in metrics], model.state_dict()))
    (losses, state), (want_losses, want_state) = seen
    assert torch.equal(torch.stack(losses), torch.stack(want_losses)) and len(set(losses)) == 3
    assert state.keys() == want_state.keys()
    for name, x in state.items():
        assert torch.equal(x, want_state[name]), name


def test_compiled():
    """In a graph the copies are used if they are there already; nothing is made or looked at in it."""
    torch._dynamo.reset()
    config = tiny_config("text", **NO_DROPOUT)
    one_layer = {"encoder": replace(config.encoder, layers=1), "targets": replace(config.targets, top_k=1)}
    model = Data2Vec(replace(config, frontend=replace(config.frontend, dropout=0.0), **one_layer))
    batch = tiny_batch(config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for with_copies in (False, True):
        with torch.autocast(**AUTOCAST):
            if with_copies:
                want = model(batch).loss
            got = compiled(batch).loss
        assert (model.teacher._low is not None) == with_copies
    torch.testing.assert_close(got, want, rtol=2e-3, atol=0)
    moved(model.encoder)
    model.teacher.update_(1)
    with torch.autocast(**AUTOCAST):
        torch.testing.assert_close(compiled(batch).loss, model(batch).loss, rtol=2e-3, atol=0)

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


def follows_exactly(teacher, student):
    """A step with a decay of 0.5 puts every averaged parameter half-way, and copies the rest."""
    moved(student)
    start = {name: p.clone() for name, p in teacher.module.named_parameters()}
    teacher.update_(10**6 if teacher._last_update is None else teacher._last_update + 1)
    for (name, mine), theirs in zip(teacher.module.named_parameters(), student.parameters(), strict=True):
        want = theirs if name.startswith(("copied.", "frozen")) else (start[name] + theirs) / 2
        torch.testing.assert_close(mine.detach(), want.detach().to(mine.dtype), msg=name)


HALF = EMAConfig(decay=0.5, end_decay=0.5, anneal_updates=0)


@pytest.mark.parametrize("share", [True, False])
def test_skipped_parameters_share_the_students_memory(share):
    student = Student()
    teacher = EMATeacher(student, HALF, skip=("copied.",), share=share)
    for mine, theirs in zip(teacher.module.copied.parameters(), student.copied.parameters(), strict=True):
        assert (mine.data_ptr() == theirs.data_ptr()) == share
        assert not mine.requires_grad and theirs.requires_grad
    assert teacher.module.body.weight.data_ptr() != student.body.weight.data_ptr()
    assert teacher.module.frozen.data_ptr() != student.frozen.data_ptr()
    for _ in range(2):
        follows_exactly(teacher, student)


def test_sharing_survives_moves_copies_and_loads():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = Student()
            self.teacher = EMATeacher(self.student, HALF, skip=("copied.",))

    def shared(model):
        return model.teacher.module.copied.weight.data_ptr() == model.student.copied.weight.data_ptr()

    model = Model()
    assert shared(model.double().float())  # taken apart by the move, shared again at once
    twin = copy.deepcopy(model)
    assert shared(twin) and twin.student.copied.weight.data_ptr() != model.student.copied.weight.data_ptr()
    follows_exactly(twin.teacher, twin.student)
    follows_exactly(model.teacher, model.student)

    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["teacher.module.copied.weight"] += 1  # a file from a teacher that averaged them
    kept = state["student.copied.weight"].clone()
    twin.load_state_dict(state)
    assert torch.equal(twin.student.copied.weight, kept)  # loading the teacher leaves the student alone
    assert torch.equal(twin.teacher.module.copied.weight, kept + 1)
    follows_exactly(twin.teacher, twin.student)
    assert shared(twin)
    twin.load_state_dict(state, assign=True)  # other Parameter objects
    follows_exactly(twin.teacher, twin.student)
    assert shared(twin)

    state["teacher.module.copied.weight"] = state["student.copied.weight"]
    for assign in (False, True):
        model.load_state_dict(state, assign=assign)
        assert shared(model)  # at once
    with pytest.raises(RuntimeError, match=r"size mismatch for student\.body\.weight"):
        twin.load_state_dict({**state, "student.body.weight": torch.zeros(7)})
    assert shared(twin)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stays_float32_in_a_low_precision_model(dtype):
    """The averages keep what they have; not even a way to the low precision and back loses it."""
    student = Student()
    teacher = EMATeacher(student, HALF, skip=("copied.",))
    moved(student)
    teacher.update_(1)
    state = {name: x.clone() for name, x in teacher.ema_state().items()}
    model = nn.ModuleDict({"student": student, "teacher": teacher}).to(dtype)
    assert student.body.weight.dtype == dtype
    for name, x in teacher.ema_state().items():
        assert x.dtype == state[name].dtype and torch.equal(x, state[name]), name
    follows_exactly(teacher, student)
    assert torch.equal(teacher.module.copied.weight, student.copied.weight.float())
    model.float()
    assert teacher.module.copied.weight.data_ptr() == student.copied.weight.data_ptr()
    assert not torch.equal(teacher.module.body.weight, teacher.module.body.weight.to(dtype).float())


def test_permuted_and_sparse_layouts():
    student = nn.Conv2d(4, 3, 2).to(memory_format=torch.channels_last)
    teacher = EMATeacher(student, HALF)
    assert teacher.module.weight.is_contiguous(memory_format=torch.channels_last)
    follows_exactly(teacher, student)
    both = nn.ModuleList([student, teacher]).to(memory_format=torch.contiguous_format)
    assert both[0].weight.is_contiguous()
    follows_exactly(teacher, student)
    gaps = nn.Module()
    gaps.weight = nn.Parameter(torch.zeros(4, 6)[:, ::2])
    with pytest.raises(ValueError, match=r"the student's weight must be dense, got shape \(4, 3\) strides \(6, 2\)"):
        EMATeacher(gaps, HALF)


def test_skip_names_whole_components():
    """ "1" is the module 1, not 10; a name may be that of a parameter, and the last dot is as good as none."""
    student = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(11)])
    for skip in (("1",), ("1.",), ("1.weight",)):
        teacher = EMATeacher(student, HALF, skip=skip)
        copied = set(student.parameters()) - teacher.averages().keys()
        assert copied == {student[1].weight}
    with pytest.raises(ValueError, match=r"starts with '1\.wei'"):
        EMATeacher(student, HALF, skip=("1.wei",))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda t: EMATeacher(None, HALF), "student must be a module, got NoneType"),
        (lambda t: EMATeacher(Student(), HALF, skip="body"), "skip must be a tuple of names, got the string 'body'"),
        (
            lambda t: EMATeacher(Student(), HALF, copies=torch.float32),
            "copies must be torch.bfloat16, .* torch.float32",
        ),
        (lambda t: t.update_(1, skip=True), "skip must be a tensor, got bool"),
        (
            lambda t: t.load_ema_state({**t.ema_state(), "frozen": None}),
            r"state\['frozen'\] must be a tensor, got None",
        ),
    ],
)
def test_wrong_types_raise(call, match):
    with pytest.raises(TypeError, match=match):
        call(EMATeacher(Student(), HALF))


def test_low_precision_student_is_copied():
    student = Student().bfloat16()
    teacher = EMATeacher(student, HALF, skip=("copied.",))
    moved(student)
    teacher.update_(1)
    assert teacher.module.copied.weight.dtype == torch.float32
    assert torch.equal(teacher.module.copied.weight, student.copied.weight.float())


def test_steps_once_per_update():
    student = Student()
    teacher = EMATeacher(student, HALF)
    moved(student)
    teacher.update_(1)
    once = teacher.module.body.weight.clone()
    assert teacher.update_(1) == 0.5
    assert torch.equal(teacher.module.body.weight, once)
    teacher.update_(1, again=True)
    assert not torch.equal(teacher.module.body.weight, once)
    once = teacher.module.body.weight.clone()
    teacher.update_(2)
    assert not torch.equal(teacher.module.body.weight, once)
    teacher.load_state_dict(teacher.state_dict())  # another start: the same number may come again
    once = teacher.module.body.weight.clone()
    teacher.update_(2)
    assert not torch.equal(teacher.module.body.weight, once)


def test_skip_flag_and_averages_moved_elsewhere():
    student = Student()
    teacher = EMATeacher(student, HALF, skip=("copied.",), share=False)
    moved(student)
    start = teacher.module.body.weight.clone()
    assert teacher.update_(1, skip=torch.tensor(1.0)) == 0.5
    teacher.update_(2, averaged=True)
    assert torch.equal(teacher.module.body.weight, start)
    assert torch.equal(teacher.module.copied.weight, student.copied.weight)
    teacher.update_(3, skip=torch.tensor(0.0))
    torch.testing.assert_close(teacher.module.body.weight, (start + student.body.weight.detach()) / 2)


def test_decay_on_the_device():
    """In place of the schedule's, together with skip; and a graph's replay is noted without a step."""
    student = Student()
    teacher, other = EMATeacher(student, HALF), EMATeacher(student, EMAConfig(decay=0.9, end_decay=1, anneal_updates=0))
    moved(student)
    teacher.update_(1)
    assert other.update_(1, decay=torch.tensor(0.5, dtype=torch.float64), skip=torch.tensor(0.0)) == 1
    for mine, want in zip(other.module.parameters(), teacher.module.parameters(), strict=True):
        torch.testing.assert_close(mine, want)
    kept = other.module.body.weight.clone()
    other.update_(2, decay=torch.tensor(0.5), skip=torch.tensor(1.0))
    assert torch.equal(other.module.body.weight, kept)
    teacher.note_update(2)
    kept = teacher.module.body.weight.clone()
    teacher.update_(2)
    assert torch.equal(teacher.module.body.weight, kept)
    with pytest.raises(TypeError, match="decay must be a tensor, got float"):
        teacher.update_(3, decay=0.5)


def test_averages_maps_student_to_teacher():
    student = Student()
    teacher = EMATeacher(student, HALF, skip=("copied.",))
    averages = teacher.averages()
    assert {id(p) for p in averages} == {id(p) for p in student.body.parameters()}
    assert averages[student.body.weight] is teacher.module.body.weight


def test_notices_frozen_and_replaced_parameters():
    student = Student()
    teacher = EMATeacher(student, HALF)
    moved(student)
    teacher.update_(1)
    student.body.weight.requires_grad_(False)
    moved(student)
    teacher.update_(2)
    assert torch.equal(teacher.module.body.weight, student.body.weight)
    student.body.weight = nn.Parameter(torch.zeros(3, 4))
    start = teacher.module.body.weight.clone()
    teacher.update_(3)
    torch.testing.assert_close(teacher.module.body.weight, start / 2)
    student.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"must have the same tensors, but these differ: \['extra'\]"):
        teacher.update_(4)


def test_linear_warm_up_of_the_vision_reference():
    """Its schedule: init + it (decay - init) / start_at for it < start_at, then decay; the same line as fairseq's."""
    init, decay, start_at = 0.99, 0.9998, 40
    schedule = EMAConfig(decay=init, end_decay=decay, anneal_updates=start_at)
    for it in range(start_at):
        assert schedule.decay_at(it) == pytest.approx(init + it * (decay - init) / start_at, abs=1e-12)
    assert schedule.decay_at(start_at) == schedule.decay_at(10 * start_at) == decay
    assert EMAConfig(decay=0.9998, end_decay=0.9998, anneal_updates=0).decay_at(1) == 0.9998


def test_ema_state_round_trip():
    student = Student()
    teacher, other = (EMATeacher(student, HALF, skip=("copied.",)) for _ in range(2))
    moved(student)
    teacher.update_(1)
    state = {name: x.clone() for name, x in teacher.ema_state().items()}
    assert state.keys() == student.state_dict().keys()
    kept = student.copied.weight.detach().clone()
    state["copied.weight"] = state["copied.weight"] + 1
    other.load_ema_state({name: x.double() if x.is_floating_point() else x for name, x in state.items()})
    for name, x in other.ema_state().items():
        assert torch.equal(x, state[name]) and x.dtype == teacher.ema_state()[name].dtype, name
    assert torch.equal(student.copied.weight, kept)
    follows_exactly(other, student)
    with pytest.raises(ValueError, match=r"missing: \['frozen'\], unknown: \['other'\]"):
        other.load_ema_state({"other" if name == "frozen" else name: x for name, x in state.items()})
    with pytest.raises(ValueError, match=r"state\['frozen'\] must have shape \(2,\), got \(3,\)"):
        other.load_ema_state({**state, "frozen": torch.zeros(3)})


def test_sharded_student_and_teacher(tmp_path):
    """FSDP2 on a mesh of one process: local shards are averaged, the same as without sharding."""
    from torch import distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    plain, sharded = Student(), Student()
    sharded.load_state_dict(plain.state_dict())
    teachers = [EMATeacher(student, HALF, skip=("copied.",)) for student in (plain, sharded)]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        sharded.frozen.requires_grad_(True), plain.frozen.requires_grad_(True)  # FSDP wants uniform gradients
        fully_shard(sharded, mesh=mesh)
        with pytest.raises(ValueError, match="teacher and student must be sharded alike"):
            teachers[1].update_(1)
        fully_shard(teachers[1].module, mesh=mesh)
        for student in (plain, sharded):
            torch.manual_seed(1)
            with torch.no_grad():
                for p in student.parameters():
                    full = torch.randn(p.shape)
                    (p.to_local() if isinstance(p, DTensor) else p).copy_(full)
        for teacher in teachers:
            teacher.update_(2)
        for mine, want in zip(teachers[1].module.parameters(), teachers[0].module.parameters(), strict=True):
            assert isinstance(mine, DTensor)
            assert torch.equal(mine.to_local(), want)
    finally:
        dist.destroy_process_group()


def test_unknown_skip_prefix():
    with pytest.raises(ValueError, match="no parameter of the student starts with 'nothing'"):
        EMATeacher(Student(), EMAConfig(), skip=("nothing",))

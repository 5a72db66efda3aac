"""The teacher's step under fairseq's ``EMAModule``, patched against not, from the same state.

Averages may be one unit in the last place of the larger of average and parameter apart; everything that is copied is
equal bit for bit, the teacher's own parameters being their averages rounded.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("fairseq_peer")

from fairseq.modules import ema_module
from fairseq.modules.ema_module import EMAModule, EMAModuleConfig
from fairseq_pairs import speech_pair, text_pair
from patched import dictionaries, perturb

import d2v_fast
from d2v_fast.patches import PatchError
from d2v_fast.patches._core import STATE, Options, Patch, Site, is_ours
from d2v_fast.patches.fairseq.ema import STEP


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 48), nn.LayerNorm(48))
        self.pos_conv = nn.Conv1d(8, 8, 3)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.layout_version = nn.Parameter(torch.ones(2))  # upstream leaves names with "version" alone
        self.register_buffer("offsets", torch.randn(5))
        self.register_buffer("index", torch.arange(6))


def trio(dtype=torch.float32, **options) -> tuple[nn.Module, EMAModule, EMAModule, Patch]:
    """The student, fairseq's teacher, one with our step, and the patch."""
    torch.manual_seed(0)
    student = Student().to(dtype)
    config = EMAModuleConfig(ema_decay=0.9, ema_fp32=options.pop("ema_fp32", True), **options)
    theirs, ours = (EMAModule(student, config, skip_keys={"pos_conv.weight", "pos_conv.bias"}) for _ in range(2))
    return student, theirs, ours, Patch("test").apply([Site("", ours, STEP)], Options())


def units_apart(ours: Tensor, theirs: Tensor, size: Tensor) -> float:
    """Largest difference in units of the last place of ``size``."""
    unit = torch.finfo(torch.float32).eps * torch.exp2(torch.floor(torch.log2(size.abs().clamp(min=1e-30))))
    return ((ours.double() - theirs.double()).abs() / unit).max().item()


def assert_close(ours: EMAModule, theirs: EMAModule, student: nn.Module, before: dict[str, Tensor]) -> None:
    parameters = dict(student.named_parameters())
    assert ours.fp32_params.keys() == theirs.fp32_params.keys()
    for name, want in theirs.fp32_params.items():
        got = ours.fp32_params[name]
        assert got.dtype == want.dtype
        if name.startswith("body"):
            size = torch.maximum(before[name].abs(), parameters[name].float().abs())
            assert units_apart(got, want, size) <= 1, name
        else:
            assert torch.equal(got, want), name
    state = ours.model.state_dict()
    for name, want in theirs.model.state_dict().items():
        if name.startswith("body"):
            want = ours.fp32_params[name].to(want.dtype)
        assert torch.equal(state[name], want), name


def step_both(student: nn.Module, theirs: EMAModule, ours: EMAModule) -> None:
    """Move the student, compare a step of both teachers, and let ours begin the next where upstream's does."""
    perturb(student)
    before = {name: x.clone() for name, x in theirs.fp32_params.items()}
    for ema in (theirs, ours):
        ema.step(student)
    assert_close(ours, theirs, student, before)
    with torch.no_grad():
        for name, x in theirs.fp32_params.items():
            ours.fp32_params[name].copy_(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_step(dtype):
    student, theirs, ours, patch = trio(dtype)
    memory = {name: x.data_ptr() for name, x in ours.fp32_params.items()}
    for step in range(10):
        student.offsets.add_(1)
        student.index.add_(1)
        for ema in (theirs, ours):
            ema.set_decay(0.9 + 0.01 * step)
        step_both(student, theirs, ours)
    assert memory == {name: x.data_ptr() for name, x in ours.fp32_params.items()}
    assert not patch.fallbacks()


def test_averages_move():
    """Neither side of the comparison stands still."""
    student, _, ours, _ = trio()
    start = {name: x.clone() for name, x in ours.fp32_params.items()}
    perturb(student)
    ours.step(student)
    still = {name for name, x in ours.fp32_params.items() if torch.equal(x, start[name])}
    assert still == {"layout_version", "offsets", "index"}


def test_changes_are_followed():
    """Frozen and exchanged parameters, a converted teacher, a load: found at the next step."""
    student, theirs, ours, patch = trio()

    step_both(student, theirs, ours)
    student.body[1].bias.requires_grad_(False)
    for ema in (theirs, ours):
        ema.skip_keys = ema.skip_keys | {"body.0.bias"}
    perturb(student)
    for ema in (theirs, ours):
        ema.step(student)
    assert torch.equal(ours.fp32_params["body.1.bias"], student.body[1].bias)
    assert torch.equal(ours.fp32_params["body.0.bias"], student.body[0].bias)
    for name, x in theirs.fp32_params.items():
        ours.fp32_params[name].copy_(x)
    student.body[0].weight = nn.Parameter(torch.randn(48, 64))
    for ema in (theirs, ours):
        ema.model.half()  # its averages stay float32, and are the teacher's memory no more
    step_both(student, theirs, ours)
    for ema in (theirs, ours):
        ema.restore({name: x + 1 for name, x in ema.fp32_params.items()}, True)
    step_both(student, theirs, ours)
    assert not patch.fallbacks()


@pytest.mark.parametrize(
    "convert",
    [
        lambda ema: ema.model.half(),
        lambda ema: setattr(ema.model.body[0].weight, "data", ema.model.body[0].weight.data.clone()),
    ],
)
def test_other_memory_in_the_same_parameters(convert):
    student, theirs, ours, patch = trio()
    step_both(student, theirs, ours)
    before = ours.model.body[0].weight
    for ema in (theirs, ours):
        convert(ema)
    assert ours.model.body[0].weight is before
    step_both(student, theirs, ours)
    assert not patch.fallbacks()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms_that_are_logged(dtype, monkeypatch):
    """Of what is averaged, as upstream takes them where apex has its function."""

    def norm(chunk_size, has_inf, tensors, per_tensor):
        return torch.stack([x.float().norm() for x in tensors[0]]).norm().reshape(1), None

    monkeypatch.setattr(ema_module, "multi_tensor_l2norm_available", True)
    monkeypatch.setattr(ema_module, "multi_tensor_l2norm", norm, raising=False)
    student, theirs, ours, patch = trio(dtype, log_norms=True)
    assert ours.logs == {}
    for _ in range(2):
        step_both(student, theirs, ours)
        assert ours.logs.keys() == theirs.logs.keys() == {"model_norm", "ema_norm"}
        for name, want in theirs.logs.items():
            torch.testing.assert_close(ours.logs[name], want)
    torch.testing.assert_close(ours.prev_model_norm, theirs.prev_model_norm)
    assert ours.prev_model_norm != ours.logs["model_norm"]
    assert not patch.fallbacks()


def test_missing_parameters_are_upstreams():
    student, theirs, ours, patch = trio()
    student.late = nn.Linear(3, 3)
    for _ in range(2):
        for ema in (theirs, ours):
            ema.step(student)
    assert "late.weight" in ours.fp32_params
    assert patch.fallbacks().total() == 1  # the first time: then it has them
    for name, want in theirs.fp32_params.items():
        torch.testing.assert_close(ours.fp32_params[name], want, rtol=1e-6, atol=0)


def test_averages_in_half_precision_are_upstreams():
    student, theirs, ours, patch = trio(torch.float16, ema_fp32=False)
    perturb(student)
    for ema in (theirs, ours):
        ema.step(student)
    for name, want in theirs.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], want)
    assert [reason for _, reason in patch.fallbacks()] == ["averages are kept in another dtype than float32"]


def test_without_masters():
    student, theirs, ours, patch = trio(ema_fp32=False)
    perturb(student)
    for ema in (theirs, ours):
        ema.step(student)
    for name, want in theirs.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], want, rtol=1e-6, atol=1e-7)
    assert not patch.fallbacks()


def test_other_shapes_are_refused_as_upstream_does():
    student, theirs, ours, _ = trio()
    student.body[0] = nn.Linear(32, 48)
    with pytest.raises(ValueError) as want:
        theirs.step(student)
    with pytest.raises(ValueError, match="incompatible tensor shapes") as got:
        ours.step(student)
    assert str(got.value) == str(want.value)


def test_strict():
    student, _, ours, patch = trio(torch.float16, ema_fp32=False)
    patch.revert()
    Patch("test").apply([Site("", ours, STEP)], Options(strict=True))
    with pytest.raises(PatchError, match="averages are kept in another dtype"):
        ours.step(student)


def test_copies_step_by_themselves():
    student, _, ours, _ = trio()
    ours.step(student)
    other = copy.deepcopy(ours)
    kept = {name: x.clone() for name, x in ours.fp32_params.items()}
    perturb(student)
    other.step(student)
    assert is_ours(other._step_internal)
    assert all(torch.equal(ours.fp32_params[name], x) for name, x in kept.items())
    assert not torch.equal(other.fp32_params["body.0.weight"], kept["body.0.weight"])
    assert torch.equal(other.fp32_params["body.0.weight"], other.model.body[0].weight)  # no memory in common any more


@pytest.mark.parametrize(("pair", "part"), [(speech_pair, ""), (text_pair, "encoder")])
def test_a_teacher_that_is_made_later(pair, part):
    model = pair()[0]
    owner = model.get_submodule(part)
    owner.ema = None
    before = {path: x.keys() for path, x in dictionaries(model).items()}
    patch = d2v_fast.patch(model)
    model.set_num_updates(0)
    assert is_ours(owner.ema._step_internal)
    model.set_num_updates(1)
    teacher = owner.ema
    patch.revert()
    assert not is_ours(teacher._step_internal)
    assert STATE not in teacher.__dict__
    owner.ema = None
    assert {path: x.keys() for path, x in dictionaries(model).items()} == before

"""The teacher against fairseq's own ``EMAModule`` over 50 steps.

Averages: fairseq computes ``e (1 - (1 - d)) + (1 - d) p`` with a rounding after each of its two steps, here it is
``e + (1 - d) (p - e)``. From the same state the two differ by at most one unit in the last place of the larger of the
old average and the parameter; copied parameters and buffers are equal bit for bit.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("fairseq_peer")

from fairseq.modules.ema_module import EMAModule, EMAModuleConfig

from d2v_fast.nn import EMATeacher
from d2v_fast.nn.config import EMAConfig
from d2v_fast.ops import adamw_ema_

STEPS = 50
SCHEDULE = EMAConfig(decay=0.99, end_decay=0.9999, anneal_updates=40)


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 48), nn.LayerNorm(48))
        self.pos_conv = nn.Conv1d(8, 8, 3)
        self.register_buffer("version", torch.tensor([3.0]))
        self.register_buffer("index", torch.arange(6))


def pair(dtype=torch.float32):
    torch.manual_seed(0)
    student = Student().to(dtype)
    skip = {name for name, _ in student.named_parameters() if name.startswith("pos_conv.")}
    theirs = EMAModule(student, EMAModuleConfig(ema_decay=0.99, ema_fp32=True), skip_keys=skip)
    return student, theirs, EMATeacher(student, SCHEDULE, skip=("pos_conv.",))


def move(student: nn.Module) -> None:
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.02 * torch.randn_like(p))


def last_places(ours: Tensor, theirs: Tensor, size: Tensor) -> float:
    """Largest difference in units of the last place of ``size``."""
    unit = torch.finfo(torch.float32).eps * torch.exp2(torch.floor(torch.log2(size.abs().clamp(min=1e-30))))
    return ((ours.double() - theirs.double()).abs() / unit).max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_step_from_the_same_state(dtype):
    student, theirs, ours = pair(dtype)
    worst, moved = 0.0, 0.0
    for update in range(1, STEPS + 1):
        move(student)
        ours.load_ema_state(theirs.fp32_params)
        before = {name: x.clone() for name, x in theirs.fp32_params.items()}
        theirs.set_decay(ours.update_(update))
        theirs.step(student)
        for name, p in student.named_parameters():
            mine, other = ours.ema_state()[name], theirs.fp32_params[name]
            if name.startswith("pos_conv."):
                assert torch.equal(mine, other), name
            else:
                worst = max(
                    worst, last_places(mine, other, torch.maximum(before[name].abs(), p.detach().abs().float()))
                )
                moved = max(moved, last_places(other, before[name], before[name]))
    assert worst <= 1.0 and moved > 100.0


def test_fifty_steps_on_end():
    """Independent runs drift apart by rounding only, by 3e-6 of the size of a tensor.

    In float32 fairseq's two factors do not add up to 1, so that every step shifts its average by up to 3e-8 of itself.
    """
    student, theirs, ours = pair()
    start = copy.deepcopy(theirs.fp32_params)
    for update in range(1, STEPS + 1):
        move(student)
        theirs.set_decay(ours.update_(update))
        theirs.step(student)
    for name, x in ours.ema_state().items():
        other = theirs.fp32_params[name]
        torch.testing.assert_close(x, other, rtol=0, atol=3e-6 * other.abs().max().item(), msg=name)
    assert not torch.allclose(start["body.0.weight"], theirs.fp32_params["body.0.weight"], atol=1e-3)


def test_state_goes_both_ways():
    student, theirs, ours = pair()
    move(student)
    theirs.step(student), ours.update_(1)
    state = ours.ema_state()
    assert state.keys() == theirs.fp32_params.keys()
    for name, x in theirs.fp32_params.items():
        assert state[name].dtype == x.dtype and state[name].shape == x.shape, name
    theirs.restore({name: x.clone() for name, x in state.items()}, build_fp32_params=True)
    assert all(torch.equal(x, state[name]) for name, x in theirs.fp32_params.items())
    move(student)
    theirs.step(student)
    ours.load_ema_state(theirs.fp32_params)
    assert all(torch.equal(x, theirs.fp32_params[name]) for name, x in ours.ema_state().items())


def test_optimizer_with_fairseqs_eps():
    """One call of adamw_ema_(eps_mode="fairseq") per step against fairseq's own Adam."""
    from fairseq.optim.adam import Adam

    torch.manual_seed(0)
    leaf = nn.Parameter(torch.randn(300))
    p, m, v, step = leaf.detach().clone(), torch.zeros(300), torch.zeros(300), torch.zeros(())
    adam = Adam([leaf], lr=1e-2, betas=(0.9, 0.98), eps=1e-2, weight_decay=0.1)
    for _ in range(20):
        leaf.grad = torch.randn(300)
        adamw_ema_(
            [p], [leaf.grad], [m], [v], step,
            lr=1e-2, betas=(0.9, 0.98), eps=1e-2, weight_decay=0.1, eps_mode="fairseq",
        )  # fmt: skip
        adam.step()
    torch.testing.assert_close(p, leaf.detach(), rtol=1e-6, atol=1e-6)

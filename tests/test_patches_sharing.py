"""Modules of ours on somebody else's parameters, and who forbids to leave theirs uncalled."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from d2v_fast.checkpoints.rules import Rule, pairs
from d2v_fast.patches._core import state_of
from d2v_fast.patches._sharing import Bypassed, Shared, bypassable, is_known, live_weight, plan_of, watched

KINDS = ("Linear", "LayerNorm", "Sequential", "Dropout", "Conv1d")


class Theirs(nn.Module):
    """Three projections and a norm."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self.tail = nn.Sequential(nn.LayerNorm(4), nn.Dropout(0.1))


class Ours(nn.Module):
    """The projections as one."""

    def __init__(self):
        super().__init__()
        self.qkv, self.norm = nn.Linear(4, 12), nn.LayerNorm(4)

    def forward(self, x):
        return torch.cat([nn.functional.linear(x, self.qkv.weight, self.qkv.bias), self.norm(x)], -1)


RULES = pairs("", "", {"qkv": ("q", "k", "v"), "norm": ("tail.0",)})


def shared(theirs: nn.Module) -> Shared:
    with torch.device("meta"):
        ours = Ours()
    return Shared(ours, theirs, RULES)


def expected(theirs: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([theirs.q(x), theirs.k(x), theirs.v(x), theirs.tail[0](x)], -1)


def test_the_same_parameters():
    theirs, x = Theirs(), torch.randn(3, 4)
    before = dict(theirs.named_parameters())
    ours = shared(theirs)
    torch.testing.assert_close(ours.module(x), expected(theirs, x))
    ours.module(x).pow(2).sum().backward()
    got = {name: p.grad.clone() for name, p in theirs.named_parameters()}
    theirs.zero_grad()
    expected(theirs, x).pow(2).sum().backward()
    for name, p in theirs.named_parameters():
        assert p is before[name]
        torch.testing.assert_close(got[name], p.grad)


def test_parameters_that_have_no_values_yet():
    theirs = Theirs().to("meta")
    ours = shared(theirs)
    theirs.to_empty(device="cpu").load_state_dict(Theirs().state_dict())
    x = torch.randn(3, 4)
    torch.testing.assert_close(ours.module(x), expected(theirs, x))


def test_follows_moves_loads_and_modes():
    theirs = Theirs()
    ours = shared(theirs)
    x = torch.randn(3, 4, dtype=torch.float64)
    theirs.double()
    torch.testing.assert_close(ours.module(x), expected(theirs, x))
    theirs.load_state_dict(Theirs().state_dict())
    torch.testing.assert_close(ours.module(x), expected(theirs, x))
    theirs.tail[0].weight = nn.Parameter(torch.randn(4, dtype=torch.float64))  # another object
    torch.testing.assert_close(ours.module(x), expected(theirs, x))
    theirs.eval()
    assert not ours.module.training


def test_rules_that_do_not_fit():
    with torch.device("meta"):
        ours = Ours()
    with pytest.raises(ValueError, match="no rule says where these are"):
        Shared(ours, Theirs(), pairs("", "", {"norm": ("tail.0",)}))
    with pytest.raises(KeyError, match="Theirs has no tensor"):
        Shared(ours, Theirs(), pairs("", "", {"norm": ("tail.7",)}))
    with pytest.raises(ValueError, match=r"qkv.weight has shape \(8, 4\), expected \(12, 4\)"):
        Shared(ours, Theirs(), [Rule("qkv.weight", ("q.weight", "k.weight"))])


def test_nothing_is_in_the_way():
    assert bypassable(Theirs(), KINDS) is None
    theirs = Theirs()
    theirs.register_forward_hook(print)  # the root is called as ever
    assert bypassable(theirs, KINDS) is None


@pytest.mark.parametrize("register", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_hooks_want_calls(register):
    theirs = Theirs()
    bypassed = Bypassed(theirs, KINDS)
    handle = getattr(theirs.tail[0], f"register_{register}")(lambda *args: None)
    assert bypassed.watched() == "tail.0 has hooks, which want to see it called"
    assert watched(theirs.tail[0]) == "has hooks, which want to see it called"
    handle.remove()
    assert bypassed.watched() is None is watched(theirs.tail[0])


def test_hooks_that_are_followed():
    theirs, mine = Theirs(), lambda *args: None
    theirs.q.register_forward_hook(mine)
    assert Bypassed(theirs, KINDS, followed=lambda hook: hook is mine).watched() is None
    theirs.q.register_forward_hook(print)
    assert Bypassed(theirs, KINDS, followed=lambda hook: hook is mine).watched().startswith("q has hooks")


def test_a_forward_of_somebody_else():
    theirs = Theirs()
    theirs.q.forward = lambda x: x
    assert bypassable(theirs, KINDS) == "q has another forward, by somebody else"


class Linear(nn.Module):
    """An adapter that is called like PyTorch's layer."""


def test_classes_by_name_and_by_module():
    theirs = Theirs()
    theirs.q = Linear()
    here = f"{Linear.__module__}.Linear"
    assert bypassable(theirs, KINDS) is None  # of the same package as the root: its own
    assert bypassable(nn.Sequential(theirs.q), KINDS) == "0 is a Linear"
    assert bypassable(nn.Sequential(theirs.q), (*KINDS, here)) is None
    assert is_known(Theirs, ("Theirs",)) and not is_known(Theirs, ("Ours",))
    assert bypassable(nn.Sequential(nn.Tanh()), KINDS) == "0 is a Tanh"
    quantised = type("Linear", (nn.Linear,), {"__module__": "torch.ao.nn.quantized"})
    assert bypassable(nn.Sequential(quantised(4, 4)), KINDS) == "0 is a Linear"


def test_what_changed():
    theirs = Theirs()
    bypassed = Bypassed(theirs, KINDS)
    assert bypassed.valid()
    theirs.tail.append(nn.Dropout(0.1))
    assert not bypassed.valid()
    del theirs.tail[2]
    assert bypassed.valid()
    theirs.q = nn.Linear(4, 4)
    assert not bypassed.valid()
    bypassed = Bypassed(theirs, KINDS)
    parametrizations.weight_norm(theirs.q)  # becomes of another class
    assert not bypassed.valid()
    assert bypassable(theirs, KINDS) == "q is a ParametrizedLinear"


def test_settings_that_changed():
    theirs = Theirs()
    bypassed = Bypassed(theirs, KINDS, settings=("eps", "in_features"))
    assert bypassed.valid()
    theirs.tail[0].eps = 0.1
    assert not bypassed.valid() and Bypassed(theirs, KINDS).valid()
    theirs.tail[0].eps, theirs.tail[1].p = 1e-5, 0.7
    assert bypassed.valid()
    del theirs.q.in_features
    assert not bypassed.valid()


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("norm", [weight_norm, parametrizations.weight_norm], ids=["hook", "parametrization"])
def test_weights_by_weight_norm(norm):
    root = nn.Sequential(nn.Conv1d(4, 4, 3))
    conv = norm(root[0], dim=2)
    assert bypassable(root, KINDS) is not None
    bypassed = Bypassed(root, KINDS, weight_norm=True)
    assert bypassed.misfit() is None and bypassed.watched() is None
    with torch.no_grad():
        for p in conv.parameters():
            p.mul_(1.5)
    x = torch.randn(1, 4, 5)
    got = nn.functional.conv1d(x, live_weight(conv), conv.bias)  # before the call, whose hook makes the weight
    torch.testing.assert_close(got, conv(x))
    got.sum().backward()
    assert all(p.grad is not None for p in conv.parameters())


def test_another_parametrization_is_a_misfit():
    root = nn.Sequential(nn.Conv1d(4, 4, 3))
    parametrizations.spectral_norm(root[0])
    assert Bypassed(root, KINDS, weight_norm=True).misfit() == "0 is a ParametrizedConv1d"


class Plan:
    """Counts how often it was made."""

    made = 0

    def __init__(self, owner):
        Plan.made += 1
        self.owner, self.child = owner, owner.q

    def valid(self):
        return self.owner.q is self.child


def test_plans_are_made_once_and_again():
    theirs, Plan.made = Theirs(), 0
    first = plan_of(theirs, "plan", Plan)
    assert plan_of(theirs, "plan", Plan) is first and Plan.made == 1
    theirs.q = nn.Linear(4, 4)
    assert plan_of(theirs, "plan", Plan) is not first and Plan.made == 2
    other = copy.deepcopy(theirs)
    assert plan_of(other, "plan", Plan).owner is other
    assert "plan" in state_of(theirs).cache


def test_plans_while_compiling():
    """What is made at the first call is not traced, and made again where a module was replaced."""
    theirs, Plan.made = Theirs(), 0

    def call(x):
        return x + plan_of(theirs, "plan", Plan).child.weight.sum()

    compiled, x = torch.compile(call, backend="eager", fullgraph=True), torch.randn(3)
    torch.testing.assert_close(compiled(x), x + theirs.q.weight.sum())
    theirs.q = nn.Linear(4, 4)
    torch.testing.assert_close(compiled(x), x + theirs.q.weight.sum())
    assert Plan.made == 2

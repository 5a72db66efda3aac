"""patches.compare: what differs is found and named, what does not is 0, and the user's model is left alone."""

import random
from dataclasses import dataclass
from math import inf
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy_patches as toy
from torch import nn

import d2v_fast.patches as patches
from d2v_fast.patches._compare import without_dropout
from d2v_fast.patches._core import Patch, PatchError, Seam, Site, fall_back
from d2v_fast.patches._differences import differences, leaves

X = torch.linspace(-1, 1, 8).reshape(2, 4)


def seam(attribute, make):
    return Seam("norms", attribute, make, "for the test")


def wrong_layer(original, options):
    def forward(self, x, scale=1.0):
        return original(self, x, scale) * 1.001

    return forward


def same(original, options):
    return lambda self, *args, **keys: original(self, *args, **keys)


@pytest.fixture
def with_seams(monkeypatch):
    """Make these seams of a :class:`toy.Toy`'s parts what patch() finds."""

    def install(**seams):
        def sites(model, patch, options):
            return [Site(path, model.get_submodule(path), each) for path, each in seams.items()]

        toy.install(monkeypatch, sites=sites)

    return install


class Reporting(toy.Toy):
    """Output of several kinds."""

    def __init__(self):
        super().__init__()
        self.layers.append(toy.Layer())
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        y = super().forward(x)
        return {"losses": {"a": y.square(), "b": y.abs().sum()}, "sample_size": 2, "states": (x, [y])}


Reporting.__name__ = "Toy"


def test_equal_paths_have_no_difference(with_seams):
    with_seams(**{"": seam("forward", same), "layers.0": seam("forward", same)})
    found = patches.compare(Reporting(), {"x": X})
    assert found.relative == 0 and found.first() is None
    names = {(d.what, d.name) for d in found.differences}
    for name in ("losses.a", "losses.b", "sample_size", "states.0", "states.1.0"):
        assert ("output", name) in names
    assert {("loss", "loss"), ("gradient", "layers.2.linear.bias"), ("state", "calls"), ("module", "layers.1")} <= names
    text = str(found)
    assert "of 6 outputs of modules that both called alike, all agree within 1e-04 (relative)" in text
    assert not found.both_upstream and "nothing was replaced" not in text


def test_a_difference_is_traced_to_its_module(with_seams):
    with_seams(**{"layers.1": seam("forward", wrong_layer)})
    found = patches.compare(Reporting(), (X,))
    assert found.first().name == "layers.1" and found.first().relative == pytest.approx(1e-3, rel=1e-3)
    assert found.first(1e-2) is None
    assert found.worst("gradient")[0].relative > 5e-4 and found.relative > 5e-4
    assert found.worst("state")[0].relative == 0
    text = str(found)
    assert "the first that differs is layers.1\n" in text and "1 x layers.* Lazy.forward" in text


def test_rows_left_out_and_losses_summed_are_no_difference(with_seams):
    def fewer(original, options):
        def forward(self, x):
            full = original(self, x)
            self.layers[0](x[:1])
            return full | {"losses": {name: x.sum() for name, x in full["losses"].items()}}

        return forward

    with_seams(**{"": seam("forward", fewer)})
    found = patches.compare(Reporting(), X)
    assert found.relative == 0 and found.first() is None

    def short(original, options):
        return lambda self, x, scale=1.0: original(self, x[:1], scale).expand(2, 4)

    with_seams(**{"layers.0": seam("forward", short)})
    names = {d.name for d in patches.compare(Reporting(), X).differences if d.what == "module"}
    assert "layers.0" in names and "layers.0.linear" not in names


def test_the_first_difference_is_before_what_was_changed_in_place(with_seams):
    class Changing(toy.Toy):
        def forward(self, x):
            x = self.layers[0](x)
            y = self.layers[1](x)
            with torch.no_grad():
                x.mul_(y.mean())
            return y

    Changing.__name__ = "Toy"
    with_seams(**{"layers.1": seam("forward", wrong_layer)})
    assert patches.compare(Changing().requires_grad_(False), X).first().name == "layers.1"


def test_gradients_that_the_model_has_do_not_count(with_seams):
    with_seams(**{"layers.0": seam("forward", same)})
    model = toy.Toy()
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    found = patches.compare(model, X)
    assert found.relative == 0 and all(0 < d.norm < inf for d in found.worst("gradient"))


def test_weights_that_a_hook_computes(with_seams):
    with_seams(**{"layers.0": seam("forward", same)})
    model = toy.Toy()
    nn.utils.weight_norm(model.layers[0].linear)
    model(X)
    assert patches.compare(model, X).relative == 0


def test_the_model_is_left_alone(with_seams):
    with_seams(**{"layers.1": seam("forward", wrong_layer)})
    model = Reporting()
    batch = {"x": X.clone()}
    batch["x"].requires_grad_()
    states = torch.get_rng_state(), np.random.get_state()[1], random.getstate(), np.random.default_rng
    patch = patches.patch(model)
    before = toy.snapshot(model)
    found = patches.compare(model, batch)
    assert found.relative > 5e-4, "the upstream side of a patched model is upstream's"
    assert toy.snapshot(model) == before and model.calls == 0
    assert all(p.grad is None for p in (*model.parameters(), batch["x"]))
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate(), np.random.default_rng
    assert torch.equal(states[0], after[0]) and np.array_equal(states[1], after[1]) and states[2:] == after[2:]
    patch.revert()


def test_both_paths_draw_the_same(with_seams):
    class Drawing(toy.Toy):
        def forward(self, x):
            torch.nn.functional.dropout(x)
            keep = np.random.default_rng().random() + np.random.rand() + random.random()
            return {"loss": (super().forward(nn.functional.dropout(x)) * keep).sum()}

    Drawing.__name__ = "Toy"
    with_seams(**{"layers.0": seam("forward", same)})
    first, again, other = (patches.compare(Drawing(), (X,), seed=seed, dropout=True) for seed in (0, 0, 1))
    assert first.relative == again.relative == other.relative == 0


def test_rates_of_dropout_are_0_in_the_copies(with_seams):
    with_seams(**{"layers.0": seam("forward", same)})
    model = toy.Toy()
    model.layers[0].dropout = nn.Dropout(0.5)
    model.layers[0].layerdrop = 0.5
    model.config = SimpleNamespace(hidden_dropout=0.5, hidden=0.5)
    model.cfg = {"dropout": 0.5}
    seen = []
    patches.compare(model, X, call=lambda model, x: seen.append(model) or model(x))
    for each in seen:
        assert (each.layers[0].dropout.p, each.layers[0].layerdrop) == (0, 0)
        assert (each.config.hidden_dropout, each.config.hidden) == (0, 0.5)
    assert (model.layers[0].dropout.p, model.layers[0].layerdrop, model.config.hidden_dropout) == (0.5, 0.5, 0.5)
    module = type("DropPath", (nn.Module,), {})()
    module.drop_prob = 0.3
    without_dropout(module)
    assert module.drop_prob == 0


@dataclass
class Output:
    loss: torch.Tensor | None
    hidden: torch.Tensor


@pytest.mark.parametrize(
    ("wrap", "has_loss"),
    [
        (lambda y: Output(y.sum(), y), True),
        (lambda y: {"loss": y.mean()}, True),
        (lambda y: y.sum(), True),
        (lambda y: Output(None, y), False),
        (lambda y: (y, [y.detach()]), False),
    ],
)
def test_loss_of_every_kind_of_output(with_seams, wrap, has_loss):
    with_seams(**{"layers.1": seam("forward", wrong_layer)})
    found = patches.compare(toy.Toy(), X, call=lambda model, x: wrap(model(x)))
    assert bool(found.worst("loss")) == has_loss
    gradients = {d.name: d.norm for d in found.worst("gradient")}
    assert len(gradients) == 4 and all(norm > 0 for norm in gradients.values())


def test_models_without_gradients(with_seams):
    with_seams(**{"layers.1": seam("forward", wrong_layer)})
    found = patches.compare(toy.Toy().requires_grad_(False), X)
    assert found.worst("output")[0].relative == pytest.approx(1e-3, rel=1e-3)
    assert all(d.relative == 0 for d in found.worst("gradient"))


def test_fairseq_s_samples_and_teachers_outside_of_the_modules(with_seams):
    model = Reporting()
    model.ema = SimpleNamespace(model=nn.Linear(4, 4))
    with_seams(**{"layers.0": seam("forward", same)})
    found = patches.compare(
        model, {"net_input": {"x": X}}, call=lambda m, b: m.ema.model(m(**b["net_input"])["states"][0])
    )
    assert "ema.model" in {d.name for d in found.differences if d.what == "module"}


def test_models_patched_at_their_class_are_refused(with_seams):
    with_seams()
    with (
        Patch("classes").apply([Site("", toy.Layer, toy.DOUBLE)], patches.Options()),
        pytest.raises(PatchError, match=r"Layer, Lazy: patched at the class by patch_all\(\); revert that to compare"),
    ):
        patches.compare(toy.Toy(), X)


def test_switches_reach_the_patch(with_seams):
    with_seams(**{"layers.0": seam("forward", wrong_layer)})
    found = patches.compare(toy.Toy(), X, norms=False)
    assert found.relative == 0 and found.both_upstream
    assert str(found).startswith(
        "nothing was replaced: both ran as upstream wrote them, so this comparison shows nothing"
    )
    with pytest.raises(TypeError, match="'nroms' is no switch"):
        patches.compare(toy.Toy(), X, nroms=False)


def test_a_disabled_patch_shows_nothing(with_seams, monkeypatch):
    with_seams(**{"layers.0": seam("forward", wrong_layer)})
    monkeypatch.setenv("D2V_FAST_DISABLE", "1")
    found = patches.compare(toy.Toy(), X)
    lines = str(found).splitlines()
    assert found.both_upstream and lines[0].startswith("nothing was replaced: ") and "D2V_FAST_DISABLE=1" in lines[-1]


def test_a_patch_that_computed_nothing_shows_nothing(with_seams):
    def leave(original, options):
        def forward(self, x, scale=1.0):
            fall_back(self, "forward", "for the test", options)
            return original(self, x, scale)

        return forward

    with_seams(**{"layers.0": seam("forward", leave)})
    found = patches.compare(toy.Toy(), X)
    assert found.both_upstream and str(found).startswith("every call went to the original method: both ran as upstream")
    with_seams(**{"layers.0": seam("forward", wrong_layer)})
    found = patches.compare(toy.Toy(), X, call=lambda model, x: model.layers[1](x))
    assert found.both_upstream and str(found).startswith("nothing that was replaced was called: both ran as upstream")
    with_seams(**{"layers.0": seam("forward", leave), "layers.1": seam("forward", same)})
    assert not patches.compare(toy.Toy(), X).both_upstream


@pytest.mark.parametrize("whole", [1, 0])
def test_parts_left_to_upstream_are_no_calls_left(with_seams, whole):
    """As many reasons as calls, or more, though ours computed some."""

    def partly(original, options):
        def forward(self, x, scale=1.0):
            for reason in ("the draws", "the norm"):
                fall_back(self, "forward", reason, options, whole=False)
            return original(self, x, scale) * 1.001

        return forward

    def leave(original, options):
        def forward(self, x, scale=1.0):
            fall_back(self, "forward", "for the test", options)
            return original(self, x, scale)

        return forward

    with_seams(**{"layers.0": seam("forward", partly), "layers.1": seam("forward", leave if whole else partly)})
    found = patches.compare(toy.Toy(), X)
    assert (found.patch.calls, found.patch.calls_left) == (2, whole)
    assert not found.both_upstream and "every call" not in str(found) and found.first().name == "layers.0"


def test_no_module_that_both_called(with_seams):
    """No success: nothing inside was looked at."""

    def direct(original, options):
        return lambda self, x: x * 2

    with_seams(**{"": seam("forward", direct)})
    found = patches.compare(toy.Toy(), X)
    assert found.first() is None and not found.both_upstream
    text = str(found)
    assert "no module was called by both with an output of the same shape: nothing inside was compared" in text
    assert "agree" not in text


def test_differences_of_two_tensors():
    nan, big = float("nan"), float("inf")

    def one(a, b, floor=0.0):
        (found,) = differences("output", {"x": a}, {"x": b}, floor)
        return found

    x = torch.tensor([3.0, 4.0])
    assert (one(x, x).relative, one(x, x).norm) == (0, 5)
    assert (one(x, x + 0.5).relative, one(x, x + 0.5).largest) == (pytest.approx(0.5**0.5 / 5), 0.5)
    assert one(torch.zeros(2), torch.zeros(2)).relative == 0 and one(torch.zeros(2), x).relative == inf
    assert one(torch.tensor([nan, big, 1.0]), torch.tensor([nan, big, 1.0])).relative == 0
    assert one(torch.tensor([nan, 1.0]), torch.tensor([nan, 2.0])).relative == 1
    assert one(torch.tensor([1.0, 1.0]), torch.tensor([nan, 1.0])).note == "not finite in one of them"
    assert one(x, x[:1]).note == "shape [1], upstream [2]"
    assert (one(x, None).note, one(None, x).note, one(None, None).relative) == ("ours has none", "upstream has none", 0)
    assert one(x.bfloat16(), x).relative == 0 and one(torch.zeros(0), torch.zeros(0)).relative == 0
    small = {"a": torch.tensor([1e-9]), "b": torch.tensor([1.0])}
    rounding = {"a": torch.tensor([2e-9]), "b": torch.tensor([1.0])}
    assert next(d.relative for d in differences("gradient", small, rounding, 1e-3)) == pytest.approx(1e-6, rel=1e-3)
    nested = {"a": [x, {"b": 1.5}], "c": Output(None, x), "d": "text"}
    assert [name for name, _ in leaves(nested)] == ["a.0", "a.1.b", "c.hidden"]


def test_fairseq_s_speech_model():
    pytest.importorskip("fairseq", reason="needs ve-fairseq (requirements/peers.txt)")
    from fairseq_pairs import speech_pair

    torch.manual_seed(0)
    model, _ = speech_pair()
    model.train().set_num_updates(1)
    found = patches.compare(model, {"net_input": {"source": torch.randn(2, 4000)}})
    assert found.relative < 2e-5, found
    assert found.worst("loss")[0].norm > 0 and len(found.patch.applied) > 5 and not found.patch.fallbacks()

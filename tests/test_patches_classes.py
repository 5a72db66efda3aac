"""Methods replaced at classes, beside instances, and how calls are counted: ours, and those left to the original."""

import copy
import logging
import pickle

import pytest
import torch
import toy_patches as toy
from toy_patches import X, doubled, inner_seam, patched, two_layers

from d2v_fast.patches._core import STATE, Options, Patch, PatchError, Seam, Site, fall_back, state_of


@pytest.fixture
def model():
    return toy.make()


def test_static_methods_at_classes_and_instances(model):
    at_class = Patch("classes").apply([Site("", toy.Toy, toy.SPREAD)], Options())
    assert toy.Toy.spread(X) == 20 and model.spread(X) == 20
    at_class.revert()
    assert toy.Toy.spread(X) == 2 and isinstance(toy.Toy.__dict__["spread"], staticmethod)


def test_class_and_instance_in_either_order(model):
    classes = [Site("", kind, toy.DOUBLE) for kind in (toy.Layer, toy.Lazy)]
    before = toy.snapshot(model)
    at_class = Patch("classes").apply(classes, Options())
    assert doubled(model), "Lazy inherits a method that was replaced, and is doubled once"
    at_instance = patched(model)
    assert not at_instance.applied and doubled(model)
    at_class.revert()
    assert "forward" not in vars(toy.Lazy) and torch.equal(model(X), two_layers(model))
    at_instance = patched(model)
    at_class = Patch("classes").apply(classes, Options())
    assert doubled(model)
    at_instance.revert()
    assert doubled(model)
    at_class.revert()
    assert torch.equal(model(X), two_layers(model)) and toy.snapshot(model) == before


def test_state_of_an_instance_goes_with_the_last_patch(model):
    before = toy.snapshot(model)
    at_instance = patched(model)
    at_class = Patch("classes").apply([Site("", toy.Layer, toy.DOUBLE)], Options())
    at_instance.revert()
    at_class.revert()
    assert toy.snapshot(model) == before


def test_states_of_a_class_go_with_its_patch(model):
    before = toy.snapshot(model)
    patch = Patch("classes").apply([Site("", toy.Layer, toy.DOUBLE)], Options())
    model(X)
    model(X[:1])
    copied = copy.deepcopy(model)
    assert state_of(copied.layers[0]).cache == {} and state_of(model.layers[0]).cache
    assert patch.fallbacks() == {("Layer.forward", "a single row"): 1, ("Lazy.forward", "a single row"): 1}
    assert b"d2v_fast" not in pickle.dumps(model).replace(STATE.encode(), b"")
    patch.revert()
    assert toy.snapshot(model) == before
    assert all(STATE not in module.__dict__ for module in copied.modules())
    assert patch.fallbacks()["Layer.forward", "a single row"] == 1, "the record stays"


# calls that ours leaves to the original


def test_fallbacks_are_counted_and_logged_once(model, caplog):
    patch = patched(model)
    for _ in range(3):
        assert torch.equal(model(X[:1]), two_layers(model, X[:1]))
    assert patch.fallbacks() == {("Layer.forward", "a single row"): 3, ("Lazy.forward", "a single row"): 3}
    told = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert told == [f"{kind}.forward runs as upstream wrote it: a single row" for kind in ("Layer", "Lazy")]
    patch.revert()
    patched(model, strict=True)
    with pytest.raises(PatchError, match=r"strict=True: Layer\.forward would run as upstream wrote it: a single row"):
        model(X[:1])


@pytest.mark.parametrize("at_class", [False, True])
def test_parts_of_calls_are_told_from_whole_calls(caplog, at_class):
    def make(original, options):
        def forward(self, x, scale=1.0):
            fall_back(self, "forward", "the draws", options, whole=False)
            if len(x) == 1:
                fall_back(self, "forward", "a single row", options)
                return original(self, x, scale)
            return original(self, x, scale) * 2

        return forward

    kind = type("Layer", (toy.Layer,), {})
    layer = kind()
    seam = Seam("norms", "forward", make, "for the test")
    patch = Patch("toy").apply([Site("", kind if at_class else layer, seam)], Options())
    for each in (layer, layer if at_class else copy.deepcopy(layer)):
        each(X[:1]), each(X)
    for _ in range(2):
        draws, row = ("Layer.forward", "the draws"), ("Layer.forward", "a single row")
        assert patch.fallbacks() == {draws: 4, row: 2} and patch.partial_fallbacks() == {draws: 4}
        assert (patch.calls, patch.calls_left) == (4, 2)
        lines = [" ".join(line.split()) for line in str(patch).splitlines()[2:]]
        expected = ["2 x Layer.forward of calls a single row", "4 x Layer.forward in part the draws"]
        assert lines == [f"upstream {line}" for line in expected]
        patch.revert()
    told = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    runs = ("runs in part as upstream wrote it: the draws", "runs as upstream wrote it: a single row")
    assert told == [f"Layer.forward {how}" for how in runs]
    message = r"strict=True: Layer\.forward would run in part as upstream wrote it: the draws"
    with (
        Patch("toy").apply([Site("", layer, seam)], Options(strict=True)),
        pytest.raises(PatchError, match=message),
    ):
        layer(X)


def test_calls_are_counted_wherever_they_come_from(model):
    patch = patched(model, toy.SPREAD)
    assert patch.calls == 0
    model(X)
    copied = copy.deepcopy(model)
    copied.layers[0](X)
    copied.spread(X)
    assert patch.calls == 4
    with pytest.raises(TypeError):
        model.layers[1](None)
    assert patch.calls == 5, "a call that fails was a call"
    patch.revert()
    model(X)
    copied(X)
    assert patch.calls == 5
    with Patch("classes").apply([Site("", toy.Layer, toy.DOUBLE), Site("", toy.Toy, toy.SPREAD)], Options()) as patch:
        model(X)
        toy.Toy.spread(X)
        assert patch.calls == 3, "subclasses inherit ours"


def test_classes_are_not_asked_whether_ours_fits(model):
    """Instances may differ; ``refuses`` looks at one."""
    seam = inner_seam("forward", refuses=lambda owner: f"{owner.counter.shape} is odd")
    with Patch("classes").apply([Site("", toy.Toy, seam)], Options(strict=True)) as patch:
        assert patch.applied and torch.equal(model(X), two_layers(model) + 1)
    assert "is odd" in Patch("toy").apply([Site("", model, seam)], Options()).skipped[0].reason

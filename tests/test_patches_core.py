"""Swapping methods: all or nothing, and taken back without a trace."""

import copy
import functools
import inspect
from types import MethodType

import pytest
import torch
import toy_patches as toy
from toy_patches import X, doubled, inner_seam, patched, two_layers

from d2v_fast.patches._core import STATE, Options, Patch, PatchError, Seam, Site, is_ours, state_of
from d2v_fast.patches._fingerprint import fingerprint


@pytest.fixture
def model():
    return toy.make()


def test_swap_and_revert_leave_no_trace(model):
    before, keys = toy.snapshot(model), list(model.state_dict())
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    with patched(model, toy.SPREAD) as patch:
        assert doubled(model) and model.spread(X) == 20
        assert list(model.state_dict()) == keys
        assert [name for name, _ in (*model.named_parameters(), *model.named_buffers())] == names
        assert [site.name for site in patch.applied] == [
            "layers.0 Layer.forward",
            "layers.1 Lazy.forward",
            "Toy.spread",
        ]
    assert toy.snapshot(model) == before
    assert torch.equal(model(X), two_layers(model)) and model.spread(X) == 2
    patch.revert()
    assert patch.reverted and toy.snapshot(model) == before


def test_again_changes_nothing(model, caplog):
    first = patched(model)
    inside = toy.snapshot(model)
    second = patched(model)
    assert not second.applied and {s.reason for s in second.skipped} == {"already replaced"}
    second.revert()
    assert toy.snapshot(model) == inside and doubled(model)
    assert "its own handle takes it back" in caplog.text
    caplog.clear()
    first.revert()
    assert not caplog.text


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_patches_of_one_object_come_off_in_either_order(model, order):
    before = toy.snapshot(model)
    both = [Patch("a").apply([Site("", model, seam)], Options()) for seam in (toy.SPREAD, inner_seam("forward"))]
    copied = copy.deepcopy(model)
    both[order[0]].revert()
    assert state_of(model) is model.__dict__[STATE]
    both[order[1]].revert()
    for each in (model, copied):
        assert [set(inside) for inside in toy.snapshot(each)] == [set(inside) for inside in before]
    assert toy.snapshot(model) == before


def test_a_patch_that_was_taken_back_counts_no_more(model):
    first = patched(model)
    second = Patch("b").apply([Site("layers.0", model.layers[0], inner_seam("extra_repr"))], Options())
    copied = copy.deepcopy(model)
    copied(X[:1])
    counts = first.fallbacks()
    assert counts == {("Layer.forward", "a single row"): 1, ("Lazy.forward", "a single row"): 1}
    first.revert()
    assert first.fallbacks() == counts
    second_copy = copy.deepcopy(model)
    assert second_copy.layers[0].extra_repr.__self__ is second_copy.layers[0]
    state_of(second_copy.layers[0]).fallbacks["extra_repr", "none"] += 1
    assert first.fallbacks() == counts and second.fallbacks()["Layer.extra_repr", "none"] == 1
    second.revert()
    assert "extra_repr" not in second_copy.layers[0].__dict__


def test_signature_is_the_original_s(model):
    forward = inspect.signature(model.layers[0].forward)
    with Patch("toy").apply([Site("", model.layers[0], inner_seam("forward"))], Options()):
        ours = model.layers[0].forward
        assert inspect.signature(ours) == forward and ours.__name__ == "forward"
        assert not hasattr(ours, "__wrapped__"), "somebody who unwraps would strip ours off"


@pytest.mark.parametrize(
    ("seam", "reason"),
    [
        (inner_seam("nothing"), "there is no such method"),
        (inner_seam("depth"), "it is a property, not a method"),
        (inner_seam("build"), "it is a classmethod, not a method"),
        (inner_seam("forward", known=frozenset({"0" * 16})), "its source is not one that ours was written from"),
        (inner_seam("forward", refuses=lambda owner: f"{type(owner).__name__} is odd"), "Toy is odd"),
    ],
)
def test_skipped_with_its_reason(model, seam, reason, caplog):
    before = toy.snapshot(model)
    patch = patched(model, seam)
    assert len(patch.applied) == 2 and reason in patch.skipped[0].reason and reason in caplog.text
    patch.revert()
    with pytest.raises(PatchError, match=f"strict=True: Toy.{seam.attribute}: .*{reason}"):
        patched(model, seam, strict=True)
    assert toy.snapshot(model) == before


def test_foreign_replacement_stays(model):
    model.forward = MethodType(lambda self, x: x, model)
    patch = patched(model, inner_seam("forward"))
    assert "somebody else replaced it already" in patch.skipped[0].reason and torch.equal(model(X), X)


def test_an_object_that_is_copied_its_own_way_stays(model):
    model.layers[0].__dict__["__deepcopy__"] = lambda memo: "mine"
    patch = patched(model)
    assert "this object has a __deepcopy__ of its own" in patch.skipped[0].reason and len(patch.applied) == 1
    patch.revert()
    assert copy.deepcopy(model.layers[0]) == "mine"


def test_fingerprint_follows_the_source():
    assert fingerprint(toy.Layer.forward) == fingerprint(toy.Lazy().forward) != fingerprint(toy.Toy.forward)
    assert fingerprint(toy.Toy.__dict__["spread"]) == fingerprint(toy.Toy.spread)
    assert fingerprint(len) == "unknown"


@pytest.mark.parametrize("where", ["refuses", "make", "prepare"])
def test_nothing_is_half_patched_after_an_error(model, where):
    def broken(*args):
        raise OSError(where)

    before = toy.snapshot(model)
    keys = {where: broken}
    make = keys.pop("make", None)
    seam = Seam("loss", "forward", make or toy.make_double, "never", **keys)
    patch = Patch("toy").apply([Site("", model, toy.SPREAD)], Options())
    with pytest.raises(OSError, match=where):
        patch.apply(toy.sites(model, seam), Options())
    assert len(patch.applied) == 1 and model.spread(X) == 20, "what an earlier apply() did stays"
    patch.revert()
    assert toy.snapshot(model) == before


def test_nothing_is_half_patched_after_an_error_in_a_swap(model):
    before = toy.snapshot(model)
    with pytest.raises(TypeError, match="immutable"):
        Patch("toy").apply([*toy.sites(model), Site("", int, inner_seam("bit_length"))], Options())
    assert toy.snapshot(model) == before


def test_make_that_returns_the_original_is_an_error(model):
    with pytest.raises(TypeError, match=r"seam at Toy.forward returned the original"):
        patched(model, Seam("loss", "forward", lambda original, options: original, "nothing"))
    assert not is_ours(toy.Toy.forward)


def test_one_object_in_two_places(model):
    model.layers[1] = model.layers[0]
    patch = patched(model)
    assert [s.reason for s in patch.skipped] == ["the same object as layers.0 Layer.forward"] and doubled(model)
    patch.revert()
    assert torch.equal(model(X), two_layers(model))


def test_revert_under_somebody_else_changes_nothing(model):
    patch = patched(model)
    ours = model.layers[0].forward
    model.layers[0].forward = functools.wraps(ours)(lambda x: ours(x))
    with pytest.raises(PatchError, match=r"layers.0 Layer.forward was replaced by .*: take that back first"):
        patch.revert()
    assert doubled(model)
    model.layers[0].__dict__["forward"] = ours
    patch.revert()
    assert torch.equal(model(X), two_layers(model))
    patch = patched(model)
    del model.layers[1].forward
    with pytest.raises(PatchError, match=r"layers.1 Lazy.forward was removed"):
        patch.revert()


def test_no_patch_during_a_capture(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    before = toy.snapshot(model)
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        patched(model)
    assert toy.snapshot(model) == before

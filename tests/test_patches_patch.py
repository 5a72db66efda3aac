"""d2v_fast.patch: models it finds and refuses, its switches, its report."""

import logging

import pytest
import torch
import toy_patches as toy
from torch import nn
from toy_patches import X, doubled, inner_seam

import d2v_fast.patches as patches
from d2v_fast.patches._core import PatchError, Site


@pytest.fixture
def model():
    return toy.make()


def test_patch_finds_the_model_and_parts(model, monkeypatch):
    toy.install(monkeypatch)
    with patches.patch(model) as patch:
        assert doubled(model) and len(patch.applied) == 3 and repr(patch).startswith("<d2v_fast on Toy: 3 replaced")
    outer = nn.ModuleDict({"student": nn.Sequential(model), "head": nn.Linear(4, 4)})
    with patches.patch(outer) as patch:
        assert [s.path for s in patch.applied] == ["student.0.layers.0", "student.0.layers.1", "student.0"]
    with patches.patch(nn.DataParallel(model)) as patch:
        assert len(patch.applied) == 3


def test_patch_takes_a_teacher(model, monkeypatch):
    teacher = toy.Toy()
    toy.install(monkeypatch)
    with patches.patch(model, teacher=teacher) as patch:
        assert [s.path for s in patch.applied[3:]] == ["teacher.layers.0", "teacher.layers.1", "teacher"]
    with pytest.raises(PatchError, match="teacher must be of a supported class as model is, got Linear"):
        patches.patch(model, teacher=nn.Linear(2, 2))
    seen = []
    toy.install(monkeypatch, TAKES_TEACHER=True, sites=lambda model, patch, options: seen.append(options.teacher) or [])
    patches.patch(model, teacher=teacher)
    assert seen == [teacher]


def test_switches(model, monkeypatch):
    toy.install(monkeypatch)
    patch = patches.patch(model, norms=False, strict=True)
    assert [s.seam.part for s in patch.applied] == ["metrics"]
    assert {s.reason for s in patch.skipped} == {"norms=False"}
    with pytest.raises(
        TypeError, match=r"'nroms' is no switch \(nearest: norms\); switches are ema, loss, .*; and strict"
    ):
        patches.patch(model, nroms=False)
    with pytest.raises(TypeError, match=r"'flash' is no switch; switches are"):
        patches.patch(model, flash=True)
    for name, value in (("encoder", "no"), ("masks", 0), ("strict", "yes"), ("ema", None)):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got {value!r} \\({type(value).__name__}"):
            patches.patch(model, **{name: value})


def test_a_seam_of_two_parts_needs_both(model, monkeypatch):
    both = inner_seam("forward", also=frozenset({"targets"}))
    toy.install(monkeypatch, sites=lambda model, patch, options: [Site("", model, both)])
    for off, reason in (({"loss": False}, "loss=False"), ({"targets": False}, "targets=False")):
        patch = patches.patch(model, strict=True, **off)
        assert not patch.applied and [s.reason for s in patch.skipped] == [reason]
    assert patches.patch(model, loss=False, targets=False).skipped[0].reason == "loss=False, targets=False"
    assert patches.patch(model, masks=False).applied


@pytest.mark.parametrize(
    ("model", "got"), [(nn.Linear(2, 2), "Linear"), ("toy", "str"), (toy.Toy, r"the class Toy; patch_all\(\)")]
)
def test_unknown_models_are_told_what_is_supported(model, got, monkeypatch):
    toy.install(monkeypatch, SUPPORTED=("Toy", "Other"), matches=lambda model: False)
    with pytest.raises(PatchError, match=f"model must be one of Toy, Other, or have one .*, got {got}"):
        patches.patch(model)


def test_wrappers_that_come_after_the_patch(model, monkeypatch):
    toy.install(monkeypatch)
    with pytest.raises(PatchError, match=r"went through torch\.compile already: patch it before that"):
        patches.patch(torch.compile(model, backend="aot_eager"))
    itself = toy.Toy()
    itself.compile(backend="aot_eager")
    with pytest.raises(PatchError, match=r"went through its own compile\(\) already"):
        patches.patch(itself)
    sharded = type("FSDPToy", (type("FSDPModule", (), {}), toy.Toy), {})()
    with pytest.raises(PatchError, match="went through FSDP already"):
        patches.patch(sharded)


def test_disabled_is_a_logged_no_op(model, monkeypatch, caplog):
    toy.install(monkeypatch)
    monkeypatch.setenv("D2V_FAST_DISABLE", "1")
    before = toy.snapshot(model)
    patch = patches.patch(model, strict=True)
    assert toy.snapshot(model) == before and "D2V_FAST_DISABLE=1: Toy stays as it is" in caplog.text
    assert not patch.applied and patch.skipped[0].reason == "D2V_FAST_DISABLE=1"


REPORT = """\
d2v_fast on Toy: 3 replaced, 2 left as they were
  replaced    2 x layers.* Layer.forward  norms      twice as much  3 calls
  replaced    1 x Toy.spread              metrics    ten times as much  never called
  left        1 x Toy.nothing             loss       there is no such method in this version
  left        1 x Toy.forward             loss       loss=False
  upstream    2 x Layer.forward           of calls   a single row"""


TAKEN_BACK = """\
d2v_fast on Toy, taken back: 3 were replaced, 2 left as they were
  was replaced    2 x layers.* Layer.forward  norms      twice as much  3 calls
  was replaced    1 x Toy.spread              metrics    ten times as much  1 call
  left            1 x Toy.nothing             loss       there is no such method in this version
  left            1 x Toy.forward             loss       loss=False
  upstream        2 x Layer.forward           of calls   a single row"""


def test_report(model, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "d2v_fast.patches")
    model.layers[1] = toy.Layer()
    seams = (toy.SPREAD, inner_seam("nothing"))
    both = lambda model, patch, options: toy.sites(model, *seams)  # noqa: E731
    toy.install(monkeypatch, sites=both)
    patch = patches.patch(model)
    assert "twice as much" in caplog.text and "called" not in caplog.text, "nothing can have been called yet"
    patch.skip("Toy.forward", "loss", "loss=False", harmless=True)
    model(X[:1])
    model.layers[0](X)
    assert str(patch) == REPORT
    model.spread(X)
    patch.revert()
    model(X)
    assert str(patch) == TAKEN_BACK and repr(patch) == f"<{TAKEN_BACK.splitlines()[0]}>"

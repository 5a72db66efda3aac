"""fairseq's ``Data2VecAudioModel`` patched: what is left to upstream, and what stays when it is taken back."""

import copy

import pytest
import torch
from parity import relative

pytest.importorskip("fairseq_peer")

from fairseq_peer import audio as upstream
from patched import dictionaries, perturb, same_as_upstream
from patched_audio import assert_same, batch, pair, run, upstreams

import d2v_fast
from d2v_fast.patches import PatchError
from d2v_fast.patches._core import Options, Patch, Site, is_ours
from d2v_fast.patches.fairseq import audio


def test_revert_leaves_nothing(monkeypatch):
    model = upstreams()
    want, grads = run(model, monkeypatch, batch(7))
    before = dictionaries(model), dictionaries(model.ema.model), set(model.ema.__dict__)
    with d2v_fast.patch(model):
        run(model, monkeypatch, batch(7, padded=True))
        assert set(model.ema.__dict__) != before[2]
    assert (dictionaries(model), dictionaries(model.ema.model), set(model.ema.__dict__)) == before
    got, again = run(model, monkeypatch, batch(7))
    assert torch.equal(got["losses"]["regression"], want["losses"]["regression"])
    assert all(torch.equal(x, grads[name]) for name, x in again.items())


def test_deep_copies_are_patched(monkeypatch):
    theirs, ours, patch = pair()
    run(ours, monkeypatch, batch(8))
    copied = copy.deepcopy(ours)
    assert is_ours(copied.forward)
    assert is_ours(copied.ema._step_internal)
    perturb(ours)  # the copy has parameters of its own
    assert_same(theirs, copied, monkeypatch, batch(9))
    patch.revert()
    assert not is_ours(copied.forward)
    assert not is_ours(copied.ema._step_internal)


def test_features_for_other_uses_are_upstreams():
    theirs, ours, patch = pair()
    want = theirs.extract_features(batch()["source"], None)
    got = ours.extract_features(batch()["source"], None)
    assert relative(got["x"], want["x"]) < 1e-5
    assert len(got["layer_results"]) == len(want["layer_results"])
    assert not patch.fallbacks()


@pytest.mark.parametrize(
    ("norm", "options", "call", "reason"),
    [
        ("none", {"group_norm_target_layer": True}, {}, "targets are normalised by group_norm_target_layer"),
        ("instance", {"layer_norm_target_layer": True}, {}, "instance_norm_target_layer and layer_norm_target_layer"),
        ("layer", {"instance_norm_targets": True}, {}, "a norm over the batch"),
        ("instance", {}, {"layer": 1}, "the output of a layer"),
    ],
)
def test_what_is_left_to_upstream(norm, options, call, reason, monkeypatch):
    theirs, ours, patch = pair(norm, **options)
    assert_same(theirs, ours, monkeypatch, {**batch(), **call})
    assert [reason in why for (name, why) in patch.fallbacks() if name == "Data2VecAudioModel.forward"] == [True]
    patch.revert()
    d2v_fast.patch(ours, strict=True)
    with pytest.raises(PatchError, match=reason):
        ours(**batch(), **call)


def test_other_spreads_are_left_to_upstream(monkeypatch):
    theirs = upstreams()
    kind = type("Wider", (type(theirs),), {"compute_var": staticmethod(lambda y: y.float().abs().mean())})
    theirs.__class__ = kind
    ours = copy.deepcopy(theirs)
    patch = d2v_fast.patch(ours)
    assert_same(theirs, ours, monkeypatch)
    assert [why for _, why in patch.fallbacks()] == [
        "the source of Wider.compute_var is not one that ours was written from"
    ]


def test_float64_on_a_device_is_left_to_upstream():
    ours = upstreams().double().to("meta")
    d2v_fast.patch(ours, strict=True)
    with pytest.raises(PatchError, match="float64 on meta"):
        ours(batch()["source"])


def test_hooks_see_their_modules_called(monkeypatch):
    """The encoder is upstream's again then; the loss stays ours."""
    theirs, ours, patch = pair()
    seen = []
    ours.encoder.layers[1].register_forward_hook(lambda *_: seen.append(1))
    assert_same(theirs, ours, monkeypatch)
    assert len(seen) == 1
    assert {name for name, _ in patch.fallbacks()} == {"TransformerEncoder.extract_features"}


def test_at_the_class(monkeypatch):
    """As ``patch_all`` has it: for models that are there, and those that come."""
    before, kind = upstreams(), upstream.Data2VecAudioModel
    names = set(before.__dict__)
    want, _ = run(before, monkeypatch, batch(10))
    patch = Patch("test").apply([Site("", kind, seam) for seam in audio.seams(kind)], Options())
    try:
        for model in (before, upstreams()):
            same_as_upstream(run(model, monkeypatch, batch(10))[0], want, 1e-5)
        upstreams()(**batch(), layer=1)
        assert list(patch.fallbacks()) == [("Data2VecAudioModel.forward", "the output of a layer was asked for")]
    finally:
        patch.revert()
    assert not is_ours(kind.forward)
    assert not is_ours(kind.apply_mask)
    assert set(before.__dict__) == names


def test_another_source_is_left_alone(monkeypatch):
    kind = type("Data2VecAudioModel", (type(upstreams()),), {"forward": lambda self, source: source})
    model = upstreams()
    model.__class__ = kind
    patch = d2v_fast.patch(model)
    assert not is_ours(model.forward)
    reasons = [s.reason for s in patch.skipped if s.name == "Data2VecAudioModel.forward"]
    assert len(reasons) == 1
    assert "its source is not one that ours was written from" in reasons[0]


def test_report():
    _, _, patch = pair(switches={"targets": False})
    lines = str(patch).splitlines()
    assert [" ".join(line.split()) for line in lines if "Data2VecAudioModel." in line or "EMAModule" in line] == [
        "replaced 1 x ema EMAModule._step_internal ema averages and the teacher's copy of them in one pass over the"
        " memory never called",
        "replaced 1 x Data2VecAudioModel.apply_mask masks spans drawn by the same random numbers without a loop over"
        " frames, put in without waiting for the device never called",
        "left 1 x Data2VecAudioModel.forward loss targets=False",
    ]

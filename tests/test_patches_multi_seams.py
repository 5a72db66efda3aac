"""What of fairseq's data2vec 2.0 is replaced, what is left as it was and why, and how it is put back."""

import copy

import pytest
import torch
from parity import assert_equal

pytest.importorskip("fairseq_peer")

import fairseq_multi_peer as peer
from fairseq_multi_peer import KINDS, same, step

import d2v_fast
from d2v_fast.patches import PatchError
from d2v_fast.patches._core import Options, Patch, Site
from d2v_fast.patches.fairseq import multi, multi_attention, multi_context, multi_forward
from d2v_fast.patches.fairseq.multi_attention import Alibi


def test_calls_that_are_upstreams():
    """Reconstruction of pixels, and a subclass with targets of its own, with the finer seams below."""
    # patches of as many values as there are channels, which is what upstream compares
    model = peer.build("image", embed_dim=48, part={"embed_dim": 48, "input_size": 16, "patch_size": 4}, recon_loss=0.5)
    patch = same(model, {**peer.batch("image"), "source": torch.randn(3, 3, 16, 16)})
    assert {reason for _, reason in patch.fallbacks()} == {"recon_loss: pixels are reconstructed too"}
    model = peer.build("text")
    model.__class__ = type("Mine", (type(model),), {"make_targets": lambda self, y, n: y[-1].float() * 2})
    patch = same(model, peer.batch("text"))
    assert [s.name for s in patch.skipped] == ["Mine.make_targets"]
    assert {reason for _, reason in patch.fallbacks()} == {"make_targets is not upstream's"}


def test_targets_switched_off():
    patch = same(peer.build("audio"), peer.batch("audio"), targets=False)
    names = {site.name for site in patch.applied}
    assert "Data2VecMultiModel.d2v_loss" in names
    assert "Data2VecMultiModel.forward" not in names


def test_targets_switched_off_at_the_class(monkeypatch):
    kind, options = peer.data2vec2.Data2VecMultiModel, Options(frozenset({"loss"}), strict=True)
    model, batch = peer.build("text"), peer.batch("text")
    losses, *_ = step(model, batch)
    monkeypatch.setattr(multi_forward, "data2vec_loss", lambda *_, **__: pytest.fail("targets were made by ours"))
    sites = [Site("", kind, seam) for seam in (multi.LOSS, multi_forward.FORWARD)]
    with Patch("class").apply(sites, options):
        assert_equal(step(model, batch)[0], losses)


def test_attention_switched_off():
    """Then upstream's own tensor goes through our blocks."""
    patch = same(peer.build("audio"), peer.batch("audio"), attention=False)
    assert {site.seam.part for site in patch.applied} == {"loss", "targets", "norms", "conv", "ema", "masks"}


def test_norms_switched_off():
    """Upstream's blocks call our attention with a dropout behind it."""
    model = peer.build("audio", encoder_dropout=0.5)
    model.eval()
    batch = peer.batch("audio")
    want = model(batch["source"], mask=False, features_only=True)["x"]
    d2v_fast.patch(model, norms=False)
    assert_equal({"x": model(batch["source"], mask=False, features_only=True)["x"]}, {"x": want})


REFUSED = {
    "two dimensions": ("image", {"part": {"use_alibi_encoder": True, "num_extra_tokens": 0}, "cls_loss": 0.0}),
    "extra tokens": ("audio", {"part": {"num_extra_tokens": 1}}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_biases_are_upstreams(case):
    kind, overrides = REFUSED[case]
    model = peer.build(kind, **overrides)
    patch = same(model, peer.batch(kind))
    assert {s.name.split(".")[-1] for s in patch.skipped} == {"contextualized_features"}
    assert {name for name, _ in patch.fallbacks()} == {"AltAttention.forward"}  # tensors again
    patch.revert()
    with pytest.raises(PatchError, match="contextualized_features"):
        d2v_fast.patch(model, strict=True)
    assert not any("d2v_fast" in name for m in model.modules() for name in m.__dict__)


def test_several_norms_of_targets_are_upstreams():
    model = peer.build("text", instance_norm_target_layer=True)
    patch = same(model, peer.batch("text"))
    assert [s.name for s in patch.skipped] == ["Data2VecMultiModel.make_targets"]


WATCHED = {
    "blocks.0.norm1": {"AltBlock.forward"},
    "blocks.0.post_mlp_dropout": {"AltBlock.forward"},
    "blocks.0.attn": set(),
    "blocks.0.attn.proj_drop": set(),
    "blocks.0.mlp": set(),
    "blocks.0.mlp.act": set(),
    "modality_encoders.TEXT.decoder": set(),
    "modality_encoders.TEXT.decoder.proj": set(),
    "modality_encoders.TEXT.decoder.blocks.1.5": {"Decoder1d.forward"},
}


@pytest.mark.parametrize("path", WATCHED)
def test_hooks_are_called(path, monkeypatch):
    """What somebody watches is called, with what upstream gives it; of the rest as much as can be is ours."""
    monkeypatch.setattr(multi_attention, "runs_reference", lambda *_: False)  # as on a GPU
    model, batch, seen = peer.build("text"), peer.batch("text"), []
    model.get_submodule(path).register_forward_hook(lambda _, args, out: seen.append(args[0].shape))
    losses, grads, _ = step(model, batch)
    patch = d2v_fast.patch(model)
    got_losses, got_grads, _ = step(model, batch)
    assert len(seen) == 2
    assert seen[0] == seen[1]
    assert {name for name, _ in patch.fallbacks()} | {s.name.split()[-1] for s in patch.skipped} == WATCHED[path]
    assert_equal(got_losses, losses)
    assert_equal(got_grads, grads)


def test_strict_raises_for_a_hook():
    model = peer.build("text")
    d2v_fast.patch(model, strict=True)
    model.blocks[1].norm2.register_forward_hook(lambda *_: None)
    with pytest.raises(PatchError, match="norm is not an ordinary layer norm, or is watched"):
        model(**peer.batch("text"))


@pytest.mark.parametrize("kind", KINDS)
def test_revert(kind):
    model, batch = peer.build(kind), peer.batch(kind)
    parts = [*model.modules(), *model.ema.model.modules(), model.ema]
    before, (losses, grads, _) = [dict(part.__dict__) for part in parts], step(model, batch)
    keys = list(model.state_dict())
    patch = d2v_fast.patch(model)
    step(model, batch)
    assert list(model.state_dict()) == keys
    assert not d2v_fast.patch(model).applied  # a second time: nothing
    patch.revert()
    assert [part.__dict__.keys() for part in parts] == [inside.keys() for inside in before]
    got_losses, got_grads, _ = step(model, batch)
    assert_equal(got_losses, losses, 0.0)
    assert_equal(got_grads, grads, 0.0)


def test_copies_are_patched_too():
    model = peer.build("audio")
    d2v_fast.patch(model)
    step(model, peer.batch("audio"))
    copied = copy.deepcopy(model)
    want, grads, _ = step(model, peer.batch("audio"))
    got, copied_grads, _ = step(copied, peer.batch("audio"))
    assert copied.blocks[0].attn.forward.__self__ is copied.blocks[0].attn
    assert_equal(got, want, 0.0)
    assert_equal(copied_grads, grads, 0.0)


def test_compiled():
    """A block with ALiBi, in one graph."""
    model = peer.build("audio", part={"learned_alibi_scale_per_layer": True})
    block = model.blocks[0]
    d2v_fast.patch(model)
    x, positions, scale = torch.randn(2, 7, 32), torch.randint(0, 30, (2, 7)), torch.rand(1, 4, 1, 1)

    def run(slopes):
        bias = Alibi(slopes, positions)
        return block(x, None, bias * scale.type_as(bias))[0]

    slopes = torch.rand(4, requires_grad=True)
    want, got = run(slopes), torch.compile(run, backend="aot_eager", fullgraph=True)(slopes)
    torch.testing.assert_close(got, want)
    (want_grad,), (got_grad,) = (torch.autograd.grad(y.square().sum(), slopes) for y in (want, got))
    torch.testing.assert_close(got_grad, want_grad)


def test_compiled_before_the_first_call():
    """What feeds the teacher, in one graph, its slopes read while it is traced."""
    model, patched = peer.build("audio", part={"prenet_depth": 0}), peer.build("audio", part={"prenet_depth": 0})
    patch = d2v_fast.patch(patched)
    x, whole = torch.randn(2, 11, 32), {"mask": False, "remove_masked": False}
    found, encoder = [], patched.modality_encoders["AUDIO"]
    compiled = torch.compile(encoder.contextualized_features, backend="aot_eager", fullgraph=True)
    for call in (model.modality_encoders["AUDIO"].contextualized_features, compiled):
        result = call(x, None, **whole)
        found.append({"x": result["x"], "bias": result["alibi_bias"] * torch.ones(1, 4, 1, 1)})
    found[1]["bias"] = found[1]["bias"].dense()
    assert_equal(found[1], found[0])
    assert not patch.fallbacks()


def test_at_the_classes():
    """As patch_all does it: models made before and after are fast."""
    model, batch = peer.build("audio"), peer.batch("audio")
    losses, grads, _ = step(model, batch)
    kinds = (
        peer.data2vec2.Data2VecMultiModel,
        peer.base.ModalitySpecificEncoder,
        *(getattr(peer.modules, name) for name in ("AltAttention", "AltBlock", "Decoder1d", "Decoder2d")),
    )
    options, patch = Options(), Patch("classes")
    with patch.apply([Site("", kind, seam) for kind in kinds for seam in multi.seams(kind)], options):
        assert not patch.skipped
        for each in (model, peer.build("audio")):
            got_losses, got_grads, _ = step(each, batch)
            assert_equal(got_losses, losses)
            assert_equal(got_grads, grads)
        assert not patch.fallbacks()
        image, images = peer.build("image"), peer.batch("image")
        got, *_ = step(image, images)
    want, *_ = step(image, images)
    assert_equal(got, want)


def test_changed_upstream_is_left_alone(monkeypatch):
    """Slopes by other code than ours was written from."""
    monkeypatch.setattr(multi_context, "_is_known", lambda made: False)
    patch = same(peer.build("audio"), peer.batch("audio"))
    assert "code that ours was not written from" in str(patch)


def test_report():
    patch = d2v_fast.patch(peer.build("image"), conv=False)
    lines = str(patch).splitlines()
    assert lines[0].startswith("d2v_fast on Data2VecMultiModel:")
    shown = [" ".join(line.split()) for line in lines]
    for expected in (
        "replaced 2 x blocks.*.attn AltAttention.forward attention",
        "replaced 2 x ema.model.blocks.* AltBlock.forward norms",
        "left 1 x modality_encoders.IMAGE.decoder Decoder2d.forward conv conv=False",
    ):
        assert any(line.startswith(expected) for line in shown), expected

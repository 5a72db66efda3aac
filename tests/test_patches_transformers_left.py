"""The drop-in under transformers: what is left as it was and why, copies, classes, and how it is put back."""

import copy

import pytest
import torch
from parity import TOLERANCE, relative
from torch import nn
from transformers_models import CASES, ONE_EACH, STABLE, attributes, batch, make, run, same, transformers

import d2v_fast
from d2v_fast.patches import PatchError, patch


@ONE_EACH
def test_revert_leaves_nothing(name):
    model, inputs = make(name), batch(name)
    run(model, inputs, output_hidden_states=True)  # transformers sets its recorders up, which stay
    before, want = attributes(model), run(model, inputs)
    keys = list(model.state_dict()), [n for n, _ in model.named_parameters()], [n for n, _ in model.named_modules()]
    handle = patch(model)
    run(model, inputs)
    assert keys == (
        list(model.state_dict()),
        [n for n, _ in model.named_parameters()],
        [n for n, _ in model.named_modules()],
    )
    handle.revert()
    got = run(model, inputs)
    assert torch.equal(got[0].last_hidden_state, want[0].last_hidden_state)
    assert all(g is None or torch.equal(g, want[1][n]) for n, g in got[1].items())
    after = attributes(model)
    assert {path: values.keys() for path, values in after.items()} == {p: v.keys() for p, v in before.items()}
    for path, values in after.items():
        assert all(values[key] is value for key, value in before[path].items()), path


@ONE_EACH
def test_copies_and_saved_models(name, tmp_path):
    model, inputs = make(name), batch(name)
    handle = patch(model)
    want = run(model, inputs)
    copied = copy.deepcopy(model)
    got = run(copied, inputs)
    assert torch.equal(got[0].last_hidden_state, want[0].last_hidden_state)
    with torch.no_grad():
        for p in copied.parameters():
            p.mul_(1.5)  # the copy's own parameters are what it computes with
    assert relative(run(copied, inputs)[0].last_hidden_state, want[0].last_hidden_state) > 0.01
    same(run(model, inputs), want)
    model.save_pretrained(tmp_path)
    assert "d2v" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path).train()
    same(run(loaded, inputs), want)
    handle.revert()
    assert not any("forward" in m.__dict__ for m in (*model.modules(), *copied.modules()))


def test_copies_that_data_parallel_makes():
    model, x = make("hubert"), torch.randn(2, 9, 32)
    want = model.encoder(x).last_hidden_state
    with patch(model) as handle:
        replica = model.encoder._replicate_for_data_parallel()
        replica.pos_conv_embed, replica.layer_norm = model.encoder.pos_conv_embed, model.encoder.layer_norm
        replica.layers = model.encoder.layers
        assert relative(replica(x).last_hidden_state, want) <= TOLERANCE
        assert "copy that DataParallel makes" in str(handle)


def test_waveforms_that_are_too_short_are_upstreams_error():
    model = make("audio")
    with patch(model), pytest.raises(RuntimeError, match="Kernel size"):
        model(torch.randn(1, 100))


FALLBACKS = {
    "attention weights": (lambda model: None, {"output_attentions": True}, "attention weights were asked for"),
    "a hook": (lambda model: hooked(model), {}, "has hooks, which want to see it called"),
    "a wrapped layer": (lambda model: adapted(model), {}, "is a Adapted"),
}


class Adapted(nn.Linear):
    """Stands for an adapter around a linear layer."""

    def forward(self, x):
        return super().forward(x) + 1


def hooked(model):
    encoder = model.encoder
    (encoder.layers if hasattr(encoder, "layers") else encoder.layer)[1].register_forward_hook(lambda *_: None)


def adapted(model):
    name, layer = next((n, m) for n, m in model.encoder.named_modules() if n.split(".")[-1] in ("q_proj", "query"))
    owner, _, attribute = name.rpartition(".")
    new = Adapted(layer.in_features, layer.out_features)
    new.load_state_dict(layer.state_dict())
    setattr(model.encoder.get_submodule(owner), attribute, new)


@pytest.mark.parametrize("what", FALLBACKS)
@pytest.mark.parametrize("name", ["audio", "text", "vision-own"])
def test_what_ours_cannot_do_is_upstreams(name, what):
    change, options, reason = FALLBACKS[what]
    prefix = CASES[name][0]
    model, inputs = (
        make(name, **({"attn_implementation": "eager"} if options else {})),
        batch(name, name != "vision-own"),
    )
    handle = patch(model)
    run(model, inputs)
    change(model)
    got = run(model, inputs, **options)
    found = [why for (method, why), count in handle.fallbacks().items() if method == f"{prefix}Encoder.forward"]
    assert len(found) == 1 and reason in found[0]
    assert reason in str(handle)
    handle.revert()
    want = run(model, inputs, **options)
    same(got, want)
    if options:
        assert len(got[0].attentions) == 2
        assert all(relative(a, b) <= TOLERANCE for a, b in zip(got[0].attentions, want[0].attentions, strict=True))
        with patch(model, strict=True), pytest.raises(PatchError, match=reason):
            model(**inputs, **options)


REFUSED = {
    "activation": ({"hidden_act": "gelu_new"}, "layers.0.feed_forward.intermediate_act_fn is a NewGELUActivation"),
    "kind of GELU": ({"hidden_act": "gelu_python"}, "its activation is not GELU"),
    "adapters": (STABLE | {"adapter_attn_dim": 4}, "layers.0.adapter_layer is a Wav2Vec2AttnAdapterLayer"),
    "all layers": ({"layerdrop": 1.0}, "layerdrop"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_encoders_that_do_not_fit_are_left(what):
    settings, reason = REFUSED[what]
    name = "wav2vec2-stable" if what == "adapters" else "wav2vec2"
    model, inputs = make(name, **settings), batch(name)
    want = run(model, inputs)
    handle = patch(model)
    left = [s for s in handle.skipped if s.part == "encoder"]
    assert len(left) == 1 and reason in left[0].reason
    same(run(model, inputs), want)
    handle.revert()
    with pytest.raises(PatchError, match=reason):
        patch(model, strict=True)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_changed_sources_are_left(monkeypatch):
    model = make("hubert")
    kind = type(model.encoder.layers[0])
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x, **kwargs: original(self, x, **kwargs))
    handle = patch(model)
    reasons = {s.name.split()[-1]: s.reason for s in handle.skipped}
    assert (
        "source of HubertEncoderLayer.forward is not one that ours was written from" in reasons["HubertEncoder.forward"]
    )
    assert "fingerprint" in reasons["HubertEncoderLayer.forward"]
    same(run(model, inputs := batch("hubert")), (handle.revert(), run(model, inputs))[1])


def test_images_of_another_size():
    model = make("vision-own")
    images = torch.randn(1, 3, 32, 32)
    with patch(model) as handle:
        got = run(model, {"pixel_values": images})
        assert "interpolated" in str(handle)
    same(got, run(model, {"pixel_values": images}))


REPORT = """
d2v_fast on Data2VecAudioModel: 9 replaced, 0 left as they were
replaced 1 x feature_extractor Data2VecAudioFeatureEncoder.forward
    conv convolutions as matrix products, norms and GELU fused 1 call
replaced 1 x encoder Data2VecAudioEncoder.forward
    encoder the whole stack in fused operators, on the same parameters 1 call
replaced 1 x encoder.pos_conv_embed Data2VecAudioPositionalConvEmbedding.forward
    conv convolutions, norms and GELU fused 1 call
replaced 2 x encoder.layers.* Data2VecAudioEncoderLayer.forward
    norms dropout, residual and norm in one pass 2 calls
replaced 2 x encoder.layers.*.attention Data2VecAudioAttention.forward
    attention one product for q, k, v; the best kernel that is installed 2 calls
replaced 2 x encoder.layers.*.feed_forward Data2VecAudioFeedForward.forward
    norms bias and GELU in one pass 2 calls
upstream 2 x Data2VecAudioAttention.forward of calls attention weights were asked for
upstream 1 x Data2VecAudioEncoder.forward of calls attention weights were asked for
"""


def test_report():
    model = make("audio", attn_implementation="eager")
    handle = patch(model)
    model(**batch("audio"), output_attentions=True)
    assert str(handle).split() == REPORT.split()


@pytest.mark.parametrize("name", ["is_deepspeed_zero3_enabled", "is_fsdp_managed_module"])
def test_spread_parameters_are_upstreams(name, monkeypatch):
    model, inputs = make("wav2vec2"), batch("wav2vec2")
    monkeypatch.setattr(transformers.models.wav2vec2.modeling_wav2vec2, name, lambda *_: True)
    with patch(model, strict=True), pytest.raises(PatchError, match="spread over ranks"):
        model(**inputs)


def test_norms_of_convolutions_have_our_eps():
    model, inputs = make("wav2vec2-stable"), batch("wav2vec2")
    for layer in model.feature_extractor.conv_layers:
        layer.layer_norm.eps = 0.5
    want = run(model, inputs)
    with patch(model) as handle:
        same(run(model, inputs), want)
        assert "its norms have an eps of 0.5" in str(handle.skipped)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_class_level():
    inputs, want = batch("wav2vec2"), {}
    model = make("wav2vec2")
    want = run(model, inputs)
    kinds = [type(module) for module in model.modules()]
    before = [kind.forward for kind in kinds]
    handle = d2v_fast.patch_all()
    try:
        assert type(model.encoder).forward is not before[kinds.index(type(model.encoder))]
        same(run(model, inputs), want)
        model.gradient_checkpointing_enable()
        same(run(model, inputs), want)
        layer = model.encoder.layers[0]
        layer.register_forward_hook(lambda *_: None)  # upstream's encoder around our layers
        same(run(model, inputs), want)
    finally:
        handle.revert()
    assert [kind.forward for kind in kinds] == before


def test_unknown_models():
    with pytest.raises(PatchError, match="Wav2Vec2Model, HubertModel, Data2VecVisionModel"):
        patch(nn.Linear(2, 2))

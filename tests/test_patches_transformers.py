"""The drop-in under transformers: outputs, hidden states and every gradient of patched models against upstream's own.

Weights are not at trivial values, the gradient from above is random, dropout is 0 unless a test says otherwise.
"""

import copy

import pytest
import torch
from parity import TOLERANCE, relative
from torch import nn

transformers = pytest.importorskip("transformers", reason="needs transformers")

import d2v_fast  # noqa: E402
from d2v_fast.patches import PatchError, patch  # noqa: E402
from d2v_fast.patches._core import Options  # noqa: E402
from d2v_fast.patches.transformers import register_attention, speech_encoder  # noqa: E402

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
NO_DROPOUT = dict.fromkeys(
    ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop", "final_dropout"),
    0.0,
)
SPEECH = WIDTHS | NO_DROPOUT | {"conv_dim": (16,) * 7, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False}
STABLE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
TEXT = WIDTHS | {"vocab_size": 40, "max_position_embeddings": 24, "hidden_dropout_prob": 0.0}
TEXT |= {"attention_probs_dropout_prob": 0.0}
VISION = WIDTHS | {"image_size": 24, "patch_size": 8, "drop_path_rate": 0.0, "use_mask_token": True}
OWN, SHARED = {"use_relative_position_bias": True}, {"use_shared_relative_position_bias": True}
CASES = {
    "audio": ("Data2VecAudio", {}),
    "wav2vec2": ("Wav2Vec2", {}),
    "wav2vec2-stable": ("Wav2Vec2", STABLE),
    "hubert": ("Hubert", {}),
    "hubert-stable": ("Hubert", STABLE),
    "text": ("Data2VecText", {}),
    "vision": ("Data2VecVision", {}),
    "vision-own": ("Data2VecVision", OWN),
    "vision-shared": ("Data2VecVision", SHARED),
}
ONE_EACH = pytest.mark.parametrize("name", ["wav2vec2-stable", "audio", "text", "vision-own"])


def make(name, kind="Model", **changes):
    """A model of a case, in training mode."""
    prefix, settings = CASES[name]
    base = TEXT if prefix.endswith("Text") else VISION if prefix.endswith("Vision") else SPEECH
    config = getattr(transformers, f"{prefix}Config")(**base | settings | changes)
    model = getattr(transformers, prefix + kind)(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.train()


def batch(name, padded=False):
    """What the model of a case reads, two samples, the second shorter if ``padded``."""
    if name == "text":
        mask = torch.arange(20) < torch.tensor([[20], [13]])
        return {"input_ids": torch.randint(4, 40, (2, 20))} | ({"attention_mask": mask.long()} if padded else {})
    if name.startswith("vision"):
        return {"pixel_values": torch.randn(2, 3, 24, 24)}
    mask = torch.arange(4000) < torch.tensor([[4000], [2600]])
    return {"input_values": torch.randn(2, 4000)} | ({"attention_mask": mask.long()} if padded else {})


def run(model, inputs, **options):
    """(output, gradients by name) with the same random numbers every time."""
    model.zero_grad()
    torch.manual_seed(1)
    out = model(**inputs, **options)
    torch.manual_seed(2)
    torch.sum(out.last_hidden_state * torch.randn(out.last_hidden_state.shape)).backward()
    return out, {name: p.grad for name, p in model.named_parameters()}


def same(got, want):
    """Outputs and gradients agree; a bias of keys has none in exact arithmetic, and is measured by that of queries."""
    (out, grads), (expected, wanted) = got, want
    assert relative(out.last_hidden_state, expected.last_hidden_state) <= TOLERANCE
    assert {name for name, g in grads.items() if g is None} == {name for name, g in wanted.items() if g is None}
    for name, g in grads.items():
        if g is not None:
            size = wanted[name.replace("k_proj.bias", "q_proj.bias").replace("key.bias", "query.bias")].norm()
            assert (g - wanted[name]).norm() <= TOLERANCE * size + 1e-7, name
    if expected.hidden_states is not None:
        assert len(out.hidden_states) == len(expected.hidden_states)
        assert all(relative(a, b) <= TOLERANCE for a, b in zip(out.hidden_states, expected.hidden_states, strict=True))


def attributes(model):
    return {path: dict(module.__dict__) for path, module in model.named_modules()}


@pytest.mark.parametrize("switches", [{}, {"encoder": False}], ids=["encoder", "parts"])
@pytest.mark.parametrize(("name", "padded"), [(n, p) for n in CASES for p in (False, True) if not (p and "vis" in n)])
def test_same_numbers(name, padded, switches):
    model, inputs = make(name), batch(name, padded)
    want = run(model, inputs, output_hidden_states=True)
    with patch(model, **switches) as handle:
        same(run(model, inputs, output_hidden_states=True), want)
        same(run(model, inputs), (want[0].__class__(want[0].last_hidden_state), want[1]))
        assert not handle.fallbacks()
        assert not [s for s in handle.skipped if not s.harmless]


HEADS = [
    ("audio", "ForCTC"),
    ("audio", "ForSequenceClassification"),
    ("wav2vec2", "ForCTC"),
    ("wav2vec2-stable", "ForPreTraining"),
    ("hubert", "ForCTC"),
    ("text", "ForMaskedLM"),
    ("text", "ForSequenceClassification"),
    ("vision-own", "ForImageClassification"),
]


@pytest.mark.parametrize(("name", "kind"), HEADS, ids=[f"{name}-{kind}" for name, kind in HEADS])
def test_models_with_a_head(name, kind):
    model, inputs = make(name, kind, num_labels=3), batch(name)
    if kind == "ForPreTraining":
        mask = torch.arange(12) % 3 == 0
        inputs |= {"mask_time_indices": mask.expand(2, 12), "sampled_negative_indices": torch.randint(24, (2, 12, 5))}
    else:
        per_token = {"ForCTC": torch.tensor([[1, 2], [2, 1]]), "ForMaskedLM": inputs.get("input_ids")}
        inputs["labels"] = per_token.get(kind, torch.tensor([0, 2]))

    def step():
        model.zero_grad()
        torch.manual_seed(0)
        loss = model(**inputs).loss
        loss.backward()
        return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    want = step()
    with patch(model) as handle:
        got = step()
        assert not handle.fallbacks()
    assert all(relative(a, b) <= TOLERANCE for a, b in zip(got, want, strict=True))


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


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("switches", [{}, {"encoder": False}], ids=["encoder", "parts"])
@ONE_EACH
def test_gradient_checkpointing(name, switches):
    model, inputs = make(name), batch(name)
    want = run(model, inputs)
    model.gradient_checkpointing_enable()
    with patch(model, **switches) as handle:
        same(run(model, inputs), want)
        left = {method for method, _ in handle.fallbacks()}
    assert all(method.endswith("FeatureEncoder.forward") for method in left)


@pytest.mark.parametrize("name", ["audio", "wav2vec2-stable"])
def test_layerdrop_skips_upstreams_layers(name):
    model, inputs = make(name, layerdrop=0.5, num_hidden_layers=6), batch(name)
    want = run(model, inputs, output_hidden_states=True)
    assert 1 < len(want[0].hidden_states) < 7
    with patch(model):
        same(run(model, inputs, output_hidden_states=True), want)


@pytest.mark.parametrize("name", ["hubert", "hubert-stable"])
def test_encoders_of_older_versions(name):
    """They hand hidden states out themselves, a layer's input also where LayerDrop skips it."""
    encoder, x = make(name, layerdrop=0.5, num_hidden_layers=5).encoder, torch.randn(2, 9, 32)

    def written(self, hidden_states, attention_mask=None, output_attentions=False, output_hidden_states=False, *_):
        return "upstream"

    torch.manual_seed(1)
    h = x + encoder.pos_conv_embed(x)
    h, want = h if "stable" in name else encoder.layer_norm(h), []
    for layer in encoder.layers:
        want.append(h)
        h = h if torch.rand([]) < encoder.config.layerdrop else layer(h)
    want.append(encoder.layer_norm(h) if "stable" in name else h)
    forward = speech_encoder.make(written, Options())
    torch.manual_seed(1)
    last, states = forward(encoder, x, None, False, True, False)
    assert len(states) == 6
    assert all(relative(a, b) <= TOLERANCE for a, b in zip(states, want, strict=True))
    assert torch.equal(last, states[-1])
    assert forward(encoder, x, None, True) == "upstream"


def test_copies_that_data_parallel_makes():
    model, x = make("hubert"), torch.randn(2, 9, 32)
    want = model.encoder(x).last_hidden_state
    with patch(model) as handle:
        replica = model.encoder._replicate_for_data_parallel()
        replica.pos_conv_embed, replica.layer_norm = model.encoder.pos_conv_embed, model.encoder.layer_norm
        replica.layers = model.encoder.layers
        assert relative(replica(x).last_hidden_state, want) <= TOLERANCE
        assert "copy that DataParallel makes" in str(handle)


def test_dropout_is_drawn():
    model, inputs = make("audio", hidden_dropout=0.2, attention_dropout=0.2, activation_dropout=0.2), batch("audio")
    with patch(model) as handle:
        torch.manual_seed(0)
        a, b = (model(**inputs).last_hidden_state for _ in range(2))
        assert relative(a, b) > 0.01
        assert not handle.fallbacks()
        model.eval()
        assert torch.equal(*(model(**inputs).last_hidden_state for _ in range(2)))


def test_drop_path_rates_are_the_layers():
    model = make("vision", drop_path_rate=0.5, num_hidden_layers=3)
    images = torch.randn(1, 3, 24, 24).expand(64, -1, -1, -1)
    with patch(model, strict=True) as handle:
        torch.manual_seed(0)
        states = model(images, output_hidden_states=True).hidden_states
    for rate, before, after in zip((0.0, 0.25, 0.5), states[:-1], states[1:], strict=True):
        untouched = (before == after).flatten(1).all(1).float().mean().item()  # both branches of a layer are dropped
        assert abs(untouched - rate**2) < 0.15
    assert not handle.fallbacks()


def test_settings_are_followed():
    model, inputs = make("audio"), batch("audio")
    want = run(model, inputs)
    with patch(model, strict=True):
        same(run(model, inputs), want)
        for module in model.encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        assert relative(run(model, inputs)[0].last_hidden_state, want[0].last_hidden_state) > 0.01


def test_frozen_features():
    model, inputs = make("wav2vec2"), batch("wav2vec2")
    model.freeze_feature_encoder()
    want = run(model, inputs)
    with patch(model):
        got = run(model, inputs)
    same(got, want)
    assert all(g is None for n, g in got[1].items() if n.startswith("feature_extractor."))


def test_waveforms_that_are_too_short_are_upstreams_error():
    model = make("audio")
    with patch(model), pytest.raises(RuntimeError, match="Kernel size"):
        model(torch.randn(1, 100))


@ONE_EACH
def test_autocast_and_half_precision(name):
    model, inputs = make(name).eval(), batch(name)
    with patch(model) as handle:
        with torch.autocast("cpu", torch.bfloat16):
            got = model(**inputs, output_hidden_states=True)
        low = copy.deepcopy(model).bfloat16()
        halves = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
        assert low(**halves).last_hidden_state.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        want = model(**inputs, output_hidden_states=True)
    assert not handle.fallbacks()
    assert [x.dtype for x in got.hidden_states] == [x.dtype for x in want.hidden_states]
    assert got.last_hidden_state.dtype == want.last_hidden_state.dtype
    assert relative(got.last_hidden_state.float(), want.last_hidden_state.float()) < 0.05


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
    conv convolutions as matrix products, norms and GELU fused
replaced 1 x encoder Data2VecAudioEncoder.forward
    encoder the whole stack in fused operators, on the same parameters
replaced 1 x encoder.pos_conv_embed Data2VecAudioPositionalConvEmbedding.forward
    conv convolutions, norms and GELU fused
replaced 2 x encoder.layers.* Data2VecAudioEncoderLayer.forward
    norms dropout, residual and norm in one pass
replaced 2 x encoder.layers.*.attention Data2VecAudioAttention.forward
    attention one product for q, k, v; the best kernel that is installed
replaced 2 x encoder.layers.*.feed_forward Data2VecAudioFeedForward.forward
    norms bias and GELU in one pass
upstream 2 x Data2VecAudioAttention.forward calls attention weights were asked for
upstream 1 x Data2VecAudioEncoder.forward calls attention weights were asked for
"""


def test_report():
    model = make("audio", attn_implementation="eager")
    handle = patch(model)
    model(**batch("audio"), output_attentions=True)
    assert str(handle).split() == REPORT.split()


@pytest.mark.parametrize("name", ["wav2vec2", "text"])
def test_attention_implementation(name):
    register_attention()
    model, inputs = make(name), batch(name, padded=True)
    other = make(name, attn_implementation="d2v_fast")
    other.load_state_dict(model.state_dict())
    want = run(model, inputs)
    same(run(other, inputs), want)
    with patch(other) as handle:
        same(run(other, inputs), want)
        assert not handle.fallbacks()


def test_attention_implementation_of_other_models():
    register_attention()
    sizes = WIDTHS | {"vocab_size": 40, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    tokens, mask = torch.randint(4, 40, (2, 20)), (torch.arange(20) < torch.tensor([[20], [13]])).long()
    for kind in ("Bert", "Llama"):  # the second is causal, with fewer heads of keys: SDPA's
        extra = {"num_key_value_heads": 1} if kind == "Llama" else {}
        config = getattr(transformers, f"{kind}Config")(**sizes, **extra)
        model = getattr(transformers, f"{kind}Model")(config)
        want = run(model, {"input_ids": tokens, "attention_mask": mask})
        model.set_attn_implementation("d2v_fast")
        same(run(model, {"input_ids": tokens, "attention_mask": mask}), want)


def queries_keys_values():
    return torch.randn(3, 2, 2, 6, 8, generator=torch.Generator().manual_seed(0)).unbind()


def attention_module():
    module = nn.Module()
    module.is_causal = False
    return module


def attend(**given):
    """What "d2v_fast" gives for attention that knows no order, with more arguments."""
    register_attention()
    run_it = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["d2v_fast"]
    return run_it(attention_module(), *queries_keys_values(), None, **given)[0]


@pytest.mark.parametrize(
    "name", ["s_aux", "sinks", "softcap", "indices", "block_indices", "head_mask", "cu_seq_lens_q"]
)
def test_attention_implementation_refuses_what_it_does_not_know(name):
    with pytest.raises(ValueError, match=f"d2v_fast.* cannot serve Module: it does not know the argument {name};"):
        attend(**{name: torch.ones(2)})


def test_attention_implementation_knows():
    want = attend()
    given = {"position_ids": torch.arange(6)[None], "sliding_window": 4, "use_cache": False, "labels": torch.ones(2)}
    assert torch.equal(attend(**given, s_aux=None, softcap=None), want)
    bias = torch.randn(1, 2, 6, 6)
    assert relative(attend(position_bias=bias), attend(position_bias=0 * bias)) > 0.1
    assert relative(attend(position_bias=0 * bias), want) <= TOLERANCE


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_attention_implementation_refuses_models():
    register_attention()
    sizes = {"d_model": 32, "vocab_size": 40, "encoder_layers": 1, "decoder_layers": 1, "block_size": 4}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_global_tokens": 2}
    sizes |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "attn_implementation": "d2v_fast"}
    model = transformers.PegasusXModel(transformers.PegasusXConfig(**sizes))
    tokens = torch.randint(4, 40, (2, 8))
    with pytest.raises(ValueError, match="PegasusXPreTrainedModel does not support SDPA; load"):
        model(input_ids=tokens, decoder_input_ids=tokens)


def test_attention_implementation_compiled():
    torch.compiler.reset()
    want = attend()
    module, (q, k, v) = attention_module(), queries_keys_values()
    run_it = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["d2v_fast"]
    compiled = torch.compile(lambda *given: run_it(module, *given, None)[0], backend="aot_eager", fullgraph=True)
    assert relative(compiled(q, k, v), want) <= TOLERANCE


def test_attention_implementation_scales_as_asked():
    q, k, v = queries_keys_values()
    want = torch.softmax(0.9 * q @ k.transpose(-1, -2), -1) @ v
    assert relative(attend(scaling=0.9), want.transpose(1, 2)) <= TOLERANCE


def test_masks_of_shifted_keys_are_those_of_sdpa():
    register_attention()
    masking = transformers.masking_utils
    asked = {"batch_size": 2, "q_length": 6, "kv_length": 6, "mask_function": masking.bidirectional_mask_function}
    asked |= {"attention_mask": torch.arange(6) < torch.tensor([[6], [4]]), "q_offset": 0, "kv_offset": 2}
    want, got = (masking.ALL_MASK_ATTENTION_FUNCTIONS[name](**asked) for name in ("sdpa", "d2v_fast"))
    assert torch.equal(got, want)
    assert not torch.equal(want[:, 0, 0], asked["attention_mask"])


@pytest.mark.parametrize("switches", [{}, {"encoder": False}], ids=["encoder", "parts"])
@pytest.mark.parametrize("how", ["eager", "sdpa"])
def test_a_sequence_without_tokens(how, switches):
    model, inputs = make("text", attn_implementation=how), batch("text", padded=True)
    inputs["attention_mask"][0] = 0
    want = run(model, inputs)
    with patch(model, **switches) as handle:
        same(run(model, inputs), want)
        assert ("a sequence has no tokens" in str(handle.fallbacks())) == (not switches)


def test_a_sequence_without_tokens_in_attention_by_name():
    register_attention()
    model, inputs = make("text", attn_implementation="sdpa"), batch("text", padded=True)
    inputs["attention_mask"][0] = 0
    want = run(model, inputs)
    model.set_attn_implementation("d2v_fast")
    same(run(model, inputs), want)


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("switches", [{}, {"encoder": False}], ids=["encoder", "parts"])
def test_eager_attention_adds_masks_of_any_kind(switches, expanded):
    model, inputs = make("text", attn_implementation="eager"), batch("text")
    mask = torch.rand(2, 1, 1, 20).expand(2, 1, 20, 20) if expanded else torch.rand(2, 1, 20, 20)
    inputs["attention_mask"] = mask > 0.5
    want = run(model, inputs)
    with patch(model, **switches) as handle:
        same(run(model, inputs), want)
        assert "eager attention adds its mask" in str(handle.fallbacks())


@pytest.mark.parametrize("switches", [{}, {"encoder": False}], ids=["encoder", "parts"])
def test_masks_of_each_query(switches):
    model, inputs = make("text"), batch("text")
    inputs["attention_mask"] = (torch.rand(2, 1, 20, 20) > 0.5) | torch.eye(20, dtype=torch.bool)
    want = run(model, inputs)
    with patch(model, **switches):
        same(run(model, inputs), want)


def test_decoders_do_not_see_what_follows():
    model, inputs = make("text", "ForCausalLM", is_decoder=True).eval(), batch("text")
    with torch.no_grad():
        want = model(**inputs).logits
        with patch(model) as handle:
            assert relative(model(**inputs).logits, want) <= TOLERANCE
            assert "it is causal" in str(handle.fallbacks())


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


@pytest.mark.parametrize("name", ["audio", "wav2vec2-stable", "text", "vision-own"])
def test_parts_keep_the_dtype_under_autocast(name):
    model, inputs = make(name), batch(name)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(**inputs, output_hidden_states=True)
        with patch(model, encoder=False):
            got = model(**inputs, output_hidden_states=True)
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        assert a.dtype == b.dtype
        assert relative(a, b) <= 3e-2
    assert got.last_hidden_state.dtype == want.last_hidden_state.dtype


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


def test_compile():
    model, inputs = make("text", num_hidden_layers=1).eval(), batch("text", padded=True)
    want = model(**inputs).last_hidden_state
    patch(model)
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs).last_hidden_state
    assert relative(got, want) <= TOLERANCE


def test_unknown_models():
    with pytest.raises(PatchError, match="Wav2Vec2Model, HubertModel, Data2VecVisionModel"):
        patch(nn.Linear(2, 2))

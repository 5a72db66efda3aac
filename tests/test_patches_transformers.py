"""The drop-in under transformers: outputs, hidden states and gradients of patched models against upstream's own."""

import copy

import pytest
import torch
from parity import TOLERANCE, relative
from torch import nn
from transformers_models import CASES, ONE_EACH, batch, make, run, same

from d2v_fast.patches import patch
from d2v_fast.patches._core import Options
from d2v_fast.patches.transformers import speech_encoder


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


def test_compile():
    model, inputs = make("text", num_hidden_layers=1).eval(), batch("text", padded=True)
    want = model(**inputs).last_hidden_state
    patch(model)
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs).last_hidden_state
    assert relative(got, want) <= TOLERANCE

"""LayerDrop on the host and on the device: what is skipped, gradients, distribution."""

import pytest
import torch
from test_encoder_packed import MASKED, T, encoder_of
from tiny import NO_DROPOUT, tiny_batch, tiny_config

from d2v_fast.nn import Data2Vec
from d2v_fast.nn.sequences import Sequences
from d2v_fast.train.optim import OptimConfig, build_optimizer
from d2v_fast.train.step import train_step


@pytest.fixture(params=[("text", "post"), ("image", "pre")], ids=["post", "pre"])
def encoder(request):
    modality, norm = request.param
    return encoder_of(modality, norm=norm, layers=4, layerdrop=0.5).train()


def on_device(encoder, monkeypatch, keep):
    """As where a graph is recorded, with this draw."""
    monkeypatch.setattr(encoder, "_draws_on_device", lambda x: True)
    monkeypatch.setattr(torch, "rand", lambda *size, device=None: torch.tensor(keep, device=device).float())


def run(encoder, x, upstream, **options):
    encoder.zero_grad()
    output = encoder(x, **options)
    output.x.backward(upstream)
    return output, {name: p.grad for name, p in encoder.named_parameters()}


@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize("keep", [(1, 0, 1, 1), (0, 1, 1, 0), (0, 0, 0, 0)])
def test_skipped_layers_have_zero_gradients(encoder, keep, selected, monkeypatch):
    """Both ways of skipping, against an encoder that has only the other layers."""
    x, options = torch.randn(3, T, 32, requires_grad=True), {"select": Sequences.from_mask(MASKED)} if selected else {}
    upstream = torch.randn(int(MASKED.sum()), 32) if selected else torch.randn_like(x)
    kept = [i for i, k in enumerate(keep) if k]
    runs = {}
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "_kept_layers", lambda: kept)
        runs["host"] = run(encoder, x, upstream, **options)
    with monkeypatch.context() as patch:
        on_device(encoder, patch, keep)
        runs["device"] = run(encoder, x, upstream, **options)
    layers = encoder.layers
    encoder.layers = torch.nn.ModuleList(layers[i] for i in kept)
    encoder.eval()  # without LayerDrop
    want, grads = run(encoder, x, upstream, **options)
    encoder.layers = layers
    for name, (output, got) in runs.items():
        torch.testing.assert_close(output.x, want.x, rtol=1e-5, atol=1e-6, msg=name)
        for parameter, grad in got.items():
            if not parameter.startswith("layers."):
                continue
            _, index, rest = parameter.split(".", 2)
            if int(index) in kept:
                expected = grads[f"layers.{kept.index(int(index))}.{rest}"]
                torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5, msg=f"{name} {parameter}")
            else:
                assert grad is not None and not grad.any(), f"{name} {parameter}"


def test_the_device_draws_the_same_distribution(encoder, monkeypatch):
    """Layers that change the stream, as its states show: one in two."""
    monkeypatch.setattr(encoder, "_draws_on_device", lambda x: True)
    x, changed = torch.randn(1, T, 32), []
    with torch.no_grad():
        for _ in range(20):
            states = encoder(x, hidden_states=True, top_k=4)
            assert len(states.layer_results) == 4 and len(states.hidden_states) == 5
            pairs = zip(states.hidden_states, states.hidden_states[1:], strict=False)
            changed += [not torch.equal(a, b) for a, b in pairs]
    assert 0.3 < sum(changed) / len(changed) < 0.7


def test_results_are_those_of_executed_layers(encoder, monkeypatch):
    monkeypatch.setattr(encoder, "_kept_layers", lambda: [0, 2])
    output = encoder(torch.randn(1, T, 32), top_k=3, hidden_states=True)
    assert len(output.layer_results) == 1 and len(output.hidden_states) == 3


def test_an_update_moves_every_parameter():
    """Weight decay reaches a skipped layer, and its optimizer state exists, as in fairseq's flat fp16 optimizer."""
    model = Data2Vec(tiny_config("text", **{**NO_DROPOUT, "layerdrop": 0.99})).train()
    before = [p.detach().clone() for p in model.encoder.layers.parameters()]
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.1))
    torch.manual_seed(1)
    assert len(model.encoder._kept_layers()) == 0
    torch.manual_seed(1)
    train_step(model, [tiny_batch(model.config)], optimizer, lr=1e-2, update=0)
    states = [optimizer.state[p] for p in model.encoder.layers.parameters()]
    assert all(state["step"] == 1 and not state["exp_avg"].any() for state in states)
    moved = [not torch.equal(p, q) for p, q in zip(model.encoder.layers.parameters(), before, strict=True) if q.any()]
    assert any(moved)


@pytest.mark.parametrize("kept", [(0, 2, 3), (1,)])
def test_layers_that_the_caller_keeps(encoder, kept, monkeypatch):
    """The same layers run as where they are drawn here; nothing is drawn, and the others get no gradient at all."""
    x = torch.randn(3, T, 32)
    upstream = torch.randn_like(x)
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "_kept_layers", lambda: list(kept))
        want, want_gradients = run(encoder, x, upstream, top_k=3)
    before = torch.get_rng_state()
    monkeypatch.setattr(encoder, "_draws_on_device", lambda x: True)  # makes no difference
    got, gradients = run(encoder, x, upstream, top_k=3, kept=kept)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(got.x, want.x) and len(got.layer_results) == len(want.layer_results)
    for name, grad in gradients.items():
        skipped = name.startswith("layers.") and int(name.split(".")[1]) not in kept
        assert grad is None if skipped else torch.equal(grad, want_gradients[name]), name


@pytest.mark.parametrize("kept", [(0, 4), (2, 1), (1, 1), (-1, 2)])
def test_kept_layers_are_checked(encoder, kept):
    with pytest.raises(ValueError, match="kept must be rising indices of the 4 layers"):
        encoder(torch.randn(3, T, 32), kept=kept)

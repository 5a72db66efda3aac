"""Encoder and attention: float64 re-statements, masks, drop path, LayerDrop, layer results."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from checks import INTERPRET
from tiny import NO_DROPOUT, tiny_batch, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from d2v_fast.nn import Data2Vec
from d2v_fast.nn.block import Stream, drop_path_scale
from d2v_fast.nn.config import EncoderConfig
from d2v_fast.nn.encoder import TransformerEncoder
from d2v_fast.nn.positions import ConvPositions, RelativePositionBias
from d2v_fast.nn.self_attention import Scope
from d2v_fast.ops import _dispatch
from d2v_fast.train.optim import OptimConfig, build_optimizer
from d2v_fast.train.step import train_step


def test_relative_bias_index():
    """Entry by entry: rows of the table by (dy, dx), and the three of the class token."""
    grid, heads = 3, 2
    bias = RelativePositionBias(heads, grid)
    with torch.no_grad():
        bias.table.copy_(torch.arange(bias.table.numel()).view_as(bias.table))
        got = bias()
    assert got.shape == (heads, 10, 10)
    for i in range(10):
        for j in range(10):
            if i == 0 and j == 0:
                row = 27
            elif i == 0:
                row = 25
            elif j == 0:
                row = 26
            else:
                dy, dx = (i - 1) // grid - (j - 1) // grid, (i - 1) % grid - (j - 1) % grid
                row = (dy + grid - 1) * (2 * grid - 1) + dx + grid - 1
            assert got[:, i, j].tolist() == bias.table[row].tolist(), (i, j)


@pytest.mark.parametrize(("depth", "kernel"), [(5, 19), (2, 47), (4, 23)])
def test_conv_positions_keep_length(depth, kernel):
    module = ConvPositions(EncoderConfig(dim=32, heads=2, pos_conv_depth=depth, pos_conv_groups=4))
    assert module.convs[0].kernel_size == (kernel,)
    assert module(torch.randn(2, 11, 32)).shape == (2, 11, 32)


def test_conv_positions_even_kernel_trims_the_end():
    config = EncoderConfig(dim=16, heads=2, pos_conv_depth=2, pos_conv_width=8, pos_conv_groups=4)
    module = ConvPositions(config)
    x = torch.randn(1, 9, 16)
    want = x
    for conv in module.convs:
        want = F.conv1d(want.mT, conv.weight, conv.bias, padding=2, groups=4)[..., :-1].mT
        want = F.gelu(F.layer_norm(want, (16,)))
    torch.testing.assert_close(module(x), want)


def test_drop_path():
    x = torch.ones(4000, 2, 3)
    rows = drop_path_scale(x, 0.3, training=True)
    assert rows.shape == (4000,)
    assert torch.equal(rows[rows != 0], torch.full_like(rows[rows != 0], 1 / 0.7))
    assert (rows == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert drop_path_scale(x.bfloat16(), 0.3, training=True).dtype == torch.float32
    assert drop_path_scale(x, 0.3, training=False) is None
    assert drop_path_scale(x, 0.0, training=True) is None


RATES = ("dropout", "attention_dropout", "activation_dropout", "drop_path", "layerdrop")


@pytest.mark.parametrize("modality", ["speech", "image", "text"])
def test_rates_count_in_training_only(modality):
    """Each rate alone changes a training run; in evaluation all of them together change nothing."""
    config = replace(tiny_config(modality).encoder, layers=4, layer_scale=1.0, **dict.fromkeys(RATES, 0.0))
    plain, x = TransformerEncoder(config, 6), torch.randn(3, 37, 32)

    def run(training, **rates):
        encoder = TransformerEncoder(replace(config, **rates), 6).train(training)
        encoder.load_state_dict(plain.state_dict())
        torch.manual_seed(1)
        with torch.no_grad():
            output = encoder(x, top_k=4, hidden_states=True)
        return [output.x, *output.hidden_states, *output.layer_results]

    want = run(True)
    for name in RATES:
        assert not torch.equal(run(True, **{name: 0.7})[0], want[0]), name
    evaluated = run(False, **dict.fromkeys(RATES, 0.7))
    assert len(evaluated) == len(want)
    assert all(torch.equal(a, b) for a, b in zip(evaluated, want, strict=True))


def test_drop_path_rates_grow_linearly():
    config = replace(tiny_config("image").encoder, layers=5, drop_path=0.2)
    assert [layer.drop_path for layer in TransformerEncoder(config, 6).layers] == pytest.approx(
        [0, 0.05, 0.1, 0.15, 0.2]
    )


def test_layerdrop_skips_layers_in_training_only():
    config = replace(tiny_config("text").encoder, layers=4, layerdrop=0.5, dropout=0.0, attention_dropout=0.0)
    encoder = TransformerEncoder(config)
    x = torch.randn(2, 7, 32)
    counts = [len(encoder(x, hidden_states=True).hidden_states) - 1 for _ in range(60)]
    assert 0.35 < sum(counts) / (4 * 60) < 0.65
    encoder.eval()
    assert len(encoder(x, hidden_states=True, top_k=4).layer_results) == 4


@pytest.mark.parametrize("modality", ["speech", "image", "text"])
def test_layer_results(modality):
    """FFN outputs before the residual (speech, text), block outputs (images), of the last top_k layers."""
    config = tiny_config(modality)
    encoder = TransformerEncoder(config.encoder, 6).eval()
    seen = []
    for layer in encoder.layers:
        layer.fc2.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        output = encoder(torch.randn(2, 37, 32), top_k=2, hidden_states=True)
    assert len(output.layer_results) == 2
    want = output.hidden_states[-2:] if modality == "image" else seen[-2:]
    for a, b in zip(output.layer_results, want, strict=True):
        assert torch.equal(a, b)


def restated_block(layer, x, bias):
    """One layer in float64, step by step, for ``layer`` in float64: its output, and its FFN result."""
    scale1, scale2 = (1 if s is None else s for s in (layer.scale1, layer.scale2))

    def ffn(x):
        return layer.fc2(F.gelu(layer.fc1(x)))

    if layer.pre_norm:
        x = x + scale1 * layer.attention(layer.norm1(x), Scope(bias=bias))
        branch = scale2 * ffn(layer.norm2(x))
        return x + branch, branch
    x = layer.norm1(x + scale1 * layer.attention(x, Scope(bias=bias)))
    branch = ffn(x)
    return layer.norm2(x + scale2 * branch), branch


@pytest.mark.parametrize("layer_scale", [0.0, 0.5])
@pytest.mark.parametrize("layer_result", ["ffn", "block"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_both_norm_forms(norm, layer_result, layer_scale):
    """Outputs, layer results and gradients against a re-statement in float64."""
    options = {"layer_result": layer_result, "layer_scale": layer_scale, **NO_DROPOUT}
    config = replace(tiny_config("image").encoder, norm=norm, **options)
    encoder, exact = TransformerEncoder(config, 6), TransformerEncoder(config, 6).double()
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(0.1 * torch.randn_like(p))
    exact.load_state_dict(encoder.state_dict())
    x = torch.randn(2, 37, 32)
    output = encoder(x, top_k=3, hidden_states=True)
    states, results = [x.double()], []
    for layer in exact.layers:
        state, branch = restated_block(layer, states[-1], exact.relative_bias())
        states.append(state)
        results.append(branch if layer_result == "ffn" else state)
    want = exact.norm(states[-1]) if norm == "pre" else states[-1]
    for got, w in zip([output.x, *output.hidden_states, *output.layer_results], [want, *states, *results], strict=True):
        torch.testing.assert_close(got.double(), w, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(x)
    output.x.backward(upstream)
    want.backward(upstream.double())
    for (name, p), q in zip(encoder.named_parameters(), exact.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_scaled_branch_as_layer_result_in_training():
    """With dropout and DropPath on, the FFN result of a pre-norm layer is still what the layer adds."""
    options = {"layer_result": "ffn", "layer_scale": 0.5, "dropout": 0.3, "drop_path": 0.5}
    encoder = TransformerEncoder(replace(tiny_config("image").encoder, norm="pre", **options), 6)
    layer = encoder.layers[-1]
    h = torch.randn(16, 37, 32)
    (y, out, _), ffn = layer(Stream(layer.norm1(h), h), encoder.norm, Scope())
    torch.testing.assert_close(y, F.layer_norm(out, (32,), eps=1e-6))
    dropped = (ffn == 0).flatten(1).double().mean(1)
    assert set(dropped[dropped == 1].tolist()) == {1.0} and ((dropped == 1) | (dropped - 0.3).abs().lt(0.06)).all()


def test_precision_of_the_residual_stream_under_autocast():
    """LayerScale adds increments of 1e-4, which bfloat16 would lose; post-norm streams stay in bfloat16."""
    x = torch.randn(2, 37, 32)
    for norm, dtype in (("pre", torch.float32), ("post", torch.bfloat16)):
        encoder = TransformerEncoder(replace(tiny_config("image").encoder, norm=norm), 6)
        with torch.autocast("cpu", torch.bfloat16):
            states = encoder(x.bfloat16(), hidden_states=True).hidden_states
        assert all(state.dtype == dtype for state in states[1:])


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_no_layer_left(norm, monkeypatch):
    """LayerDrop may skip all of them."""
    encoder = TransformerEncoder(replace(tiny_config("image").encoder, norm=norm), 6)
    monkeypatch.setattr(encoder, "_kept_layers", list)
    x = torch.randn(2, 37, 32)
    torch.testing.assert_close(encoder(x).x, encoder.norm(x) if norm == "pre" else x)


class SeenOps(TorchDispatchMode):
    """Collects the names of our registered ops that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "d2v_fast":
            self.names.add(func._schema.name.removeprefix("d2v_fast::"))
        return func(*args, **(kwargs or {}))


FUSIONS = {
    "speech": ("bias_gelu", "layer_norm_gelu", "residual_dropout_layer_norm"),
    "image": ("bias_gelu", "residual_dropout_layer_norm"),
    "text": ("bias_gelu", "residual_dropout_layer_norm"),
}


def one_step(modality, autocast=False, **encoder):
    """A model after one update of a tiny recipe, and the update's metrics."""
    torch.manual_seed(0)
    config = tiny_config(modality, **encoder)
    if modality == "text":
        config = replace(config, frontend=replace(config.frontend, dropout=encoder.get("dropout", 0.1)))
    model = Data2Vec(config).train()
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2, eps=1e-3))
    metrics = train_step(model, [tiny_batch(config)], optimizer, lr=1e-2, update=0, autocast=autocast)
    return model, metrics


@pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("modality", FUSIONS)
def test_kernels_take_the_step_of_the_reference(modality, autocast, monkeypatch):
    with SeenOps() as seen:
        model, metrics = one_step(modality, autocast, **NO_DROPOUT)
    assert {f"{name}_{way}" for name in FUSIONS[modality] for way in ("fwd", "bwd")} <= seen.names
    monkeypatch.setattr(_dispatch, "INTERPRET", False)
    with SeenOps() as seen:
        reference, want = one_step(modality, autocast, **NO_DROPOUT)
    assert not any(name.startswith(FUSIONS[modality]) for name in seen.names)
    for name in ("loss", "target_var", "pred_var", "grad_norm"):
        rtol = 3e-2 if autocast else 1e-4
        torch.testing.assert_close(getattr(metrics, name), getattr(want, name), rtol=rtol, atol=1e-5, msg=name)
    if not autocast:  # there the update follows the signs of rounding errors where gradients are tiny
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("modality", FUSIONS)
def test_dropout_is_governed_by_the_seed(modality):
    options = {"dropout": 0.2, "attention_dropout": 0.1, "drop_path": 0.3, "layerdrop": 0.0, "layer_scale": 1.0}
    (first, metrics), (second, again) = (one_step(modality, **options) for _ in range(2))
    assert torch.equal(metrics.loss, again.loss)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    _, without = one_step(modality, **NO_DROPOUT, layer_scale=1.0)
    assert not torch.equal(metrics.loss, without.loss)


def test_initialisation():
    """Speech and text: N(0, 0.02). Images: truncated at one sigma, output projections divided by sqrt(2 depth)."""
    bert = TransformerEncoder(EncoderConfig(layers=2, dim=256, ffn_dim=256, heads=2))
    assert bert.layers[0].attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not bert.layers[0].fc1.bias.any()
    beit = TransformerEncoder(EncoderConfig(layers=2, dim=256, ffn_dim=256, heads=2, norm="pre", init="beit"))
    assert beit.layers[0].fc1.weight.abs().max().item() <= 0.02
    assert beit.layers[0].fc1.weight.std().item() == pytest.approx(0.0108, rel=0.02)
    for depth, layer in enumerate(beit.layers, start=1):
        assert layer.fc2.weight.std().item() == pytest.approx(0.0108 / (2 * depth) ** 0.5, rel=0.03)
        assert layer.attention.out.weight.std().item() == pytest.approx(0.0108 / (2 * depth) ** 0.5, rel=0.03)

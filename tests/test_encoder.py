"""Encoder and attention: float64 re-statements, masks, drop path, LayerDrop, layer results."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config

from d2v_fast.nn.attention import attention
from d2v_fast.nn.config import EncoderConfig
from d2v_fast.nn.encoder import ConvPositions, RelativePositionBias, TransformerEncoder, drop_path_scale


def math_attention(q, k, v, bias=None, padding_mask=None):
    logits = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
    if bias is not None:
        logits = logits + bias.double()
    if padding_mask is not None:
        logits = logits.masked_fill(padding_mask[:, None, None, :], float("-inf"))
    return logits.softmax(-1) @ v.double()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_attention(biased, padded):
    q, k, v = torch.randn(3, 2, 4, 13, 8, requires_grad=True).unbind()
    bias = torch.randn(4, 13, 13, requires_grad=True) if biased else None
    padding = torch.arange(13) >= torch.tensor([[13], [9]]) if padded else None
    got, want = attention(q, k, v, bias=bias, padding_mask=padding), math_attention(q, k, v, bias, padding)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(got)
    inputs = [q, k, v] + ([bias] if biased else [])
    for a, b in zip(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(want, inputs, upstream.double()), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


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

"""Convolutional positions against the modules of fairseq and transformers, with copied weights."""

import copy

import pytest
import torch
from checks import assert_as_accurate_as_eager

from d2v_fast.nn.config import EncoderConfig
from d2v_fast.nn.positions import ConvPositions

DIM, GROUPS, FRAMES = 64, 4, 37


def fairseq_positions(width):
    pytest.importorskip("fairseq", reason="needs ve-fairseq (requirements/peers.txt)")
    import fairseq_peer  # noqa: F401  # makes fairseq importable
    from fairseq.models.wav2vec.wav2vec2 import make_conv_pos

    theirs = make_conv_pos(DIM, width, GROUPS)
    return theirs, lambda x: theirs(x.mT).mT, theirs[0].weight_g, theirs[0].weight_v, theirs[0].bias


def wav2vec2_positions(width):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2PositionalConvEmbedding

    config = transformers.Wav2Vec2Config(
        hidden_size=DIM,
        num_conv_pos_embeddings=width,
        num_conv_pos_embedding_groups=GROUPS,
        feat_extract_activation="gelu",
    )
    theirs = Wav2Vec2PositionalConvEmbedding(config)
    norm = theirs.conv.parametrizations.weight
    return theirs, theirs, norm.original0, norm.original1, theirs.conv.bias


def gradients(function, x, parameters, upstream):
    x = x.detach().requires_grad_()
    y = function(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], upstream.to(y))]


@pytest.mark.parametrize("peer", [fairseq_positions, wav2vec2_positions])
@pytest.mark.parametrize("width", [128, 15])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_one_layer_with_weight_norm(peer, width):
    """Output, and gradients in x, in magnitude and direction of the weights, and in the bias."""
    _, function, *parameters = peer(width)
    ours = ConvPositions(
        EncoderConfig(dim=DIM, heads=2, pos_conv_depth=1, pos_conv_width=width, pos_conv_groups=GROUPS)
    )
    (conv,) = ours.convs
    norm = conv.parametrizations.weight
    if peer is fairseq_positions:  # the other sets initial values elsewhere
        assert not parameters[2].any() and not conv.bias.any()
        assert (parameters[1].std() / norm.original1.std()).item() == pytest.approx(1, rel=0.05)
    with torch.no_grad():
        for mine, other in zip((norm.original0, norm.original1, conv.bias), parameters, strict=True):
            other.add_(0.02 * torch.randn_like(other))
            mine.copy_(other)
    x, upstream = torch.randn(2, FRAMES, DIM), torch.randn(2, FRAMES, DIM)
    got = gradients(ours, x, [norm.original0, norm.original1, conv.bias], upstream)
    want = gradients(function, x, parameters, upstream)
    for g, w in zip(got, want, strict=True):
        assert (g - w).abs().max() <= 1e-5 * w.abs().max()


@pytest.mark.parametrize("depth", [2, 5])
def test_layers_with_norm(depth):
    """data2vec speech as transformers has it; bfloat16 against its own error in bfloat16."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from transformers.models.data2vec.modeling_data2vec_audio import Data2VecAudioPositionalConvEmbedding

    kernel = 95 // depth
    config = transformers.Data2VecAudioConfig(
        hidden_size=DIM,
        conv_pos_kernel_size=kernel,
        num_conv_pos_embeddings=depth,
        num_conv_pos_embedding_groups=GROUPS,
        feat_extract_activation="gelu",
    )
    theirs = Data2VecAudioPositionalConvEmbedding(config)
    ours = ConvPositions(EncoderConfig(dim=DIM, heads=2, pos_conv_depth=depth, pos_conv_groups=GROUPS))
    ours.load_state_dict(
        {k.replace("layers.", "convs.").replace("conv.", ""): v for k, v in theirs.state_dict().items()}
    )
    x, upstream = torch.randn(2, FRAMES, DIM), torch.randn(2, FRAMES, DIM)
    got, want = (gradients(m, x, list(m.parameters()), upstream) for m in (ours, theirs))
    for g, w in zip(got, want, strict=True):
        assert (g - w).abs().max() <= 2e-5 * w.abs().max()

    low, peer = copy.deepcopy(ours).bfloat16(), copy.deepcopy(theirs).bfloat16()
    exact = copy.deepcopy(low).double()
    x, upstream = x.bfloat16(), upstream.bfloat16()
    got, eager = (gradients(m, x, list(m.parameters()), upstream) for m in (low, peer))
    want = gradients(exact, x.double(), list(exact.parameters()), upstream)
    for g, e, w in zip(got, eager, want, strict=True):
        assert_as_accurate_as_eager(g, e, w)

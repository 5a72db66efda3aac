"""The speech front-end against fairseq's and transformers' feature extractors, on the same weights and waveforms."""

from dataclasses import replace

import pytest
import torch
from eager_frontend import relative, saved_bytes
from torch import nn

from d2v_fast.nn import Data2VecConfig, SpeechFrontEnd, pack_waveforms
from d2v_fast.ops import _rows

BF16 = torch.bfloat16
MODES = [("layer", False), ("layer", True), ("group", False), ("group", True)]
LAYERS = [(kernel, stride) for _, kernel, stride in Data2VecConfig.speech().frontend.conv_layers]


def fairseq_convs(norm, bias, width):
    peer = pytest.importorskip("fairseq_peer")
    layers = [(width, *layer) for layer in LAYERS]
    mode = {"layer": "layer_norm", "group": "default"}[norm]
    return peer.ConvFeatureExtractionModel(layers, mode=mode, conv_bias=bias)


def fairseq_names(name):
    """conv_layers.i.0.weight, conv_layers.i.2.1.weight (layer norm), conv_layers.0.2.weight (group norm)."""
    parts = name.split(".")
    return f"convs.{parts[1]}.{'conv' if parts[2] == '0' else 'norm'}.{parts[-1]}"


def transformers_convs(norm, bias, width):
    models = pytest.importorskip("transformers.models.wav2vec2.modeling_wav2vec2", reason="needs transformers")
    config = models.Wav2Vec2Config(
        conv_dim=(width,) * len(LAYERS),
        conv_kernel=[kernel for kernel, _ in LAYERS],
        conv_stride=[stride for _, stride in LAYERS],
        feat_extract_norm=norm,
        conv_bias=bias,
    )
    return models.Wav2Vec2FeatureEncoder(config)


def transformers_names(name):
    return name.replace("conv_layers", "convs").replace("layer_norm", "norm")


PEERS = {"fairseq": (fairseq_convs, fairseq_names), "transformers": (transformers_convs, transformers_names)}


def pair(peer, norm, bias=False, width=32):
    """(their convolutions, ours, names of our parameters in the order of theirs), no weight at a trivial value."""
    make, rename = PEERS[peer]
    theirs = make(norm, bias, width)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
    config = Data2VecConfig.speech()
    layers = tuple((width, *layer) for layer in LAYERS)
    ours = SpeechFrontEnd(
        replace(config.frontend, conv_layers=layers, conv_norm=norm, conv_bias=bias),
        replace(config.encoder, dim=16, heads=1),
    )
    state = {rename(name): v for name, v in theirs.state_dict().items()}
    wrong = ours.load_state_dict(state, strict=False)
    assert not wrong.unexpected_keys and {n.split(".")[0] for n in wrong.missing_keys} <= {
        "norm", "proj", "mask_embedding",
    }  # fmt: skip
    return theirs, ours, [rename(name) for name, _ in theirs.named_parameters()]


def value_and_grads(module, function, upstream, names=None):
    """Frames, and gradients of the module's parameters, those of ``names`` in that order."""
    parameters = dict(module.named_parameters())
    wanted = parameters.values() if names is None else [parameters[name] for name in names]
    y = function()
    return [y.detach(), *torch.autograd.grad(y, list(wanted), upstream.to(y))]


def errors(got, exact):
    """Relative error of each tensor; of one that should vanish (a bias in front of a group norm), its size by that of
    the largest gradient."""
    scale = max(v.double().norm().item() for v in exact[1:])
    return [
        relative(g, e) if e.norm() > 1e-4 * scale else g.double().norm().item() / scale
        for g, e in zip(got, exact, strict=True)
    ]


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("norm", "bias"), MODES)
def test_frames_and_every_gradient(peer, norm, bias):
    theirs, ours, names = pair(peer, norm, bias)
    waves = torch.randn(3, 4567)
    upstream = torch.randn(3, ours.config.num_frames(4567), 32)
    want = value_and_grads(theirs, lambda: theirs(waves).mT, upstream)
    got = value_and_grads(ours, lambda: ours.convolve(waves), upstream, names)
    assert max(errors(got, want)) <= 1e-5, errors(got, want)


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_published_width(norm):
    theirs, ours, names = pair("fairseq", norm, width=512)
    waves = torch.randn(1, 5000)
    upstream = torch.randn(1, ours.config.num_frames(5000), 512)
    want = value_and_grads(theirs, lambda: theirs(waves).mT, upstream)
    got = value_and_grads(ours, lambda: ours.convolve(waves), upstream, names)
    assert max(errors(got, want)) <= 1e-5, errors(got, want)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(peer, norm, autocast):
    """Error against float64 at most twice theirs: bfloat16 weights, or autocast."""
    theirs, ours, names = pair(peer, norm)
    waves = torch.randn(2, 8000)
    upstream = torch.randn(2, 24, 32)
    if not autocast:
        theirs, ours, waves = theirs.to(BF16), ours.to(BF16), waves.to(BF16)
    with torch.autocast("cpu", BF16, enabled=autocast):
        eager = value_and_grads(theirs, lambda: theirs(waves).mT, upstream)
        got = value_and_grads(ours, lambda: ours.convolve(waves), upstream, names)
    wide, waves = ours.double(), waves.double()
    exact = value_and_grads(wide, lambda: wide.convolve(waves), upstream, names)  # as the tests above have shown
    assert got[0].dtype == BF16
    for name, error, budget in zip(["frames", *names], errors(got, exact), errors(eager, exact), strict=True):
        assert error <= 2 * budget + 1e-6, f"{name}: {error:.1e}, theirs {budget:.1e}"


@pytest.mark.parametrize(("norm", "bias"), [("layer", True), ("group", False)])
def test_packed_clips_are_each_alone(norm, bias):
    """Frames, and the gradients of all clips together, against fairseq's of one clip after the other."""
    theirs, ours, names = pair("fairseq", norm, bias)
    waves = [torch.randn(n) for n in (4000, 400, 1999, 2720)]
    packed = pack_waveforms(waves, ours.config)
    upstream = torch.randn(sum(packed.num_frames), 32)
    want = value_and_grads(theirs, lambda: torch.cat([theirs(w[None])[0].T for w in waves]), upstream)
    got = value_and_grads(ours, lambda: packed.valid(ours.convolve(packed)), upstream, names)
    assert max(errors(got, want)) <= 1e-5, errors(got, want)


@pytest.mark.parametrize(("norm", "autocast"), [("layer", False), ("layer", True), ("group", True)])
def test_keeps_at_most_60_percent(norm, autocast, monkeypatch):
    """Bytes kept for backward, counted alike on both sides, by the ops that a GPU runs."""
    monkeypatch.setattr(_rows, "runs_reference", lambda *_: False)
    theirs, ours, _ = pair("fairseq", norm)
    waves = torch.randn(2, 16_000)
    with torch.autocast("cpu", BF16, enabled=autocast):
        mine, _ = saved_bytes(ours, lambda: ours.convolve(waves))
        other, _ = saved_bytes(theirs, lambda: theirs(waves))
    assert mine <= 0.6 * other, mine / other


def test_whole_front_end_of_fairseq():
    """With the norm and projection behind it (``Data2VecAudioModel``), at the published width."""
    theirs, ours, _ = pair("fairseq", "layer", width=512)
    norm, projection = nn.LayerNorm(512), nn.Linear(512, 16)
    with torch.no_grad():
        for p in norm.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ours.norm.load_state_dict(norm.state_dict())
    ours.proj.load_state_dict(projection.state_dict())
    waves = torch.randn(2, 3000)
    with torch.no_grad():
        assert relative(ours.features(waves), projection(norm(theirs(waves).mT))) <= 1e-5

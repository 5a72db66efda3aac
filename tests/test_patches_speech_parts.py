"""fairseq's speech convolutions, attention and norms with our methods, against themselves."""

import copy
from types import SimpleNamespace

import pytest
import torch
from parity import TOLERANCE, assert_equal, float64, relative
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrizations, remove_weight_norm

pytest.importorskip("fairseq_peer")

from fairseq.models.wav2vec import wav2vec2 as upstream
from fairseq.modules import Fp32GroupNorm, Fp32LayerNorm, MultiheadAttention
from fairseq_speech import CONVS, FINE, both, gradients, make_encoder, moved, padding, patched

from d2v_fast.patches._core import Options, Patch, Site, is_ours
from d2v_fast.patches.fairseq import attention as attention_seam
from d2v_fast.patches.fairseq import norms, wav2vec2

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


def test_layers_as_on_a_gpu(monkeypatch):
    """There GELU has the bias of the linear layer in front of it."""
    monkeypatch.setattr(norms, "runs_reference", lambda *args: False)
    theirs = make_encoder(encoder_layerdrop=0.0)
    ours, _ = patched(theirs, FINE)
    both(theirs, ours, torch.randn(2, 11, 32), padding(11), TOLERANCE)


@pytest.mark.parametrize("affine", [True, False])
def test_norms_without_copies_in_float32(affine, monkeypatch):
    """As on a GPU in low precision; elsewhere they are upstream's."""
    layer, group = Fp32LayerNorm(32, elementwise_affine=affine), Fp32GroupNorm(32, 32, affine=affine)
    for theirs, shape in ((layer, (2, 50, 32)), (group, (2, 32, 50))):
        theirs = moved(theirs).bfloat16()
        ours, handle = copy.deepcopy(theirs), Patch("test")
        handle.apply([Site("", ours, wav2vec2.SEAMS[type(ours).__name__])], Options())
        x = 3 * torch.randn(shape).bfloat16() + 1
        assert torch.equal(ours(x), theirs(x))
        with monkeypatch.context() as context:
            context.setattr(norms, "_low", lambda *args: True)
            got = ours(x)
        assert got.dtype == torch.bfloat16 and relative(got.float(), theirs(x).float()) < 2e-3


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", ["layer_norm", "default"])
def test_extractor(mode, bias):
    with float64():
        theirs = moved(upstream.ConvFeatureExtractionModel(CONVS, mode=mode, conv_bias=bias))
        ours, handle = patched(theirs)
        x = torch.randn(3, 3_000)
        found = []
        for module in (theirs, ours):
            y = module(x)
            y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
            found.append((y, gradients(module)))
        (want, want_gradients), (got, got_gradients) = found
        assert got.shape == want.shape and relative(got, want) <= 1e-11
        if mode == "default":  # the norm takes a bias in front of it away: its gradient is rounding
            for grads in (want_gradients, got_gradients):
                grads.pop("conv_layers.0.0.bias", None)
        assert_equal(got_gradients, want_gradients, 1e-10)
    assert not handle.fallbacks()


def test_clips_without_frames():
    """Upstream's error, and its empty result."""
    theirs = moved(upstream.ConvFeatureExtractionModel(CONVS, mode="layer_norm"))
    ours, handle = patched(theirs)
    for shape in ((1, 399), (2, 300), (400,)):
        with pytest.raises(RuntimeError) as want:
            theirs(torch.randn(shape))
        with pytest.raises(RuntimeError) as got:
            ours(torch.randn(shape))
        assert str(got.value) == str(want.value)
    assert ours(torch.randn(0, 500)).shape == (0, 16, 1) and ours(torch.randn(1, 400)).shape == (1, 16, 1)
    assert not handle.fallbacks()


def test_gradients_of_waveforms():
    theirs = moved(upstream.ConvFeatureExtractionModel(CONVS, mode="default"))
    ours, _ = patched(theirs)
    x, grads = torch.randn(2, 3_000), []
    for module in (theirs, ours):
        leaf = x.clone().requires_grad_()
        module(leaf).pow(2).sum().backward()
        grads.append(leaf.grad)
    assert relative(grads[1], grads[0]) <= TOLERANCE


def test_extractor_that_ours_does_not_follow():
    dropped = moved(upstream.ConvFeatureExtractionModel(CONVS, dropout=0.5, mode="default"))
    ours, handle = patched(dropped)
    x = torch.randn(2, 3_000)
    ours(x)
    ours.eval()
    torch.testing.assert_close(ours(x), dropped.eval()(x), rtol=1e-4, atol=1e-5)
    assert handle.fallbacks() == {
        ("ConvFeatureExtractionModel.forward", "there is dropout between the convolutions"): 1
    }
    ours.conv_layers[2].register_forward_hook(lambda *args: None)
    ours(x)
    assert len(handle.fallbacks()) == 2
    ours.conv_layers[2][0] = nn.Conv1d(16, 16, 3, 2, dilation=2, bias=False)
    assert wav2vec2.EXTRACTOR.refuses(ours).startswith("conv_layers.2 is not a plain convolution")


@pytest.mark.parametrize("mode", ["layer_norm", "default"])
def test_extractor_that_was_changed(mode):
    """After its first call: a finer stride for more frames, and another eps."""
    theirs = moved(upstream.ConvFeatureExtractionModel(CONVS, mode=mode))
    ours, handle = patched(theirs)
    x = torch.randn(2, 3_000)
    assert ours(x).shape == theirs(x).shape
    for module in (theirs, ours):
        module.conv_layers[6][0].stride = (1,)
        norm = module.conv_layers[0][2]
        (norm if mode == "default" else norm[1]).eps = 0.1
    got, want = ours(x), theirs(x)
    assert got.shape == want.shape and relative(got, want) <= TOLERANCE
    assert not handle.fallbacks()


def test_extractor_in_float64_on_another_device():
    theirs = moved(upstream.ConvFeatureExtractionModel(CONVS, mode="layer_norm")).double().to("meta")
    ours, handle = patched(theirs)
    assert ours(torch.empty(2, 3_000, dtype=torch.float64, device="meta")).shape[:2] == (2, 16)
    reason = "float64 on meta: the kernels accumulate in float32"
    assert handle.fallbacks()["ConvFeatureExtractionModel.forward", reason] == 1


@pytest.mark.parametrize("depth", [1, 5])
def test_positions(depth):
    """By their own seam, with the weight norm of either kind, or taken off."""
    theirs = make_encoder(depth)
    ours, _ = patched(theirs, FINE)
    x = torch.randn(2, 32, 11)

    def same():
        torch.testing.assert_close(ours.pos_conv(x), theirs.pos_conv(x), rtol=1e-4, atol=1e-5)
        assert is_ours(ours.pos_conv.forward)

    same()
    if depth == 1:
        for module in (theirs, ours):
            remove_weight_norm(module.pos_conv[0])
        same()
        for module in (theirs, ours):
            parametrizations.weight_norm(module.pos_conv[0], dim=2)
        same()


def test_attention_takes_what_it_can(monkeypatch):
    calls = []
    real = attention_seam.attention
    monkeypatch.setattr(attention_seam, "attention", lambda *a, **k: calls.append(1) or real(*a, **k))
    theirs = moved(MultiheadAttention(32, 4, self_attention=True, dropout=0.0))
    ours, handle = copy.deepcopy(theirs), Patch("test")
    handle.apply([Site("", ours, wav2vec2.ATTENTION)], Options())
    x, mask = torch.randn(11, 2, 32), padding(11)
    for number, options in (
        (1, {"need_weights": False}),
        (2, {"need_weights": False, "key_padding_mask": mask}),
        (3, {"need_weights": False, "key_padding_mask": mask.byte()}),
        (3, {"need_weights": True}),
        (3, {"need_weights": False, "attn_mask": torch.zeros(11, 11)}),
        (3, {"need_weights": False, "incremental_state": {}}),
    ):
        want, got = (module(x, x, x, **copy.copy(options)) for module in (theirs, ours))
        assert relative(got[0], want[0]) <= TOLERANCE and (got[1] is None) == (want[1] is None)
        assert len(calls) == number
    assert not handle.fallbacks()  # those are other uses


def test_when_attention_drops(monkeypatch):
    rates = []
    monkeypatch.setattr(attention_seam, "attention", lambda q, k, v, dropout_p, **_: rates.append(dropout_p) or v)
    module = moved(MultiheadAttention(32, 4, self_attention=True, dropout=0.3))
    Patch("test").apply([Site("", module, wav2vec2.ATTENTION)], Options())
    x = torch.randn(11, 2, 32)
    for training, always in ((True, False), (False, False), (False, True)):
        module.train(training).dropout_module.apply_during_inference = always
        module(x, x, x, need_weights=False)
    assert rates == [0.3, 0.0, 0.3]


def test_float64_is_not_low_precision():
    """What upstream computes in float32 gains nothing there, and would have other numbers."""
    norm = SimpleNamespace(weight=None)
    with FakeTensorMode():
        found = {dtype: norms._low(norm, torch.empty(2, 3, dtype=dtype, device="cuda")) for dtype in DTYPES}
    assert found == {torch.bfloat16: True, torch.float16: True, torch.float32: False, torch.float64: False}

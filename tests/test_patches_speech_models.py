"""wav2vec 2.0 and HuBERT with our methods in them: whole models, their classes, copies and compilers."""

import copy
from types import SimpleNamespace

import pytest
import torch
from parity import TOLERANCE, assert_equal, relative
from torch import nn

pytest.importorskip("fairseq_peer")

from fairseq.models.wav2vec import wav2vec2 as upstream
from fairseq.modules import MultiheadAttention
from fairseq_speech import gradients, hubert, loss_of, make_encoder, patched, wav2vec

from d2v_fast.patches import patch
from d2v_fast.patches._core import Options, Patch, Site, is_ours, state_of
from d2v_fast.patches.fairseq import wav2vec2

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


@pytest.mark.parametrize("settings", [{}, {"extractor_mode": "layer_norm", "layer_norm_first": True}])
@pytest.mark.parametrize("make", [wav2vec, hubert])
def test_whole_models(make, settings):
    model = make(**settings)
    keys, names = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    want = loss_of(model)
    want.backward()
    want_gradients = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    with patch(model) as handle:
        got = loss_of(model)
        got.backward()
        got_gradients = {name: grad.clone() for name, grad in gradients(model).items()}
        assert list(model.state_dict()) == keys and [name for name, _ in model.named_parameters()] == names
        assert is_ours(model.encoder.extract_features) and is_ours(model.feature_extractor.forward)
        assert not handle.fallbacks() and not handle.skipped
    assert relative(got, want) <= TOLERANCE
    assert got_gradients.keys() == want_gradients.keys()
    assert_equal(got_gradients, want_gradients, TOLERANCE)
    model.zero_grad()
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys(), name
    assert torch.equal(loss_of(model), want)  # bit by bit what it was


def test_the_report():
    handle = patch(wav2vec(), norms=False)
    assert [line for line in str(handle).splitlines()[1:] if "apply_mask" not in line] == REPORT


REPORT = """\
  replaced    1 x feature_extractor ConvFeatureExtractionModel.forward      conv       {conv}  never called
  replaced    1 x encoder TransformerEncoder.extract_features               encoder    {encoder}  never called
  replaced    1 x encoder.pos_conv Sequential.forward                       conv       {positions}  never called
  replaced    3 x encoder.layers.*.self_attn MultiheadAttention.forward     attention  {attention}  never called
  left        1 x feature_extractor.conv_layers.*.* Fp32GroupNorm.forward   norms      norms=False
  left        3 x encoder.layers.* TransformerSentenceEncoderLayer.forward  norms      norms=False""".format(
    conv="convolution, norm and GELU in one op each, channels last",
    encoder="all layers by our encoder: fused norms and GELU, one projection, best attention",
    positions="convolution, norm and GELU in one op, for calls that the encoder leaves",
    attention="the best backend there is, for calls that the encoder leaves",
).splitlines()


def test_copies_have_their_own_parameters():
    """A teacher is a copy of a patched encoder."""
    theirs = make_encoder(encoder_layerdrop=0.0)
    ours, handle = patched(theirs)
    x = torch.randn(2, 12, 32)
    ours(x)
    teacher = copy.deepcopy(ours)
    assert is_ours(teacher.extract_features)
    with torch.no_grad():
        for p in teacher.parameters():
            p.zero_()
        assert relative(ours(x)[0], theirs(x)[0]) <= TOLERANCE
        assert teacher(x)[0].abs().max() == 0
        teacher.load_state_dict(theirs.state_dict())
        assert relative(teacher(x)[0], theirs(x)[0]) <= TOLERANCE
    handle.revert()
    assert not is_ours(teacher.extract_features) and teacher.__dict__.keys() == theirs.__dict__.keys()


def test_a_teacher_that_is_there_already():
    model = nn.Module()
    model.encoder = make_encoder()
    model.ema = SimpleNamespace(model=copy.deepcopy(model.encoder))
    paths = [site.path for site in wav2vec2.sites(model, Patch("test"), Options())]
    assert "encoder" in paths and "ema.model" in paths and "ema.model.layers.2.self_attn" in paths


def test_classes_of_the_same_names_are_left_alone():
    from fairseq.models.transformer import TransformerEncoder

    assert (
        wav2vec2.seams(TransformerEncoder) == wav2vec2.seams(nn.MultiheadAttention) == wav2vec2.seams(nn.Linear) == []
    )
    assert wav2vec2.seams(upstream.TransformerEncoder) == [wav2vec2.ENCODER]


def test_at_the_classes():
    """As patch_all puts them there: instances made before and after, and all as it was in the end."""
    theirs = make_encoder(encoder_layerdrop=0.0)
    x = torch.randn(2, 11, 32)
    want, other = theirs(x)[0], make_encoder(activation_fn="relu")
    kinds = (upstream.TransformerEncoder, upstream.TransformerSentenceEncoderLayer, MultiheadAttention)
    handle = Patch("classes")
    before = [kind.__dict__ for kind in kinds]
    with handle.apply([Site("", kind, seam) for kind in kinds for seam in wav2vec2.seams(kind)], Options()):
        assert len(handle.applied) == 3
        assert wav2vec2.shared_encoder(theirs, Options()) is not None
        got = theirs(x)[0]
        assert relative(got, want) <= TOLERANCE and not torch.equal(got, want)
        other(x)  # its settings are looked at in the call
        reason = "layers.0 has another activation than GELU"
        assert state_of(other).fallbacks == {("extract_features", reason): 1}
    assert [kind.__dict__ for kind in kinds] == before
    assert torch.equal(theirs(x)[0], want)


def test_compiles():
    """In one graph, before any other call; upstream does as well."""
    theirs = make_encoder(encoder_layers=1, encoder_layerdrop=0.0)
    ours, handle = patched(theirs)
    x = torch.randn(2, 11, 32)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    got, want = compiled(x)[0], theirs(x)[0]
    assert relative(got, want) <= TOLERANCE
    got.sum().backward(), want.sum().backward()
    assert gradients(ours).keys() == gradients(theirs).keys()
    assert not handle.fallbacks()

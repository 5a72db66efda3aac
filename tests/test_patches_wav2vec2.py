"""fairseq's speech stack with our methods in it, against itself without: wav2vec 2.0, HuBERT and their parts.

Dropout is 0 where numbers are compared; LayerDrop is not, as its draws are upstream's.
"""

import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from parity import TOLERANCE, assert_equal, float64, relative
from torch import nn
from torch.nn.utils import parametrizations, remove_weight_norm

pytest.importorskip("fairseq_peer")

import fairseq_peer as peer
from fairseq.models.hubert.hubert import HubertConfig, HubertModel
from fairseq.models.wav2vec import wav2vec2 as upstream
from fairseq.modules import MultiheadAttention
from fairseq.modules.checkpoint_activations import checkpoint_wrapper, unwrap_checkpoint

from d2v_fast.patches import PatchError, patch
from d2v_fast.patches._core import PARTS, Options, Patch, Site, is_ours, state_of
from d2v_fast.patches._sharing import copy_memo
from d2v_fast.patches.fairseq import attention as attention_seam
from d2v_fast.patches.fairseq import wav2vec2

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
ENCODER = {"encoder_layers": 3, "encoder_embed_dim": 32, "encoder_ffn_embed_dim": 48, "encoder_attention_heads": 4}
CONVS = [(16, 10, 5), *[(16, 3, 2)] * 4, *[(16, 2, 2)] * 2]
SETTINGS = {
    **ENCODER,
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "encoder_layerdrop": 0.3,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
WHOLE = {"dropout_input": 0.0, "dropout_features": 0.0, "conv_feature_layers": str(CONVS), "final_dim": 16}
FINE = Options(frozenset(PARTS) - {"encoder"})  # the seams below the encoder


def moved(module: nn.Module) -> nn.Module:
    """With biases and norms away from 0 and 1, in training mode and the default dtype."""
    module.to(torch.get_default_dtype())
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return module.train()


def make_encoder(depth: int = 5, batch_norm: bool = False, **settings) -> nn.Module:
    config = upstream.Wav2Vec2Config(**{**SETTINGS, "conv_pos": 95 if depth > 1 else 16, **settings})
    config.pos_conv_depth, config.conv_pos_batch_norm = depth, batch_norm
    return moved(upstream.TransformerEncoder(config))


def patched(module: nn.Module, options: Options | None = None) -> tuple[nn.Module, Patch]:
    """A copy of a part with our methods in it."""
    options = options or Options()
    copied, handle = copy.deepcopy(module, copy_memo(module)), Patch("test")
    handle.apply(wav2vec2.sites(copied, handle, options), options)
    return copied, handle


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    """Of all parameters that have one; of keys' biases it is rounding."""
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {name: grad for name, grad in found.items() if "k_proj.bias" not in name}


def padding(T: int) -> torch.Tensor:
    mask = torch.zeros(2, T, dtype=torch.bool)
    mask[1, 7:] = True
    return mask


def both(theirs: nn.Module, ours: nn.Module, x: torch.Tensor, mask: torch.Tensor | None, tolerance: float, **options):
    """Outputs, layer results and gradients of ``extract_features`` are the same, and what NumPy draws next."""
    valid = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else ~mask
    upstream_grad = torch.randn_like(x) * valid[..., None]
    found = []
    for module in (theirs, ours):
        np.random.seed(3)
        out, layers = module.extract_features(x.clone(), mask, **options)
        drawn = np.random.random()
        assert all(weights is None for _, weights, _ in layers)
        states = [y.transpose(0, 1)[valid] for output, _, result in layers for y in (output, result)]
        module.zero_grad()
        out.backward(upstream_grad)
        found.append((dict(enumerate([out[valid], *states])), gradients(module), drawn))
    (want, want_gradients, drawn), (got, got_gradients, drawn_by_ours) = found
    assert drawn == drawn_by_ours and len(got) == len(want) and got_gradients.keys() == want_gradients.keys()
    assert_equal(got, want, tolerance)
    assert_equal(got_gradients, want_gradients, tolerance)


@pytest.mark.parametrize("options", [Options(), FINE], ids=["encoder", "fine"])
@pytest.mark.parametrize("depth", [1, 5])
@pytest.mark.parametrize("pre", [False, True], ids=["post", "pre"])
def test_encoder_in_float64(pre, depth, options):
    """With and without padding, odd numbers of frames included, to the rounding of float64."""
    with float64():
        theirs = make_encoder(depth, layer_norm_first=pre)
        ours, handle = patched(theirs, options)
        for T, mask in ((11, None), (12, padding(12)), (11, padding(11))):
            both(theirs, ours, torch.randn(2, T, 32), mask, 1e-11)
    assert not handle.fallbacks()


@pytest.mark.parametrize("options", [Options(), FINE], ids=["encoder", "fine"])
def test_encoder_in_float32(options):
    theirs = make_encoder()
    ours, _ = patched(theirs, options)
    both(theirs, ours, torch.randn(2, 11, 32), padding(11), TOLERANCE)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("which", [{"tgt_layer": 1}, {"min_layer": 2}, {"tgt_layer": 0, "min_layer": 5}])
def test_layers_that_are_asked_for(which, training):
    theirs = make_encoder().train(training)
    ours, handle = patched(theirs)
    both(theirs, ours, torch.randn(2, 11, 32), padding(11), TOLERANCE, **which)
    assert not handle.fallbacks()


def test_all_layers_dropped():
    theirs = make_encoder(encoder_layerdrop=1.0)
    ours, _ = patched(theirs)
    both(theirs, ours, torch.randn(2, 11, 32), None, TOLERANCE)


def test_padding_is_zeroed_in_place():
    """As upstream does: HuBERT returns what it passed."""
    ours, _ = patched(make_encoder())
    x = torch.randn(2, 11, 32)
    with torch.no_grad():
        ours(x, padding(11))
    assert x[padding(11)].abs().max() == 0 < x[~padding(11)].abs().min()


def test_forward_of_the_encoder():
    """With its own final norm, also where that is the last of a pre-norm encoder."""
    for pre in (False, True):
        theirs = make_encoder(layer_norm_first=pre).eval()
        ours, _ = patched(theirs)
        x = torch.randn(2, 11, 32)
        with torch.no_grad():
            for layer in (None, 1):
                assert relative(ours(x.clone(), layer=layer)[0], theirs(x.clone(), layer=layer)[0]) <= TOLERANCE


def test_dtypes_under_autocast():
    for pre in (False, True):
        theirs = make_encoder(layer_norm_first=pre, encoder_layerdrop=0.0)
        ours, _ = patched(theirs)
        fine, _ = patched(theirs, FINE)
        x = torch.randn(2, 11, 32)
        with torch.autocast("cpu", torch.bfloat16):
            want = theirs(x.clone())[0]
            for module in (ours, fine):
                got = module(x.clone())[0]
                assert got.dtype == want.dtype and relative(got.float(), want.float()) < 2e-2
        half = theirs.bfloat16()
        low, _ = patched(half)
        got, want = (module(x.bfloat16())[0] for module in (low, half))
        assert got.dtype == want.dtype == torch.bfloat16 and relative(got.float(), want.float()) < 3e-2


def test_rates_of_dropout_are_read_at_every_call():
    theirs = make_encoder(dropout=0.5, attention_dropout=0.5, activation_dropout=0.5, encoder_layerdrop=0.0)
    ours, handle = patched(theirs)
    x = torch.randn(2, 12, 32)
    first, second = ours(x)[0], ours(x)[0]
    assert relative(first, second) > 0.1  # drawn again
    torch.manual_seed(0)
    once = ours(x)[0]
    torch.manual_seed(0)
    torch.testing.assert_close(ours(x)[0], once)
    for module in (theirs, ours):
        module.dropout = 0.0
        for part in module.modules():
            if isinstance(part, nn.Dropout) or type(part).__name__ == "FairseqDropout":
                part.p = 0.0
    both(theirs, ours, x, None, TOLERANCE)
    ours.layers[1].dropout1.p = 0.2
    ours(x)
    ((_, reason),) = handle.fallbacks()
    assert reason == "dropout behind attention and FFN differs: 0.2 and 0.0"


def test_layers_in_eval_mode_have_no_dropout():
    theirs = make_encoder(dropout=0.5, attention_dropout=0.5, encoder_layerdrop=0.0)
    theirs.dropout = 0.0
    theirs.layers.eval()
    ours, handle = patched(theirs)
    both(theirs, ours, torch.randn(2, 12, 32), None, TOLERANCE)
    ours.eval()
    ours.layers[2].train()
    ours(torch.randn(2, 12, 32))
    ((_, reason),) = handle.fallbacks()
    assert reason == "there is dropout although the encoder is in eval mode"


def test_results_of_pre_norm_layers_with_dropout_are_upstreams():
    ours, handle = patched(make_encoder(layer_norm_first=True, dropout=0.1))
    ours(torch.randn(2, 12, 32))
    assert handle.fallbacks() == {
        ("TransformerEncoder.extract_features", "layer results of pre-norm layers are those before dropout"): 1
    }
    ours.eval()(torch.randn(2, 12, 32))
    assert handle.fallbacks().total() == 1


@pytest.mark.parametrize("where", ["layers.1.fc1", "layers.0.self_attn.q_proj", "pos_conv.2.3"])
def test_probes_see_their_modules_called(where):
    theirs = make_encoder(encoder_layerdrop=0.0)
    ours, handle = patched(theirs)
    x, seen = torch.randn(2, 12, 32), []
    probe = ours.get_submodule(where).register_forward_pre_hook(lambda *args: seen.append(args))
    both(theirs, ours, x, None, TOLERANCE)
    reason = f"{where} has hooks, which want to see it called"
    assert handle.fallbacks()["TransformerEncoder.extract_features", reason] == 1 == len(seen)
    probe.remove()
    count = handle.fallbacks().total()
    both(theirs, ours, x, None, TOLERANCE)
    assert handle.fallbacks().total() == count and len(seen) == 1


class Adapted(nn.Linear):
    """A linear layer with something added, as adapters have."""

    def forward(self, x):
        return super().forward(x) + x.mean()


@pytest.mark.parametrize("name", ["fc1", "fc2"])
def test_layers_that_were_replaced(name):
    """After the patch and its first call: adapters run, and nothing else changes."""
    theirs = make_encoder(encoder_layerdrop=0.0)
    ours, handle = patched(theirs)
    x = torch.randn(2, 12, 32)
    both(theirs, ours, x, None, TOLERANCE)
    for module in (theirs, ours):
        old = getattr(module.layers[1], name)
        new = Adapted(old.in_features, old.out_features)
        new.load_state_dict(theirs.layers[1].get_submodule(name).state_dict())
        setattr(module.layers[1], name, new)
    both(theirs, ours, x, None, TOLERANCE)
    assert ("TransformerEncoder.extract_features", f"layers.1.{name} is a Adapted") in handle.fallbacks()


def test_fewer_layers():
    """Fine-tuning throws the last ones away."""
    theirs = make_encoder(encoder_layerdrop=0.0)
    ours, handle = patched(theirs)
    both(theirs, ours, torch.randn(2, 12, 32), None, TOLERANCE)
    for module in (theirs, ours):
        module.layers = nn.ModuleList(list(module.layers)[:2])
    both(theirs, ours, torch.randn(2, 12, 32), None, TOLERANCE)
    assert not handle.fallbacks()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"activation_fn": "relu"}, "layers.0 has another activation than GELU"),
        ({"batch_norm": True, "depth": 1}, "pos_conv: 0 is a BatchNorm1d"),
        ({"layer_type": "trf_adp", "adp_trf_idx": "1:2", "adp_num": 1, "adp_dim": 4}, "layers.1 is a "),
    ],
)
def test_settings_that_ours_does_not_follow(settings, reason):
    """They stay as they are, and say why."""
    theirs = make_encoder(**settings)
    handle = Patch("test")
    handle.apply(wav2vec2.sites(theirs, handle, Options()), Options())
    skipped = {s.name: s.reason for s in handle.skipped}
    assert not is_ours(theirs.extract_features)
    assert skipped["TransformerEncoder.extract_features"].startswith(reason)


def test_checkpointed_layers():
    """What fairseq computes again in backward, ours does as well."""
    theirs = make_encoder(checkpoint_activations=True, encoder_layerdrop=0.0)
    ours, handle = patched(theirs)
    both(theirs, ours, torch.randn(2, 11, 32), padding(11), TOLERANCE)
    assert wav2vec2.shared_encoder(ours, Options()).config.checkpointing == "full"
    assert not handle.fallbacks() and all(skipped.harmless for skipped in handle.skipped)
    unwrap_checkpoint(ours)
    both(theirs, ours, torch.randn(2, 11, 32), None, TOLERANCE)
    assert wav2vec2.shared_encoder(ours, Options()).config.checkpointing == "none"
    checkpoint_wrapper(ours.layers[1])
    both(theirs, ours, torch.randn(2, 11, 32), None, TOLERANCE)
    reason = "layers.1: activations of some layers are checkpointed, of others not"
    assert handle.fallbacks() == {("TransformerEncoder.extract_features", reason): 1}


def test_a_layer_of_a_changed_source():
    """Somebody's own forward in the class of the layers is not ours to replace."""
    theirs = make_encoder()

    class TransformerSentenceEncoderLayer(upstream.TransformerSentenceEncoderLayer):
        def forward(self, x, **options):
            return super().forward(2 * x, **options)

    theirs.layers[1].__class__ = TransformerSentenceEncoderLayer
    reason = "the source of TransformerSentenceEncoderLayer.forward is not one that ours was written from"
    assert wav2vec2.ENCODER.refuses(theirs) == reason


def test_strict_raises_at_the_call():
    options = Options(strict=True)
    ours, _ = patched(make_encoder(), options)
    ours.layers[0].fc1.register_forward_hook(lambda *args: None)
    with pytest.raises(PatchError, match=r"layers\.0\.fc1 has hooks"):
        ours(torch.randn(2, 12, 32))


def test_shared_encoder():
    """What a whole model's forward asks for: ours while the seam is in force, and nothing where it is not."""
    theirs = make_encoder()
    ours, handle = patched(theirs)
    x, options = torch.randn(2, 11, 32), Options()
    np.random.seed(1)
    kept = wav2vec2.kept_layers(ours)
    encoder = wav2vec2.shared_encoder(ours, options)
    np.random.seed(1)
    assert relative(encoder(x, kept=kept).x, theirs(x)[0]) <= TOLERANCE
    assert wav2vec2.shared_encoder(theirs, options) is None
    assert wav2vec2.shared_encoder(ours, FINE) is None
    probe = ours.register_forward_hook(lambda *args: None)  # of the encoder itself: it would not be called
    assert wav2vec2.shared_encoder(ours, options) is None
    probe.remove()
    assert wav2vec2.shared_encoder(ours, options) is encoder
    handle.revert()
    assert wav2vec2.shared_encoder(ours, options) is None


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


def wav2vec(**settings) -> nn.Module:
    config = upstream.Wav2Vec2Config(**{**SETTINGS, **WHOLE, "num_negatives": 5, **settings})
    return moved(upstream.Wav2Vec2Model(config))


def hubert(**settings) -> nn.Module:
    config = HubertConfig(**{**SETTINGS, **WHOLE, "label_rate": 50, "mask_length": 3, **settings})
    dictionary = peer.fairseq.data.Dictionary()
    for i in range(7):
        dictionary.add_symbol(str(i))
    return moved(HubertModel(config, SimpleNamespace(sample_rate=16_000), [dictionary]))


def loss_of(model: nn.Module) -> torch.Tensor:
    """The model's own pretraining loss, of seeds that are the same for every call."""
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    waves, mask = torch.randn(2, 8_000), torch.zeros(2, 8_000, dtype=torch.bool)
    mask[1, 6_000:] = True
    chosen = torch.arange(48).view(2, 24) % 3 == 0
    if isinstance(model, HubertModel):
        model.apply_mask = lambda x, *rest: (torch.where(chosen[..., None], model.mask_emb, x), chosen)
        out = model(waves, target_list=[torch.arange(48).view(2, 24) % 7], padding_mask=mask)
        del model.apply_mask
        loss = sum(nn.functional.cross_entropy(x, x.new_zeros(len(x), dtype=torch.long)) for x in model.get_logits(out))
        return loss + out["features_pen"]
    out = model(waves, padding_mask=mask, mask_indices=chosen)
    return nn.functional.cross_entropy(model.get_logits(out), model.get_targets(None, out)) + out["features_pen"]


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
    assert str(handle).splitlines()[1:] == REPORT


REPORT = """\
  replaced    1 x feature_extractor ConvFeatureExtractionModel.forward      conv       {conv}, channels last
  replaced    1 x encoder TransformerEncoder.extract_features               encoder    {encoder}
  replaced    1 x encoder.pos_conv Sequential.forward                       conv       {positions}
  replaced    3 x encoder.layers.*.self_attn MultiheadAttention.forward     attention  {attention}
  left        1 x feature_extractor.conv_layers.*.* Fp32GroupNorm.forward   norms      norms=False
  left        3 x encoder.layers.* TransformerSentenceEncoderLayer.forward  norms      norms=False""".format(
    conv="convolution, norm and GELU in one op each",
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

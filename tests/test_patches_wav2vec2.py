"""fairseq's speech Transformer computed by ours, against itself."""

import numpy as np
import pytest
import torch
from parity import TOLERANCE, float64, relative
from torch import nn

pytest.importorskip("fairseq_peer")

from fairseq.models.wav2vec import wav2vec2 as upstream
from fairseq.modules.checkpoint_activations import checkpoint_wrapper, unwrap_checkpoint
from fairseq_speech import FINE, both, make_encoder, padding, patched

from d2v_fast.patches import PatchError
from d2v_fast.patches._core import Options, Patch, is_ours
from d2v_fast.patches.fairseq import wav2vec2

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


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


@pytest.mark.parametrize("options", [Options(), FINE], ids=["encoder", "fine"])
def test_eps_of_every_norm(options):
    for pre in (False, True):
        theirs = make_encoder(layer_norm_first=pre)
        norms = [module for module in theirs.modules() if isinstance(module, nn.LayerNorm)]
        for number, norm in enumerate(norms):
            norm.eps = 0.01 * number if norm.elementwise_affine else 0.3  # those of the positions have one
        ours, handle = patched(theirs, options)
        both(theirs, ours, torch.randn(2, 11, 32), None, TOLERANCE)
        assert not handle.fallbacks()


def test_settings_that_change_after_the_first_call():
    theirs = make_encoder(encoder_layerdrop=0.0)
    ours, handle = patched(theirs)
    x = torch.randn(2, 11, 32)
    both(theirs, ours, x, None, TOLERANCE)
    for path in ("layers.0.final_layer_norm", "layers.2.self_attn_layer_norm", "layer_norm"):
        for module in (theirs, ours):
            module.get_submodule(path).eps = 0.1
        both(theirs, ours, x, None, TOLERANCE)
    for module in (theirs, ours):
        for block in module.pos_conv:
            block[3].eps = 0.2
    both(theirs, ours, x, None, TOLERANCE)
    assert not handle.fallbacks()
    for module in (theirs, ours):
        module.layers[0].activation_fn = nn.functional.relu
    both(theirs, ours, x, None, TOLERANCE)
    reason = "layers.0 has another activation than GELU"
    assert handle.fallbacks()["TransformerEncoder.extract_features", reason] == 1


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


def test_each_rate_of_dropout_is_its_own():
    """Numbers cannot show them: ours draws others than upstream."""
    theirs = make_encoder(dropout=0.1, attention_dropout=0.2, activation_dropout=0.3)
    for i, layer in enumerate(theirs.layers):
        layer.dropout2.p += 0.1 * i
    ours, _ = patched(theirs)
    blocks = wav2vec2.shared_encoder(ours, Options()).layers
    assert [(x.dropout, x.attention.dropout, x.activation_dropout) for x in blocks] == [
        (layer.dropout1.p, layer.self_attn.dropout_module.p, layer.dropout2.p) for layer in theirs.layers
    ]
    assert wav2vec2.shared_encoder(ours, Options()).config.dropout == 0.1
    ours.eval()
    blocks = wav2vec2.shared_encoder(ours, Options()).layers
    assert {(x.dropout, x.attention.dropout, x.activation_dropout) for x in blocks} == {(0.0, 0.0, 0.0)}


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


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
@pytest.mark.parametrize(
    "where", ["layers.1.fc1", "layers.0.self_attn.q_proj", "pos_conv.2.3", "pos_conv", "layer_norm"]
)
def test_probes_see_their_modules_called(where, kind):
    theirs = make_encoder(encoder_layerdrop=0.0)
    ours, handle = patched(theirs)
    x, seen = torch.randn(2, 12, 32), []
    probe = getattr(ours.get_submodule(where), f"register_{kind}_hook")(lambda *args: seen.append(1))
    both(theirs, ours, x, None, TOLERANCE)
    reason = f"{where} has hooks, which want to see it called"
    assert handle.fallbacks()["TransformerEncoder.extract_features", reason] == 1 == len(seen)
    probe.remove()
    count = handle.fallbacks().total()
    both(theirs, ours, x, None, TOLERANCE)
    assert handle.fallbacks().total() == count and len(seen) == 1


@pytest.mark.parametrize("where", ["pos_conv", "layer_norm"])
def test_a_forward_of_somebody_else(where):
    theirs = make_encoder(encoder_layerdrop=0.0)
    ours, handle = patched(theirs)
    for module in (theirs, ours):
        part = module.get_submodule(where)
        part.forward = lambda x, before=part.forward: 2 * before(x)
    both(theirs, ours, torch.randn(2, 12, 32), None, TOLERANCE)
    reason = f"{where} has another forward, by somebody else"
    assert handle.fallbacks() == {("TransformerEncoder.extract_features", reason): 1}


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


class Doubled(upstream.TransformerEncoder):
    """With something of its own around upstream's forward."""

    def forward(self, x, *args, **options):
        x, layers = super().forward(x, *args, **options)
        return 2 * x, layers


def test_a_forward_around_the_encoders():
    """It is called, and finds our layers inside."""
    theirs = make_encoder(encoder_layerdrop=0.0)
    ours, handle = patched(theirs)
    assert wav2vec2.shared_encoder(ours, Options()) is not None
    for module in (theirs, ours):
        module.__class__ = Doubled
    assert wav2vec2.shared_encoder(ours, Options()) is None
    before, _ = patched(theirs)
    assert wav2vec2.shared_encoder(before, Options()) is None
    x = torch.randn(2, 12, 32)
    want = theirs(x)[0]
    for module in (ours, before):
        assert relative(module(x)[0], want) <= TOLERANCE
    assert is_ours(before.extract_features) and not handle.fallbacks()


@pytest.mark.parametrize("options", [Options(), FINE], ids=["encoder", "fine"])
def test_float64_on_another_device_is_upstreams(options):
    """Our kernels do not take it, PyTorch's own do."""
    theirs = make_encoder().double()
    ours, handle = patched(theirs, options)
    ours.to("meta")
    assert ours(torch.empty(2, 12, 32, dtype=torch.float64, device="meta"))[0].shape == (2, 12, 32)
    assert wav2vec2.shared_encoder(ours, options) is None
    reason = "float64 on meta: the kernels accumulate in float32"
    methods = {"Sequential.forward", "TransformerSentenceEncoderLayer.forward", "MultiheadAttention.forward"}
    if options is not FINE:
        methods.add("TransformerEncoder.extract_features")
    assert set(handle.fallbacks()) == {(method, reason) for method in methods}
    ours.float()
    assert (wav2vec2.shared_encoder(ours, options) is None) == (options is FINE)

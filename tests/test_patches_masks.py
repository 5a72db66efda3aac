"""fairseq's span masks, patched against not: the same random numbers, so the same masks."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("fairseq_peer")

import fairseq_peer as peer
from fairseq.data.data_utils import compute_mask_indices
from fairseq.models.hubert.hubert import HubertModel
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Model
from fairseq_pairs import speech_pair
from patched import repeat_masks

from d2v_fast.patches import PatchError
from d2v_fast.patches._core import Options, Patch, Site
from d2v_fast.patches.fairseq.masks import APPLY_MASK, draw_spans, hand_on, on_host, sites

B, T, C = 3, 60, 64


def upstreams(lengths, num_frames, **options):
    """``compute_mask_indices`` with the arguments of :func:`draw_spans`."""
    padding = torch.arange(num_frames) >= torch.from_numpy(lengths)[:, None]
    prob, length = options.pop("prob"), options.pop("length")
    return compute_mask_indices((len(lengths), num_frames), padding, prob, length, min_space=1, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"prob": 0.65, "length": 10, "min_masks": 1},  # the recipe
        {"prob": 0.65, "length": 10, "min_masks": 2, "require_same_masks": False},
        {"prob": 0.3, "length": 3, "mask_dropout": 0.2},
        {"prob": 0.9, "length": 4, "mask_dropout": 0.1, "require_same_masks": False},
        {"prob": 0.5, "length": 1, "min_masks": 1},
        {"prob": 0.5, "length": 5, "min_masks": 1, "add_masks": True, "mask_dropout": 0.1},
    ],
)
@pytest.mark.parametrize("lengths", [[60, 60, 60], [60, 41, 23], [60]])
def test_spans(options, lengths, monkeypatch):
    lengths = np.array(lengths)
    for seed in range(30):
        drawn = []
        for draw in (draw_spans, upstreams):
            repeat_masks(monkeypatch, seed)
            drawn.append(draw(lengths, T, **options))
        assert np.array_equal(*drawn)
        assert drawn[0].any()


def test_rows_as_short_as_their_spans(monkeypatch):
    """Some of these are refused, by both: nothing would be left to see."""
    refused = 0
    for seed in range(40):
        drawn = []
        for draw in (draw_spans, upstreams):
            repeat_masks(monkeypatch, seed)
            try:
                drawn.append(draw(np.array([10, 12]), 12, prob=0.65, length=10, min_masks=1).tolist())
            except ValueError:
                drawn.append(None)
        assert drawn[0] == drawn[1]
        refused += drawn[0] is None
    assert 0 < refused < 40


def test_a_single_frame(monkeypatch):
    """It is masked, which is refused, or nothing is."""
    found = []
    for seed in range(10):
        for draw in (draw_spans, upstreams):
            repeat_masks(monkeypatch, seed)
            try:
                found.append(draw(np.array([1]), 1, prob=0.65, length=10, min_masks=1).tolist())
            except ValueError:
                found.append(None)
    assert found[::2] == found[1::2]
    assert None in found
    assert [[False]] in found


def test_no_span_at_all_is_refused(monkeypatch):
    for draw in (draw_spans, upstreams):
        repeat_masks(monkeypatch)
        with pytest.raises(ValueError):
            draw(np.array([20]), 20, prob=0.01, length=10)


def pair(**options):
    """Two equal models, the second with our masks, and the patch."""
    torch.manual_seed(0)
    theirs = speech_pair()[0]
    for name, value in options.items():
        setattr(theirs, name, value)
    ours = copy.deepcopy(theirs)
    return theirs, ours, Patch("test").apply([Site("", ours, APPLY_MASK)], Options())


def both(theirs, ours, monkeypatch, padding=None, **masks):
    """Results of both on the same features, and what the features and the mask embedding get as gradients."""
    found = []
    for model in (theirs, ours):
        repeat_masks(monkeypatch)
        features = torch.randn(B, T, C, generator=torch.Generator().manual_seed(1)).requires_grad_()
        x, mask = model.apply_mask(features.clone(), padding, **masks)
        if mask is not None:
            x.square().sum().backward()
        found.append((x, mask, features.grad, model.mask_emb.grad))
    return found


def assert_same(found) -> None:
    for want, got in zip(*found, strict=True):
        if want is None:
            assert got is None
        else:
            torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(want), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_apply_mask(padded, monkeypatch):
    theirs, ours, patch = pair()
    padding = torch.arange(T) >= torch.tensor([60, 41, 50])[:, None] if padded else None
    found = both(theirs, ours, monkeypatch, padding)
    assert_same(found)
    assert found[1][1].any()
    assert not patch.fallbacks()


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_given_masks(kind, monkeypatch):
    mask = np.random.Generator(np.random.PCG64(0)).random((B, T)) < 0.4
    theirs, ours, patch = pair()
    assert_same(both(theirs, ours, monkeypatch, mask_indices=kind(mask)))
    assert not patch.fallbacks()


def test_the_features_given_stay_as_they_are():
    _, ours, _ = pair()
    features = torch.randn(B, T, C)
    before = features.clone()
    ours.apply_mask(features, None)
    assert torch.equal(features, before)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mask_selection": "normal", "mask_other": 2.0}, "spans of different lengths"),
        ({"mask_channel_prob": 0.3}, "channels are masked"),
        ({"mask_channel_prob": 0.3, "mask_channel_before": True}, "channels are masked"),
    ],
)
def test_other_masks_are_upstreams(options, reason, monkeypatch):
    theirs, ours, patch = pair(**options)
    assert_same(both(theirs, ours, monkeypatch))
    assert [reason in why for _, why in patch.fallbacks()] == [True]
    assert patch.calls_left == (1 if "channels" in reason else 0)  # spans are drawn by upstream, and put in by ours


def test_other_functions_that_draw_are_called(monkeypatch):
    mask = np.zeros((B, T), bool)
    mask[:, 5:20] = True
    monkeypatch.setattr(peer.audio, "compute_mask_indices", lambda *args, **options: mask)
    theirs, ours, patch = pair()
    found = both(theirs, ours, monkeypatch)
    assert_same(found)
    assert np.array_equal(found[1][1], mask)
    assert patch.fallbacks().total() == 1


def test_nothing_to_mask(monkeypatch):
    theirs, ours, patch = pair(mask_prob=0.0)
    assert_same(both(theirs, ours, monkeypatch))
    assert not patch.fallbacks()


def bare(kind):
    """A model of which only the masks work."""
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    model.mask_emb = nn.Parameter(torch.linspace(-1, 1, C))
    model.mask_prob, model.mask_length, model.mask_selection, model.mask_other = 0.65, 10, "static", 0
    model.no_mask_overlap, model.mask_min_space = False, 1
    model.mask_channel_prob, model.mask_channel_before = 0.0, False
    model.mask_channel_length, model.mask_channel_selection, model.mask_channel_other = 3, "static", 0
    model.no_mask_channel_overlap, model.mask_channel_min_space = False, 1
    model.cfg = SimpleNamespace(require_same_masks=False, mask_dropout=0.1)  # HuBERT has neither
    return model


@pytest.mark.parametrize(("kind", "more"), [(Wav2Vec2Model, {}), (HubertModel, {"target_list": None})])
def test_models_with_labels(kind, more, monkeypatch):
    """wav2vec 2.0 and HuBERT, whose rows get two spans at least; HuBERT's features are masked in place."""
    theirs, ours = bare(kind), bare(kind)
    patch = Patch("test").apply(sites(ours, None, Options()), Options())
    assert len(patch.applied) == 1
    padding = torch.arange(T) >= torch.tensor([60, 18, 12])[:, None]
    assert_same(both(theirs, ours, monkeypatch, padding, **more))
    assert not patch.fallbacks()
    features = [torch.ones(B, T, C) for _ in range(2)]
    for model, x in zip((theirs, ours), features, strict=True):
        repeat_masks(monkeypatch)
        with torch.no_grad():
            model.apply_mask(x, padding, **more)
    assert torch.equal(*features) == (kind is HubertModel)
    theirs.mask_channel_prob = ours.mask_channel_prob = 0.3
    assert_same(both(theirs, ours, monkeypatch, padding, **more))
    assert patch.fallbacks().total() == 1


def test_what_is_known_on_the_host():
    """The values handed on, for the tensor they came with and as long as nobody writes to it."""
    owner, values = nn.Module(), np.zeros(T, bool)
    tensor, other = torch.zeros(T, dtype=torch.bool), torch.ones(T, dtype=torch.bool)
    hand_on(owner, "mask", tensor, values)
    assert on_host(owner, "mask", tensor) is values
    assert on_host(owner, "mask", other).all()
    assert on_host(owner, "mask", other.numpy()).all()
    tensor[:3] = True
    assert on_host(owner, "mask", tensor).sum() == 3
    with torch.inference_mode():  # writes are not counted there
        tensor = torch.zeros(T, dtype=torch.bool)
        hand_on(owner, "mask", tensor, values)
        tensor[:3] = True
        assert on_host(owner, "mask", tensor).sum() == 3


def test_strict():
    _, ours, patch = pair(mask_channel_prob=0.3)
    patch.revert()
    Patch("test").apply([Site("", ours, APPLY_MASK)], Options(strict=True))
    with pytest.raises(PatchError, match="mask_channel_prob"):
        ours.apply_mask(torch.randn(B, T, C), None)

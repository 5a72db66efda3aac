"""Masks in the call of fairseq's data2vec 2.0, patched against not: the same masks, tokens in the same order."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("fairseq_peer")

import fairseq_multi_peer as peer
from fairseq.data import data_utils
from parity import assert_equal
from patched import allow_meta, repeat_masks

from d2v_fast.patches import PatchError, patch
from d2v_fast.patches._core import Options, Patch, Site
from d2v_fast.patches.fairseq import multi_masks
from d2v_fast.patches.fairseq.multi_masks import masked_rows

SEEDS = peer.base.MaskSeed(seed=3, update=5, ids=torch.tensor([7, 11, 13, 17]))
PADDING = torch.arange(36) >= torch.tensor([36, 30, 36, 22])[:, None]
SPANS = {"mask_prob": 0.4, "mask_length": 3}


def encoders(kind, **options):
    """Two equal encoders, the second patched, and the patch."""
    model = peer.build(kind)
    theirs = model.modality_encoders[kind.upper()]
    vars(theirs.modality_cfg).update(options)
    ours = copy.deepcopy(theirs)
    return theirs, ours, Patch("test").apply(sites(ours), Options())


def sites(encoder):
    own = multi_masks.MASK_IMAGES if type(encoder).__name__ == "ImageEncoder" else multi_masks.MASK
    return [Site("", encoder, seam) for seam in (own, multi_masks.MASKINFO)]


def masked(encoder, monkeypatch, seed=0, padding=None, seeds=None, apply=True, given=None):
    """What compute_mask gives for the same x and random numbers, and the gradient of x."""
    repeat_masks(monkeypatch, seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    x = torch.randn(4, 36, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    noise = not encoder.modality_cfg.encoder_zero_mask  # written into x, through which upstream cannot go back then
    y, info = encoder.compute_mask(
        x.detach() if noise else x, padding, mask_seed=seeds, apply=apply, precomputed_mask=given
    )
    found = {"x": y, "after": torch.rand(1)}
    if info is not None:
        found |= {name: value for name, value in info._asdict().items() if value is not None}
    if info is not None and not noise:
        torch.manual_seed(1)
        (torch.sum(info.x_unmasked * torch.randn(info.x_unmasked.shape)) + y.square().sum()).backward()
        found["gradient"] = x.grad
    return found, info


def same_masks(theirs, ours, monkeypatch, **options):
    for seed in range(3):
        want, _ = masked(theirs, monkeypatch, seed, **options)
        got, info = masked(ours, monkeypatch, seed, **options)
        assert list(got) == list(want)
        for name, value in want.items():
            assert got[name].dtype == value.dtype, name
            # the two uses of x are added in another order
            torch.testing.assert_close(got[name], value, rtol=1e-6 if name == "gradient" else 0, atol=0, msg=name)
        if info is not None:
            assert torch.equal(masked_rows(ours, info), info.mask.bool().flatten().nonzero().squeeze(1))
    return info


CASES = {
    "random": ("text", {"mask_length": 1, "mask_prob": 0.48}, {}),
    "random, seeds": ("text", {"mask_length": 1, "mask_prob": 0.48}, {"seeds": SEEDS}),
    "random, of images": ("image", {"mask_length": 1, "mask_prob": 0.7}, {"apply": False}),
    "spans": ("text", SPANS, {}),
    "spans, padding": ("audio", SPANS, {"padding": PADDING}),
    "spans, seeds": ("audio", SPANS | {"mask_dropout": 0.2}, {"seeds": SEEDS, "padding": PADDING}),
    "spans, most": ("audio", SPANS | {"add_masks": True}, {"padding": PADDING}),
    "spans, seeds without numbers": ("audio", SPANS, {"seeds": SEEDS._replace(ids=None)}),
    "spans, any share": ("audio", SPANS | {"mask_prob_min": 0.2}, {}),
    "spans, no share below zero": ("audio", SPANS | {"mask_prob_min": -0.5}, {}),
    "spans, one a row at least": ("audio", {"mask_prob": 0.01, "mask_length": 3}, {}),
    "spans, some kept": ("audio", SPANS | {"keep_masked_pct": 0.3}, {}),
    "spans, noise": ("audio", SPANS | {"encoder_zero_mask": False, "mask_noise_std": 0.5}, {}),
    "squares": ("image", {"mask_length": 3, "mask_prob": 0.7, "inverse_mask": True, "mask_prob_adjust": 0.1}, {}),
    "squares, dropout": ("image", {"mask_length": 2, "mask_prob": 0.5, "mask_dropout": 0.3}, {"apply": False}),
    "nothing": ("audio", {"mask_prob": 0.0}, {"apply": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_drawn(case, monkeypatch):
    kind, options, call = CASES[case]
    theirs, ours, done = encoders(kind, **options)
    info = same_masks(theirs, ours, monkeypatch, **call)
    assert (info is None) == (case == "nothing")
    assert info is None or 0 < info.mask.sum() < info.mask.numel()
    assert not done.fallbacks()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
@pytest.mark.parametrize("kind", peer.KINDS)
def test_given(kind, dtype, monkeypatch):
    """Of the batch; rows of different counts as upstream's crops leave them, of which the first one's decides."""
    theirs, ours, done = encoders(kind, mask_length=3)
    order = torch.rand(4, 36, generator=torch.Generator().manual_seed(0)).argsort(1)
    for counts in ([[20]], [[20], [18], [23], [20]]):
        given = (order < torch.tensor(counts)).to(dtype)
        info = same_masks(theirs, ours, monkeypatch, given=given)
        assert info.ids_keep.shape == (4, 16, 32)
    assert not done.fallbacks()


@pytest.mark.parametrize("shape", [(4, 30), (3, 36), (3, 30)])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_given_of_another_shape(kind, shape):
    """Of fewer rows or tokens than x: what upstream's gather makes of them."""
    theirs, ours, done = encoders(kind, mask_length=3)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)).argsort(1) < 20
    x = torch.randn(4, 36, 32)
    want, got = (encoder.make_maskinfo(x, mask) for encoder in (theirs, ours))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert [why for _, why in done.fallbacks()] == ["masks are not of as many rows and tokens as x"]


@pytest.mark.parametrize("shape", [(6, 17), (4, 20), (4, 17)])
@pytest.mark.parametrize("masks", [True, False])
def test_whole_call_with_masks_of_another_shape(masks, shape):
    """Never a loss of other tokens: an error, as with upstream."""
    model, batch = peer.build("text"), peer.batch("text")
    batch["precomputed_mask"] = batch["precomputed_mask"][: shape[0], : shape[1]].contiguous()
    batch["precomputed_mask"][:] = torch.arange(shape[1]) < 8
    with pytest.raises(IndexError, match="shape of the mask"):
        model(**batch)
    patch(model, masks=masks)
    expected = r"precomputed_mask must be .*samples \* clone_batch, tokens\] = \[6, 20\], got "
    with pytest.raises(ValueError, match=expected + rf"\[{shape[0]}, {shape[1]}\]"):
        model(**batch)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_padding_of_other_dtypes(dtype, monkeypatch):
    """What text and encoders of one's own pass on as it came."""
    theirs, ours, done = encoders("text", **SPANS)
    want = same_masks(theirs, ours, monkeypatch, padding=PADDING, seeds=SEEDS)
    got = same_masks(theirs, ours, monkeypatch, padding=PADDING.to(dtype), seeds=SEEDS)
    assert torch.equal(got.mask, want.mask)
    assert not done.fallbacks()


def test_squares_for_a_shape(monkeypatch):
    """Drawn for ``shape``, whatever x is."""
    theirs, ours, _ = encoders("image", mask_length=3, mask_prob=0.6)
    found = []
    for encoder in (theirs, ours):
        torch.manual_seed(0)
        found.append(encoder.compute_mask(torch.zeros(1, 4, 8), None, None, apply=False, shape=(5, 49, 32))[1])
    want, got = found
    assert got.x_unmasked is want.x_unmasked is None
    assert got.mask.shape == (5, 49)
    assert all(torch.equal(a, b) for a, b in zip(got[1:], want[1:], strict=True))


def test_without_tokens():
    """``shape`` instead of x."""
    theirs, ours, _ = encoders("image", mask_length=3)
    mask = torch.rand(4, 36).argsort(1) < 20
    want, got = (encoder.make_maskinfo(None, mask, shape=(4, 36, 32)) for encoder in (theirs, ours))
    assert got.x_unmasked is None
    assert got.ids_keep.shape == want.ids_keep.shape == (4, 16)
    assert all(torch.equal(a, b) for a, b in zip(got[1:], want[1:], strict=True))


@pytest.mark.parametrize("case", ["random", "spans", "squares"])
def test_the_device_is_not_waited_for(case, monkeypatch):
    """On a device whose tensors cannot be read."""
    kind, options, _ = CASES[case]
    _, ours, done = encoders(kind, **options)
    allow_meta(monkeypatch)
    x, info = ours.compute_mask(torch.empty(4, 36, 32, device="meta"), None, None, apply=True, precomputed_mask=None)
    rows = masked_rows(ours, info)
    assert {t.device.type for t in (x, rows, *info)} == {"meta"}
    assert info.ids_keep.shape[1] + len(rows) // 4 == 36
    assert not done.fallbacks()


def test_masks_of_the_batch_are_read_once(monkeypatch):
    """In a whole call, the loss included."""
    model, batch, reads = peer.build("audio"), peer.batch("audio"), []
    patch(model)
    real = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: reads.append(x.shape) or real(x))
    for name in ("nonzero", "item", "tolist", "__index__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, lambda x, name=name: pytest.fail(f"{name} waits for the device"))
    model(**batch)
    assert reads == [(6, 39)]


def test_rows_of_others():
    """Masks that were written to since, or were made by somebody else, are read."""
    _, ours, _ = encoders("text")
    mask = torch.rand(4, 36).argsort(1) < 20
    info = ours.make_maskinfo(torch.randn(4, 36, 32), mask)
    info.mask[:, 5] = 1
    assert torch.equal(masked_rows(ours, info), info.mask.bool().flatten().nonzero().squeeze(1))
    other = SimpleNamespace(mask=mask)
    assert torch.equal(masked_rows(ours, other), mask.flatten().nonzero().squeeze(1))


OTHERS = {
    "random_masking": ("text", {"mask_length": 1}, peer.base),
    "compute_mask_indices": ("text", SPANS, peer.base),
    "compute_block_mask_2d": ("image", {"mask_length": 3}, data_utils),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_that_draw_are_called(name, monkeypatch):
    kind, options, module = OTHERS[name]
    theirs, ours, done = encoders(kind, **options)
    calls, real = [], getattr(module, name)

    def draw(*args, **more):
        calls.append(name)
        return real(*args, **more)

    monkeypatch.setattr(module, name, draw)
    same_masks(theirs, ours, monkeypatch)
    assert len(calls) == 6
    assert [why for _, why in done.fallbacks()] == [f"masks are drawn by a {name} that ours was not written from"]


def test_spans_that_stay_unmasked(monkeypatch):
    """Upstream cannot draw them either."""
    theirs, ours, done = encoders("audio", inverse_mask=True, **SPANS)
    for encoder in (theirs, ours):
        with pytest.raises(RuntimeError, match="bool"):
            masked(encoder, monkeypatch)
    assert [why for _, why in done.fallbacks()] == ["spans that stay unmasked (inverse_mask)"]
    done.revert()
    with Patch("strict").apply(sites(ours), Options(strict=True)), pytest.raises(PatchError, match="inverse_mask"):
        masked(ours, monkeypatch)


@pytest.mark.parametrize("kind", peer.KINDS)
def test_whole_call(kind):
    """Losses and gradients of a model that draws its masks itself, from the samples' numbers or torch's generator."""
    model, batch = peer.build(kind, part={"mask_length": 1 if kind == "text" else 2}), peer.batch(kind)
    del batch["precomputed_mask"]
    batch["id"] = torch.tensor([5, 6, 9])
    results = []
    for patched in (False, True):
        if patched:
            done = patch(model)
            assert sum(site.seam.part == "masks" for site in done.applied) == 2
        torch.manual_seed(0)
        results.append(peer.step(model, batch))
    (want_losses, want, _), (losses, grads, _) = results
    assert_equal(losses, want_losses)
    assert_equal(grads, want)
    assert not done.fallbacks()


def single(ours, monkeypatch):
    """Whether ours drew the masks of single tokens, by what it knows of them."""
    _, info = masked(ours, monkeypatch)
    return multi_masks.handed_on(ours, "rows", info.mask) is not None


def test_single_patches_of_images(monkeypatch):
    """Upstream's method leaves them to the class that it inherits from, which a patch of a model does not replace."""
    theirs, ours, done = encoders("image", mask_length=1, mask_prob=0.7)
    done.revert()
    with Patch("strict").apply(sites(ours), Options(strict=True)):
        same_masks(theirs, ours, monkeypatch)
        assert single(ours, monkeypatch)
    base, image = peer.base.ModalitySpecificEncoder, type(ours)
    seams = [Site("", base, multi_masks.MASK), Site("", image, multi_masks.MASK_IMAGES)]
    with Patch("classes").apply(seams, Options()) as done:
        assert single(ours, monkeypatch)
        assert done.calls == 2
        assert not done.fallbacks()


def test_single_patches_by_other_code(monkeypatch):
    theirs, ours, done = encoders("image", mask_length=1, mask_prob=0.7)
    base, calls = peer.base.ModalitySpecificEncoder, []
    real = base.compute_mask

    def compute_mask(self, *args):
        calls.append(type(self).__name__)
        return real(self, *args)

    monkeypatch.setattr(base, "compute_mask", compute_mask)
    same_masks(theirs, ours, monkeypatch)
    assert calls == ["ImageEncoder"] * 6
    reason = "masks of single tokens are drawn by a compute_mask that ours was not written from"
    assert [why for _, why in done.fallbacks()] == [reason]


def test_switched_off():
    model = peer.build("image")
    done = patch(model, masks=False)
    encoder = model.modality_encoders["IMAGE"]
    assert not {"compute_mask", "make_maskinfo"} & set(vars(encoder))
    peer.step(model, peer.batch("image"))
    assert not done.fallbacks()


def test_at_the_classes(monkeypatch):
    """Every kind of encoder, made before the patch."""
    pairs = [encoders(kind, mask_length=2)[::2] for kind in ("audio", "image")]
    base = peer.base.ModalitySpecificEncoder
    image = type(peer.build("image").modality_encoders["IMAGE"])
    seams = [Site("", base, multi_masks.MASK), Site("", base, multi_masks.MASKINFO)]
    wanted = []
    for theirs, own in pairs:
        own.revert()
        wanted.append(masked(theirs, monkeypatch)[0])
    with Patch("classes").apply([*seams, Site("", image, multi_masks.MASK_IMAGES)], Options()) as done:
        assert not done.skipped
        for (theirs, _), want in zip(pairs, wanted, strict=True):
            got, info = masked(theirs, monkeypatch)
            assert torch.equal(got["mask"], want["mask"])
            assert torch.equal(got["ids_keep"], want["ids_keep"])
            assert multi_masks.handed_on(theirs, "rows", info.mask) is not None
        assert not done.fallbacks()

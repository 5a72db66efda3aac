"""fairseq's block masks and the data sets that draw them: patched against not, the same masks from the same numbers."""

import importlib
import os
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("fairseq_peer")

import fairseq_peer
from fairseq.data import data_utils
from fairseq.data.audio import raw_audio_dataset
from fairseq.data.audio.raw_audio_dataset import BinarizedAudioDataset, FileAudioDataset

from d2v_fast.patches._core import Options, Patch, PatchError, Site
from d2v_fast.patches.fairseq import CLASSES, block_masks
from d2v_fast.patches.fairseq.block_masks import draw_blocks, draw_squares

PAIRS = {
    "blocks": (draw_blocks, data_utils.compute_block_mask_1d),
    "squares": (draw_squares, data_utils.compute_block_mask_2d),
}
AUDIO = {"mask_prob": 0.5, "mask_length": 5, "mask_prob_adjust": 0.05}
IMAGES = {"mask_prob": 0.8, "mask_length": 3, "mask_prob_adjust": 0.07, "inverse_mask": True}


def both(which, shape, seed, **options):
    """(masks, state of the generator afterwards) of ours and of upstream's."""
    found = []
    for draw in PAIRS[which]:
        torch.manual_seed(seed)
        found.append((draw(shape, **options), torch.get_rng_state()))
    return found


@pytest.mark.parametrize(
    ("which", "shape", "options"),
    [
        ("blocks", (8, 500), AUDIO),  # the recipes
        ("squares", (16, 196), IMAGES),
        ("blocks", (4, 61), AUDIO | {"mask_dropout": 0.3}),
        ("blocks", (4, 61), AUDIO | {"inverse_mask": True, "mask_prob": 0.3, "mask_length": 4}),
        ("blocks", (5, 36), {"mask_prob": 0.6, "mask_length": 1}),
        ("blocks", (3, 7), {"mask_prob": 0.5, "mask_length": 10, "mask_prob_adjust": 0.5}),
        ("blocks", (3, 20), {"mask_prob": 0.0, "mask_length": 3}),
        ("blocks", (3, 20), {"mask_prob": 1.0, "mask_length": 3}),
        ("squares", (4, 36), {"mask_prob": 0.5, "mask_length": 2, "mask_dropout": 0.2}),
        ("squares", (4, 36), {"mask_prob": 0.5, "mask_length": 4, "mask_prob_adjust": 0.4}),
    ],
)
def test_draws(which, shape, options):
    """From above and from below: some rows have too many at first, some too few."""
    for seed in range(15):
        (mask, state), (want, wanted_state) = both(which, shape, seed, **options)
        assert mask.dtype == want.dtype
        assert torch.equal(mask, want)
        assert torch.equal(state, wanted_state)
    share = 1 - options["mask_prob"] if options.get("inverse_mask") else options["mask_prob"]
    count = int(shape[1] * share)
    assert set(mask.sum(1).tolist()) == {shape[1] - count if options.get("inverse_mask") else count}


def test_noise_is_drawn_by_the_row(monkeypatch):
    """As ``torch.multinomial`` does; where MKL draws, a call takes one number of the generator's, whatever its size."""
    sizes, real = [], torch.Tensor.exponential_
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda x: sizes.append(x.shape) or real(x))
    draw_blocks((8, 100), **AUDIO)
    assert set(sizes) == {(100,)}
    assert len(sizes) <= 8


def test_refused():
    with pytest.raises(ValueError, match=r"mask_prob must be in \[0, 1\], got 1.5"):
        draw_blocks((2, 10), 1.5, 2)
    with pytest.raises(ValueError, match=r"shape must be .* square grid\), got \(2, 10\)"):
        draw_squares((2, 10), 0.5, 2)


def speech(kind, folder, **options):
    """A data set of one recording of 2000 samples, which get 400 frames."""
    import soundfile

    soundfile.write(folder / "a.wav", np.sin(np.arange(2000) / 9).astype("float32"), 16000, subtype="FLOAT")
    made = kind.__new__(kind)
    how = AUDIO | {"compute_mask": True, "clone_batch": 3, "feature_encoder_spec": "[(10, 5, 5)]"} | options
    raw_audio_dataset.RawAudioDataset.__init__(made, 16000, **how)
    made.root_dir, made.fnames, made.sizes = str(folder), ["a.wav"], [2000]
    made.text_compressor = SimpleNamespace(decompress=str)
    made.fnames_dict = SimpleNamespace(string=lambda name, separator: name)
    return made


@pytest.fixture
def image_module(monkeypatch):
    """``mae_image_dataset``, whose other imports are stubs: they need torchvision."""
    folder = os.path.join(os.path.dirname(fairseq_peer.fairseq.__file__), "examples", "data2vec", "data")
    stubs = {
        "torchvision": {"datasets": SimpleNamespace(), "transforms": SimpleNamespace()},
        "examples.data2vec.data": {"__path__": [folder]},
        "examples.data2vec.data.path_dataset": {"PathDataset": None},
    }
    for name, values in stubs.items():
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name]).update(values)
    name = "examples.data2vec.data.mae_image_dataset"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    del sys.modules[name]


def images(module, **options):
    """A data set of one "image" of 36 patches, with random numbers drawn in front of the mask."""
    made = module.MaeImageDataset.__new__(module.MaeImageDataset)
    made.dataset, made.key, made.patches = [(torch.zeros(3, 4, 4), 0)], "imgs", 36
    made.transform_source = made.transform_target = None
    made.transform_train, made.final_transform = torch.rand_like, torch.neg
    how = {"is_compute_mask": True, "clone_batch": 3, "expand_adjacent": False, "non_overlapping": False}
    vars(made).update(how | {"mask_dropout": 0.0} | IMAGES | options)
    return made


def same_item(dataset):
    """The item is upstream's, and so is the generator's state; returns the calls left to upstream."""
    torch.manual_seed(0)
    want, wanted_state, inside = dataset[0], torch.get_rng_state(), dict(vars(dataset))
    kind = type(dataset)
    with Patch("class").apply([Site("", kind, seam) for seam in block_masks.seams(kind)], Options()) as patch:
        assert len(patch.applied) == 1
        torch.manual_seed(0)
        got = dataset[0]
        fallbacks = patch.fallbacks()
    assert torch.equal(torch.get_rng_state(), wanted_state)
    assert list(got) == list(want)
    assert all(torch.equal(torch.as_tensor(got[key]), torch.as_tensor(want[key])) for key in want)
    assert vars(dataset) == inside
    return fallbacks


@pytest.mark.parametrize("kind", [FileAudioDataset, BinarizedAudioDataset])
def test_speech(kind, tmp_path):
    dataset = speech(kind, tmp_path)
    assert not same_item(dataset)
    assert dataset[0]["precomputed_mask"].shape == (3, 400)
    assert not same_item(speech(kind, tmp_path, mask_dropout=0.2, inverse_mask=True))
    assert not same_item(speech(kind, tmp_path, compute_mask=False))


def test_images(image_module):
    assert not same_item(images(image_module))
    assert not same_item(images(image_module, mask_dropout=0.4))
    assert not same_item(images(image_module, mask_length=1, mask_dropout=0.4))
    assert not same_item(images(image_module, is_compute_mask=False))


@pytest.mark.parametrize("option", ["expand_adjacent", "non_overlapping"])
def test_other_masks_are_upstreams(option, tmp_path, image_module):
    for dataset in (speech(FileAudioDataset, tmp_path, **{option: True}), images(image_module, **{option: True})):
        fallbacks = same_item(dataset)
        assert [why.startswith("expand_adjacent or non_overlapping") for _, why in fallbacks] == [True]


def test_other_functions_that_draw_are_called(tmp_path, monkeypatch):
    mask = torch.ones(3, 400)
    monkeypatch.setattr(raw_audio_dataset, "compute_block_mask_1d", lambda **options: mask)
    dataset = speech(FileAudioDataset, tmp_path)
    assert [why for _, why in same_item(dataset)] == [
        "its masks are drawn by a compute_block_mask_1d that ours was not written from"
    ]
    assert dataset[0]["precomputed_mask"] is mask


class Mine(FileAudioDataset):
    """Keeps things with itself while it reads, and cannot be copied."""

    opened = closed = read = 0
    handle = None

    def postprocess(self, feats, rate):
        if self.handle is None:
            self.handle, Mine.opened = object(), Mine.opened + 1
        self.read += 1
        return super().postprocess(feats, rate)

    def __reduce_ex__(self, protocol):
        raise TypeError("has a handle")

    def __del__(self):
        Mine.closed += 1


def patched():
    return Patch("class").apply([Site("", FileAudioDataset, s) for s in block_masks.seams(FileAudioDataset)], Options())


def test_items_are_read_by_the_data_set_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(Mine, "opened", 0)
    monkeypatch.setattr(Mine, "closed", 0)
    dataset = speech(Mine, tmp_path)
    with patched() as done:
        items = [dataset[0] for _ in range(5)]
        assert not done.fallbacks()
        assert done.calls == 5
    assert items[0]["precomputed_mask"].shape == (3, 400)
    assert dataset.read == 5
    assert dataset._features_size_map == {2000: 400}
    assert (Mine.opened, Mine.closed) == (1, 0)


def test_threads_share_the_data_set(tmp_path):
    """Two that read at once; upstream's functions stay for whoever else calls them."""
    dataset, inside, found = speech(FileAudioDataset, tmp_path), threading.Barrier(2, timeout=20), []

    def postprocess(feats, rate):
        inside.wait()
        found.append(raw_audio_dataset.compute_block_mask_1d)
        inside.wait()
        return feats

    dataset.postprocess = postprocess
    with patched() as done, ThreadPoolExecutor(2) as pool:
        items = list(pool.map(dataset.__getitem__, [0, 0]))
        assert not done.fallbacks()
    assert all(item["precomputed_mask"].shape == (3, 400) for item in items)
    assert found == [data_utils.compute_block_mask_1d] * 2


def test_names_of_the_module_are_those_of_now(tmp_path, monkeypatch):
    """What somebody puts into upstream's module after the patch is called; a warning that it gave is not repeated."""
    dataset, paths = speech(FileAudioDataset, tmp_path), []

    def parse_path(path):
        warnings.warn("old paths", UserWarning, stacklevel=2)
        paths.append(path)
        return path, []

    with patched(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        monkeypatch.setattr(raw_audio_dataset, "parse_path", parse_path)
        for _ in range(3):
            dataset[0]
    assert len(paths) == 3
    assert len(told) == 1


def test_a_method_that_somebody_wrapped_is_called(tmp_path, monkeypatch):
    real, calls = FileAudioDataset.__getitem__, []

    @wraps(real)
    def counting(self, index):
        calls.append(index)
        return real(self, index)

    monkeypatch.setattr(FileAudioDataset, "__getitem__", counting)
    fallbacks = same_item(speech(FileAudioDataset, tmp_path))
    assert calls == [0, 0]
    assert [why for _, why in fallbacks] == ["somebody wrapped the method that ours calls with other masks"]


def test_strict(tmp_path):
    dataset = speech(FileAudioDataset, tmp_path, expand_adjacent=True)
    sites = [Site("", FileAudioDataset, seam) for seam in block_masks.seams(FileAudioDataset)]
    with Patch("class").apply(sites, Options(strict=True)), pytest.raises(PatchError, match="expand_adjacent"):
        dataset[0]


def test_found_by_patch_all():
    modules = {
        "raw_audio_dataset": ("FileAudioDataset", "BinarizedAudioDataset"),
        "mae_image_dataset": ("MaeImageDataset",),
    }
    for module, kinds in modules.items():
        for kind in kinds:
            (key,) = [name for name in CLASSES if name.endswith(f"{module}.{kind}")]
            (seam,) = CLASSES[key](type(kind, (), {}))
            assert (seam.part, seam.attribute) == ("masks", "__getitem__")

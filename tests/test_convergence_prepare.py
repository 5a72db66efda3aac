"""What the convergence check prepares: the batches of the training's own loaders, and the probe's examples."""

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import convergence
from convergence_data import Prepared
from convergence_prepare import prepare

from d2v_fast.train.config import load_config
from d2v_fast.train.data import build_data
from d2v_fast.train.data.base import specs

MODALITIES = ["speech", "image", "text"]
UPDATES, SEEDS = 12, (1, 2)
SETTINGS = {
    "speech": ["data.max_tokens=32000", "data.min_seconds=0.5", "data.max_seconds=1.0"],
    "image": ["data.batch_size=4", "data.crop_scale=[1.0,1.0]"],
    "text": ["data.batch_size=4", "data.tokens_per_sample=16", "model.frontend.vocab_size=270"],
}


def _write_speech(root, rng):
    def write(file, seconds):
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, rng.integers(-3000, 3000, round(16_000 * seconds)).astype(np.int16), 16_000)

    for i in range(9):
        write(root / "pretrain" / f"{i}.wav", 0.4 + 0.1 * i)  # the first and the last two are too short and too long
    for part, label, i in ((p, y, i) for p in ("train", "test") for y in "ab" for i in range(3)):
        write(root / "probe" / part / label / f"{i}.wav", 0.3 + 0.1 * i)


def _write_image(root, rng):
    for part, label, i in (
        (p, y, i) for p in ("pretrain", "probe/train", "probe/test") for y in "ab" for i in range(4)
    ):
        file = root / part / label / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(file)


def _write_text(root, rng):
    def words(count):
        return " ".join(rng.choice(["rain", "sun", "a", "wind", "falls", "rises"], count))

    (root / "pretrain").mkdir(parents=True)
    (root / "pretrain" / "all.txt").write_text("".join(words(9) + "\n" for _ in range(40)))
    (root / "probe").mkdir()
    for part in ("train", "test"):
        lines = (f"{label}\t{words(3 + i)}\n" for label in "ab" for i in range(4))
        (root / "probe" / f"{part}.tsv").write_text("".join(lines))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder like the demo's."""
    root = tmp_path_factory.mktemp("demo")
    for modality, write in zip(MODALITIES, (_write_speech, _write_image, _write_text), strict=True):
        write(root / modality, np.random.default_rng(0))
    return root


@pytest.fixture(scope="module")
def prepared(demo, tmp_path_factory):
    """What was written, read again."""
    out, found = tmp_path_factory.mktemp("prepared"), {}
    for modality in MODALITIES:
        file, limits = out / f"{modality}.npz", {"probe_clips": 4, "probe_seconds": 0.4}
        prepare(modality, demo, file, SEEDS, UPDATES, **limits, overrides=SETTINGS[modality])
        found[modality] = Prepared.load(file)
    return found


@pytest.mark.parametrize("modality", ["image", "text"])
def test_batches_are_the_loaders(demo, prepared, modality):
    """Those of speech come from a list of clips that is drawn; ``prepare`` compares them, see below."""
    settings = [f"data.path={demo / modality / 'pretrain'}", *SETTINGS[modality]]
    config = load_config(f"{modality}_demo", settings)
    source, mine = build_data(config.data, config.model, 2), prepared[modality].batches(2, UPDATES)
    for (epoch, index, items), (inputs, mask) in zip(specs(source, 0, 0), mine, strict=False):
        want = source.augment(source.load(epoch, index, items))
        assert torch.equal(inputs, want.inputs) and np.array_equal(mask, want.mask.numpy())


def test_clips(prepared):
    """Six of nine are long enough and not too long; a batch has equally long crops with equally many masked frames."""
    speech = prepared["speech"]
    assert len(speech.arrays["pretrain.lengths"]) == 6
    for inputs, mask in speech.batches(1, UPDATES):
        assert inputs.numel() <= 32_000 and inputs.shape[1] >= 8000
        assert mask.shape == (len(inputs), speech.model.frontend.num_frames(inputs.shape[1]))
        assert len(set(mask.sum(1))) == 1 and 0.2 < mask.mean() < 0.9


def test_batches_differ_between_seeds(prepared):
    one, two = (next(prepared["text"].batches(seed, 1)) for seed in SEEDS)
    assert not torch.equal(one[0], two[0]) and not np.array_equal(one[1], two[1])


@pytest.mark.parametrize("modality", MODALITIES)
def test_prepare_refuses_what_is_not_the_loaders_batch(demo, tmp_path, monkeypatch, modality):
    inputs = Prepared.inputs
    monkeypatch.setattr(Prepared, "inputs", lambda *args: inputs(*args) + 1)
    with pytest.raises(RuntimeError, match=f"{modality}: batch 0 of epoch 0 differs from the loader's"):
        prepare(modality, demo, tmp_path / "x.npz", SEEDS, 1, overrides=SETTINGS[modality])
    assert not list(tmp_path.iterdir())


def test_probe_examples(prepared):
    """Clips are the middle of whole normalised ones; text is padded; every example comes once."""
    for modality, count in (("speech", 4), ("image", 8), ("text", 8)):
        found = list(prepared[modality].examples("test", 3))
        assert sum(len(labels) for *_, labels in found) == count
        assert {int(y) for *_, labels in found for y in labels} == {0, 1}
        assert all(len(x) == len(labels) <= 3 for x, _, labels in found)
    waves = [x for x, *_ in prepared["speech"].examples("test", 3)]
    assert sorted(x.shape[1] for x in waves) == [4800, 6400] and all(abs(float(x.mean())) < 0.05 for x in waves)
    x, padding, _ = next(prepared["text"].examples("test", 8))
    assert padding is not None and torch.equal(padding, x == prepared["text"].model.frontend.pad_index)


def test_command(demo, tmp_path, capsys):
    command = ["prepare", "--data", str(demo), "--out", str(tmp_path / "out"), "--modality", "text", "--seed", "3"]
    assert convergence.main([*command, "--updates", "2", "--set", *SETTINGS["text"]]) == 0
    assert "2 updates of seeds 3" in capsys.readouterr().out
    made = Prepared.load(tmp_path / "out" / "text.npz")
    assert [x.shape for x, _ in made.batches(3, 2)] == [(4, 16)] * 2 and made.settings["updates"] == 2
    with pytest.raises(SystemExit, match=r"error: text: .*nothing"):
        convergence.main([*command, "--data", str(tmp_path / "nothing")])

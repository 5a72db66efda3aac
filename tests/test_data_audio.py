"""The speech loader on small files."""

import io
import itertools
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from d2v_fast.nn.config import Data2VecConfig
from d2v_fast.train.data import (
    DataError,
    SpeechData,
    SpeechDataConfig,
    UnreadableFile,
    batches,
    build_data,
    normalize_waveform,
    read_waveform,
)
from d2v_fast.train.errors import ConfigError
from d2v_fast.train.graph import signature

MODEL = Data2VecConfig.speech("base")
RATE = 16_000


def write(path, seconds, *, rate=RATE, channels=1, seed=0, scale=0.1):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (round(seconds * rate), channels)
    soundfile.write(path, scale * np.random.default_rng(seed).standard_normal(shape).clip(-5, 5), rate)


@pytest.fixture
def folder(tmp_path):
    """Eleven clips of 0.5 to 1.5 s in three formats and two folders."""
    for i in range(11):
        write(tmp_path / f"spk{i % 2}" / f"{i:02d}.{('wav', 'flac', 'ogg')[i % 3]}", 0.5 + 0.1 * i, seed=i)
    return tmp_path


def config(path, **kwargs):
    defaults = {"max_tokens": 3 * RATE, "min_seconds": 0.5, "max_seconds": 1.2}
    return SpeechDataConfig(path=str(path), **(defaults | kwargs))


def take(data, count, **kwargs):
    return list(itertools.islice(batches(data, **kwargs), count))


def assert_same(got, expected):
    assert len(got) == len(expected)
    for (*place, a), (*other, b) in zip(got, expected, strict=True):
        assert place == other and a.skipped == b.skipped
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.mask, b.mask)


def test_batches_depend_on_seed_and_place_only(folder):
    (folder / "broken.wav").write_bytes(b"RIFF")
    data = SpeechData(config(folder), MODEL, 3)
    count = 2 * len(data.plan(0))
    alone = take(data, count)
    assert_same(take(data, count, num_workers=2), alone)
    assert_same(take(SpeechData(config(folder), MODEL, 3), count - 4, epoch=0, index=4), alone[4:])
    other = take(SpeechData(config(folder), MODEL, 4), count)
    assert not any(torch.equal(a[2].inputs, b[2].inputs) for a, b in zip(alone, other, strict=True))


def test_batch_layout(folder):
    data = build_data(config(folder), MODEL, 0)
    for _, _, batch in take(data, len(data.plan(0))):
        rows, samples = batch.inputs.shape
        assert batch.inputs.dtype == torch.float32 and batch.padding_mask is None
        assert 0.5 * RATE <= samples <= 1.2 * RATE and rows * samples <= 3 * RATE
        assert batch.mask.shape == (rows, MODEL.frontend.num_frames(samples))
        assert 0 < batch.num_masked < batch.mask.numel()


def test_plan_packs_by_length(folder):
    data = SpeechData(config(folder), MODEL, 0)
    lengths = np.minimum(data.lengths, data.max_samples)
    plan = data.plan(0)
    assert sorted(i for b in plan for i in b) == list(range(11))
    assert plan != data.plan(1) and plan == data.plan(0)
    by_length = sorted(plan, key=lambda b: -max(lengths[list(b)]))
    for batch, following in itertools.pairwise(by_length):
        assert len(batch) * max(lengths[list(batch)]) <= 3 * RATE
        assert (len(batch) + 1) * max(lengths[list(batch)]) > 3 * RATE  # full
        assert min(lengths[list(batch)]) >= max(lengths[list(following)])  # buckets do not overlap


def test_static_shapes(folder):
    """Batches of few sizes, with crops of few lengths; what is masked does not change their shapes."""
    crops = {"crop_multiple": RATE // 4}
    plain, static = (build_data(config(folder, **crops), MODEL, 0, static_shapes=flag) for flag in (False, True))
    sizes = []
    for data in (plain, static):
        found = [batch for _, _, batch in take(data, 4 * len(data.plan(0)))]
        assert all(b.inputs.shape[0] * b.inputs.shape[1] <= 3 * RATE for b in found)
        sizes.append(({tuple(b.inputs.shape) for b in found}, {signature(b) for b in found}))
    assert len(sizes[1][0]) == len(sizes[1][1]) <= len(sizes[0][0]) < len(sizes[0][1])


def test_ties_are_shuffled(tmp_path):
    for i in range(8):
        write(tmp_path / f"{i}.wav", 1.3 + 0.1 * i)  # all cropped to 1.2 s
    data = SpeechData(config(tmp_path), MODEL, 0)
    groups = {frozenset(map(frozenset, data.plan(epoch))) for epoch in range(5)}
    assert len(groups) > 1  # not only the order of the batches changes


def test_crop_is_a_random_part_of_the_normalised_file(tmp_path):
    ramp = np.linspace(-0.5, 0.5, 3 * RATE, dtype=np.float32)
    soundfile.write(tmp_path / "ramp.wav", ramp, RATE, subtype="FLOAT")
    data = SpeechData(config(tmp_path), MODEL, 0)
    whole = normalize_waveform(ramp)
    starts = set()
    for _, _, batch in take(data, 4):
        crop = batch.inputs[0].numpy()
        start = int(np.abs(whole - crop[0]).argmin())
        assert np.array_equal(crop, whole[start : start + crop.size])  # statistics of the file, not of the crop
        starts.add(start)
    assert len(starts) == 4


def test_crop_multiple_gives_few_lengths(folder):
    """Crops are cut to the next lower multiple, and never below min_seconds."""
    free = [b.inputs.shape[1] for _, _, b in take(SpeechData(config(folder, max_tokens=RATE), MODEL, 0), 6)]
    data = SpeechData(config(folder, max_tokens=RATE, crop_multiple=4000), MODEL, 0)
    cut = [b.inputs.shape[1] for _, _, b in take(data, 6)]
    assert cut == [size - size % 4000 for size in free]
    assert min(cut) >= 0.5 * RATE and len(set(cut)) < len(set(free))


def test_normalisation_is_layer_norm():
    wave = np.float32(0.3) + np.random.default_rng(0).standard_normal(5000, dtype=np.float32) * np.float32(0.02)
    expected = torch.nn.functional.layer_norm(torch.from_numpy(wave).double(), (5000,))
    assert np.abs(normalize_waveform(wave) - expected.numpy()).max() < 1e-6
    assert not normalize_waveform(np.zeros(100, np.float32)).any()


def test_normalisation_can_be_switched_off(tmp_path):
    write(tmp_path / "a.wav", 0.5, scale=0.05)
    loud = {n: take(SpeechData(config(tmp_path, normalize=n), MODEL, 0), 1)[0][2].inputs.std() for n in (True, False)}
    assert abs(loud[True] - 1) < 0.01 and loud[False] < 0.1


def test_stereo_is_averaged(tmp_path):
    soundfile.write(tmp_path / "s.wav", np.tile([[0.5, -0.25]], (1000, 1)), RATE, subtype="FLOAT")
    wave = read_waveform(tmp_path / "s.wav")
    assert wave.dtype == np.float32 and wave.shape == (1000,) and (wave == 0.125).all()


def test_other_rates_are_resampled(tmp_path):
    time = np.arange(2 * 22_050) / 22_050
    soundfile.write(tmp_path / "tone.flac", 0.5 * np.sin(2 * np.pi * 440 * time), 22_050)
    wave = read_waveform(tmp_path / "tone.flac")
    assert wave.shape == (2 * RATE,) and wave.dtype == np.float32
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE)
    assert np.abs(wave - expected)[1000:-1000].max() < 1e-3
    assert SpeechData(config(tmp_path), MODEL, 0).lengths.tolist() == [2 * RATE]


@pytest.mark.parametrize("rate", [8000, 11_025, 32_000, 44_100, 48_000])
def test_length_from_the_header_is_the_decoded_one(tmp_path, rate):
    for extra in (0, 1, 7):
        soundfile.write(tmp_path / f"{extra}.wav", np.zeros(rate + extra), rate)
    data = SpeechData(config(tmp_path), MODEL, 0)
    assert data.lengths.tolist() == [read_waveform(Path(data.config.path, name)).size for name in data.names]


def test_bad_files_are_skipped_and_named(folder):
    (folder / "broken.wav").write_bytes(b"not audio")
    (folder / "empty.flac").touch()
    write(folder / "short.wav", 0.4)
    data = SpeechData(config(folder), MODEL, 0)
    reasons = dict(data.skipped)
    assert sorted(reasons) == ["broken.wav", "empty.flac", "short.wav"]
    assert reasons["short.wav"] == "0.40 s, shorter than min_seconds = 0.5"
    assert "11 files" in data.describe() and "3 skipped" in data.describe() and "0.00 h" in data.describe()


@pytest.mark.parametrize("content", ["garbage", "short", "nan", "gone"])
def test_file_that_went_bad_after_the_scan(folder, content):
    data = SpeechData(config(folder, max_tokens=20 * RATE), MODEL, 0)  # one batch an epoch
    victim = folder / "spk0" / "00.wav"
    if content == "garbage":
        victim.write_bytes(b"garbage")
    elif content == "short":
        write(victim, 0.1)
    elif content == "nan":
        soundfile.write(victim, np.full(RATE, np.nan), RATE, subtype="FLOAT")
    else:
        victim.unlink()
    batch = take(data, 1)[0][2]
    assert [name for name, _ in batch.skipped] == ["spk0/00.wav"] and len(batch.inputs) == 10
    with pytest.raises(UnreadableFile, match=r"00\.wav"):
        data._read(list(data.names).index("spk0/00.wav"))


def flac(seconds, *, frames=None, rate=RATE):
    """A FLAC file whose header says other things."""
    file = io.BytesIO()
    soundfile.write(file, 0.1 * np.random.default_rng(0).standard_normal(round(seconds * RATE)), RATE, format="FLAC")
    content = bytearray(file.getvalue())
    bits = int.from_bytes(content[18:26], "big")  # of STREAMINFO: 20 for the rate, 3 channels, 5 bits, 36 samples
    bits = bits & ~(0xFFFFF << 44) | rate << 44
    if frames is not None:
        bits = bits >> 36 << 36 | frames
    content[18:26] = bits.to_bytes(8, "big")
    return bytes(content)


@pytest.mark.parametrize("frames", [2**36 - 1, 3_000_000_000])
def test_headers_that_promise_too_much(folder, monkeypatch, frames):
    victim = folder / "long.flac"
    victim.write_bytes(flac(3, frames=frames))
    data = SpeechData(config(folder), MODEL, 0)
    size = victim.stat().st_size
    assert data.skipped == [("long.flac", f"a header with {frames} samples in a file of {size} bytes")]
    empty, room = np.empty, []
    monkeypatch.setattr(np, "empty", lambda shape, *args, **kwargs: room.append(shape) or empty(shape, *args, **kwargs))
    with pytest.raises(UnreadableFile, match=r"long\.flac"):
        read_waveform(victim)
    assert room and max(np.prod(shape) for shape in room) <= 2**24


def test_rates_that_no_recorder_has(folder):
    for rate in (1, 999):
        (folder / f"{rate}.flac").write_bytes(flac(1, rate=rate))
        with pytest.raises(UnreadableFile, match=f"a header with {rate} Hz; expected 1000 to 1000000"):
            read_waveform(folder / f"{rate}.flac")
    data = SpeechData(config(folder), MODEL, 0)
    assert {name for name, _ in data.skipped} == {"1.flac", "999.flac"}


def test_silence_is_not_taken_for_damage(tmp_path):
    soundfile.write(tmp_path / "a.flac", np.zeros(60 * RATE), RATE)
    assert SpeechData(config(tmp_path, normalize=False), MODEL, 0).lengths.tolist() == [60 * RATE]


@pytest.mark.parametrize("channels", [1, 2])
def test_long_files_are_read_in_pieces(tmp_path, monkeypatch, channels):
    for seconds in (0.5, 0.6, 1.03):  # also pieces that end with the file
        write(tmp_path / "a.flac", seconds, channels=channels)
        whole = read_waveform(tmp_path / "a.flac")
        with monkeypatch.context() as patch:
            patch.setattr("d2v_fast.train.data.audio.READ_AT_ONCE", RATE // 10 * channels)
            assert np.array_equal(read_waveform(tmp_path / "a.flac"), whole)


def test_what_takes_too_much_memory_is_skipped(folder, monkeypatch):
    def decode(wave, rate, to):
        raise MemoryError

    write(folder / "other.wav", 1.0, rate=8000)
    data = SpeechData(config(folder, max_tokens=20 * RATE), MODEL, 0)
    monkeypatch.setattr("soxr.resample", decode)
    batch = take(data, 1)[0][2]
    assert [name for name, _ in batch.skipped] == ["other.wav"] and len(batch.inputs) == 11
    assert batch.skipped[0][1].startswith("it takes more memory than there is")


def test_nothing_usable(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        SpeechData(config(tmp_path / "no"), MODEL, 0)
    with pytest.raises(DataError, match="holds no audio"):
        SpeechData(config(tmp_path), MODEL, 0)
    write(tmp_path / "short.wav", 0.3)
    with pytest.raises(DataError, match=r"none of the 1 files .* at least 0.5 s. short.wav: 0.30 s"):
        SpeechData(config(tmp_path), MODEL, 0)


def test_manifest_is_taken_at_its_word(folder, tmp_path_factory):
    manifest = tmp_path_factory.mktemp("manifests") / "train.tsv"
    lines = [str(folder), "spk0/00.wav\t8000", "spk1/03.wav\t12800", "", "spk1/07.flac\t100"]
    manifest.write_text("\n".join(lines) + "\n")
    data = SpeechData(config(manifest), MODEL, 0)
    assert list(data.names) == ["spk0/00.wav", "spk1/03.wav"] and data.lengths.tolist() == [8000, 12800]
    assert data.skipped == [("spk1/07.flac", "0.01 s, shorter than min_seconds = 0.5")]
    assert take(data, 1)[0][2].inputs.shape == (2, 8000)


def test_understated_lengths_do_not_break_the_budget(folder):
    manifest = folder / "train.tsv"
    manifest.write_text("\n".join([".", *(f"spk{i % 2}/{i:02d}.wav\t8000" for i in (6, 9))]))  # really 1.1 and 1.4 s
    batch = take(SpeechData(config(manifest, max_tokens=RATE), MODEL, 0), 1)[0][2]
    assert batch.inputs.shape == (2, 8000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no files"),
        ("/root\n", "lists no files"),
        ("/root\na.wav 5\n", "line 2: expected path<TAB>samples, got 'a.wav 5'"),
        ("/root\na.wav\tmany\n", "line 2: expected"),
        ("/root\na.wav\t5\t6\n", "line 2: expected"),
        ("\xff", "not UTF-8"),
    ],
)
def test_bad_manifest(tmp_path, text, message):
    (tmp_path / "m.tsv").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        SpeechData(config(tmp_path / "m.tsv"), MODEL, 0)


def test_missing_manifest(tmp_path):
    with pytest.raises(DataError, match=r"gone\.tsv does not exist"):
        SpeechData(config(tmp_path / "gone.tsv"), MODEL, 0)


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"path": ""}, "path"),
        ({"min_seconds": 0}, "min_seconds"),
        ({"max_seconds": 0.1}, "max_seconds"),
        ({"max_tokens": 100}, "max_tokens"),
        ({"crop_multiple": 0}, "crop_multiple"),
        ({"crop_multiple": 3000}, "crop_multiple"),
        ({"extensions": ("wav",)}, "extensions"),
        ({"extensions": ()}, "extensions"),
    ],
)
def test_bad_config(kwargs, name):
    with pytest.raises(ConfigError, match=f"data.{name} must be"):
        config(**({"path": "x"} | kwargs))


def test_model_that_does_not_fit(folder):
    with pytest.raises(ConfigError, match=r"model\.modality"):
        SpeechData(config(folder), Data2VecConfig.image("base"), 0)
    with pytest.raises(ConfigError, match="sample_rate"):
        SpeechData(config(folder), replace(MODEL, frontend=replace(MODEL.frontend, sample_rate=8000)), 0)
    with pytest.raises(ConfigError, match=r"min_seconds .* mask.length = 10 frames, got '0.2 s = 9 frames'"):
        SpeechData(config(folder, min_seconds=0.2), MODEL, 0)


def test_extensions_select(folder):
    assert len(SpeechData(config(folder, extensions=[".flac"]), MODEL, 0).names) == 4


def test_survives_pickling(folder):
    data = SpeechData(config(folder), MODEL, 0)  # what a spawned worker receives
    assert_same(take(pickle.loads(pickle.dumps(data)), 3), take(data, 3))

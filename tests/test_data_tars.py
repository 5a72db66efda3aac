"""webdataset's shards, compared with what webdataset itself reads, and damaged ones."""

import io
import itertools
import json
import os
import pickle
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
import torch
from data_sets import audio, clips, image

from d2v_fast.nn.config import Data2VecConfig
from d2v_fast.train.data import DataError, ImageData, ImageDataConfig, SpeechData, SpeechDataConfig, batches, read_image
from d2v_fast.train.data.formats import expand_braces
from d2v_fast.train.data.sources import cached
from d2v_fast.train.errors import ConfigError

MODEL = Data2VecConfig.speech("base")
CODEC = {"FLAC": "flac", "WAV": "wav"}


def config(path, **kwargs):
    return SpeechDataConfig(path=str(path), **({"max_tokens": 48_000, "min_seconds": 0.5, "max_seconds": 1.2} | kwargs))


def image_config(path, **kwargs):
    return ImageDataConfig(path=str(path), **({"batch_size": 4, "decode_size": 24} | kwargs))


def write_tar(path, samples):
    """A tar of {name: content}, by the standard library."""
    with tarfile.open(path, "w") as tar:
        for name, content in samples.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def write_shards(folder, items, suffix, count=3):
    """``count`` shards of the items, each with a description beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(items)
    for shard in range(count):
        samples = {}
        for name in names[shard::count]:
            samples |= {f"{name}.{suffix}": items[name], f"{name}.json": json.dumps({"id": name}).encode()}
        write_tar(folder / f"train-{shard:06d}.tar", samples)
    return folder


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards", clips(11), "flac")


def test_the_same_samples_as_webdataset(tmp_path):
    wds = pytest.importorskip("webdataset", reason="needs webdataset (requirements/test.txt)")
    for shard in range(2):
        with wds.TarWriter(str(tmp_path / f"train-{shard:06d}.tar")) as writer:
            for i in range(shard, 8, 2):
                kind = ("FLAC", "WAV")[i % 4 // 2]
                sample = {CODEC[kind]: audio(i, 0.5 + 0.05 * i, kind), "json": {"id": i}, "seg.txt": "noise"}
                writer.write({"__key__": f"speaker{shard}/clip{i:03d}", **sample})
    urls = str(tmp_path / "train-{000000..000001}.tar")
    theirs = {}
    for sample in wds.WebDataset(urls, shardshuffle=False):
        content = sample.get("flac") or sample["wav"]
        theirs[sample["__key__"]] = soundfile.read(io.BytesIO(content), dtype="float32")[0]
    data = SpeechData(config(urls, normalize=False), MODEL, 0)
    ours = {os.path.splitext(name)[0].partition(".tar/")[2]: data._read(i) for i, name in enumerate(data.names)}
    assert list(ours) == list(theirs) and len(ours) == 8
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    assert sorted(i for batch in data.plan(0) for i in batch) == list(range(8))


def test_the_same_images_as_webdataset(tmp_path):
    wds = pytest.importorskip("webdataset", reason="needs webdataset (requirements/test.txt)")
    path = tmp_path / "images.tar"
    with wds.TarWriter(str(path)) as writer:
        for i in range(6):
            writer.write({"__key__": f"{i:04d}", "jpg": image(i, "JPEG"), "cls": i})
    theirs = [read_image(io.BytesIO(sample["jpg"]), 24) for sample in wds.WebDataset(str(path), shardshuffle=False)]
    data = ImageData(image_config(path), Data2VecConfig.image("base"), 0)
    assert len(data.names) == len(theirs) == 6
    assert all(np.array_equal(data._read(i), expected) for i, expected in enumerate(theirs))


def test_batches_depend_on_seed_and_place_only(shards, tmp_path):
    data = SpeechData(config(shards), MODEL, 3)
    count = 2 * len(data.plan(0))
    alone = list(itertools.islice(batches(data), count))
    others = (
        batches(data, num_workers=2),
        batches(pickle.loads(pickle.dumps(data))),
        batches(SpeechData(config(shards, cache_dir=str(tmp_path / "cache")), MODEL, 3)),
        batches(SpeechData(config(shards, cache_dir=str(tmp_path / "cache")), MODEL, 3)),  # out of the cache
    )
    for other in others:
        for (*place, a), (*same, b) in zip(alone, itertools.islice(other, count), strict=True):
            assert place == same and torch.equal(a.inputs, b.inputs) and torch.equal(a.mask, b.mask)
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 4  # of each tar what is in it, and the lengths of all


def test_cache_notices_other_shards(shards, tmp_path):
    cached = config(shards, cache_dir=str(tmp_path / "cache"))
    before = SpeechData(cached, MODEL, 0)
    write_tar(shards / "train-000001.tar", {"new.flac": audio(20, 1.0)})
    after = SpeechData(cached, MODEL, 0)
    assert "train-000001.tar/new.flac" in list(after.names) and len(after.names) < len(before.names)
    assert after.fingerprint() == SpeechData(config(shards), MODEL, 0).fingerprint() != before.fingerprint()


def test_ranks_that_start_together_make_a_cache_once(tmp_path, caplog):
    calls = []

    def make():
        calls.append(1)
        time.sleep(1.3)
        return {"x": np.arange(3)}

    def ask(number):
        return cached(str(tmp_path / "cache"), "kind", ["key"], make)["x"].tolist()

    with caplog.at_level("INFO"), ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask, range(3))) == [[0, 1, 2]] * 3
    assert len(calls) == 1 and "waiting for another process" in caplog.text


def test_other_rates_channels_and_nothing_in_a_tar(tmp_path):
    def encoded(wave, rate):
        file = io.BytesIO()
        soundfile.write(file, wave, rate, format="WAV")
        return file.getvalue()

    samples = {
        "fast.wav": encoded(np.zeros(48_000), 48_000),
        "stereo.wav": encoded(np.full((16_000, 2), (0.5, -0.25)), 16_000),
        "zero.wav": encoded(np.zeros(0), 16_000),
        "none.wav": b"",
    }
    data = SpeechData(config(write_tar(tmp_path / "x.tar", samples), normalize=False), MODEL, 0)
    assert data.lengths.tolist() == [16_000, 16_000] and (data._read(1) == 0.125).all()
    assert sorted(name for name, _ in data.skipped) == ["x.tar/none.wav", "x.tar/zero.wav"]


def test_which_members_are_taken(tmp_path):
    clip, other = audio(0, 1.0), audio(1, 1.0)
    samples = {
        "a.json": b"{}",
        "a.FLAC": clip,
        "a.wav": other,  # a second one of the same sample
        "b.mic.flac": clip,
        "b.far.flac": other,
        "__meta__/c.flac": clip,
        "d/no_extension": clip,
        "e.dir/f.flac": clip,
        "e.dir/g.txt": b"",
    }
    path = write_tar(tmp_path / "x.tar", samples)
    assert list(SpeechData(config(path), MODEL, 0).names) == ["x.tar/a.FLAC", "x.tar/e.dir/f.flac"]
    assert list(SpeechData(config(path, column="far.flac"), MODEL, 0).names) == ["x.tar/b.far.flac"]


@pytest.mark.parametrize("damage", ["inside a member", "between members", "header", "empty", "zipped", "garbage"])
def test_damaged_tars_give_what_came_before(shards, damage, caplog):
    path = shards / "train-000001.tar"
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    content, third = path.read_bytes(), members[2]
    whole = {"inside a member": 1, "between members": 1, "header": 1}.get(damage, 0)
    if damage == "inside a member":
        path.write_bytes(content[: third.offset_data + 700])
    elif damage == "between members":
        path.write_bytes(content[: third.offset])
    elif damage == "header":
        path.write_bytes(content[: third.offset] + b"\xff" * 512 + content[third.offset + 512 :])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "garbage":
        path.write_bytes(b"\x89PNG" * 500)
    else:
        import gzip

        path.write_bytes(gzip.compress(content))
    data = SpeechData(config(shards), MODEL, 0)
    assert len(data.names) == 7 + whole
    ((name, reason),) = data.skipped
    assert name == "train-000001.tar" and ("tar is damaged" in reason or "not a whole, uncompressed tar" in reason)
    assert name in caplog.text
    for _, _, batch in itertools.islice(batches(data), len(data.plan(0))):
        assert not batch.skipped


def test_nothing_in_them(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.txt": b"text"})
    with pytest.raises(DataError, match=r"a\.tar holds nothing to train on; expected audio of at least"):
        SpeechData(config(path), MODEL, 0)
    with pytest.raises(DataError, match="holds nothing to train on; expected images"):
        ImageData(image_config(path), Data2VecConfig.image("base"), 0)


def test_a_shard_that_went_away(shards):
    data = SpeechData(config(shards, max_tokens=1_000_000), MODEL, 0)
    (shards / "train-000002.tar").unlink()
    batch = next(batches(data))[2]
    assert len(batch.inputs) == 8
    assert {(name.partition("/")[0], reason) for name, reason in batch.skipped} == {
        ("train-000002.tar", "No such file or directory")
    }


def test_many_broken_headers_end_the_start(tmp_path):
    items = clips(30)
    write_shards(tmp_path, {n: c if i % 2 else b"broken" for i, (n, c) in enumerate(items.items())}, "flac")
    with pytest.raises(DataError, match=r"15 of 30 items could not be read \(50.00%\), more than data.max_bad"):
        SpeechData(config(tmp_path, max_seconds=5), MODEL, 0)
    allowed = SpeechData(config(tmp_path, max_bad_fraction=0.5), MODEL, 0)
    assert len(allowed.names) == 15 and len(allowed.skipped) == 15


def test_patterns(shards, monkeypatch):
    def names(path, **kwargs):
        return {name.partition("/")[0] for name in SpeechData(config(path, **kwargs), MODEL, 0).names}

    both = {"train-000000.tar", "train-000002.tar"}
    assert names(shards / "train-{000000,000002}.tar") == names(shards / "train-*[02].tar") == both
    assert names(shards / "train-00000{0..2}.tar") == names(shards) == both | {"train-000001.tar"}
    monkeypatch.chdir(shards)
    assert names("train-00000?.tar", format="webdataset") == names(shards)
    with pytest.raises(DataError, match=r"train-\{000002..000003\}\.tar: train-000003\.tar does not exist"):
        names("train-{000002..000003}.tar")
    with pytest.raises(DataError, match="does not exist"):
        names("valid-*.tar")
    assert list(expand_braces("a{08..10}b{x,y}")) == ["a08bx", "a08by", "a09bx", "a09by", "a10bx", "a10by"]


def test_splits_in_one_folder(shards):
    write_tar(shards / "validation-0.tar", {"v.flac": audio(30, 1.0)})
    write_tar(shards / "test-0.tar", {"t.flac": audio(31, 1.0)})
    assert len(SpeechData(config(shards), MODEL, 0).names) == 11
    assert list(SpeechData(config(shards, split="valid"), MODEL, 0).names) == ["validation-0.tar/v.flac"]
    with pytest.raises(DataError, match=r"holds the splits test, train, validation; data.split is 'other'"):
        SpeechData(config(shards, split="other"), MODEL, 0)


def test_folders_of_several_formats(shards):
    (shards / "loose.flac").write_bytes(audio(40, 1.0))
    with pytest.raises(DataError, match=r"several formats \(1 of files, 3 of webdataset\); choose one with data.f"):
        SpeechData(config(shards), MODEL, 0)
    assert list(SpeechData(config(shards, format="files"), MODEL, 0).names) == ["loose.flac"]
    assert len(SpeechData(config(shards, format="webdataset"), MODEL, 0).names) == 11
    with pytest.raises(ConfigError, match="must be auto or one of files, manifest, webdataset, parquet, arrow here"):
        SpeechData(config(shards, format="lmdb"), MODEL, 0)
    with pytest.raises(DataError, match=r"several formats \(files, webdataset\); expected one"):
        SpeechData(config(shards / "*[a-z0-9]"), MODEL, 0)
    with pytest.raises(DataError, match=r"holds no audio files, a .tsv manifest, uncompressed tars or tables \("):
        SpeechData(config(write_tar(shards / "x.zip", {})), MODEL, 0)

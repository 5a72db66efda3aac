"""Parquet and Arrow files of speech, images and text, as pyarrow and Hugging Face datasets write them."""

import itertools
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from data_sets import RATE, audio, clips, image, wave

from d2v_fast.nn.config import Data2VecConfig, TextFrontEndConfig
from d2v_fast.train.data import (
    DataError,
    ImageData,
    ImageDataConfig,
    SpeechData,
    SpeechDataConfig,
    TextData,
    TextDataConfig,
    UnreadableFile,
    batches,
    build_data,
    read_image,
)
from d2v_fast.train.data.tables import read_documents
from d2v_fast.train.errors import ConfigError

pa = pytest.importorskip("pyarrow", reason="needs pyarrow (requirements/test.txt)")
pq = pytest.importorskip("pyarrow.parquet")

MODEL = Data2VecConfig.speech("base")
IMAGES = Data2VecConfig.image("base")


def config(path, **kwargs):
    return SpeechDataConfig(path=str(path), **({"max_tokens": 48_000, "min_seconds": 0.5, "max_seconds": 1.2} | kwargs))


def image_config(path, **kwargs):
    return ImageDataConfig(path=str(path), **({"batch_size": 4, "decode_size": 24} | kwargs))


def text_config(path, **kwargs):
    return TextDataConfig(path=str(path), **({"batch_size": 4, "tokens_per_sample": 16} | kwargs))


def table(items, column="audio", **others):
    """A table with a column of the form that datasets gives to Audio and Image, and a text."""
    values = [None if content is None else {"bytes": content, "path": f"{name}.x"} for name, content in items.items()]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {column: pa.array(values, kind), "sentence": pa.array(list(items)), **others}
    return pa.table(columns)


def write_arrow(path, content, stream=True):
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), content.schema) as writer:
        writer.write_table(content, max_chunksize=4)
    return path


@pytest.fixture
def folder(tmp_path):
    """Eleven clips in two parquet files of row groups of three, beside a split for tests."""
    items = list(clips(11).items())
    for number, part in enumerate((items[:6], items[6:])):
        pq.write_table(table(dict(part)), tmp_path / f"train-{number:05d}-of-00002.parquet", row_group_size=3)
    pq.write_table(table({"other": audio(50, 1.0)}), tmp_path / "test-00000-of-00001.parquet")
    return tmp_path


def assert_the_clips(data, count=11):
    assert len(data.names) == count
    for item in range(count):
        assert np.array_equal(data._read(item), wave(item, 0.5 + 0.05 * item))
    assert sorted(i for batch in data.plan(0) for i in batch) == list(range(count))


@pytest.mark.parametrize("cache", [False, True])
def test_parquet(folder, tmp_path_factory, cache):
    cache_dir = str(tmp_path_factory.mktemp("cache")) if cache else None
    data = SpeechData(config(folder, normalize=False, cache_dir=cache_dir), MODEL, 0)
    assert_the_clips(data)
    assert data.names[7] == "train-00001-of-00002.parquet:1"
    assert list(SpeechData(config(folder, split="test"), MODEL, 0).names) == ["test-00000-of-00001.parquet:0"]
    alone = list(itertools.islice(batches(data), 2 * len(data.plan(0))))
    for other in (batches(data, num_workers=2), batches(pickle.loads(pickle.dumps(data)))):
        for (*place, a), (*same, b) in zip(alone, itertools.islice(other, len(alone)), strict=True):
            assert place == same and torch.equal(a.inputs, b.inputs) and torch.equal(a.mask, b.mask)


@pytest.mark.parametrize("cache", [False, True])
def test_few_files_are_open(folder, tmp_path_factory, monkeypatch, cache):
    monkeypatch.setattr("d2v_fast.train.data.tables.OPEN_FILES", 1)
    cache_dir = str(tmp_path_factory.mktemp("cache")) if cache else None
    data = SpeechData(config(folder, normalize=False, cache_dir=cache_dir), MODEL, 0)
    opened = []
    for item in (0, 10, 1, 9):
        assert np.array_equal(data._read(item), wave(item, 0.5 + 0.05 * item))
        opened += data.source._open
    assert opened == [0, 1, 0, 1]


def test_unpacked_once(folder, tmp_path_factory, caplog):
    cache = tmp_path_factory.mktemp("cache")
    with caplog.at_level("INFO"):
        first = SpeechData(config(folder, cache_dir=str(cache)), MODEL, 0)
        assert caplog.text.count("unpacking column audio") == 2
        second = SpeechData(config(folder, cache_dir=str(cache)), MODEL, 0)
        assert caplog.text.count("unpacking column audio") == 2
    assert first.fingerprint() == second.fingerprint() == SpeechData(config(folder), MODEL, 0).fingerprint()
    assert sorted(path.suffix for path in cache.iterdir() if path.suffix != ".lock") == [".arrow", ".arrow", ".npz"]


@pytest.mark.parametrize("stream", [True, False])
def test_arrow(tmp_path, stream):
    path = write_arrow(tmp_path / "data.arrow", table(clips(11)), stream)
    assert_the_clips(SpeechData(config(path, normalize=False), MODEL, 0))


def test_saved_by_datasets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs datasets (requirements/test.txt)")
    value = datasets.Value
    kind = datasets.Features({"clip": {"bytes": value("binary"), "path": value("string")}, "extra": value("binary")})
    values = [{"bytes": content, "path": None} for content in clips(11).values()]
    saved = datasets.Dataset.from_dict({"clip": values, "extra": [b"x"] * 11}, features=kind)
    saved = saved.cast_column("clip", datasets.Audio(RATE, decode=False))
    saved.save_to_disk(str(tmp_path / "one"), num_shards=3)
    saved.to_parquet(str(tmp_path / "one.parquet"))
    splits = {"train": saved, "validation": saved.select(range(2))}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "splits"))
    for path in ("one", "one.parquet", "splits"):
        assert_the_clips(SpeechData(config(tmp_path / path, normalize=False), MODEL, 0))
    assert_the_clips(SpeechData(config(tmp_path / "splits", split="validation", normalize=False), MODEL, 0), 2)
    with pytest.raises(DataError, match=r"holds the splits train, validation; data.split is 'test'"):
        SpeechData(config(tmp_path / "splits", split="test"), MODEL, 0)


def test_images(tmp_path):
    items = {f"{i}": image(i) for i in range(7)}
    pq.write_table(table(items, "image", label=pa.array(range(7))), tmp_path / "a.parquet")
    data = ImageData(image_config(tmp_path), IMAGES, 0)
    for item, content in enumerate(items.values()):
        (tmp_path / "one.png").write_bytes(content)
        assert np.array_equal(data._read(item), read_image(tmp_path / "one.png", 24))


def test_plain_bytes_and_paths(tmp_path):
    plain = pa.table({"flac": pa.array([audio(0, 1.0), None], pa.large_binary()), "n": [1, 2]})
    data = SpeechData(config(write_arrow(tmp_path / "plain.arrow", plain), normalize=False), MODEL, 0)
    assert np.array_equal(data._read(0), wave(0, 1.0)) and data.skipped == [("plain.arrow:1", "an empty row")]
    (tmp_path / "there.flac").write_bytes(audio(1, 1.0))
    rows = [{"bytes": None, "path": "there.flac"}, {"bytes": None, "path": "gone.flac"}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    (tmp_path / "paths").mkdir()
    pq.write_table(pa.table({"audio": pa.array(rows, kind)}), tmp_path / "paths.parquet")
    data = SpeechData(config(tmp_path / "paths.parquet", normalize=False), MODEL, 0)
    assert np.array_equal(data._read(0), wave(1, 1.0))
    assert data.skipped == [("paths.parquet:1", "gone.flac: No such file or directory")]


def test_paths_lead_below_the_tables_only(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for path in (tmp_path / "out.flac", folder / "in.flac"):
        path.write_bytes(audio(1, 1.0))
    os.mkfifo(folder / "pipe.flac")
    (folder / "link.flac").symlink_to(tmp_path / "out.flac")  # made by whoever owns the folder, not by the table
    paths = ["in.flac", str(folder / "in.flac"), "x/../in.flac", "link.flac"]
    paths += ["../out.flac", str(tmp_path / "out.flac"), "../set2/in.flac", "pipe.flac", ".", "in\0.flac"]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.array([{"bytes": None, "path": path} for path in paths], kind)
    data = SpeechData(config(write_arrow(folder / "a.arrow", pa.table({"audio": rows})), normalize=False), MODEL, 0)
    assert all(np.array_equal(data._read(item), wave(1, 1.0)) for item in range(4))
    reasons = [reason.removeprefix(f"{path}: ") for path, (_, reason) in zip(paths[4:], data.skipped, strict=True)]
    assert reasons[:3] == [f"not below the folder of the tables, {folder}"] * 3
    assert reasons[3:] == ["not a regular file"] * 2 + ["embedded null byte"]


def test_bad_items_are_skipped_and_named(tmp_path):
    items = {"good": audio(0, 1.0), "broken": b"fLaC", "none": None, "short": audio(1, 0.2), "empty": b""}
    pq.write_table(table(items), tmp_path / "a.parquet")
    data = SpeechData(config(tmp_path), MODEL, 0)
    assert [name for name, _ in data.skipped] == [f"a.parquet:{row}" for row in (1, 2, 4, 3)]
    pq.write_table(table({"good": image(0), "cut": image(1)[:400]}, "image"), tmp_path / "b.parquet")
    batch = next(batches(ImageData(image_config(tmp_path / "b.parquet"), IMAGES, 0)))[2]
    assert len(batch.inputs) == 1 and [name for name, _ in batch.skipped] == ["b.parquet:1"]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_damaged_files_are_skipped_and_named(folder, suffix):
    for path in folder.glob("test*"):
        path.unlink()
    if suffix == ".arrow":
        for path in folder.glob("*.parquet"):
            write_arrow(path.with_suffix(".arrow"), pq.read_table(path))
            path.unlink()
    victim = sorted(folder.iterdir())[1]
    victim.write_bytes(victim.read_bytes()[:-2000])
    data = SpeechData(config(folder, max_bad_fraction=0.5), MODEL, 0)
    ((name, reason),) = data.skipped
    assert name == victim.name and "damaged or cut short" in reason and len(data.names) == 6
    for path in folder.iterdir():
        path.write_bytes(b"\x89PNG" * 100)
    with pytest.raises(DataError, match=r"none of the 2 files under .* damaged or cut short"):
        SpeechData(config(folder), MODEL, 0)


FUZZ = """
import random
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa

from d2v_fast.train.data.tables import Tables, UnreadableFile

folder = Path(sys.argv[1])
table = pa.table({"audio": [b"x" * 200] * 20})
with pa.ipc.new_stream(str(folder / "whole.arrow"), table.schema) as writer:
    writer.write_table(table)
whole = (folder / "whole.arrow").read_bytes()
start = whole.index(np.arange(0, 4200, 200, np.int32).tobytes())  # the 21 offsets
refused = 0
for seed in range(400):
    draw, content = random.Random(seed), bytearray(whole)
    for _ in range(draw.choice([1, 3])):
        content[start + draw.randrange(84)] = draw.randrange(256)
    (folder / "damaged.arrow").write_bytes(content)
    source = Tables(folder, [folder / "damaged.arrow"], "audio", None)
    refused += len(source.skipped)
    for item in range(len(source.names)):
        try:
            source.open(item).read()
        except UnreadableFile:
            refused += 1
print(refused)
"""


def test_damaged_offsets_of_arrow_do_not_end_the_process(tmp_path):
    # wrong offsets crash pyarrow, so this one has a process of its own
    done = subprocess.run([sys.executable, "-c", FUZZ, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 50


def test_text_that_is_not_utf_8(tmp_path):
    content = pa.table({"text": ["a text", "another"]})
    for path in (write_arrow(tmp_path / "t.arrow", content), tmp_path / "t.parquet"):
        if path.suffix == ".parquet":
            pq.write_table(content, path, compression=None, use_dictionary=False, write_statistics=False)
        assert list(read_documents(path, None)) == ["a text", "another"]
        path.write_bytes(path.read_bytes().replace(b"another", b"ano\xff\xfeer"))
        with pytest.raises(UnreadableFile, match=r"damaged: .*Invalid UTF8"):
            list(read_documents(path, None))


def test_fewer_rows_than_the_footer_says(tmp_path, monkeypatch):
    pq.write_table(table(clips(6)), tmp_path / "a.parquet", row_group_size=3)
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, i, **kwargs: read(self, i, **kwargs)[: 3 - i])
    data = SpeechData(config(tmp_path / "a.parquet"), MODEL, 0)
    assert data.skipped == [(f"a.parquet:{row}", "row group 1 is damaged: 2 of its 3 rows") for row in (3, 4, 5)]


def test_a_footer_that_contradicts_itself(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"audio": [b"x"] * 77}), path, row_group_size=50)
    start = path.stat().st_size - 8 - pq.read_metadata(path).serialized_size
    rows = b"\x16\x9a\x01"  # 77 as thrift has it
    data, footer = path.read_bytes()[:start], path.read_bytes()[start:]
    path.write_bytes(data + footer.replace(rows, b"\x16\x9c\x01", 1))
    with pytest.raises(DataError, match=r"damaged: the footer has 78 rows, its row groups 50, 27"):
        SpeechData(config(path), MODEL, 0)


def test_a_row_group_that_is_damaged(folder):
    path = folder / "train-00000-of-00002.parquet"
    group = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    content[group.data_page_offset : group.data_page_offset + 60] = bytes(60)
    path.write_bytes(content)
    data = SpeechData(config(folder), MODEL, 0)
    assert len(data.names) == 8 and [name for name, _ in data.skipped] == [f"{path.name}:{row}" for row in (3, 4, 5)]
    assert all("row group 1 is damaged" in reason for _, reason in data.skipped)


def test_which_column(tmp_path):
    both = table({"a": audio(0, 1.0)}, far=pa.array([{"bytes": audio(1, 1.0), "path": ""}]))
    path = write_arrow(tmp_path / "a.arrow", both)
    message = r"2 columns \(audio, far\) of encoded audio .* data.column to say which. Its columns: audio: struct"
    with pytest.raises(DataError, match=message):
        SpeechData(config(path), MODEL, 0)
    data = SpeechData(config(path, column="far", normalize=False), MODEL, 0)
    assert np.array_equal(data._read(0), wave(1, 1.0))
    features = {"info": {"features": {"audio": {"_type": "Audio"}, "far": {"_type": "Value"}}}}
    marked = both.replace_schema_metadata({"huggingface": json.dumps(features)})
    data = SpeechData(config(write_arrow(tmp_path / "a.arrow", marked), normalize=False), MODEL, 0)
    assert np.array_equal(data._read(0), wave(0, 1.0))
    with pytest.raises(DataError, match=r"no column 'sound' among audio, sentence, far"):
        SpeechData(config(path, column="sound"), MODEL, 0)
    with pytest.raises(DataError, match="no column of encoded audio"):
        SpeechData(config(write_arrow(path, both.select(["sentence"]))), MODEL, 0)


def test_text(tmp_path):
    documents = [f"line {i} of a text" + " and more" * (i % 5) for i in range(60)]
    model = Data2VecConfig.text("base")
    model = type(model)(**{**vars(model), "frontend": TextFrontEndConfig(vocab_size=280, max_positions=64)})
    (tmp_path / "plain.txt").write_text("\n".join(documents))
    plain = TextData(text_config(tmp_path / "plain.txt"), model, 0)
    content = pa.table({"id": range(62), "text": ["", *documents, None], "title": ["x"] * 62})
    pq.write_table(content, tmp_path / "t.parquet", row_group_size=7)
    write_arrow(tmp_path / "t.arrow", content)
    for path in ("t.parquet", "t.arrow"):
        data = build_data(text_config(tmp_path / path, cache_dir=str(tmp_path / "cache")), model, 0)
        assert np.array_equal(data.ids, plain.ids) and data.num_documents == 60
    with pytest.raises(DataError, match=r"several formats \(1 of files, 1 of parquet, 1 of arrow\)"):
        build_data(text_config(tmp_path), model, 0)
    with pytest.raises(DataError, match=r"2 columns .a, b. of text"):
        pq.write_table(pa.table({"a": ["x"], "b": ["y"]}), tmp_path / "t.parquet")
        build_data(text_config(tmp_path / "t.parquet"), model, 0)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"none of the 1 files .* damaged or cut short"):
        build_data(text_config(tmp_path / "t.parquet"), model, 0)


def test_without_pyarrow(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="needs pyarrow: pip install pyarrow"):
        SpeechData(config(folder), MODEL, 0)

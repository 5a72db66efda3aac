"""fairseq's audio manifests, and slices of archives, compared with fairseq's own dataset."""

import itertools
import os
import zipfile

import numpy as np
import pytest
import torch
from data_sets import audio, clips, wave, write_files

from d2v_fast.nn.config import Data2VecConfig
from d2v_fast.train.data import DataError, SpeechData, SpeechDataConfig, UnreadableFile, batches, normalize_waveform
from d2v_fast.train.data.manifest import read_manifest

MODEL = Data2VecConfig.speech("base")


def config(path, **kwargs):
    return SpeechDataConfig(path=str(path), **({"max_tokens": 48_000, "min_seconds": 0.6, "max_seconds": 1.2} | kwargs))


def write_zip(path, items, compression=zipfile.ZIP_STORED):
    """An archive of the items; returns "path:offset:length" of each, as fairseq's tools write them."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in items.items():
            archive.writestr(f"{name}.flac", content)
        entries = [archive.getinfo(f"{name}.flac") for name in items]
    slices = []
    for entry in entries:
        offset = entry.header_offset + 30 + len(entry.filename)
        slices.append(f"{path.name}:{offset}:{entry.compress_size}")
    return slices


@pytest.fixture
def manifest(tmp_path):
    """Twelve clips of 0.5 to 1.05 s: half in files, half in an archive."""
    items = clips(12)
    names = list(items)
    root = write_files(tmp_path / "audio", {n: items[n] for n in names[:6]}, ".flac")
    lines = [f"part{i % 2}/{name}.flac" for i, name in enumerate(names[:6])]
    lines += write_zip(root / "clips.zip", {n: items[n] for n in names[6:]})
    lengths = [wave(i, 0.5 + 0.05 * i).size for i in range(12)]
    rows = [f"{line}\t{length}" for line, length in zip(lines, lengths, strict=True)]
    path = tmp_path / "manifests" / "train.tsv"
    path.parent.mkdir()
    path.write_text("\n".join([str(root), *rows]) + "\n")
    return path


def test_the_same_utterances_as_fairseqs_dataset(manifest):
    fairseq_data = pytest.importorskip("fairseq.data", reason="needs ve-fairseq (requirements/peers.txt)")
    theirs = fairseq_data.FileAudioDataset(
        str(manifest), 16_000, max_sample_size=19_200, min_sample_size=9_600, normalize=True
    )
    data = SpeechData(config(manifest), MODEL, 0)
    assert data.lengths.tolist() == theirs.sizes.tolist() and len(data.skipped) == len(theirs.skipped_indices) == 2
    for item in range(len(theirs)):
        expected = theirs[item]["source"].numpy()
        np.testing.assert_allclose(data._read(item), expected, atol=1e-5)
    order = theirs.ordered_indices()
    packed = theirs.batch_by_size(order, max_tokens=48_000)
    plan = data.plan(0)
    assert sorted(map(len, plan)) == sorted(map(len, packed))  # as many utterances in each batch
    assert sorted(i for b in plan for i in b) == sorted(int(i) for b in packed for i in b)  # each once


def test_slices_and_files_are_read_alike(manifest):
    data = SpeechData(config(manifest), MODEL, 0)
    assert len(data.names) == 10  # the first two are too short
    for item in range(10):
        assert np.array_equal(data._read(item), normalize_waveform(wave(item + 2, 0.6 + 0.05 * item)))


def test_workers_read_slices(manifest):
    data = SpeechData(config(manifest), MODEL, 0)
    alone, shared = (list(itertools.islice(batches(data, num_workers=n), 4)) for n in (0, 2))
    assert all(torch.equal(a[2].inputs, b[2].inputs) for a, b in zip(alone, shared, strict=True))


@pytest.mark.parametrize("damage", ["compressed", "beyond", "missing", "not audio"])
def test_bad_slices_are_skipped_and_named(tmp_path, damage):
    items = {"a": audio(0, 1.0), "b": audio(1, 1.0)}
    kind = zipfile.ZIP_DEFLATED if damage == "compressed" else zipfile.ZIP_STORED
    _, second = write_zip(tmp_path / "a.zip", items | ({"b": b"x" * 5000} if damage == "not audio" else {}), kind)
    (tmp_path / "good.flac").write_bytes(items["a"])
    if damage == "beyond":
        second = second.rpartition(":")[0] + ":1000000"
    elif damage == "missing":
        second = second.replace("a.zip", "gone.zip")
    (tmp_path / "m.tsv").write_text(f".\ngood.flac\t16000\n{second}\t16000\n")
    _, _, batch = next(batches(SpeechData(config(tmp_path / "m.tsv"), MODEL, 0)))
    ((name, reason),) = batch.skipped
    assert name == second and len(batch.inputs) == 1
    expected = {"beyond": "expected bytes", "missing": "No such file"}.get(damage, "not recognised")
    assert expected in reason


def test_relative_roots(tmp_path, monkeypatch):
    """The manifest's folder, then the working directory, from which fairseq takes them."""
    write_files(tmp_path / "work" / "audio", {"a": audio(0, 1.0)}, ".flac")
    manifest = tmp_path / "manifests" / "train.tsv"
    manifest.parent.mkdir()
    manifest.write_text("audio\npart0/a.flac\t16000\n")
    with pytest.raises(UnreadableFile, match="No such file"):
        read_manifest(manifest)[0].open(0)
    monkeypatch.chdir(tmp_path / "work")
    read_manifest(manifest)[0].open(0).close()
    write_files(manifest.parent / "audio", {"a": audio(1, 2.0)}, ".flac")
    source, _ = read_manifest(manifest)
    assert os.path.samefile(source.root, manifest.parent / "audio")


def test_folder_of_manifests(manifest):
    """fairseq's task names a folder and a split."""
    (manifest.parent / "valid.tsv").write_text(manifest.read_text())
    data = SpeechData(config(manifest.parent), MODEL, 0)
    assert list(data.names) == list(SpeechData(config(manifest), MODEL, 0).names)
    with pytest.raises(DataError, match=r"holds the manifests train.tsv, valid.tsv; data.split is 'test'"):
        SpeechData(config(manifest.parent, split="test"), MODEL, 0)


def test_tables_of_other_kinds_beside_audio_are_left_alone(tmp_path):
    write_files(tmp_path, {"a": audio(0, 1.0)}, ".flac")
    (tmp_path / "transcripts.tsv").write_text("path\tsentence\n")
    assert list(SpeechData(config(tmp_path), MODEL, 0).names) == ["part0/a.flac"]


def test_names_with_colons(tmp_path):
    (tmp_path / "10:30:15.flac").write_bytes(audio(0, 1.0))
    (tmp_path / "m.tsv").write_text(".\n10:30:15.flac\t16000\n")
    assert SpeechData(config(tmp_path / "m.tsv"), MODEL, 0)._read(0).size == 16_000

"""How many items and files may be unreadable, and files and names that nobody expects."""

import os
import threading
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from data_sets import audio, clips, image
from test_data_base import Numbers, take
from test_data_binarized import model as binarized_model
from test_data_binarized import write_folder
from test_data_tars import write_shards, write_tar

from d2v_fast.nn.config import Data2VecConfig, TextFrontEndConfig
from d2v_fast.train.data import (
    DataError,
    ImageDataConfig,
    SpeechDataConfig,
    TextDataConfig,
    UnreadableFile,
    batches,
    build_data,
    tables,
    tars,
    text,
)
from d2v_fast.train.data.bad_items import FILES_ALLOWED, ITEMS_ALLOWED, check_files, too_many
from d2v_fast.train.data.sources import open_regular
from d2v_fast.train.data.tables import read_documents

FRONTEND = TextFrontEndConfig(vocab_size=270, max_positions=64)
MODELS = {
    "speech": Data2VecConfig.speech("base"),
    "image": Data2VecConfig.image("base"),
    "text": replace(Data2VecConfig.text("base"), frontend=FRONTEND),
}


def build(kind, path, **kwargs):
    configs = {
        "speech": (SpeechDataConfig, {"max_tokens": 48_000, "min_seconds": 0.5}),
        "image": (ImageDataConfig, {"batch_size": 4, "decode_size": 24}),
        "text": (TextDataConfig, {"batch_size": 4, "tokens_per_sample": 16}),
    }
    kinds, settings = configs[kind]
    return build_data(kinds(path=str(path), **settings, **kwargs), MODELS[kind], 0)


@contextmanager
def pipe(path):
    """A pipe; who waits for its other end goes on after some seconds, with nothing in it."""
    os.mkfifo(path)
    done = threading.Event()

    def let_go():
        while not done.wait(5):
            os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))

    thread = threading.Thread(target=let_go)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def write_files(kind, folder):
    """Four files of many items."""
    if kind == "text":
        for number in range(4):
            (folder / f"{number}.txt").write_text(f"text number {number} and more of it\n" * 20)
    elif kind == "tables":
        pa = pytest.importorskip("pyarrow", reason="needs pyarrow (requirements/test.txt)")
        pq = pytest.importorskip("pyarrow.parquet")
        for number, content in enumerate(clips(4).values()):
            pq.write_table(pa.table({"audio": [content] * 3}), folder / f"{number}.parquet")
    else:
        items = clips(12) if kind == "speech" else {f"i{i}": image(i) for i in range(12)}
        write_shards(folder, items, "flac" if kind == "speech" else "png", count=4)
    return sorted(folder.iterdir())


def damage(path):
    """Half of the file, and in a text something that is not UTF-8; what comes first in a tar can be read still."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + b"\xff" * (path.suffix == ".txt"))


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("kind", ["speech", "image", "text", "tables"])
def test_files_are_bounded_as_files(kind, cache, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    paths = write_files(kind, folder)
    kwargs = {"cache_dir": str(tmp_path / "cache")} if cache else {}
    modality = {"tables": "speech"}.get(kind, kind)
    damage(paths[1])
    one = build(modality, folder, **kwargs)  # whatever share of them it is
    assert [name for name, _ in one.skipped] == [paths[1].name]
    with pytest.raises(DataError, match=r"1 of 4 files could not be read \(25.00%\), more than .* = 0; last: "):
        build(modality, folder, max_bad_fraction=0, **kwargs)
    damage(paths[2])
    allowed = build(modality, folder, max_bad_fraction=0.5, **kwargs)
    assert len(allowed.skipped) == 2 and next(batches(allowed))
    for limit in (0.01, 0.49):
        with pytest.raises(DataError, match=rf"2 of 4 files could not be read \(50.00%\), .* = {limit}; last: "):
            build(modality, folder, max_bad_fraction=limit, **kwargs)


def test_half_of_the_files_are_not_few(tmp_path, caplog):
    """One of two tars is cut short: refused, or said with its share; items are counted among items."""
    write_shards(tmp_path, {**clips(12), "short": audio(1, 0.2)}, "flac", count=2)
    damage(tmp_path / "train-000001.tar")
    with pytest.raises(DataError, match=r"1 of 2 files could not be read \(50\.00%\), more than .* = 0\.01"):
        build("speech", tmp_path)
    caplog.clear()
    left = build("speech", tmp_path, max_bad_fraction=0.5)
    said, items = [text.partition(":")[0] for text in caplog.messages], len(left.names) + 1
    assert said == [
        "skipped 1 of 2 files, or the rest of them (50.0%)",
        f"skipped 1 of {items} items ({1 / items:.1%})",
    ]


@pytest.mark.parametrize("kind", ["tars", "tables", "headers", "text"])
def test_failures_are_not_kept(kind, tmp_path, monkeypatch):
    """What could not be read once is there on the next start; the cache is used for all the rest."""
    folder, failing, opened = tmp_path / "data", [True], []
    folder.mkdir()
    paths = write_files({"headers": "speech", "tars": "speech"}.get(kind, kind), folder)

    def flaky(real):
        def call(path, *args, **kwargs):
            opened.append(os.path.basename(path))
            if failing and os.path.basename(path) == paths[1].name:
                raise UnreadableFile(path, "Input/output error")
            return real(path, *args, **kwargs)

        return call

    owner, name = {
        "tars": (tars, "open_regular"),
        "tables": (tables, "open_regular"),
        "headers": (tars, "open_slice"),
        "text": (text, "open_regular"),
    }[kind]
    monkeypatch.setattr(owner, name, flaky(getattr(owner, name)))
    modality, cache = "text" if kind == "text" else "speech", str(tmp_path / "cache")
    first = build(modality, folder, cache_dir=cache)
    assert [reason for _, reason in first.skipped] == ["Input/output error"] * (3 if kind == "headers" else 1)
    failing.clear()
    whole = build(modality, folder)
    for _ in range(2):
        opened.clear()
        again = build(modality, folder, cache_dir=cache, max_bad_fraction=0)
        assert not again.skipped and again.fingerprint() == whole.fingerprint() != first.fingerprint()
    # nothing was kept as bad, so all is kept now
    assert kind == "tables" or opened == []


def test_texts_without_text_are_not_damaged(tmp_path):
    write_files("text", tmp_path)
    for name in "abc":
        (tmp_path / f"{name}.txt").touch()
    assert len(build("text", tmp_path, max_bad_fraction=0).skipped) == 3


@pytest.mark.parametrize(
    ("bad", "total", "allowed", "few", "expected"),
    [
        (0, 100, 0.0, ITEMS_ALLOWED, False),
        (1, 1000, 0.0, ITEMS_ALLOWED, True),
        (10, 21, 0.01, ITEMS_ALLOWED, False),
        (10, 20, 0.01, ITEMS_ALLOWED, True),
        (9, 10, 0.01, ITEMS_ALLOWED, False),
        (11, 1000, 0.01, ITEMS_ALLOWED, True),
        (11, 1000, 0.011, ITEMS_ALLOWED, False),
        (10, 11, 1.0, ITEMS_ALLOWED, False),
        (1, 3, 0.01, FILES_ALLOWED, False),
        (1, 2, 0.01, FILES_ALLOWED, True),
        (1, 2, 0.5, FILES_ALLOWED, False),
        (1, 1, 0.01, FILES_ALLOWED, False),  # nobody knows how much of the only one it is
    ],
)
def test_how_many_are_too_many(bad, total, allowed, few, expected):
    assert too_many(bad, total, allowed, few) is expected


@pytest.mark.parametrize(
    ("bad", "total", "allowed", "too_many"),
    [(1, 1, 0.01, False), (1, 1, 0.0, True), (2, 200, 0.01, False), (2, 199, 0.01, True), (0, 1, 0.0, False)],
)
def test_which_files_are_too_many(bad, total, allowed, too_many):
    try:
        check_files([("a.tar", "damaged")] * bad, total, allowed)
    except DataError as error:
        assert too_many and f"{bad} of {total} files" in str(error)
    else:
        assert not too_many


def test_few_items_are_no_excuse_for_most_of_them(tmp_path):
    for number, content in enumerate(clips(12).values()):
        (tmp_path / f"{number}.flac").write_bytes(content if number < 5 else b"fLaC")
    with pytest.raises(DataError, match=r"7 of 12 items could not be read"):
        build("speech", tmp_path)
    for number in (5, 6):
        (tmp_path / f"{number}.flac").write_bytes(audio(number, 1.0))  # less than half of them are left
    assert len(build("speech", tmp_path).skipped) == 5
    with pytest.raises(DataError, match=r"5 of 12 items could not be read .* = 0;"):
        build("speech", tmp_path, max_bad_fraction=0)


def test_items_that_break_while_training():
    data = Numbers(count=12, broken=range(7))
    with pytest.raises(DataError, match=r"6 of 12 items could not be read"):
        take(data, 20)
    data = Numbers(count=200, broken=[7])
    assert len(take(data, 200)) == 200
    data.max_bad_fraction = 0
    with pytest.raises(DataError, match=r"1 of 200 items could not be read .* last: item7: broken"):
        take(data, 200)


@pytest.mark.parametrize("bad", [10, 11])
def test_where_a_run_is_continued_changes_nothing(bad):
    """Ten may be unreadable, whether they come in the first batch that is read or after many good ones."""
    data = Numbers(count=200, broken=range(bad), batch_size=1)
    data.plan = lambda epoch: [(i,) for i in range(15, 200)] + [tuple(range(15))]
    for index in (0, 185):
        if bad == 10:
            assert len(take(data, 400, index=index)) == 400  # more than an epoch: nor do repeats count
        else:
            with pytest.raises(DataError, match=r"11 of 200 items could not be read \(5\.50%\)"):
                take(data, 400, index=index)


def test_repeats_are_not_counted(tmp_path):
    """Two of three clips are gone, which is few, in every epoch."""
    (tmp_path / "0.flac").write_bytes(audio(0, 1.0))
    (tmp_path / "m.tsv").write_text(".\n" + "".join(f"{i}.flac\t16000\n" for i in range(3)))
    assert len(take(build("speech", tmp_path / "m.tsv"), 20)) == 20


def test_columns_of_another_type(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow (requirements/test.txt)")
    pq = pytest.importorskip("pyarrow.parquet")
    odd = {
        "lists": pa.array([[1, 2]], pa.list_(pa.uint8())),
        "numbers": pa.array([1]),
        "names": pa.array(["a.flac"]),
        "decoded": pa.array([{"array": [0.5], "sampling_rate": 16_000}]),
        "nested": pa.array([{"bytes": {"bytes": b"x"}}]),
        "odd_path": pa.array([{"bytes": b"x", "path": 5}]),
    }
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(odd), path)
    for column in odd:
        with pytest.raises(DataError, match=rf"column '{column}' is of type .*; expected binary, or structs with"):
            build("speech", path, column=column)
    for column in ("numbers", "lists"):
        with pytest.raises(UnreadableFile, match=rf"column '{column}' is of type .*; expected strings"):
            list(read_documents(path, column))
    pq.write_table(pa.Table.from_arrays([pa.array([audio(0, 1.0)])] * 2, ["a", "a"]), path)
    with pytest.raises(DataError, match="several columns 'a' among a, a"):
        build("speech", path, column="a")


@pytest.mark.parametrize("samples", [str(2**63), "9" * 5000])
def test_lengths_that_no_clip_has(tmp_path, samples):
    (tmp_path / "m.tsv").write_text(f".\nx.flac\t16000\ny.flac\t{samples}\n")
    with pytest.raises(DataError, match=r"line 3: expected path<TAB>samples, got .y\.flac\\t"):
        build("speech", tmp_path / "m.tsv")


def test_names_that_no_file_has(tmp_path):
    (tmp_path / "good.flac").write_bytes(audio(0, 1.0))
    names = ["zero\0.flac", "good.flac:0:" + "9" * 5000]
    (tmp_path / "m.tsv").write_text(".\ngood.flac\t16000\n" + "".join(f"{name}\t16000\n" for name in names))
    _, _, batch = next(batches(build("speech", tmp_path / "m.tsv")))
    assert sorted(name for name, _ in batch.skipped) == sorted(names) and len(batch.inputs) == 1


def test_pipes_are_not_waited_for(tmp_path):
    for kind, suffix in (("speech", "flac"), ("speech", "tar"), ("image", "png"), ("text", "txt")):
        folder = tmp_path / f"{kind}_{suffix}"
        folder.mkdir()
        with pipe(folder / f"pipe.{suffix}"), pytest.raises(DataError, match="not a regular file"):
            next(batches(build(kind, folder)))


def test_a_table_that_is_a_pipe(tmp_path):
    pytest.importorskip("pyarrow", reason="needs pyarrow (requirements/test.txt)")
    with pipe(tmp_path / "pipe.parquet"), pytest.raises(DataError, match="not a regular file"):
        build("speech", tmp_path)


def test_tars_and_links_that_lead_nowhere(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.flac": audio(0, 1.0)})
    (tmp_path / "b.tar").symlink_to("nowhere")
    assert build("speech", tmp_path, max_bad_fraction=0.5).skipped == [("b.tar", "No such file or directory")]
    with pytest.raises(UnreadableFile, match="No such file"):
        open_regular(tmp_path / "b.tar")


def test_a_tar_with_a_member_of_less_than_nothing(tmp_path, capfd):
    path = write_tar(tmp_path / "a.tar", {"a.flac": audio(0, 1.0), "b.flac": b""})
    content = bytearray(path.read_bytes())
    start = content.rindex(b"b.flac")
    content[start + 124 : start + 136] = b"\xff" * 12  # -1
    content[start + 148 : start + 156] = b" " * 8
    content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    path.write_bytes(content)
    data = build("speech", tmp_path)
    ((name, reason),) = data.skipped
    assert name == "a.tar" and "b.flac has a size of -" in reason and list(data.names) == ["a.tar/a.flac"]
    assert "Traceback" not in capfd.readouterr().err


def test_blocks_that_are_too_long_are_no_damage(tmp_path, caplog):
    folder = write_folder(tmp_path / "bin", [[*range(4, 12), 2], [4, 5, 2]])
    config = TextDataConfig(path=str(folder), batch_size=4, tokens_per_sample=6, break_mode="eos", max_bad_fraction=0)
    data = build_data(config, binarized_model(45), 0)
    assert not data.skipped and "1 skipped" in data.describe()
    more = "of more than data.tokens_per_sample - 1 = 5 tokens"
    assert caplog.messages == [f"{folder / 'train'}: left out 1 of 2 blocks (50.0%), {more}"]


def test_ids_of_64_bits_stay_whole(tmp_path):
    ids = 2**53 + 1  # not a float64
    folder = write_folder(tmp_path / "bin", [[ids, 2]] * 20, dtype=np.uint64, code=10)
    data = build_data(TextDataConfig(path=str(folder), tokens_per_sample=6), binarized_model(45), 0)
    assert data.shards[0][0:2].tolist() == [ids, 2]

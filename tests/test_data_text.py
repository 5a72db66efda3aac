"""The text loader and its tokenizer on small files."""

import itertools
import json
import logging
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from d2v_fast.nn.config import Data2VecConfig, TextFrontEndConfig
from d2v_fast.train.data import DataError, TextData, TextDataConfig, batches, build_data, sources
from d2v_fast.train.data.tokenizer import load_tokenizer, train_tokenizer
from d2v_fast.train.errors import ConfigError
from d2v_fast.train.graph import signature

VOCAB = 300
MODEL = replace(Data2VecConfig.text("base"), frontend=TextFrontEndConfig(vocab_size=VOCAB, max_positions=64))


def sentences(count, seed=0):
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abcdefgh"), rng.integers(2, 7))) for _ in range(100)]
    return [" ".join(rng.choice(words, rng.integers(3, 12))) for _ in range(count)]


@pytest.fixture
def folder(tmp_path):
    """Three files, one of them with a blank line, a byte order mark and Windows line ends."""
    texts = tmp_path / "texts"
    (texts / "sub").mkdir(parents=True)
    (texts / "a.txt").write_text("\n".join(sentences(40, 1)) + "\n")
    (texts / "b.txt").write_bytes(("\ufeff" + "\r\n\r\n".join(sentences(20, 2))).encode())
    (texts / "sub" / "c.txt").write_text("käse <s> und </s> ☃ <mask>\n" + "\n".join(sentences(20, 3)))
    return texts


def config(path, **kwargs):
    return TextDataConfig(path=str(path), **({"batch_size": 4, "tokens_per_sample": 16} | kwargs))


def take(data, count, **kwargs):
    return list(itertools.islice(batches(data, **kwargs), count))


def assert_same(got, expected):
    assert len(got) == len(expected)
    for (*place, a), (*other, b) in zip(got, expected, strict=True):
        assert place == other and torch.equal(a.inputs, b.inputs) and torch.equal(a.mask, b.mask)


def lines(folder):
    texts = [(folder / n).read_text(encoding="utf-8-sig") for n in ("a.txt", "b.txt", "sub/c.txt")]
    return [line for text in texts for line in text.splitlines() if line]


def test_batches_depend_on_seed_and_place_only(folder, tmp_path):
    data = TextData(config(folder, cache_dir=str(tmp_path / "cache")), MODEL, 3)
    count = len(data.plan(0)) + 3
    alone = take(data, count)
    assert_same(take(data, count, num_workers=2), alone)
    assert_same(take(TextData(config(folder), MODEL, 3), 5, epoch=0, index=count - 5), alone[-5:])
    assert not torch.equal(take(TextData(config(folder), MODEL, 4), 1)[0][2].inputs, alone[0][2].inputs)


def test_static_shapes(folder):
    """The same masks, in batches of one shape."""
    plain, static = (build_data(config(folder), MODEL, 0, static_shapes=flag) for flag in (False, True))
    shapes, counts = set(), set()
    for a, b in zip(take(plain, 8), take(static, 8), strict=True):
        assert torch.equal(a[2].mask, b[2].mask) and a[2].num_masked == b[2].num_masked
        shapes.add(signature(b[2]))
        counts.add(b[2].num_masked)
    assert len(shapes) == 1 < len(counts)


def test_blocks_hold_the_documents_in_order(folder):
    data = build_data(config(folder), MODEL, 0)
    expected = []
    for line in lines(folder):
        expected += [*data.tokenizer.encode(line, add_special_tokens=False).ids, 2]
    assert data.ids.tolist() == expected
    assert data.num_blocks == len(expected) // 15
    batch = data.load(0, 0, (3, 0))
    assert batch.inputs.dtype == torch.int64
    assert batch.inputs.tolist() == [[0, *expected[45:60]], [0, *expected[:15]]]
    assert batch.mask.shape == (2, 16) and 0 < batch.num_masked < 32 and batch.padding_mask is None
    assert f"3 files, 81 documents, {len(expected)} tokens" in data.describe()


def test_text_comes_back_from_the_ids(folder):
    data = TextData(config(folder), MODEL, 0)
    text = data.tokenizer.decode(data.ids.tolist(), skip_special_tokens=False)
    assert text == "</s>".join(lines(folder)) + "</s>"


def test_special_tokens(folder):
    tokenizer = TextData(config(folder), MODEL, 0).tokenizer
    ids = [tokenizer.token_to_id(t) for t in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")]
    assert ids == [0, 1, 2, 3, VOCAB - 1] and tokenizer.get_vocab_size() == VOCAB
    assert tokenizer.encode("ab").ids[0] == 0 and tokenizer.encode("ab").ids[-1] == 2  # for later users of the file


def test_special_tokens_in_the_text_are_text(folder):
    data = TextData(config(folder), MODEL, 0)
    count = np.bincount(data.ids, minlength=VOCAB)
    assert count[[0, 1, 3, VOCAB - 1]].sum() == 0 and count[2] == data.num_documents == 81


def test_training_is_deterministic(folder):
    first, second = (train_tokenizer(lines(folder), VOCAB).to_str() for _ in range(2))
    assert first == second


def test_saved_tokenizer_can_be_given(folder, tmp_path):
    data = TextData(config(folder), MODEL, 0)
    data.save_tokenizer(tmp_path / "tokenizer.json")
    again = TextData(config(folder, tokenizer=str(tmp_path / "tokenizer.json")), MODEL, 0)
    assert np.array_equal(again.ids, data.ids)


def test_epochs_shuffle_all_blocks(folder):
    data = TextData(config(folder, batch_size=1), MODEL, 0)
    first, second = data.plan(0), data.plan(1)
    assert first != second and sorted(first) == sorted(second) == [(i,) for i in range(data.num_blocks)]


def kept(folder):
    """What a cache holds besides locks."""
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


def test_a_cache_that_another_process_makes_for_ever(tmp_path, monkeypatch):
    """It may hang, with the lock: nobody waits for it without end."""
    monkeypatch.setattr(sources, "PATIENCE", 0.1)
    path = tmp_path / "ids.npy"
    with sources.missing(path) as first:
        with pytest.raises(
            DataError, match=rf"making {path} for more than 0\.1 s; .* the lock {tmp_path}/\.ids\.npy\.lock"
        ):
            sources.missing(path).__enter__()
        assert first


def test_cache_is_reused(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (folder / "broken.txt").write_bytes(b"\xff\xfe")
    memory = TextData(config(folder), MODEL, 0)
    cached = config(folder, cache_dir=str(tmp_path / "cache"))
    made, loaded = TextData(cached, MODEL, 0), TextData(cached, MODEL, 0)
    assert caplog.text.count("tokenizing into") == 1
    assert isinstance(loaded.ids, np.memmap) and loaded.ids.dtype == np.uint16
    for data in (made, loaded):
        assert np.array_equal(data.ids, memory.ids)
        assert data.skipped == memory.skipped and data.describe() == memory.describe()
        assert data.tokenizer.to_str() == memory.tokenizer.to_str()
    assert len(kept(tmp_path / "cache")) == 3  # documents, tokenizer, ids; nothing half-written


@pytest.mark.parametrize("change", ["mtime", "size", "name", "tokenizer"])
def test_cache_notices_changes(folder, tmp_path, caplog, change):
    caplog.set_level(logging.INFO)
    cached = config(folder, cache_dir=str(tmp_path / "cache"))
    model = MODEL
    TextData(cached, model, 0)
    if change == "mtime":
        os.utime(folder / "a.txt", ns=(1, 1))
    elif change == "size":
        (folder / "a.txt").write_text("\n".join(sentences(41, 1)))
    elif change == "name":
        (folder / "a.txt").rename(folder / "z.txt")
    else:
        model = replace(MODEL, frontend=replace(MODEL.frontend, vocab_size=VOCAB - 10))
    changed = TextData(cached, model, 0)
    assert caplog.text.count("tokenizing into") == 2
    assert np.array_equal(changed.ids, TextData(config(folder), model, 0).ids)


def test_interrupted_tokenizing_leaves_nothing(folder, tmp_path, monkeypatch):
    cached = config(folder, cache_dir=str(tmp_path / "cache"))

    def interrupted(self, tokenizer, vocab_size):
        yield np.zeros(5, np.uint16)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("d2v_fast.train.data.text._Corpus.encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            TextData(cached, MODEL, 0)
    assert [name.split("-")[0] for name in sorted(kept(tmp_path / "cache"))] == ["documents", "tokenizer"]
    assert np.array_equal(TextData(cached, MODEL, 0).ids, TextData(config(folder), MODEL, 0).ids)


def test_large_vocabularies_need_wider_ids(folder, tmp_path):
    base = json.loads(train_tokenizer(lines(folder), VOCAB).to_str())
    base["model"]["vocab"] |= {f"unused{i}": i for i in range(VOCAB - 1, 70_000)}
    base["added_tokens"][-1]["id"] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(base))
    model = replace(MODEL, frontend=replace(MODEL.frontend, vocab_size=70_001))
    kwargs = {"tokenizer": str(tmp_path / "tokenizer.json")}
    for extra in ({}, {"cache_dir": str(tmp_path / "cache")}):
        data = TextData(config(folder, **kwargs, **extra), model, 0)
        assert data.ids.dtype == np.int32 and np.array_equal(data.ids, TextData(config(folder), MODEL, 0).ids)


def test_single_file(folder):
    data = TextData(config(folder / "a.txt"), MODEL, 0)
    assert data.num_documents == 40 and "1 files" in data.describe()


def test_bad_files_are_skipped_and_named(folder):
    (folder / "latin.txt").write_bytes(b"fine\nk\xe4se\n")
    (folder / "blank.txt").write_text("\n  \n")
    (folder / "link.txt").symlink_to("nowhere")
    data = TextData(config(folder, max_bad_fraction=0.5), MODEL, 0)
    reasons = dict(data.skipped)
    assert sorted(reasons) == ["blank.txt", "latin.txt", "link.txt"] and reasons["blank.txt"] == "no text"
    assert "not readable as UTF-8" in reasons["latin.txt"] and "3 skipped" in data.describe()
    assert data.num_documents == 81  # nothing of a file that breaks half-way


@pytest.mark.parametrize("cache", [False, True])
def test_nothing_usable(tmp_path, cache):
    kwargs = {"cache_dir": str(tmp_path / "cache")} if cache else {}
    texts = tmp_path / "texts"
    with pytest.raises(DataError, match="does not exist"):
        TextData(config(texts, **kwargs), MODEL, 0)
    texts.mkdir()
    with pytest.raises(DataError, match="holds no UTF-8 text files, tables or a data-bin of fairseq-preprocess"):
        TextData(config(texts, **kwargs), MODEL, 0)
    with pytest.raises(ConfigError, match=r"data\.format must be auto or one of files, parquet, arrow, fairseq here"):
        TextData(config(texts, format="fairseqq", **kwargs), MODEL, 0)
    (texts / "a.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"none of the 1 files .* a\.txt: not readable as UTF-8"):
        TextData(config(texts, **kwargs), MODEL, 0)


def test_too_little_text(folder, tmp_path):
    with pytest.raises(DataError, match=r"too small for a vocabulary of 300 tokens, it gives 2\d\d; set"):
        (tmp_path / "a.txt").write_text("abc abc\n")
        TextData(config(tmp_path / "a.txt"), MODEL, 0)
    with pytest.raises(DataError, match="needs more tokens than a vocabulary of 200 tokens, it gives 261"):
        train_tokenizer(lines(folder), 200)
    TextData(config(folder), MODEL, 0).save_tokenizer(tmp_path / "tokenizer.json")
    short = config(tmp_path / "a.txt", tokenizer=str(tmp_path / "tokenizer.json"), tokens_per_sample=64)
    with pytest.raises(DataError, match=r"has only \d tokens; expected at least tokens_per_sample - 1 = 63"):
        TextData(short, MODEL, 0)


def test_tokenizer_that_does_not_fit(folder, tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(path, VOCAB)
    path.write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(path, VOCAB)
    tokenizer = train_tokenizer(lines(folder), VOCAB)
    tokenizer.save(str(path))
    with pytest.raises(DataError, match=r"does not fit the model: expected 301 tokens .*got 300 tokens"):
        load_tokenizer(path, VOCAB + 1)
    path.write_text(tokenizer.to_str().replace("<pad>", "[PAD]"))
    with pytest.raises(DataError, match="'<pad>': None"):
        load_tokenizer(path, VOCAB)


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [({"path": ""}, "path"), ({"batch_size": 0}, "batch_size"), ({"tokens_per_sample": 1}, "tokens")],
)
def test_bad_config(kwargs, name):
    with pytest.raises(ConfigError, match=rf"data\.{name}"):
        config(**({"path": "x"} | kwargs))


def test_model_that_does_not_fit(folder):
    with pytest.raises(ConfigError, match=r"model\.modality"):
        TextData(config(folder), Data2VecConfig.speech("base"), 0)
    with pytest.raises(ConfigError, match=r"at most the model's max_positions \(64\), got 65"):
        TextData(config(folder, tokens_per_sample=65), MODEL, 0)


@pytest.mark.parametrize("cache", [False, True])
def test_survives_pickling(folder, tmp_path, cache):
    kwargs = {"cache_dir": str(tmp_path / "cache")} if cache else {}
    data = TextData(config(folder, **kwargs), MODEL, 0)  # what a spawned worker receives
    copy = pickle.loads(pickle.dumps(data))
    assert type(copy.ids) is type(data.ids)
    assert_same(take(copy, 3), take(data, 3))

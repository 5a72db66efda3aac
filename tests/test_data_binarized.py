"""Text that fairseq-preprocess has binarised: the blocks of fairseq's own dataset, and files that do not fit."""

import itertools
import os
import pickle
import struct
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from d2v_fast.nn.config import Data2VecConfig, TextFrontEndConfig
from d2v_fast.train.data import BinarizedTextData, DataError, TextData, TextDataConfig, batches, build_data
from d2v_fast.train.data.binarized import cut, read_dictionary
from d2v_fast.train.errors import ConfigError

MODES = ("none", "complete", "complete_doc", "eos")
WORDS = [f"word{i}" for i in range(40)]


def model(vocab_size, **kwargs):
    frontend = TextFrontEndConfig(vocab_size=vocab_size, max_positions=64)
    base = Data2VecConfig.text("base")
    return type(base)(**{**vars(base), "frontend": frontend, **kwargs})


def config(path, **kwargs):
    return TextDataConfig(path=str(path), **({"batch_size": 4, "tokens_per_sample": 16} | kwargs))


def write_index(prefix, sizes, dtype=np.uint16, code=8):
    sizes = np.asarray(sizes)
    pointers = (np.cumsum(sizes) - sizes) * np.dtype(dtype).itemsize
    head = b"MMIDIDX\0\0" + struct.pack("<QBQ", 1, code, len(sizes))
    Path(f"{prefix}.idx").write_bytes(head + sizes.astype(np.int32).tobytes() + pointers.astype(np.int64).tobytes())


def write_folder(folder, sentences, split="train", words=WORDS, dtype=np.uint16, code=8):
    """A data-bin in fairseq's format, for tests that do not need fairseq."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "dict.txt").write_text("".join(f"{word} 1\n" for word in words))
    ids = np.concatenate([np.array(sentence, dtype) for sentence in sentences])
    (folder / f"{split}.bin").write_bytes(ids.tobytes())
    write_index(folder / split, [len(s) for s in sentences], dtype, code)
    return folder


def sentences(count=60, longest=12, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest, count)  # without </s>; 0: an empty line
    return [[*rng.integers(4, 4 + len(WORDS), n).tolist(), 2] for n in lengths]


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data-bin", sentences())


def blocks(data, epoch=0):
    """The blocks of an epoch without padding, in the order of the text."""
    found = {}
    for index, items in enumerate(data.plan(epoch)):
        batch = data.load(epoch, index, items)
        lengths = [batch.inputs.shape[1]] * len(items) if batch.lengths is None else batch.lengths.tolist()
        for item, row, length in zip(items, batch.inputs.tolist(), lengths, strict=True):
            assert set(row[length:]) <= {1}  # padding
            found[item] = row[:length]
    return [found[item] for item in sorted(found)]


@pytest.fixture(scope="module")
def preprocessed(tmp_path_factory):
    """A data-bin written by fairseq-preprocess itself, and the number of ids in its dictionary with <mask>."""
    pytest.importorskip("fairseq", reason="needs ve-fairseq (requirements/peers.txt)")
    from fairseq_cli import preprocess

    tmp = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, n)) for n in rng.integers(0, 25, 150)]
    (tmp / "corpus.txt").write_text("\n".join(lines) + "\n")
    destination = str(tmp / "data-bin")
    arguments = ["--only-source", "--trainpref", str(tmp / "corpus.txt"), "--destdir", destination, "--workers", "1"]
    parser = preprocess.options.get_preprocessing_parser()
    preprocess.main(parser.parse_args(arguments))
    return Path(destination)


@pytest.mark.parametrize("mode", MODES)
def test_the_same_blocks_as_fairseqs_task(preprocessed, mode, monkeypatch):
    from fairseq.tasks.masked_lm import MaskedLMConfig, MaskedLMTask

    monkeypatch.setattr(np, "compat", types.SimpleNamespace(long=np.int64), raising=False)  # removed from NumPy
    task = MaskedLMTask.setup_task(
        MaskedLMConfig(data=str(preprocessed), sample_break_mode=mode, tokens_per_sample=20, seed=1)
    )
    theirs = task._load_dataset_split("train", epoch=1, combine=True)
    expected = [theirs[i].tolist() for i in range(len(theirs))]
    size = len(task.dictionary)
    data = build_data(config(preprocessed, tokens_per_sample=20, break_mode=mode), model(size), 0)
    assert blocks(data) == [block for block in expected if len(block) <= 20]
    assert data.shards[0].too_long == sum(len(block) > 20 for block in expected)
    assert (data.shards[0].too_long > 0) == (mode != "none")
    assert task.mask_idx == size - 1 == data.model.frontend.mask_index
    assert read_dictionary(preprocessed / "dict.txt") == task.dictionary.symbols[:-1]


@pytest.mark.parametrize("mode", ["complete", "complete_doc"])
def test_batches_are_packed_as_fairseqs(preprocessed, mode):
    from fairseq.tasks.masked_lm import MaskedLMConfig, MaskedLMTask

    task = MaskedLMTask.setup_task(
        MaskedLMConfig(data=str(preprocessed), sample_break_mode=mode, tokens_per_sample=20, seed=1)
    )
    task.load_dataset("train")
    theirs = task.dataset("train")
    order = np.array([i for i in theirs.ordered_indices() if theirs.size(i) <= 20])[::-1].copy()  # longest first
    packed = theirs.batch_by_size(order, max_tokens=80)
    data = build_data(config(preprocessed, tokens_per_sample=20, break_mode=mode), model(len(task.dictionary)), 0)
    plan = data.plan(0)
    assert sorted(map(len, plan)) == sorted(map(len, packed))
    assert sorted(i for batch in plan for i in batch) == list(range(len(data.shards[0].blocks)))


def slow_cut(sizes, mode, block_size):
    """fairseq's loop, sentence by sentence."""
    found, start, size, i = [], 0, 0, 0
    while i < len(sizes):
        separator = mode == "complete_doc" and sizes[i] == 1
        if (size + sizes[i] <= block_size or size == 0) and not separator:
            size, i = size + sizes[i], i + 1
            continue
        if size > (mode == "complete_doc"):
            found.append((start, start + size))
        start, size = start + size, 0
        if separator:
            start, i = start + 1, i + 1
    return [*found, (start, start + size)] if size > (mode == "complete_doc") else found


@pytest.mark.parametrize("mode", ["complete", "complete_doc"])
def test_whole_sentences(mode):
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = rng.integers(0, 9, rng.integers(0, 30))
        assert cut(sizes, mode, 8).tolist() == [list(block) for block in slow_cut(sizes.tolist(), mode, 8)]


def test_batches_depend_on_seed_and_place_only(folder):
    data = build_data(config(folder, break_mode="eos"), model(45), 3)
    assert isinstance(data, BinarizedTextData)
    count = 2 * len(data.plan(0))
    runs = [list(itertools.islice(batches(d, **k), n)) for d, k, n in (
        (data, {}, count),
        (data, {"num_workers": 2}, count),
        (pickle.loads(pickle.dumps(data)), {"index": 3}, count - 3),
    )]  # fmt: skip
    for (*place, a), (*other, b) in [*zip(*runs[:2], strict=True), *zip(runs[0][3:], runs[2], strict=True)]:
        assert place == other and torch.equal(a.inputs, b.inputs) and torch.equal(a.mask, b.mask)
        a.check()
    assert runs[0][0][2].inputs.tolist() != next(batches(build_data(data.config, data.model, 4)))[2].inputs.tolist()


def test_equal_blocks_have_static_shapes(folder):
    data = build_data(config(folder), model(45), 0, static_shapes=True)
    shapes = {
        (b.inputs.shape, b.positions.shape) for i, items in enumerate(data.plan(0)) for b in [data.load(0, i, items)]
    }
    assert len(shapes) == 2 and all(size[1] == 16 for size, _ in shapes)  # the last blocks of the text are one batch


def test_several_folders_take_turns(tmp_path):
    """As fairseq's colon-separated data: one folder an epoch."""
    folders = [write_folder(tmp_path / f"shard{i}", sentences(seed=i)) for i in range(3)]
    data = build_data(config(os.pathsep.join(map(str, folders))), model(45), 0)
    alone = [build_data(config(folder), model(45), 0) for folder in folders]
    assert [blocks(data, epoch) for epoch in range(6)] == [blocks(alone[epoch % 3]) for epoch in range(6)]
    write_folder(tmp_path / "other", sentences(), words=WORDS[::-1])
    with pytest.raises(DataError, match=r"other.dict\.txt differs from"):
        build_data(config(f"{folders[0]}{os.pathsep}{tmp_path / 'other'}"), model(45), 0)


def test_numbered_parts_are_one_text(folder):
    """train, train1, ... as fairseq combines them; blocks go over the seams."""
    more = sentences(seed=1)
    whole = blocks(build_data(config(write_folder(folder.parent / "whole", sentences() + more)), model(45), 0))
    write_folder(folder, more, split="train1")
    assert blocks(build_data(config(folder), model(45), 0)) == whole


@pytest.mark.parametrize(("dtype", "code"), [(np.uint16, 8), (np.int32, 4), (np.int64, 5)])
def test_dtypes(tmp_path, dtype, code):
    folder = write_folder(tmp_path / "d", sentences(), dtype=dtype, code=code)
    text = list(itertools.chain.from_iterable(sentences()))
    assert blocks(build_data(config(folder), model(45), 0))[0] == [0, *text[:15]]


def test_a_mask_symbol_in_the_dictionary_becomes_the_last_id(tmp_path):
    words = [*WORDS[:10], "<mask>", *WORDS[10:]]
    folder = write_folder(tmp_path / "d", [[4, 13, 14, 15, 44, 2]] * 5, words=words)
    data = build_data(config(folder, tokens_per_sample=7), model(45), 0)
    assert blocks(data)[0] == [0, 4, 13, 44, 14, 43, 2]


def test_fingerprint_tells_texts_apart(folder):
    def fingerprint(**kwargs):
        return build_data(config(folder, **kwargs), model(45), 0).fingerprint()

    first = fingerprint()
    assert first == fingerprint() != fingerprint(break_mode="eos")
    content = bytearray((folder / "train.bin").read_bytes())
    content[20] ^= 1
    (folder / "train.bin").write_bytes(content)
    assert fingerprint() != first


def test_overwritten_symbols(tmp_path):
    (tmp_path / "dict.txt").write_text("a 5\n<s> 3 #fairseq:overwrite\nb c 2\n")
    assert read_dictionary(tmp_path / "dict.txt")[4:] == ["a", "<s>", "b c"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 1\na 2\n", "line 2: 'a' is there already"),
        ("a 1\nb\n", "line 2: expected a symbol and its count, got 'b'"),
        ("<pad> 1\n", "line 1: '<pad>' is there already"),
        ("\xff 1\n", "cannot be read"),
        ("a 1\n", "it gives 6 ids, with special ones and <mask>, and model.frontend.vocab_size is 45; set it to 6"),
    ],
)
def test_bad_dictionaries(folder, text, message):
    (folder / "dict.txt").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        build_data(config(folder), model(45), 0)


def damage(folder, kind):
    index, ids = folder / "train.idx", folder / "train.bin"
    content = index.read_bytes()
    if kind == "short index":
        index.write_bytes(content[:-4])
    elif kind == "stub of an index":
        index.write_bytes(content[:12])
    elif kind == "short ids":
        ids.write_bytes(ids.read_bytes()[:-2])
    elif kind == "no ids":
        ids.unlink()
    elif kind == "legacy":
        index.write_bytes(b"TNTIDX\0\0" + content[8:])
    elif kind == "garbage":
        index.write_bytes(b"\x89PNG" * 100)
    elif kind == "dtype":
        index.write_bytes(content[:17] + b"\x06" + content[18:])
    elif kind == "pointers":
        index.write_bytes(content[:-8] + bytes(8))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("short index", r"train.idx has \d+ bytes; expected \d+ for 60 sentences"),
        ("stub of an index", "train.idx is cut short"),
        ("short ids", r"train.bin has \d+ bytes, \d+ by its index"),
        ("no ids", "train.bin has None bytes"),
        ("legacy", "of the kinds lazy or cached; expected .*--dataset-impl mmap"),
        ("garbage", "of no known kind"),
        ("dtype", "dtype code 6; expected"),
        ("pointers", "the sentences do not lie behind each other"),
    ],
)
def test_damaged_files(folder, kind, message):
    damage(folder, kind)
    with pytest.raises(DataError, match=message):
        build_data(config(folder), model(45), 0)


def test_ids_beyond_the_dictionary(folder):
    ids = np.fromfile(folder / "train.bin", np.uint16)
    ids[5] = 60_000
    ids.tofile(folder / "train.bin")
    with pytest.raises(DataError, match=r"holds the ids \d+ to 60000 .* dict.txt beside it has 44 symbols"):
        blocks(build_data(config(folder), model(45), 0))


def test_other_settings_that_do_not_fit(folder, tmp_path):
    with pytest.raises(DataError, match=r"index .*valid\.idx cannot be read"):
        build_data(config(folder, split="valid"), model(45), 0)
    with pytest.raises(ConfigError, match="tokens_per_sample must be at most"):
        build_data(config(folder, tokens_per_sample=65), model(45), 0)
    with pytest.raises(ConfigError, match="break_mode must be one of none"):
        config(folder, break_mode="doc")
    (tmp_path / "plain.txt").write_text("some text\n" * 50)
    with pytest.raises(ConfigError, match="break_mode must be none"):
        build_data(config(tmp_path / "plain.txt", break_mode="eos"), model(300), 0)
    with pytest.raises(DataError, match=r"no block of at most data\.tokens_per_sample - 1 = 1 tokens"):
        build_data(
            config(write_folder(tmp_path / "d", [[4, 5, 2]]), break_mode="eos", tokens_per_sample=2), model(45), 0
        )


def test_a_folder_of_text_with_a_dictionary_is_text(tmp_path):
    (tmp_path / "dict.txt").write_text("one two three\n" * 300)
    assert type(build_data(config(tmp_path), model(270), 0)) is TextData

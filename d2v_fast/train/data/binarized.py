"""Text that ``fairseq-preprocess`` has binarised, cut into the blocks of its ``TokenBlockDataset``.

A folder holds ``dict.txt`` and, for a split, ``train.bin`` (the ids of all sentences behind each other) and
``train.idx`` (their lengths), both memory-mapped here. Every block gets ``<s>`` in front, as in the task ``masked_lm``.
"""

import logging
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2v_fast.nn.batch import Batch, make_batch
from d2v_fast.nn.config import Data2VecConfig
from d2v_fast.train.data.base import PretrainData
from d2v_fast.train.data.packing import packed_batches
from d2v_fast.train.data.text_config import BOS, PAD, TextDataConfig, check_text_model
from d2v_fast.train.data.tokenizer import MASK_TOKEN, SPECIAL_TOKENS
from d2v_fast.train.errors import DataError

logger = logging.getLogger(__name__)

MAGIC = b"MMIDIDX\0\0"
OTHER_KINDS = {b"TNTIDX\0\0": "of the kinds lazy or cached", b"HUFFIDX\0": "of the kind huffman"}
HEADER = struct.Struct("<QBQ")  # version, code of the dtype, sentences
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4", 10: "<u8"}  # fairseq's codes
OVERWRITE = "#fairseq:overwrite"


def binarized_folders(config: TextDataConfig) -> list[Path]:
    """The folders of ``config.path`` (several are separated as in ``PATH``, by colons) if they hold binarised text.

    Empty if they hold something else; with ``format`` "fairseq" they are not looked at.
    """
    whole = Path(config.path).expanduser()
    paths = [whole] if whole.exists() else [Path(p).expanduser() for p in config.path.split(os.pathsep)]
    if config.format == "fairseq":
        return paths
    binarized = [(path / "dict.txt").is_file() and any(path.glob("*.idx")) for path in paths]
    return paths if config.format == "auto" and all(binarized) else []


class BinarizedTextData(PretrainData):
    """Batches of token ids [B, T] int64 with span masks [B, T]; T is the longest block, others are padded.

    An epoch goes through one folder, the next epoch through the next one, as in fairseq. Blocks of equal length, as
    ``break_mode`` "none" gives but for the last, are batched ``batch_size`` at a time; others are packed by length into
    as many tokens.

    Raises:
        ConfigError: a model for another modality or with too few positions.
        DataError: files that are missing, damaged, of another kind, or do not fit each other or the model.
    """

    def __init__(self, config: TextDataConfig, model: Data2VecConfig, seed: int) -> None:
        super().__init__(seed)
        check_text_model(config, model)
        self.config, self.model, self.max_bad_fraction = config, model, config.max_bad_fraction
        folders = binarized_folders(config)
        symbols = read_dictionary(folders[0] / "dict.txt")
        self.map = _id_map(symbols, folders[0] / "dict.txt", model.frontend.vocab_size)
        self.num_ids = len(symbols)
        self.shards = [_Shard(folder, config) for folder in folders]
        for other in folders[1:]:
            if read_dictionary(other / "dict.txt") != symbols:
                raise DataError(f"{other / 'dict.txt'} differs from {folders[0] / 'dict.txt'}; expected one dictionary")
        for shard in self.shards:
            if shard.too_long:
                blocks = shard.too_long + len(shard.blocks)
                left_out = f"left out {shard.too_long} of {blocks} blocks ({shard.too_long / blocks:.1%})"
                logger.warning("%s: %s, of more than %s", shard.prefix, left_out, _limit(config))

    def describe(self) -> str:
        """Folders, sentences, tokens, blocks and what was left out."""
        tokens, sentences = (sum(getattr(s, name) for s in self.shards) for name in ("num_tokens", "num_sentences"))
        blocks, long = sum(len(s.blocks) for s in self.shards), sum(s.too_long for s in self.shards)
        return (
            f"binarised text {self.config.path}: {len(self.shards)} folders, {sentences} sentences, {tokens} tokens, "
            f"{blocks} blocks of up to {self.config.tokens_per_sample} ({self.config.break_mode}), {long} skipped"
        )

    def contents(self) -> Iterator[bytes]:
        """The map of ids, the blocks, and a sample of the ids; see :meth:`PretrainData.fingerprint`."""
        yield self.map.tobytes()
        for shard in self.shards:
            yield shard.blocks.tobytes()
            some = shard.blocks[:: 1 + len(shard.blocks) // 1000].tolist()
            yield np.concatenate([shard[start:end] for start, end in some]).tobytes()

    def plan(self, epoch: int) -> list[tuple[int, ...]]:
        """The blocks of the epoch's folder, packed by length with random ties, batches shuffled."""
        blocks = self.shards[epoch % len(self.shards)].blocks
        budget = self.config.batch_size * self.config.tokens_per_sample
        return packed_batches(self.rng(self.ORDER, epoch), blocks[:, 1] - blocks[:, 0] + 1, budget)

    def load(self, epoch: int, index: int, items: tuple[int, ...]) -> Batch:
        """Cut out the blocks and draw their masks; see :meth:`PretrainData.load`."""
        shard = self.shards[epoch % len(self.shards)]
        blocks = shard.blocks[list(items)]
        lengths = blocks[:, 1] - blocks[:, 0] + 1  # [B]
        size = int(lengths.max())
        inputs = np.full((len(items), size), PAD, np.int64)  # [B, T]
        inputs[:, 0] = BOS
        for row, (start, end) in zip(inputs, blocks.tolist(), strict=True):
            ids = shard[start:end]
            if ids.size and not 0 <= ids.min() <= ids.max() < self.num_ids:
                raise DataError(
                    f"{shard.prefix}.bin holds the ids {ids.min()} to {ids.max()} in its tokens {start} to {end}; "
                    f"dict.txt beside it has {self.num_ids} symbols: the files do not belong together, or are damaged"
                )
            row[1 : 1 + end - start] = self.map[ids]
        mask = self.model.mask.draw(self.rng(self.MASK, epoch, index), lengths, size)
        padded = bool((lengths < size).any())
        num_masked = None if padded else self.num_masked(mask)
        return make_batch(torch.from_numpy(inputs), mask, lengths if padded else None, num_masked=num_masked)


def _limit(config: TextDataConfig) -> str:
    return f"data.tokens_per_sample - 1 = {config.tokens_per_sample - 1} tokens"


class _Shard:
    """The ids of a split in one folder, memory-mapped, and the blocks that they are cut into.

    Attributes:
        blocks: [blocks, 2] int64, first token and the one after the last.
        too_long: blocks that were left out, being longer than the model's positions.
    """

    def __init__(self, folder: Path, config: TextDataConfig) -> None:
        self.prefix = folder / config.split
        self.parts, sizes = [], []  # train, train1, train2 ..., as fairseq combines them
        while not self.parts or Path(f"{self.prefix}{len(self.parts)}.idx").exists():
            name = f"{self.prefix}{len(self.parts) or ''}"
            dtype, part = _read_index(Path(name + ".idx"))
            _check_size(Path(name + ".bin"), int(part.sum()) * dtype.itemsize)
            self.parts.append((name + ".bin", dtype))
            sizes.append(part)
        self.ends = np.cumsum([part.sum() for part in sizes], dtype=np.int64)  # [parts] tokens
        self.num_tokens, self.num_sentences = int(self.ends[-1]), sum(map(len, sizes))
        blocks = cut(np.concatenate(sizes), config.break_mode, config.tokens_per_sample - 1)
        fits = blocks[:, 1] - blocks[:, 0] < config.tokens_per_sample
        self.blocks, self.too_long = blocks[fits], int((~fits).sum())
        if not len(self.blocks):
            raise DataError(f"{self.prefix}.bin gives no block of at most {_limit(config)}")
        self._open()

    def _open(self) -> None:
        self.maps = [np.memmap(path, dtype, "r") if os.path.getsize(path) else [] for path, dtype in self.parts]

    def __getitem__(self, where: slice) -> np.ndarray:
        """The ids from ``where.start`` to ``where.stop``."""
        first, last = np.searchsorted(self.ends, (where.start, max(where.start, where.stop - 1)), side="right")
        begins = np.concatenate([[0], self.ends])
        pieces = [
            self.maps[part][max(0, where.start - begins[part]) : where.stop - begins[part]]
            for part in range(first, min(last + 1, len(self.maps)))
        ]
        # each on its own: together, int64 and uint64 would become float64
        return np.concatenate([np.zeros(0, np.int64), *(np.asarray(piece, np.int64) for piece in pieces)])

    def __getstate__(self) -> dict[str, Any]:
        # a memory map would be pickled with all its contents when workers are spawned
        return {name: value for name, value in self.__dict__.items() if name != "maps"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def read_dictionary(path: Path) -> list[str]:
    """The symbols of a ``dict.txt`` in the order of their ids, the four special ones first (fairseq ``Dictionary``).

    Raises:
        DataError: missing, not UTF-8, or with a line that is not ``symbol count``, or a symbol twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"dictionary {path} cannot be read: {error}; expected UTF-8 text") from None
    symbols, known = list(SPECIAL_TOKENS), set(SPECIAL_TOKENS)
    for number, line in enumerate(lines, start=1):
        if not line and number == len(lines):
            break
        text = line.rstrip()
        again = text.endswith(f" {OVERWRITE}")
        symbol, _, count = text.removesuffix(f" {OVERWRITE}").rpartition(" ")
        if not count.removeprefix("-").isdecimal():
            raise DataError(f"dictionary {path}, line {number}: expected a symbol and its count, got {line!r}")
        if symbol in known and not again:
            raise DataError(f"dictionary {path}, line {number}: {symbol!r} is there already; expected each symbol once")
        known.add(symbol)
        symbols.append(symbol)
    return symbols


def _id_map(symbols: list[str], path: Path, vocab_size: int) -> np.ndarray:
    """Our id for each of theirs, int64 [symbols]: the same, but <mask> is the last one of ours wherever theirs is."""
    ids = np.arange(len(symbols))
    if MASK_TOKEN in symbols:
        place = symbols.index(MASK_TOKEN)
        ids[place + 1 :] -= 1
        ids[place] = len(symbols) - 1
    size = len(symbols) + (MASK_TOKEN not in symbols)  # fairseq's task adds it behind the others
    if size != vocab_size:
        raise DataError(
            f"dictionary {path} does not fit the model: it gives {size} ids, with special ones and <mask>, and "
            f"model.frontend.vocab_size is {vocab_size}; set it to {size}, or use the dictionary of the model"
        )
    return ids


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray]:
    """The ids' dtype and the sentences' lengths, int64 [sentences], of an ``.idx`` (fairseq ``MMapIndexedDataset``)."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"index {path} cannot be read: {error.strerror}; expected one of fairseq-preprocess") from None
    if content[: len(MAGIC)] != MAGIC:
        kind = OTHER_KINDS.get(content[:8], "of no known kind")
        raise DataError(f"index {path} is {kind}; expected fairseq-preprocess --dataset-impl mmap, its default")
    start = len(MAGIC) + HEADER.size
    if len(content) < start:
        raise DataError(f"index {path} is cut short: {len(content)} bytes")
    version, code, count = HEADER.unpack_from(content, len(MAGIC))
    if version != 1 or code not in DTYPES:
        raise DataError(f"index {path} has version {version} and dtype code {code}; expected 1 and one of {[*DTYPES]}")
    if len(content) != start + 12 * count:
        raise DataError(f"index {path} has {len(content)} bytes; expected {start + 12 * count} for {count} sentences")
    dtype = np.dtype(DTYPES[code])
    sizes = np.frombuffer(content, "<i4", count, start).astype(np.int64)
    pointers = np.frombuffer(content, "<i8", count, start + 4 * count)
    if sizes.min(initial=0) < 0 or not np.array_equal(pointers, (np.cumsum(sizes) - sizes) * dtype.itemsize):
        raise DataError(f"index {path} is damaged: the sentences do not lie behind each other")
    return dtype, sizes


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != expected:
        raise DataError(f"{path} has {found} bytes, {expected} by its index: missing, cut short, or of another one")


def cut(sizes: np.ndarray, break_mode: str, block_size: int) -> np.ndarray:
    """Blocks of consecutive sentences' tokens (fairseq ``_get_slice_indices_fast``), int64 [blocks, 2]: first, past.

    Args:
        sizes: lengths of the sentences, int64 [sentences].
        break_mode: "none": equal blocks whatever the sentences, the last one shorter; "complete": as many whole
            sentences as fit, longer ones alone; "complete_doc": the same, and a sentence of one token (an empty line)
            ends a document, is left out, and no block goes over it; "eos": each sentence alone.
        block_size: tokens.
    """
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    if break_mode == "none":
        starts = np.arange(0, total, block_size)
        return np.stack([starts, np.minimum(starts + block_size, total)], 1)
    if break_mode == "eos":
        return np.stack([ends - sizes, ends], 1)
    starts = ends - sizes
    # for a block that starts with a sentence, the sentence after it: what fits, and one with tokens in it
    first_filled = np.searchsorted(ends, starts, side="right")
    after = np.maximum(np.searchsorted(ends, starts + block_size, side="right"), first_filled + 1)
    is_break = np.zeros(len(sizes), bool)
    if break_mode == "complete_doc":
        is_break = sizes == 1
        breaks = np.append(np.flatnonzero(is_break), len(sizes))
        after = np.minimum(after, breaks[np.searchsorted(breaks, np.arange(len(sizes)))])
    after = np.minimum(after, len(sizes))
    blocks, sentence, last, skip = [], 0, len(sizes), is_break.tolist()
    chain, tokens = after.tolist(), np.append(starts, total).tolist()
    least = 2 if break_mode == "complete_doc" else 1
    while sentence < last:
        following = chain[sentence]
        if tokens[following] - tokens[sentence] >= least:
            blocks.append((tokens[sentence], tokens[following]))
        sentence = following + 1 if following < last and skip[following] else following
    return np.array(blocks, np.int64).reshape(-1, 2)

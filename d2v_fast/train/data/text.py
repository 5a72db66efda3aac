"""Text: files or tables to blocks of token ids (fairseq ``TokenBlockDataset``, break mode "none").

A document is a line of a file, or a row of a table.

Documents, each followed by ``</s>``, are laid end to end and cut into blocks of ``tokens_per_sample - 1`` tokens; every
block starts with ``<s>``. The ids are computed once and, with a cache folder, kept in a memory-mapped file.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from io import TextIOWrapper
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tokenizers import Tokenizer

from d2v_fast.nn.batch import Batch, make_batch
from d2v_fast.nn.config import Data2VecConfig
from d2v_fast.train.data.bad_items import check_files, log_skipped, nothing_left
from d2v_fast.train.data.base import PretrainData, UnreadableFile, fixed_batches, relative_names, require
from d2v_fast.train.data.formats import TABLES, find
from d2v_fast.train.data.sources import Measure, cache_path, measured, missing, open_regular
from d2v_fast.train.data.tables import read_documents
from d2v_fast.train.data.text_config import BOS, EOS, TextDataConfig, check_text_model
from d2v_fast.train.data.tokenizer import as_encoder, load_tokenizer, train_tokenizer
from d2v_fast.train.errors import DataError
from d2v_fast.train.files import replace_file

logger = logging.getLogger(__name__)

ENCODE_DOCUMENTS = 1024  # handed to the tokenizer's threads at a time
KINDS = {"files": (".txt",), **TABLES}
NO_TEXT = "no text"  # of files that can be read
CACHE_FORMAT = 2  # raise when the layout or the way of tokenizing changes


class TextData(PretrainData):
    """Batches of token ids [B, T] int64 with span masks [B, T], T = ``config.tokens_per_sample``.

    Attributes:
        tokenizer: the ``tokenizers.Tokenizer``, trained or loaded.
        ids: the whole text as one row of ids; an array or a memory map.

    Raises:
        ConfigError: a model for another modality or with too few positions.
        DataError: nothing usable under ``config.path``, a tokenizer that does not fit, or too little text.
    """

    def __init__(self, config: TextDataConfig, model: Data2VecConfig, seed: int) -> None:
        super().__init__(seed)
        check_text_model(config, model)
        self.config, self.model, self.max_bad_fraction = config, model, config.max_bad_fraction
        what = "UTF-8 text files, tables or a data-bin of fairseq-preprocess with its dict.txt"
        found = find(config.path, KINDS, config.format, config.split, what, elsewhere=("fairseq",))
        binarised = "none, the only one for text that fairseq-preprocess has not binarised"
        require(config.break_mode == "none", "data.break_mode", binarised, config.break_mode)
        files, names = found.files, relative_names(found.root, found.files)
        vocab_size, cache = model.frontend.vocab_size, _Cache(config.cache_dir, files, names, config.column)
        corpus = _Corpus(config, files, names, cache)
        log_skipped(corpus.skipped, len(files), "files")
        if config.tokenizer is None:
            self.tokenizer = cache.tokenizer(vocab_size, lambda: train_tokenizer(corpus.documents(), vocab_size))
        else:
            self.tokenizer = load_tokenizer(config.tokenizer, vocab_size)
        self.ids = cache.ids(self.tokenizer, lambda: corpus.encode(self.tokenizer, vocab_size))
        self.skipped, self.num_files, self.num_documents = corpus.skipped, len(corpus.usable), corpus.num_documents
        self.num_blocks = len(self.ids) // (config.tokens_per_sample - 1)
        if self.num_blocks == 0:
            raise DataError(
                f"the text under {config.path} has only {len(self.ids)} tokens; expected at least "
                f"tokens_per_sample - 1 = {config.tokens_per_sample - 1}"
            )

    def describe(self) -> str:
        """Files, documents, tokens, blocks and what was left out."""
        return (
            f"text {self.config.path}: {self.num_files} files, {self.num_documents} documents, {len(self.ids)} tokens, "
            f"{self.num_blocks} blocks of {self.config.tokens_per_sample}, {len(self.skipped)} skipped"
        )

    def contents(self) -> Iterator[bytes]:
        """The tokenizer, and a sample of the ids; see :meth:`PretrainData.fingerprint`."""
        yield self.tokenizer.to_str().encode()
        yield str(len(self.ids)).encode()
        yield np.ascontiguousarray(self.ids[:: max(1, len(self.ids) // 1_000_000)], np.int32).tobytes()

    def save_tokenizer(self, path: str | Path) -> None:
        """Write the tokenizer as a ``tokenizer.json``."""
        replace_file(Path(path), lambda file: file.write(self.tokenizer.to_str(pretty=True).encode()))

    def plan(self, epoch: int) -> list[tuple[int, ...]]:
        """Shuffled blocks in batches of ``batch_size``; a smaller last batch only if there is no other."""
        return fixed_batches(self.rng(self.ORDER, epoch), self.num_blocks, self.config.batch_size)

    def load(self, epoch: int, index: int, items: tuple[int, ...]) -> Batch:
        """Cut out the blocks and draw their masks; see :meth:`PretrainData.load`."""
        size = self.config.tokens_per_sample
        inputs = np.full((len(items), size), BOS, np.int64)  # [B, T]
        for row, block in zip(inputs, items, strict=True):
            row[1:] = self.ids[block * (size - 1) : (block + 1) * (size - 1)]
        mask = self.model.mask.draw(self.rng(self.MASK, epoch, index), np.full(len(items), size), size)
        return make_batch(torch.from_numpy(inputs), mask, num_masked=self.num_masked(mask))

    def __getstate__(self) -> dict[str, Any]:
        # a memory map would be pickled with all its contents when workers are spawned
        state = self.__dict__.copy()
        if isinstance(self.ids, np.memmap):
            state["ids"] = Path(self.ids.filename)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.ids, Path):
            self.ids = np.load(self.ids, mmap_mode="r")


class _Corpus:
    """The documents of the files that can be read throughout; which ones those are, ``cache`` keeps."""

    def __init__(self, config: TextDataConfig, files: list[Path], names: list[str], cache: "_Cache") -> None:
        self.config = config
        documents, reasons = cache.documents(lambda chosen: self._count([files[i] for i in chosen]))
        self.usable = [file for file, count in zip(files, documents, strict=True) if count > 0]
        self.num_documents = int(documents[documents > 0].sum())
        unreadable = [(names[i], reasons[i]) for i in np.flatnonzero(documents < 0)]
        self.skipped = [(names[i], reasons[i] if documents[i] else NO_TEXT) for i in np.flatnonzero(documents <= 0)]
        if not self.usable:
            raise nothing_left(config.path, self.skipped, "UTF-8 text")
        check_files(unreadable, len(files), config.max_bad_fraction)  # before hours of tokenizing
        cache.leave_out([name for name, _ in unreadable])

    def _count(self, files: Sequence[Path]) -> tuple[np.ndarray, list[str]]:
        """The number of documents in each of ``files``, or -1 and why it cannot be read."""
        counts, reasons = [], []
        for file in files:
            count, reason = -1, ""
            try:
                count = sum(1 for _ in self._read(file))
            except UnreadableFile as error:
                reason = error.reason
            except (UnicodeDecodeError, OSError) as error:
                reason = f"not readable as UTF-8 text: {error}"
            counts.append(count)
            reasons.append(reason)
        return np.array(counts, np.int64), reasons

    def documents(self) -> Iterator[str]:
        return chain.from_iterable(map(self._read, self.usable))

    def _read(self, file: Path) -> Iterator[str]:
        is_table = any(file.suffix.lower() in suffixes for suffixes in TABLES.values())
        return read_documents(file, self.config.column) if is_table else _lines(file)

    def encode(self, tokenizer: Tokenizer, vocab_size: int) -> Iterator[np.ndarray]:
        """The ids of the documents, each followed by </s>, in pieces of uint16 or int32 [n]."""
        dtype = np.uint16 if vocab_size <= 2**16 else np.int32
        documents = self.documents()
        while chunk := list(islice(documents, ENCODE_DOCUMENTS)):
            encodings = tokenizer.encode_batch(chunk, add_special_tokens=False)
            yield np.concatenate([np.array([*e.ids, EOS], dtype) for e in encodings])


def _lines(file: Path) -> Iterator[str]:
    """The lines with text in them, without their line ends."""
    with TextIOWrapper(open_regular(file), encoding="utf-8-sig") as lines:
        for line in lines:
            if line.strip():
                yield line.rstrip("\n")


class _Cache:
    """Numbers of documents, trained tokenizers and ids under a key of what they were made from, in ``folder``.

    Without a folder they are just made.
    """

    def __init__(self, folder: str | None, files: list[Path], names: list[str], column: str | None) -> None:
        self.folder, self.number = folder, len(files)
        self.source: list[Any] = [CACHE_FORMAT, column]
        for file, name in zip(files, names, strict=True):
            stat = file.stat() if file.exists() else None  # None: a broken link
            self.source.append((name, stat and (stat.st_size, stat.st_mtime_ns)))

    def documents(self, count: Measure) -> tuple[np.ndarray, np.ndarray]:
        """How many there are in each file, or -1 and why; see ``measured``."""
        return measured(self.folder, "documents", self.source, self.number, count)

    def leave_out(self, names: list[str]) -> None:
        """From now on for what is made without these files."""
        self.source.append(names)

    def _path(self, kind: str, *key: Any) -> Path:
        return cache_path(self.folder, kind, [self.source, *key])

    def tokenizer(self, vocab_size: int, make: Callable[[], Tokenizer]) -> Tokenizer:
        """The tokenizer of ``vocab_size`` tokens trained on the files."""
        if self.folder is None:
            return make()
        path = self._path("tokenizer", vocab_size).with_suffix(".json")
        with missing(path) as is_missing:
            if not is_missing:
                return as_encoder(Tokenizer.from_file(str(path)))
            tokenizer = make()
            replace_file(path, lambda file: file.write(tokenizer.to_str().encode()))
            return tokenizer

    def ids(self, tokenizer: Tokenizer, make: Callable[[], Iterator[np.ndarray]]) -> np.ndarray:
        """The ids [n] of the files' text."""
        if self.folder is None:
            return np.concatenate([np.zeros(0, np.uint16), *make()])
        path = self._path("ids", tokenizer.to_str()).with_suffix(".npy")
        with missing(path) as is_missing:
            if is_missing:
                logger.info("tokenizing into %s", path)
                replace_file(path, lambda file: _write_array(file, make()))
        return np.load(path, mmap_mode="r")


def _write_array(file: BinaryIO, pieces: Iterator[np.ndarray]) -> None:
    """Write one .npy of the concatenated pieces without holding them all; the header is filled in at the end."""
    count, dtype = 0, np.dtype(np.uint16)

    def header() -> None:
        fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(file, fields)  # NumPy leaves room for a longer first dimension

    for number, piece in enumerate(pieces):
        if number == 0:
            dtype = piece.dtype
            header()
        file.write(piece.tobytes())
        count += piece.size
    file.seek(0)
    header()

"""Parquet and Arrow files as Hugging Face ``datasets`` writes them: a row is an item, one column holds the bytes.

Arrow files are memory-mapped and any row is read alone. Parquet is compressed in row groups, and a row costs as much as
its group: with a cache folder the column is unpacked once into Arrow files there (as ``datasets`` itself does).
pyarrow is imported when it is needed.
"""

import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

from d2v_fast.train.data.base import UnreadableFile
from d2v_fast.train.data.names import Names
from d2v_fast.train.data.sources import Source, cache_path, describe_files, missing, open_regular
from d2v_fast.train.errors import ConfigError, DataError
from d2v_fast.train.files import replace_file

logger = logging.getLogger(__name__)

FORMAT = 1  # raise when the unpacked form changes
OPEN_FILES = 128  # in each process; systems allow 1024 at least
BATCH_ROWS = 64  # rows in a batch of an unpacked file
BYTES, TEXT = "binary, or structs with binary bytes and a path", "strings"  # what columns hold, for messages


class Tables(Source):
    """Rows of files with a column of audio or images: bytes, or structs of bytes and path (``Audio``, ``Image``).

    Raises:
        DataError: no column, or more than one, that could be meant; or no file can be read.
    """

    threads = 1  # they share the row group that was read last

    def __init__(self, root: Path, files: Sequence[Path], column: str | None, cache_dir: str | None) -> None:
        short = [file.relative_to(root).as_posix() for file in files]
        self.key = ["tables", FORMAT, describe_files(files), column]
        self.files: list[str] = []
        self.column, self.skipped, counts, names = column, [], [], []
        for file, name in zip(files, short, strict=True):
            try:
                with _reader(str(file)) as reader:
                    self.column = self.column or _bytes_column(reader.schema, file)
                    _check_column(reader.schema, self.column, _holds_bytes, BYTES, file)
                    reader.check(self.column)
                    rows = reader.num_rows
                    path = str(file) if cache_dir is None else _unpacked(reader, str(file), self.column, cache_dir)
            except UnreadableFile as error:
                self.skipped.append((name, error.reason))
                continue
            self.files.append(path)
            counts.append(rows)
            names += (f"{name}:{row}" for row in range(rows))
        self.ends = np.cumsum(counts, dtype=np.int64)  # [files] rows
        self.names = Names(names)
        self.folder = root
        self._open: dict[int, Any] = {}  # readers of this process

    def open(self, item: int) -> BinaryIO:
        """See :meth:`Source.open`."""
        file = int(np.searchsorted(self.ends, item, side="right"))
        row = item - (int(self.ends[file - 1]) if file else 0)
        value = self._reader(file).value(self.column, row)
        path = None
        if value is not None and hasattr(value, "keys"):  # a struct
            path = value["path"].as_py() if "path" in value else None
            value = value["bytes"]
        if value is not None and value.is_valid:
            return io.BytesIO(value.as_buffer())
        if not path:
            raise UnreadableFile(self.names[item], "an empty row")
        return self._open_beside(item, path)

    def _open_beside(self, item: int, path: str) -> BinaryIO:
        """The file that a row names: only what lies below the tables, whoever wrote them."""
        folder = os.path.abspath(self.folder)
        target = os.path.normpath(os.path.join(folder, path))
        if os.path.commonpath([folder, target]) != folder:
            raise UnreadableFile(self.names[item], f"{path}: not below the folder of the tables, {folder}")
        try:
            return open_regular(target, buffering=0)
        except UnreadableFile as error:
            raise UnreadableFile(self.names[item], f"{path}: {error.reason}") from error

    def _reader(self, file: int) -> "_Parquet | _Arrow":
        """The reader of a file, of those that were used last."""
        reader = self._open.pop(file, None) or _reader(self.files[file])
        if len(self._open) >= OPEN_FILES:
            del self._open[next(iter(self._open))]  # the one that was used longest ago
        self._open[file] = reader
        return reader

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # files are opened where they are read


def read_documents(path: Path, column: str | None) -> Iterator[str]:
    """The texts of a table's column, row by row, without empty ones.

    Raises:
        UnreadableFile: the file is damaged.
        DataError: no column, or more than one, that could be meant.
    """
    with _reader(str(path)) as reader:
        column = column or _text_column(reader.schema, path)
        _check_column(reader.schema, column, _holds_text, TEXT, path)
        reader.check(column)
        for values in reader.batches(column):
            yield from (text for text in values.to_pylist() if text and text.strip())


def _pyarrow() -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            "data.path holds parquet or arrow files; reading them needs pyarrow: pip install pyarrow"
        ) from None
    return pyarrow


def _reader(path: str) -> "_Parquet | _Arrow":
    pa = _pyarrow()
    open_regular(path).close()  # pyarrow would wait for the other end of a pipe
    try:
        return _Parquet(path) if path.endswith(".parquet") else _Arrow(path)
    except (pa.ArrowException, OSError) as error:
        raise UnreadableFile(path, f"damaged or cut short: {_first_line(error)}") from error


class _Parquet:
    """Rows of a parquet file; the last row group that was asked for is kept."""

    def __init__(self, path: str) -> None:
        self.pa, self.path = _pyarrow(), path
        self.file = self.pa.parquet.ParquetFile(path, memory_map=True)
        self.schema, self.num_rows = self.file.schema_arrow, self.file.metadata.num_rows
        metadata = self.file.metadata
        rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        if sum(rows) != self.num_rows or any(count < 0 for count in rows):
            reason = f"the footer has {self.num_rows} rows, its row groups {', '.join(map(str, rows[:3]))}"
            raise UnreadableFile(path, f"damaged: {reason}" + ", ..." * (len(rows) > 3))
        self.ends = np.cumsum(rows, dtype=np.int64)
        self.kept: tuple[int, Any] = (-1, None)

    def check(self, column: str) -> None:
        """Nothing before rows are read: each row group is checked then."""

    def value(self, column: str, row: int) -> Any:
        """The scalar in one row."""
        group = int(np.searchsorted(self.ends, row, side="right"))
        if self.kept[0] != group:
            try:
                # without pyarrow's threads, which a forked worker does not have
                table = self.file.read_row_group(group, columns=[column], use_threads=False)
                table.validate(full=True)  # its text is not yet known to be UTF-8
            except (self.pa.ArrowException, OSError) as error:
                raise UnreadableFile(self.path, f"row group {group} is damaged: {_first_line(error)}") from error
            expected = self.file.metadata.row_group(group).num_rows
            if len(table) != expected:
                raise UnreadableFile(self.path, f"row group {group} is damaged: {len(table)} of its {expected} rows")
            self.kept = (group, table.column(column))
        return self.kept[1][row - (int(self.ends[group - 1]) if group else 0)]

    def batches(self, column: str) -> Iterator[Any]:
        """The column, in pieces."""
        try:
            for batch in self.file.iter_batches(BATCH_ROWS, columns=[column], use_threads=False):
                batch.validate(full=True)
                yield batch.column(0)
        except (self.pa.ArrowException, OSError) as error:
            raise UnreadableFile(self.path, f"damaged: {_first_line(error)}") from error

    def __enter__(self) -> "_Parquet":
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()


class _Arrow:
    """Rows of an Arrow file, memory-mapped; its stream format (``datasets``) and its file format."""

    def __init__(self, path: str) -> None:
        pa = self.pa = _pyarrow()
        self.path, self.map = path, pa.memory_map(path)
        is_file = self.map.read(6) == b"ARROW1"
        self.map.seek(0)
        reader = pa.ipc.open_file(self.map) if is_file else pa.ipc.open_stream(self.map)
        self.table = reader.read_all()
        self.schema, self.num_rows = self.table.schema, self.table.num_rows
        self.columns: dict[str, tuple[list[Any], np.ndarray]] = {}

    def check(self, column: str) -> None:
        """Look at the offsets of all rows: pyarrow takes them as they are, and wrong ones end the process.

        Raises:
            UnreadableFile: some of them do not fit the file, or text is not UTF-8.
        """
        if column in self.columns:
            return
        values = self.table.column(column)
        try:
            values.validate(full=True)
        except self.pa.ArrowException as error:
            raise UnreadableFile(self.path, f"column {column!r} is damaged: {_first_line(error)}") from error
        # looking for the piece that a row is in, piece by piece, would be slow
        self.columns[column] = values.chunks, np.cumsum([len(piece) for piece in values.chunks], dtype=np.int64)

    def value(self, column: str, row: int) -> Any:
        """The scalar in one row."""
        self.check(column)
        pieces, ends = self.columns[column]
        piece = int(np.searchsorted(ends, row, side="right"))
        return pieces[piece][row - (int(ends[piece - 1]) if piece else 0)]

    def batches(self, column: str) -> Iterator[Any]:
        """The column, in pieces."""
        return iter(self.table.column(column).chunks)

    def __enter__(self) -> "_Arrow":
        return self

    def __exit__(self, *exc: object) -> None:
        self.map.close()


def _unpacked(reader: "_Parquet | _Arrow", path: str, column: str, cache_dir: str) -> str:
    """An Arrow file in ``cache_dir`` with one column of a parquet file; an Arrow file is left where it is."""
    if isinstance(reader, _Arrow):
        return path
    pa = _pyarrow()
    target = cache_path(cache_dir, "table", [FORMAT, describe_files([path]), column]).with_suffix(".arrow")

    def write(file: BinaryIO) -> None:
        with pa.ipc.new_stream(file, pa.schema([reader.schema.field(column)])) as stream:
            for values in reader.batches(column):
                stream.write_batch(pa.record_batch([values], names=[column]))

    with missing(target) as is_missing:
        if is_missing:
            logger.info("unpacking column %s of %s into %s", column, path, target)
            replace_file(target, write)
    return str(target)


def _bytes_column(schema: Any, path: Path) -> str:
    """The column of encoded audio or images: what ``datasets`` marks as such, else the only one of bytes."""
    features = _features(schema)
    marked = [name for name in schema.names if _is_media(features.get(name))]
    found = marked or [field.name for field in schema if _holds_bytes(field.type)]
    return _only(found, f"encoded audio or images ({BYTES})", schema, path)


def _text_column(schema: Any, path: Path) -> str:
    found = [field.name for field in schema if _holds_text(field.type)]
    return "text" if "text" in found else _only(found, f"text ({TEXT})", schema, path)


def _holds_bytes(kind: Any) -> bool:
    types = _pyarrow().types
    if not types.is_struct(kind):
        return types.is_binary(kind) or types.is_large_binary(kind)
    fields = {field.name: field.type for field in kind}
    if "bytes" not in fields or types.is_struct(fields["bytes"]) or not _holds_bytes(fields["bytes"]):
        return False
    return "path" not in fields or types.is_null(fields["path"]) or _holds_text(fields["path"])


def _holds_text(kind: Any) -> bool:
    types = _pyarrow().types
    return types.is_string(kind) or types.is_large_string(kind)


def _check_column(schema: Any, name: str, fits: Callable[[Any], bool], expected: str, path: Path) -> None:
    """Raise the UnreadableFile of a table without the column ``name``, or in which it holds something else."""
    if schema.names.count(name) != 1:
        which = "several columns" if name in schema.names else "no column"
        raise UnreadableFile(path, f"{which} {name!r} among {', '.join(schema.names)}")
    if not fits(schema.field(name).type):
        raise UnreadableFile(path, f"column {name!r} is of type {schema.field(name).type}; expected {expected}")


def _features(schema: Any) -> dict[str, Any]:
    """The columns' features in the words of ``datasets``, which keeps them in the schema's metadata."""
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        return json.loads(text)["info"]["features"] if text else {}
    except (ValueError, KeyError, TypeError):
        return {}


def _is_media(feature: Any) -> bool:
    return isinstance(feature, dict) and feature.get("_type") in ("Audio", "Image")


def _only(found: list[str], what: str, schema: Any, path: Path) -> str:
    if len(found) == 1:
        return found[0]
    columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
    which = f"{len(found)} columns ({', '.join(found)})" if found else "no column"
    raise DataError(f"{path} has {which} of {what}; expected one, or data.column to say which. Its columns: {columns}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

"""Which format the data at a path has, and which of its files are read."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

from d2v_fast.train.data.bad_items import check_files, log_skipped
from d2v_fast.train.data.base import compressed, list_files, relative_names, require
from d2v_fast.train.data.names import Names
from d2v_fast.train.data.sources import Files, Source
from d2v_fast.train.data.tables import Tables
from d2v_fast.train.data.tars import Tars
from d2v_fast.train.errors import DataError

TABLES = {"parquet": (".parquet",), "arrow": (".arrow",)}
SHARDS = {"webdataset": (".tar",), **TABLES}
BRACES = re.compile(r"\{([^{}]*)\}")
SPLITS = {  # words in file names, as Hugging Face datasets reads them
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


@dataclass(frozen=True, kw_only=True)
class LocationConfig:
    """Where data is and in which form; part of the configuration of every modality."""

    path: str  # a file, a folder or a pattern of files; see find
    format: str = "auto"  # what the files at path are; auto: seen from their names
    split: str = "train"  # where one folder or file holds several
    column: str | None = None  # of tables, or the extension in tars; None: the only one of its kind
    cache_dir: str | None = None  # keeps what is worked out from the files; None: done again on every start
    max_bad_fraction: float = 0.01  # of items, and of files; more unreadable ones end the run, unless they are few

    def __post_init__(self) -> None:
        require(bool(self.path), "data.path", "a folder, a file, or a pattern of files", self.path)
        require(bool(self.split), "data.split", "the name of a split", self.split)
        require(0 <= self.max_bad_fraction <= 1, "data.max_bad_fraction", "in [0, 1]", self.max_bad_fraction)


@dataclass(frozen=True)
class Found:
    """What is to be read: ``files``, all of ``format``, under ``root``."""

    format: str
    root: Path
    files: list[Path]


def open_source(found: Found, config: LocationConfig, suffixes: Sequence[str]) -> Source:
    """The items of ``found``: files, members of tars, or rows of tables; what is wrong with them is not looked at.

    The source names tars and tables that cannot be read, wholly or from some place on, in ``skipped``.

    Args:
        found: what :func:`find` gave, of the format "files" or one of ``SHARDS``.
        config: says which column, where to keep what was worked out, and how many files may be unreadable.
        suffixes: of the members of tars that are wanted, with a dot.

    Raises:
        DataError: see :class:`Tables`; or more unreadable files than ``config`` allows, where others hold something.
    """
    if found.format == "files":
        return Files(found.root, Names(relative_names(found.root, found.files)))
    if found.format == "webdataset":
        extensions = [config.column] if config.column else [suffix.removeprefix(".") for suffix in suffixes]
        source: Source = Tars(found.root, found.files, extensions, config.cache_dir)
    else:
        source = Tables(found.root, found.files, config.column, config.cache_dir)
    if source.names:
        check_files(source.skipped, len(found.files), config.max_bad_fraction)
        log_skipped(source.skipped, len(found.files), "files, or the rest of them")
    return source


def find(
    path: str,
    kinds: Mapping[str, Sequence[str]],
    wanted: str,
    split: str,
    what: str,
    elsewhere: Sequence[str] = (),
) -> Found:
    """The files at ``path`` and their format.

    ``path`` is a file, a folder, or a pattern: ``*``, ``?`` and ``[...]`` as in a shell, ``{000..127}`` and ``{a,b}``
    as in webdataset. A folder is searched to any depth for files of one format; of tables and tars in a folder whose
    names tell splits apart only those of ``split`` are read. A folder that ``datasets`` has saved is recognised.

    Args:
        path: as above; ``~`` is the home folder.
        kinds: formats that can be read and the suffixes of their files, lower case, with a dot.
        wanted: one of ``kinds``, or "auto".
        split: which part of the data.
        what: the expected contents, for messages.
        elsewhere: formats that ``wanted`` may be, but that are not read here; for messages.

    Raises:
        ConfigError: ``wanted`` is not a format that can be read.
        DataError: nothing there, or files of several formats.
    """
    require(
        wanted == "auto" or wanted in kinds,
        "data.format",
        f"auto or one of {', '.join([*kinds, *elsewhere])} here",
        wanted,
    )
    kinds = kinds if wanted == "auto" else {wanted: kinds[wanted]}
    root = Path(path).expanduser()
    if not root.exists() and (has_magic(path) or BRACES.search(path)):
        return _pattern(str(root), kinds, what)
    if root.is_file():
        return Found(_kind_of_file(root, kinds, wanted, what), root.parent, [root])
    if root.is_dir() and "arrow" in kinds and (saved := _saved_folder(root, split)):
        return Found("arrow", saved, sorted(saved.glob("*.arrow")))
    suffixes = tuple(dict.fromkeys(suffix for group in kinds.values() for suffix in group))
    groups = _groups(list_files(path, suffixes, what), kinds)
    if "files" in groups:
        groups.pop("manifest", None)  # tables of other kinds lie beside audio
    if len(groups) > 1:
        counts = ", ".join(f"{len(files)} of {kind}" for kind, files in groups.items())
        raise DataError(f"data path {root} holds files of several formats ({counts}); choose one with data.format")
    ((kind, files),) = groups.items()
    if kind in SHARDS:
        files = _of_split(root, files, split)
    return Found(kind, root, files)


def _kind_of_file(path: Path, kinds: Mapping[str, Sequence[str]], wanted: str, what: str) -> str:
    if wanted in kinds:
        return wanted
    for kind, suffixes in kinds.items():
        if path.suffix.lower() in suffixes:
            return kind
    known = [suffix for suffixes in kinds.values() for suffix in suffixes]
    raise DataError(f"data path {path} holds no {what} ({', '.join(known)}){compressed([path], known)}")


def _groups(files: list[Path], kinds: Mapping[str, Sequence[str]]) -> dict[str, list[Path]]:
    of_suffix = {suffix: kind for kind, suffixes in kinds.items() for suffix in suffixes}
    groups: dict[str, list[Path]] = {kind: [] for kind in kinds}
    for file in files:
        groups[of_suffix[file.suffix.lower()]].append(file)
    return {kind: group for kind, group in groups.items() if group}


def _pattern(path: str, kinds: Mapping[str, Sequence[str]], what: str) -> Found:
    files: list[Path] = []
    for part in expand_braces(path):
        matches = sorted(glob(part, recursive=True)) if has_magic(part) else [part]
        if not matches or not os.path.exists(matches[0]):
            raise DataError(f"data path {path}: {part} does not exist")
        files += map(Path, matches)
    found = {_kind_of_file(file, kinds, "auto" if len(kinds) > 1 else next(iter(kinds)), what) for file in files}
    if len(found) > 1:
        raise DataError(f"data path {path} matches files of several formats ({', '.join(sorted(found))}); expected one")
    return Found(found.pop(), Path(os.path.commonpath([file.parent for file in files])), files)


def expand_braces(pattern: str) -> Iterator[str]:
    """``a{0..2}`` to a0, a1, a2, with as many digits as written, and ``a{b,c}`` to ab, ac; from left to right."""
    match = BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        first, last, width = int(numbers[1]), int(numbers[2]), len(numbers[1])
        choices = [f"{number:0{width}d}" for number in range(first, last + 1)]
    else:
        choices = match[1].split(",")
    for choice in choices:
        yield from expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])


def _saved_folder(root: Path, split: str) -> Path | None:
    """The folder that ``Dataset.save_to_disk`` has written: ``root``, or the split's inside of it."""
    if (root / "state.json").is_file():
        return root
    if not (root / "dataset_dict.json").is_file():
        return None
    if (root / split / "state.json").is_file():
        return root / split
    there = sorted(folder.parent.name for folder in root.glob("*/state.json"))
    raise DataError(f"data path {root} holds the splits {', '.join(there) or 'none'}; data.split is {split!r}")


def _of_split(root: Path, files: list[Path], split: str) -> list[Path]:
    """The files of ``split`` where their names tell several splits apart, else all of them."""
    words = [set(re.split(r"[^a-z]+", file.relative_to(root).as_posix().lower())) for file in files]
    named = {name for name, synonyms in SPLITS.items() if any(synonyms & found for found in words)}
    if len(named) < 2:
        return files
    wanted = next((synonyms for name, synonyms in SPLITS.items() if split in synonyms), {split})
    chosen = [file for file, found in zip(files, words, strict=True) if wanted & found]
    if not chosen:
        raise DataError(f"data path {root} holds the splits {', '.join(sorted(named))}; data.split is {split!r}")
    return chosen

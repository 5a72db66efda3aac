"""fairseq's audio manifests (``FileAudioDataset``): the root, then one ``path<TAB>samples`` a line, at 16 kHz.

A path may be ``archive.zip:offset:length``: bytes of an archive whose members are stored without compression.
"""

import os
from pathlib import Path

import numpy as np

from d2v_fast.train.data.names import Names
from d2v_fast.train.data.sources import SLICE, Files
from d2v_fast.train.errors import DataError

DIGITS = 18  # of a length, which is kept in 64 bits


def read_manifest(path: Path) -> tuple[Files, np.ndarray]:
    """The items of a manifest and their lengths in samples, int64 [items]; files are not looked at.

    fairseq takes a relative root from the working directory. Here the manifest's folder comes first, and the working
    directory only if the first item is not there.

    Raises:
        DataError: missing, not UTF-8 text, without items, or with a line of another form.
    """
    if not path.is_file():
        raise DataError(f"manifest {path} does not exist; expected a .tsv file: the root, then path<TAB>samples lines")
    try:
        root, *lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"manifest {path} is not UTF-8 text: {error}") from error
    names, lengths = [], []
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        name, tab, samples = line.strip().partition("\t")
        samples = samples.strip()
        if not tab or not samples.isdecimal() or len(samples) > DIGITS:
            raise DataError(f"manifest {path}, line {number}: expected path<TAB>samples, got {line[:1000]!r}")
        names.append(name)
        lengths.append(int(samples))
    if not names:
        raise DataError(f"manifest {path} lists no files; expected the root, then path<TAB>samples lines")
    root = root.strip()
    beside = path.parent / root  # an absolute root replaces the manifest's folder
    here = not _exists(beside, names[0]) and _exists(Path(root), names[0])
    return Files(root if here else beside, Names(names), slices=True), np.array(lengths, np.int64)


def _exists(root: Path, name: str) -> bool:
    part = SLICE.fullmatch(name)
    return os.path.exists(root / (part[1] if part else name))

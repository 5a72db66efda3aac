"""Files as torch writes them, and such as it would not."""

import zipfile
from pathlib import Path

import pytest
import torch

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


class Call:
    """An object whose pickle calls ``function`` with ``args``."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def save(path: Path, content, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def with_pickle(path: Path, raw: bytes) -> Path:
    """A zip as torch writes it, with ``raw`` in place of the pickle."""
    with zipfile.ZipFile(save(path, {"x": torch.arange(4.0)})) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, part in parts.items():
            archive.writestr(name, raw if name.endswith("data.pkl") else part)
    return path

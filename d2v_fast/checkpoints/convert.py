"""Reading any of the formats by looking at it, and writing any."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from d2v_fast.checkpoints import beit, fairseq, native, transformers
from d2v_fast.checkpoints.directories import CONFIG, read_json
from d2v_fast.checkpoints.rules import Loaded, Report
from d2v_fast.checkpoints.safe_load import read_torch
from d2v_fast.errors import CheckpointError
from d2v_fast.nn import Data2Vec

WRITERS: dict[str, Callable[[Data2Vec, str | Path], Report]] = {
    "fairseq": fairseq.save_fairseq,
    "transformers": transformers.save_transformers,
    "beit": beit.save_beit,
    "native": native.save_pretrained,
}
DIRECTORIES = ("transformers", "native")  # the others are single files


def read_any(path: str | Path, dtype: torch.dtype | None = None) -> Loaded:
    """A checkpoint of any format, which the report names, in the file's precision by default.

    Raises:
        CheckpointError: none of the formats, or what its reader raises.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "manifest.json").exists():
            raise CheckpointError(f"{path} is a checkpoint of a run: use d2v-fast export")
        config = read_json(path / CONFIG)
        for module, fits in ((native, native.is_native), (transformers, transformers.is_transformers)):
            if fits(config):
                return module.read(path, dtype)
        raise CheckpointError(f"{path / CONFIG} must be of d2v_fast or transformers ('model_type'), got neither")
    content = read_torch(path)
    for module, fits in ((beit, beit.is_beit), (fairseq, fairseq.is_fairseq)):
        if fits(content):
            return module.from_content(path, content, dtype)
    if isinstance(content, dict) and "d2v_fast" in content:
        raise CheckpointError(f"{path} is a checkpoint of a run: use d2v-fast export")
    raise CheckpointError(f"{path} must be a checkpoint of fairseq or the BEiT fork, got {_describe(content)}")


def _describe(content: Any) -> str:
    if isinstance(content, dict):
        return f"a dictionary with {', '.join(map(repr, list(content)[:8])) or 'nothing'}"
    return type(content).__name__


def check_target(path: str | Path, format: str, force: bool = False) -> None:
    """Refuse to write ``format``, a key of ``WRITERS``, over what is at ``path``, unless ``force``.

    Raises:
        CheckpointError: an unknown format; a file where a directory is to be, or the reverse; or something is there.
    """
    if format not in WRITERS:
        raise CheckpointError(f"the format must be one of {', '.join(WRITERS)}, got {format!r}")
    path = Path(path)
    directory = format in DIRECTORIES
    if path.exists() and path.is_dir() != directory:
        raise CheckpointError(f"{path} must be a {'directory' if directory else 'file'} for the {format} format")
    if not force and (any(path.iterdir()) if path.is_dir() else path.exists()):
        raise CheckpointError(f"{path} exists: choose another name, or replace it with --force")


def write_as(model: Data2Vec, path: str | Path, format: str, force: bool = False, *, teacher: bool = False) -> Report:
    """Write ``model`` as ``format``, a key of ``WRITERS``, to a file or directory.

    ``teacher``: write :func:`averaged` of it, and say so in the report.

    Raises:
        CheckpointError: as :func:`check_target`, or what the writer of the format raises.
    """
    check_target(path, format, force)
    if not teacher:
        return WRITERS[format](model, path)
    report = WRITERS[format](averaged(model), path)
    report.dropped = [name for name in report.dropped if not name.startswith("teacher.")]  # written as the student
    said = "written are the teacher's averages, under the student's names; what is not averaged is the student's"
    report.notes.insert(0, said)
    return report


def averaged(model: Data2Vec) -> Data2Vec:
    """A copy of ``model`` whose student has the teacher's averages; what is not averaged stays the student's."""
    result = copy.deepcopy(model)
    state = result.state_dict()
    prefix = "teacher.module."
    averages = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    result.load_state_dict(state | averages)
    return result

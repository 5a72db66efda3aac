"""What a checkpoint is on disk: names, manifest, checksums, and which ones stay."""

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2v_fast.checkpoints.directories import read_json
from d2v_fast.train.checkpoint.schema import Manifest, check_content
from d2v_fast.train.errors import CheckpointError
from d2v_fast.train.files import replace_file

logger = logging.getLogger(__name__)

FORMAT = 2
MANIFEST = "manifest.json"
SUFFIX = ".safetensors"
_NAME = re.compile(r"checkpoint-(\d+)(?:\.pt)?")
_CHUNK = 1 << 20


@dataclass
class Progress:
    """Where a run is: completed updates and the position in the data."""

    update: int = 0
    epoch: int = 0
    index: int = 0  # next micro-batch of the epoch, of all ranks together


def checkpoint_path(folder: Path, update: int) -> Path:
    """The checkpoint after ``update`` updates."""
    return folder / f"checkpoint-{update:08d}"


def update_of(path: Path) -> int:
    """The update in the name of a checkpoint."""
    return int(_NAME.fullmatch(path.name)[1])


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in ``folder``, those of earlier versions included (``.pt``), oldest first."""
    return sorted((p for p in folder.glob("checkpoint-*") if _NAME.fullmatch(p.name)), key=update_of)


def partial_path(folder: Path, update: int, token: str) -> Path:
    """Where the checkpoint is written before it has its name."""
    return folder / f".{checkpoint_path(folder, update).name}.{token}.tmp"


def remove_partial(folder: Path) -> None:
    """Remove what interrupted saves and removals left behind."""
    for path in folder.glob(".checkpoint-*.tmp"):
        remove(path)


def prune(folder: Path, update: int, keep: int, keep_every: int) -> None:
    """Remove the checkpoints before the newest ``keep``; those of every ``keep_every``-th update stay (0 = none).

    Those of updates after ``update``, the run's last, do not count: it did not go on from them, so they are damaged.
    """
    known = [path for path in checkpoints(folder) if update_of(path) <= update]
    for path in known[:-keep]:
        if not keep_every or update_of(path) % keep_every:
            discard(path)


def discard(path: Path) -> None:
    """Remove a checkpoint: it loses its name first, so that there is never half of one."""
    hidden = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.rename(hidden)
    except OSError as error:
        logger.warning("could not remove %s: %s", path, error)
        return
    remove(hidden)


def remove(path: Path) -> None:
    """Remove a file or folder; what stands against it is logged."""
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        logger.warning("could not remove %s: %s", path, error)


def checksums(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Of each file its size in bytes and its SHA-256.

    Raises:
        OSError: a file cannot be read.
    """
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in names}


def _sha256(path: Path, tick: Callable[[], None] = lambda: None) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            tick()
    return digest.hexdigest()


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write the manifest, with a checksum of its own."""
    text = json.dumps({**content, "sha256": _digest(content)}, indent=1)
    replace_file(folder / MANIFEST, lambda file: file.write(text.encode()))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at ``path``, checked against its own checksum.

    Raises:
        CheckpointError: there is none, it is damaged, or of another format.
    """
    manifest = path / MANIFEST
    if manifest.exists() and not manifest.is_file():  # reading a pipe would wait for who writes to it
        raise CheckpointError(f"{path} is damaged: {MANIFEST} is not a regular file")
    content = read_json(manifest)
    checksum = content.pop("sha256", None)
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a d2v_fast checkpoint of format {FORMAT}")
    if checksum != _digest(content):
        raise CheckpointError(f"{path} is damaged: wrong checksum of {MANIFEST}")
    check_content(Manifest, content, str(manifest))
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_files(path: Path, manifest: dict[str, Any], tick: Callable[[], None] = lambda: None) -> None:
    """Read every file of the checkpoint at ``path``; ``tick`` is called again and again.

    Raises:
        CheckpointError: a file is missing, not the one that was written, or not in the manifest.
    """
    expected = manifest["files"]
    if unknown := sorted({p.name for p in path.glob(f"*{SUFFIX}")} - expected.keys()):
        raise CheckpointError(f"{path} is damaged: {unknown[0]} is not in {MANIFEST}")
    if strange := [name for name in expected if Path(name).name != name or "\0" in name]:
        raise CheckpointError(f"{path} is damaged: {strange[0]!r} is no name of a file in it")
    try:
        found = {name: (path / name).stat() for name in expected}  # all before any is read
        for name, file in expected.items():
            if not stat.S_ISREG(found[name].st_mode):
                raise CheckpointError(f"{path} is damaged: {name} is not a regular file")
            if (size := found[name].st_size) != file["bytes"]:
                raise CheckpointError(f"{path} is damaged: {name} must have {file['bytes']} bytes, got {size}")
        for name, file in expected.items():
            if _sha256(path / name, tick) != file["sha256"]:
                raise CheckpointError(f"{path} is damaged: wrong checksum of {name}")
    except OSError as error:
        name = Path(error.filename or "").name
        raise CheckpointError(f"{path} is damaged: {name}: {error.strerror}") from error


def sync_folder(path: Path) -> None:
    """Let the names in a folder reach the disk as well, where the file system can do that.

    Raises:
        OSError: the disk failed.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # what some network file systems say of any folder
            raise
    finally:
        os.close(handle)

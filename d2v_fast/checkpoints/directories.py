"""Directories of ``config.json`` and weights: safetensors, or torch files, in one piece or several."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from d2v_fast.checkpoints.rules import distinct
from d2v_fast.checkpoints.safe_load import first_line, read_torch
from d2v_fast.errors import CheckpointError
from d2v_fast.files import replace_file

CONFIG, WEIGHTS, TORCH_WEIGHTS = "config.json", "model.safetensors", "pytorch_model.bin"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: missing, unreadable, or no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no file at {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: missing, truncated, or no safetensors file; or the package safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise _needs_safetensors() from None
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"no file at {path}") from None
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {first_line(error)}") from error


def _needs_safetensors() -> CheckpointError:
    return CheckpointError("safetensors files need the package safetensors: pip install 'd2v-fast[checkpoints]'")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a directory as transformers writes them.

    Raises:
        CheckpointError: no weights, a piece is missing or outside of the directory, a tensor is in two of them, or a
            file cannot be read.
    """
    for name, read in ((WEIGHTS, read_safetensors), (TORCH_WEIGHTS, read_torch)):
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            pieces = [name]
        elif index.exists():
            pieces = _pieces(index)
        else:
            continue
        named: list[tuple[str, Tensor]] = []
        for piece in pieces:
            content = read(folder / piece)
            fits = isinstance(content, Mapping) and all(isinstance(key, str) for key in content)
            if not fits or not all(isinstance(x, Tensor) for x in content.values()):
                raise CheckpointError(f"{folder / piece} must hold tensors by name, and nothing else")
            named += content.items()
        return distinct(folder, named)
    raise CheckpointError(f"{folder} must hold {WEIGHTS} or {TORCH_WEIGHTS}, whole or with an index of pieces")


def _pieces(index: Path) -> list[str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(x, str) and os.path.basename(x) == x for x in names.values()):
        raise CheckpointError(f"{index} must name files beside it under 'weight_map'")
    return sorted(set(names.values()))


def write_directory(folder: str | Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write ``model.safetensors`` and then ``config.json``, each beside and renamed.

    Raises:
        CheckpointError: no space, no permission; or the package safetensors is not installed.
    """
    try:
        from safetensors.torch import save
    except ImportError:
        raise _needs_safetensors() from None
    folder = Path(folder)
    try:
        weights = save({name: x.contiguous() for name, x in tensors.items()}, {"format": "pt"})
        replace_file(folder / WEIGHTS, lambda file: file.write(weights))
        text = json.dumps(config, indent=2) + "\n"
        replace_file(folder / CONFIG, lambda file: file.write(text.encode()))
    except OSError as error:
        raise CheckpointError(f"could not write {folder}: {error}") from error

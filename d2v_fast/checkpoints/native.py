"""Our own format: a directory of ``config.json`` and ``model.safetensors``, the teacher included."""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

import torch

from d2v_fast import __version__
from d2v_fast.checkpoints.directories import CONFIG, WEIGHTS, read_json, read_safetensors, write_directory
from d2v_fast.checkpoints.options import REQUIRED, settings
from d2v_fast.checkpoints.rules import STUDENT, Loaded, Report, Rule, build, check_counts, gather, outline, require
from d2v_fast.errors import CheckpointError
from d2v_fast.nn import Data2Vec, Data2VecConfig

FORMAT = "d2v_fast"
VERSION = 1
MODALITIES = ("speech", "image", "text")


def save_pretrained(model: Data2Vec, folder: str | Path) -> Report:
    """Write every tensor of ``model``; what the teacher shares with the student is written once.

    Raises:
        CheckpointError: no space, no permission; or the package safetensors is not installed.
    """
    state = model.state_dict()
    student = {name: x for name, x in state.items() if not name.startswith("teacher.")}
    own = {  # the teacher's shared tensors have the student's memory, or at least its values
        name: x
        for name, x in state.items()
        if name in student or not _same(x, student.get(name.removeprefix("teacher.module.")))
    }
    report = Report(f"native {model.config.modality}", mapped=[Rule(name, (name,)) for name in own])
    config = {"format": FORMAT, "version": VERSION, "d2v_fast": __version__, "model": dataclasses.asdict(model.config)}
    tensors = {name: x.detach().cpu().clone() for name, x in own.items()}
    write_directory(folder, config, tensors)
    return report


def _same(x: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and x.data_ptr() == other.data_ptr() and x.dtype == other.dtype


def is_native(config: dict[str, Any]) -> bool:
    """Whether a ``config.json`` is one of ours."""
    return config.get("format") == FORMAT


def read(folder: str | Path, dtype: torch.dtype | None = torch.float32) -> Loaded:
    """The model that :func:`save_pretrained` wrote, and the report of it."""
    folder = Path(folder)
    values = read_json(folder / CONFIG)
    if not is_native(values) or values.get("version") != VERSION:
        raise CheckpointError(f"{folder / CONFIG} must be of format {FORMAT!r}, version {VERSION}")
    config = config_from_dict(folder / CONFIG, values.get("model"))
    tensors = read_safetensors(folder / WEIGHTS)
    check_counts(folder, config, tensors, r"encoder\.layers\.(\d+)\.")
    # what the teacher shares with the student was written once
    skipped = tuple(f"teacher.module.{name.removesuffix('.')}." for name in config.ema.skip)
    expected = outline(folder, config).state_dict()
    rules = [Rule(name, (name,), name if f"{name}.".startswith(skipped) else STUDENT) for name in expected]
    report = Report(f"native {config.modality}")
    return build(folder, config, gather(folder, report, config, rules, tensors, "(?!)"), report, dtype)


def config_from_dict(path: str | Path, values: Any) -> Data2VecConfig:
    """A configuration from the plain values that ``dataclasses.asdict`` and JSON make of it.

    What decides of features and targets has to be there; other settings default to the recipe of the modality.

    Raises:
        CheckpointError: unknown or missing names, or values of a wrong type, all of them listed; or values that do not
            fit.
    """
    problems: list[str] = []
    modality = values.get("modality") if isinstance(values, dict) else None
    if modality not in MODALITIES:
        raise CheckpointError(f"{path}: model.modality must be one of {', '.join(MODALITIES)}, got {modality!r}")
    recipe = getattr(Data2VecConfig, modality)()
    known = settings(recipe)
    problems += [f"model.{name} is missing" for name in REQUIRED if name in known and not _has(values, name)]
    try:
        config = _build(recipe, values, "model", problems)
    except (TypeError, ValueError, ArithmeticError) as error:  # the configuration's own checks
        config = problems.append(str(error))
    require(path, "not a configuration of this version", problems)
    return config


def _has(values: Any, name: str) -> bool:
    for key in name.split("."):
        if not isinstance(values, dict) or key not in values:
            return False
        values = values[key]
    return True


def _build(base: Any, values: Any, where: str, problems: list[str]) -> Any:
    """The dataclass ``base`` with ``values`` in place of its own."""
    if not isinstance(values, dict):
        problems.append(f"{where} must be a group of values, got {values!r}")
        values = {}
    hints = typing.get_type_hints(type(base))
    names = {field.name for field in dataclasses.fields(base)}
    problems += [f"{where}.{name} is unknown" for name in sorted(values.keys() - names)]
    fields = {}
    for name in names & values.keys():
        value, hint, default = values[name], hints[name], getattr(base, name)
        if dataclasses.is_dataclass(default):
            fields[name] = _build(default, value, f"{where}.{name}", problems)
        elif _fits(value, hint):
            fields[name] = _tuples(value)
        else:
            problems.append(f"{where}.{name} must be of type {getattr(hint, '__name__', hint)}, got {value!r}")
    return dataclasses.replace(base, **fields)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is one of a field's type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in arguments)
    if origin is typing.Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        if not isinstance(value, list):
            return False
        parts = [arguments[0]] * len(value) if arguments[1:] == (...,) else arguments
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is hint


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value

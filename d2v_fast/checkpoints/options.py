"""Settings of other formats: read with their types and defaults, and compared with ours before they are written."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2v_fast.checkpoints.rules import require
from d2v_fast.nn import Data2VecConfig

# settings that decide what the weights compute: a format must keep them, or the model cannot be written in it
COMPUTED = (
    "modality",
    *(f"frontend.{n}" for n in ("conv_layers", "conv_norm", "conv_bias", "image_size", "patch_size", "channels")),
    *(f"frontend.{n}" for n in ("vocab_size", "max_positions", "sample_rate")),
    *(f"encoder.{n}" for n in ("layers", "dim", "ffn_dim", "heads", "norm", "norm_eps", "layer_scale", "key_bias")),
    *(f"encoder.{n}" for n in ("pos_conv_depth", "pos_conv_kernel", "pos_conv_groups", "relative_bias")),
)
# these, as a configuration of ours names them, and what else decides of features and targets
REQUIRED = (*(n for n in COMPUTED if n != "encoder.pos_conv_kernel"), "encoder.pos_conv_width")
REQUIRED += ("encoder.padding_aware", "encoder.layer_result")
# how it is computed, or how fresh weights are drawn: no property of trained weights
LOCAL = ("prune.", "encoder.checkpointing", "encoder.attention_backend", "encoder.attention_strict", "encoder.init")
LOCAL += ("frontend.position_init_std", "encoder.pos_conv_width")


class Options:
    """Values by name, each of its default's type; what does not fit is kept in ``problems`` for one message.

    A default of None allows for a number or None.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.values, self.defaults, self.problems = values, defaults, []

    def __getitem__(self, name: str) -> Any:
        default = self.defaults[name]
        value = self.values.get(name, default)
        if isinstance(default, float) or default is None:
            fits = isinstance(value, (int, float)) and not isinstance(value, bool)
            fits = fits or (value is None and default is None)
            expected = "a number"
        else:
            fits = type(value) is type(default) or (isinstance(default, tuple) and isinstance(value, list))
            expected = {bool: "true or false", int: "an integer", str: "a string"}.get(type(default), "a list")
        if fits:
            return value
        message = f"{name} must be {expected}, got {value!r}"
        if message not in self.problems:
            self.problems.append(message)
        return default

    def only(self, fixed: Mapping[str, Any]) -> None:
        """These options change what is computed; we know one value of each."""
        for name, value in fixed.items():
            if (got := self.values.get(name, value)) != value:
                self.problems.append(f"{name}={got!r} is not supported, only {value!r}")

    def one_of(self, choices: Mapping[str, str]) -> str:
        """The key of ``choices`` whose flag is set, "none" if no flag is; several together are a problem."""
        chosen = [key for key, flag in choices.items() if self[flag]]
        if len(chosen) > 1:
            self.problems.append(f"{' and '.join(choices[key] for key in chosen)} together are not supported")
        return chosen[0] if chosen else "none"

    def notes(self, usual: Mapping[str, Any]) -> list[str]:
        """What training would do otherwise here, because we have no such option."""
        changed = {name: self.values.get(name, value) for name, value in usual.items()}
        return [f"{n}={changed[n]!r} has no counterpart here" for n in usual if changed[n] != usual[n]]


def resolved(value: Any, root: Mapping[str, Any], depth: int = 8) -> Any:
    """``value`` with omegaconf's ``${a.b}`` replaced by what ``root`` has there, if it has anything."""
    if isinstance(value, dict):
        return {key: resolved(x, root, depth) for key, x in value.items()}
    reference = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) and depth else None
    if reference is None:
        return value
    found: Any = root
    for key in reference[1].split("."):
        if not isinstance(found, Mapping) or key not in found:
            return value
        found = found[key]
    return resolved(found, root, depth - 1)


def settings(config: Data2VecConfig) -> dict[str, Any]:
    """Every setting by its dotted name, and the kernel that the width of the position convolutions amounts to."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                walk(f"{prefix}{key}.", value)
            else:
                flat[f"{prefix}{key}"] = value

    walk("", dataclasses.asdict(config))
    encoder = config.encoder
    flat["encoder.pos_conv_kernel"] = max(3, encoder.pos_conv_width // max(1, encoder.pos_conv_depth))
    return flat


def losses(
    path: str | Path, format: str, config: Data2VecConfig, back: Data2VecConfig, without: tuple[str, ...] = ()
) -> list[str]:
    """What differs in ``back``, which is ``config`` written in a format and read again, for a report.

    ``without`` names groups of settings that the format does not have at all.

    Raises:
        CheckpointError: a setting that decides what the weights compute is among them.
    """
    ours, theirs = settings(config), settings(back)
    changed = [name for name in ours if ours[name] != theirs.get(name)]
    problems = [f"{n}={ours[n]!r} would become {theirs.get(n)!r}" for n in changed if n in COMPUTED]
    require(path, f"the {format} format has no place for this model", problems)
    groups = [f"no place for settings of {', '.join(group.rstrip('.') for group in without)}"] if without else []
    kept = [name for name in changed if not name.startswith((*LOCAL, *without))]
    return groups + [f"{name}={ours[name]!r} becomes {theirs.get(name)!r}" for name in kept]

"""One run's configuration: dataclasses, YAML presets, and ``key=value`` overrides."""

import dataclasses
import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from yaml import YAMLError

from d2v_fast.nn.config import Data2VecConfig, Profile
from d2v_fast.train.data import ImageDataConfig, SpeechDataConfig, TextDataConfig
from d2v_fast.train.distributed import DistributedConfig
from d2v_fast.train.errors import ConfigError
from d2v_fast.train.optim import OptimConfig, ScheduleConfig

DATA_CONFIGS = {"speech": SpeechDataConfig, "image": ImageDataConfig, "text": TextDataConfig}
# keys that may differ between a run and its continuation: they change where and how often, not what is computed
RUN_KEYS = (
    "out",
    "device",
    "workers",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "accumulate",  # the product with the number of processes is compared, see checkpoint.restore
    "stop_after",
    "reference_gpus",
    "optim.one_pass",  # the same results up to rounding
    "compile",
    "model.encoder.checkpointing",
    "model.encoder.attention_backend",
    "model.encoder.attention_strict",
    "data.path",  # the data themselves are compared, see checkpoint.restore
    "data.tokenizer",
    "data.cache_dir",
    "data.format",
    "data.max_bad_fraction",
)
RUN_GROUPS = ("guards.", "log.", "distributed.", "model.prune.")
RANK_KEYS = ("device", "workers", "data.path", "data.cache_dir")  # may differ between the ranks of a run
COERCE = {"coerce_numbers_to_str": True}  # a folder may be called 2024


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When to warn of a run that goes wrong, and when to stop it (docs/reliability.md)."""

    min_target_var: float = 0.1  # collapse: standard deviation of the targets below this (0 = never)
    min_pred_var: float = 0.01  # the same for the predictions
    min_feature_var: float = 0.0  # the same for what the encoder reads, positions being normalised; fairseq has none
    after_updates: int = 5000  # the three above are only looked at from here on
    warn_target_var: float = 0.2  # a warning below this, from the start on (0 = never)
    warn_pred_var: float = 0.05  # from after_updates on: at the start of good runs it falls and rises again
    warn_feature_var: float = 0.05  # from the start on
    max_nonfinite: int = 20  # consecutive updates skipped because loss or gradient is not finite
    spike_deviations: float = 6.0  # a loss so many standard deviations above the mean is noted (0 = never)
    spike_window: int = 1000  # losses that mean and deviation are taken of

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            if not 0 <= getattr(self, one.name) < math.inf:  # which NaN is not either; it would switch a guard off
                raise ValueError(f"guards.{one.name} must be at least 0 and finite, got {getattr(self, one.name)}")
        if self.spike_window < 1:
            raise ValueError(f"guards.spike_window must be at least 1, got {self.spike_window}")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where numbers go besides metrics.jsonl and the terminal."""

    tensorboard: bool = True
    wandb_project: str = ""  # "" = not to Weights & Biases


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that defines a run."""

    model: Data2VecConfig
    data: SpeechDataConfig | ImageDataConfig | TextDataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    log: LogConfig = field(default_factory=LogConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    updates: int = 400_000
    accumulate: int = 1  # micro-batches per update of each rank
    seed: int = 1
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 autocast on CUDA, fp32 on CPU
    # Updates are replayed from CUDA graphs (train/graph.py) where possible, or "strict": always. Batches have few
    # shapes then; those of speech need a data.crop_multiple of a second or so as well. Not yet timed on a GPU.
    cuda_graph: Literal["off", "auto", "strict"] = "off"
    compile: bool = False  # torch.compile of each layer
    reference_gpus: int = 1  # GPUs of the published recipe that this batch size is per GPU of; for information
    out: str = "runs/default"
    device: str = "auto"
    workers: int = 2
    log_every: int = 100  # updates
    checkpoint_every: int = 5000  # updates
    keep_checkpoints: int = 2  # the newest ones
    keep_every: int = 0  # and all whose update is a multiple of this; 0 = none
    stop_after: int = 0  # end this session after so many updates, as if interrupted; 0 = run to the end

    def __post_init__(self) -> None:
        for name in ("updates", "accumulate", "reference_gpus", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seed", "workers", "keep_every", "stop_after"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}")


def presets() -> list[str]:
    """Names of the packaged presets."""
    folder = resources.files("d2v_fast.train") / "presets"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else ""


def _all_keys(config: Any, path: str) -> Iterator[str]:
    """Keys and groups of the dataclass ``config``, nested ones too, behind ``path``."""
    for one in dataclasses.fields(config):
        yield f"{path}{one.name}"
        value = getattr(config, one.name)
        if dataclasses.is_dataclass(value):
            yield from _all_keys(value, f"{path}{one.name}.")


def _nearest_key(name: str, path: str, everywhere: Sequence[str]) -> str:
    """Keys like ``name``: behind ``path``, or further away if they are more like it."""
    likeness = {}
    for key in everywhere:
        group, _, last = key.rpartition(".")
        here = group == path.removesuffix(".")
        ratio = difflib.SequenceMatcher(None, name, last).ratio()
        if ratio >= (0.5 if here else 0.8):
            likeness[key] = (ratio, here)
    best = max(likeness.values(), default=None)
    close = [repr(key) for key, value in likeness.items() if value == best]
    return f"did you mean {' or '.join(close[:3])}? " if close else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _override(config: Any, values: dict[str, Any], path: str = "", everywhere: Sequence[str] = ()) -> Any:
    """A copy of the dataclass ``config`` with ``values`` put in, nested ones included; refuses what does not fit."""
    hints = get_type_hints(type(config))
    known = [f.name for f in dataclasses.fields(config)]
    everywhere = everywhere or [*_all_keys(config, path)]
    changes = {}
    for key, value in values.items():
        where = f"{path}{key}"
        if key not in known:
            raise ConfigError(
                f"unknown key {where!r}: {_nearest_key(key, path, everywhere)}known here: {', '.join(known)}"
            )
        current = getattr(config, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise ConfigError(f"{where} is a group of keys, got the single value {value!r}")
            changes[key] = _override(current, value, f"{where}.", everywhere)
            continue
        try:
            changes[key] = TypeAdapter(hints[key], config=COERCE).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            short = first["type"] == "missing"  # of a tuple
            why = f"a value is missing of {hints[key]}" if short else first["msg"]
            raise ConfigError(f"{where}: {why}, got {value!r}") from None
    try:
        return dataclasses.replace(config, **changes)
    except ValueError as error:
        # which names a field, as a rule with its group: the last one of the path
        group = f"{path.removesuffix('.').rpartition('.')[2]}."
        raise ConfigError(f"{path}{str(error).removeprefix(group)}") from None


def model_config(values: dict[str, Any]) -> Data2VecConfig:
    """Build a model configuration from plain values: modality, size, profile, then any field to override."""
    if not isinstance(values, dict):
        raise ConfigError(f"model is a group of keys, got the single value {values!r}")
    values = dict(values)
    modality = values.pop("modality", None)
    if modality not in DATA_CONFIGS:
        raise ConfigError(f"model.modality must be one of {', '.join(DATA_CONFIGS)}, got {modality!r}")
    size, profile = values.pop("size", "base"), values.pop("profile", "paper")
    try:
        base = getattr(Data2VecConfig, modality)(size, profile=profile)
    except ValueError as error:
        key = "size" if profile in get_args(Profile) else "profile"
        raise ConfigError(f"model.{key}: {error}") from None
    return _override(base, values, "model.")


def complete_model(values: dict[str, Any]) -> dict[str, Any]:
    """The model's values out of an older checkpoint, with the keys that came later.

    One of these belongs to a profile, which such a file does not name; another value of the same profile tells.
    """
    padding_aware = values["targets"]["padding_aware"]
    encoder = {"padding_aware": padding_aware, **values["encoder"]}
    return config_to_dict(model_config({**values, "encoder": encoder}))


def config_from_dict(values: dict[str, Any]) -> TrainConfig:
    """Build a run's configuration from plain nested values, as a preset or a checkpoint holds them."""
    values = dict(values)
    model = model_config(values.pop("model", {}))
    data_values = values.pop("data", {})
    if not isinstance(data_values, dict) or not data_values.get("path"):
        raise ConfigError(f"data.path is missing: say where the {model.modality} data is with data.path=...")
    base = TrainConfig(model=model, data=DATA_CONFIGS[model.modality](path=str(data_values["path"])))
    return _override(base, {**values, "data": data_values})


def config_to_dict(config: Any) -> dict[str, Any]:
    """Plain nested values of a configuration; :func:`config_from_dict` reads them back."""
    return dataclasses.asdict(config)


def load_config(preset: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Configuration of ``preset`` (a packaged name or the path of a YAML file) with ``key=value`` overrides.

    ``out`` is ``runs/`` and the preset's name unless it is given.

    Raises:
        ConfigError: unknown preset or key (with the nearest name), malformed override, or a value that does not fit.
    """
    if preset.endswith((".yaml", ".yml")):
        try:
            base = OmegaConf.load(preset)
        except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"cannot read the configuration {preset}: {_one_line(error)}") from None
        if not isinstance(base, DictConfig):
            raise ConfigError(f"{preset} must hold keys and values, got {OmegaConf.to_container(base)!r}")
    elif preset in presets():
        text = (resources.files("d2v_fast.train") / "presets" / f"{preset}.yaml").read_text(encoding="utf-8")
        base = OmegaConf.create(text)
    else:
        raise ConfigError(f"unknown preset {preset!r}: {_nearest(preset, presets())}known: {', '.join(presets())}")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"an override must look like key=value, got {override!r}")
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(base, OmegaConf.from_dotlist(list(overrides))), resolve=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"overrides: {_one_line(error)}") from None
    return config_from_dict({"out": f"runs/{Path(preset).stem}", **merged})


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as one level of dotted keys."""
    flat = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def differences(old: dict[str, Any], new: dict[str, Any], ignore: Sequence[str] = RUN_KEYS) -> list[str]:
    """Lines "key: old -> new" for every key that differs between two plain configurations."""
    old, new = flatten(old), flatten(new)
    keys = [key for key in sorted({*old, *new}) if key not in ignore and not key.startswith(RUN_GROUPS)]
    return [f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in keys if _plain(old.get(k)) != _plain(new.get(k))]


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value

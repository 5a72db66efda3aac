"""A recipe on another number of GPUs: which accumulation keeps its batch, and what changes where none does.

An update of a recipe takes B items: ``reference_gpus`` GPUs times ``accumulate`` micro-batches of images, blocks of
text or samples of speech. On N GPUs, with micro-batches of at most the recipe's b items, it takes
``a = ceil(B / (N b))`` micro-batches on each, or up to twice as many where N a divides B then, of ``round(B / (N a))``
items. Then f is the new batch over B, and where it is not 1, the run keeps to the recipe as a function of the items it
has seen:

* updates, warm-up, final decay and ``ema.anneal_updates`` are divided by f;
* the teacher's decay d becomes ``d ** f``, so that its horizon in items stays what it was (Busbridge et al. 2023, "How
  to scale your EMA");
* the peak learning rate is multiplied by ``sqrt(f)``, the rule for Adam (Malladi et al. 2022, "On the SDEs and scaling
  rules for adaptive gradient algorithms"), or with "linear" by f (Goyal et al. 2017).

The decay is linear between its two ends, so that ``d ** f`` is exact there and close in between. Betas, eps, weight
decay and clipping stay as they are. With ``ema.per = micro_batch`` the teacher steps a times an update, so that d
becomes ``d ** (f a0 / a)`` for the recipe's own accumulation a0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from d2v_fast.train.config import TrainConfig, load_config
from d2v_fast.train.data import SpeechDataConfig
from d2v_fast.train.data.audio import SAMPLE_RATE
from d2v_fast.train.errors import ConfigError
from d2v_fast.train.predict import measurements, seconds_to_train, state_memory, suitable
from d2v_fast.train.words import counted

LrRule = Literal["sqrt", "linear"]
LR_RULES: tuple[LrRule, ...] = ("sqrt", "linear")
ROUNDING = 1e-6  # of a batch of speech, whose limit is a number of samples: the whole ones are no other batch
PLACEHOLDER = "data.path=."  # a preset names no data


@dataclass(frozen=True)
class Recipe:
    """A recipe on ``gpus`` GPUs."""

    gpus: int
    per_gpu: int  # items of a micro-batch: images, blocks of text, samples of speech
    accumulate: int
    factor: float  # the batch over the published one
    published: int  # items of an update of the published recipe
    unit: str  # of items
    changes: dict[str, Any]  # key of the configuration -> value, those that differ from the published recipe
    notes: tuple[str, ...]  # what is the same and what is not, in words

    @property
    def batch(self) -> int:
        """Items of an update."""
        return self.gpus * self.accumulate * self.per_gpu

    def overrides(self) -> list[str]:
        """The changes as ``key=value`` arguments."""
        return [f"{key}={value!r}" for key, value in self.changes.items()]


def batch_key(config: TrainConfig) -> str:
    """The key of the configuration that limits a micro-batch."""
    return "data.max_tokens" if isinstance(config.data, SpeechDataConfig) else "data.batch_size"


def per_gpu(config: TrainConfig) -> int:
    """Items of a micro-batch: samples of speech, images, blocks of text."""
    return getattr(config.data, batch_key(config).removeprefix("data."))


def on_gpus(
    published: TrainConfig,
    gpus: int,
    *,
    micro_batch: int | None = None,
    accumulate: int | None = None,
    lr_rule: LrRule = "sqrt",
) -> Recipe:
    """``published`` on ``gpus`` GPUs.

    Args:
        published: its micro-batch, ``accumulate`` and ``reference_gpus`` are what its batch is made of.
        gpus: of the run, one process each.
        micro_batch: items that fit on one of them; by default as many as published.
        accumulate: micro-batches of an update on each, if that is what has to be so; by default what keeps the batch.
        lr_rule: "sqrt" or "linear", where the batch is another one.

    Raises:
        ConfigError: an argument out of range, or more GPUs than the batch has items for.
    """
    for name, value in (("gpus", gpus), ("micro_batch", micro_batch), ("accumulate", accumulate)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if lr_rule not in LR_RULES:
        raise ConfigError(f"lr_rule must be one of {', '.join(LR_RULES)}, got {lr_rule!r}")
    own = per_gpu(published)
    total = published.reference_gpus * published.accumulate * own
    count = accumulate or _micro_batches(published, total, gpus, micro_batch or own)
    size = micro_batch if accumulate and micro_batch else round(total / (gpus * count))
    size = min(size, micro_batch or own)
    if size < _least(published):
        raise ConfigError(
            f"gpus must be fewer: {total} {_unit(published)} an update leave {size} for a micro-batch of each of "
            f"{gpus}, which needs at least {_least(published)}"
        )
    factor = gpus * count * size / total
    if abs(factor - 1) < ROUNDING:
        factor = 1.0
    changes = _changes(published, gpus, size, count, factor, lr_rule)
    notes = _notes(published, gpus, size, count, factor, lr_rule)
    return Recipe(gpus, size, count, factor, total, _unit(published), changes, notes)


def _micro_batches(config: TrainConfig, total: int, gpus: int, most: int) -> int:
    """Micro-batches of at most ``most`` items on each GPU that make ``total``, exactly if twice the fewest allow it."""
    fewest = math.ceil(total / (gpus * most))
    if isinstance(config.data, SpeechDataConfig):  # a limit in samples divides well enough
        return fewest
    return next((count for count in range(fewest, 2 * fewest) if total % (gpus * count) == 0), fewest)


def _unit(config: TrainConfig) -> str:
    return {"speech": "samples", "image": "images", "text": "blocks"}[config.model.modality]


def _least(config: TrainConfig) -> int:
    """Items that a micro-batch must have room for."""
    data = config.data
    return round(data.max_seconds * SAMPLE_RATE) if isinstance(data, SpeechDataConfig) else 1


def _changes(
    published: TrainConfig, gpus: int, size: int, count: int, factor: float, lr_rule: LrRule
) -> dict[str, Any]:
    """Keys whose values differ from those of ``published``."""
    ema, schedule = published.model.ema, published.schedule
    values: dict[str, tuple[Any, Any]] = {  # old, new
        "accumulate": (published.accumulate, count),
        batch_key(published): (per_gpu(published), size),
    }
    power = factor * published.accumulate / count if ema.per == "micro_batch" else factor
    for name in ("decay", "end_decay"):
        values[f"model.ema.{name}"] = (getattr(ema, name), _significant(getattr(ema, name) ** power))
    if factor != 1:
        values["optim.lr"] = (published.optim.lr, _significant(published.optim.lr * lr_factor(factor, lr_rule), 6))
        updates = {
            "updates": published.updates,
            "schedule.warmup_updates": schedule.warmup_updates,
            "schedule.decay_updates": schedule.decay_updates,
            "model.ema.anneal_updates": ema.anneal_updates,
            "guards.after_updates": published.guards.after_updates,
        }
        for key, old in updates.items():
            values[key] = (old, max(1, round(old / factor)) if old else 0)
    return {key: new for key, (old, new) in values.items() if new != old}


def lr_factor(factor: float, rule: LrRule) -> float:
    """What the learning rate is multiplied with where the batch is multiplied with ``factor``."""
    return math.sqrt(factor) if rule == "sqrt" else factor


def _significant(value: float, digits: int = 12) -> float:
    return float(f"{value:.{digits}g}")


def _notes(published: TrainConfig, gpus: int, size: int, count: int, factor: float, lr_rule: LrRule) -> tuple[str, ...]:
    unit = _unit(published)
    same_size = size == per_gpu(published)
    several = published.model.ema.per == "micro_batch" and count != published.accumulate
    notes = []
    if factor == 1 and same_size:
        notes.append("exact: the published micro-batches, so that every update sees the same data and masks")
    elif factor == 1 and unit == "samples":
        notes.append("the same samples an update up to rounding; clips are put together in micro-batches differently")
    elif factor == 1:
        notes.append(f"the same {unit} an update; they are put together in micro-batches differently")
    else:
        notes += [
            f"NOT the published batch: {factor:.4g} times as large",
            f"learning rate by the {lr_rule} rule: times {lr_factor(factor, lr_rule):.4g}",
            f"updates, warm-up, final decay, EMA schedule: divided by {factor:.4g}, for as many {unit} in all",
            f"EMA decay: to the power of {factor:.4g}, for the same horizon in {unit} (exact at its ends)",
            "betas, eps, weight decay and clipping: unchanged",
        ]
    if several:
        notes.append(
            f"the teacher steps {count} times an update (ema.per = micro_batch): its decays are to the power of "
            f"{factor * published.accumulate / count:.4g}"
        )
    return tuple(notes)


def recipe_overrides(
    preset: str, given: Sequence[str], gpus: int, lr_rule: LrRule = "sqrt"
) -> tuple[list[str], Recipe]:
    """Overrides with which ``preset`` runs on ``gpus`` GPUs, and the recipe they come from.

    A micro-batch or ``accumulate`` among ``given`` is what the recipe is made for; any other key among them has the
    last word over what the recipe would change.

    Raises:
        ConfigError: see :func:`on_gpus` and ``config.load_config``.
    """
    path = [] if any(_key(o) == "data.path" for o in given) else [PLACEHOLDER]
    wanted = load_config(preset, [*path, *given])
    limits = {"accumulate", batch_key(wanted)}
    published = load_config(preset, [*path, *(o for o in given if _key(o) not in limits)])
    keys = {_key(override) for override in given}
    recipe = on_gpus(
        published,
        gpus,
        micro_batch=per_gpu(wanted) if batch_key(wanted) in keys else None,
        accumulate=wanted.accumulate if "accumulate" in keys else None,
        lr_rule=lr_rule,
    )
    changes = {key: value for key, value in recipe.changes.items() if key not in keys - limits}
    recipe = replace(recipe, changes=changes)
    # the micro-batch among those given is the most that it may be
    kept = [o for o in given if _key(o) != batch_key(wanted)]
    return [*kept, f"{batch_key(wanted)}={recipe.per_gpu}", *recipe.overrides()], recipe


def _key(override: str) -> str:
    return override.split("=", 1)[0].strip()


def describe(recipe: Recipe, config: TrainConfig) -> str:
    """The recipe, what differs from the published one, and what the run will need, for people. ``config`` has it."""
    batch = f"{recipe.gpus} x {recipe.accumulate} x {recipe.per_gpu} = {recipe.batch} {recipe.unit} an update"
    lines = [f"recipe for {counted(recipe.gpus, 'GPU')}: {batch} (published: {recipe.published})"]
    lines += [f"  {note}" for note in recipe.notes]
    lines += [f"  {key} = {value}" for key, value in recipe.changes.items()]
    lines += [f"  {line}" for line in [*_memory_lines(config, recipe.gpus), *_time_lines(config, recipe)]]
    return "\n".join(lines)


def _memory_lines(config: TrainConfig, gpus: int) -> list[str]:
    """Bytes of the state, with one copy on every GPU and in shards."""
    lines = []
    for mode, shards in (("one copy on each GPU", 1), (f"in {gpus} shards (fsdp2)", gpus))[: 1 + (gpus > 1)]:
        m = state_memory(config.model, shards, bf16=config.precision != "fp32")
        parts = ", ".join(f"{name} {_size(value)}" for name, value in vars(m).items() if value)
        lines.append(f"memory, {mode}: {_size(m.total)} ({parts}); computed, without activations")
    return lines


def _size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"


def _time_lines(config: TrainConfig, recipe: Recipe) -> list[str]:
    """Time by each GPU that the model was timed on."""
    lines = []
    for m in suitable(config, measurements()):
        hours = seconds_to_train(config, recipe.batch, recipe.gpus, m) / 3600
        lines.append(f"time: {hours:.1f} h on {recipe.gpus} x {m.gpu}, from one GPU's rate: communication is left out")
    return lines or ["time: no measurement of this model on any GPU"]


def load_recipe(preset: str, given: Sequence[str], gpus: int, lr_rule: LrRule = "sqrt") -> tuple[TrainConfig, Recipe]:
    """The configuration of ``preset`` on ``gpus`` GPUs; see :func:`recipe_overrides`."""
    overrides, recipe = recipe_overrides(preset, given, gpus, lr_rule)
    return load_config(preset, overrides), recipe


def table(preset: str, given: Sequence[str], gpus: Sequence[int], lr_rule: LrRule = "sqrt") -> str:
    """How ``preset`` runs on each of these numbers of GPUs, a line for each; no data is needed.

    Raises:
        ConfigError: see :func:`recipe_overrides`.
    """
    rows = [
        ("GPUs", "accumulate", "per GPU", "update", "batch", "lr", "updates", "warm-up", "EMA decay", "GiB", "fsdp2")
    ]
    given = [PLACEHOLDER, *given]
    recipes = [load_recipe(preset, given, count, lr_rule) for count in gpus]
    for config, recipe in recipes:
        ema, bf16 = config.model.ema, config.precision != "fp32"
        rows.append(
            (
                str(recipe.gpus),
                str(recipe.accumulate),
                str(recipe.per_gpu),
                str(recipe.batch),
                "published" if recipe.factor == 1 else f"x {recipe.factor:.4g}",
                f"{config.optim.lr:g}",
                str(config.updates),
                str(config.schedule.warmup_updates),
                f"{ema.decay:g} to {ema.end_decay:g}",
                *(f"{state_memory(config.model, n, bf16=bf16).total / 2**30:.2f}" for n in (1, recipe.gpus)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    unit = recipes[0][1].unit
    lines += [
        f"per GPU: {unit} of a micro-batch; update: {unit} of all GPUs",
        "GiB: parameters, gradients, moments and averages, computed, without activations; a copy on each GPU, and",
        "in as many shards as there are GPUs (fsdp2)",
    ]
    lines += dict.fromkeys(line for config, recipe in recipes for line in _time_lines(config, recipe))
    return "\n".join(lines)


def gpu_counts(text: str) -> list[int]:
    """The numbers in "1,2,4".

    Raises:
        ConfigError: something else than positive whole numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--gpus must be positive numbers such as 1,2,4, got {text!r}")
    return [int(part) for part in parts]


def check_processes(gpus: int, processes: int) -> None:
    """Refuse a recipe for another number of GPUs than there are processes.

    Raises:
        ConfigError: they differ.
    """
    if gpus != processes:
        raise ConfigError(
            f"--gpus must be the number of processes, {processes}, got {gpus}; each runs on one GPU: "
            f"torchrun --nproc_per_node={gpus} -m d2v_fast pretrain ... --gpus {gpus}"
        )

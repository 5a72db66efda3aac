"""Checkpoints found, checked, restored into a run, or opened for other uses."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_fast.nn import Data2Vec
from d2v_fast.train.checkpoint.folder import Progress, check_files, checkpoints, read_manifest, update_of
from d2v_fast.train.checkpoint.shards import ShardReader
from d2v_fast.train.checkpoint.single_file import fill, named_optimizer, read_single_file
from d2v_fast.train.checkpoint.state import OPTIMIZER, model_tensors, start_optimizer
from d2v_fast.train.checkpoint.together import raise_first, reason
from d2v_fast.train.config import (
    DATA_CONFIGS,
    RUN_KEYS,
    TrainConfig,
    complete_model,
    config_to_dict,
    differences,
    model_config,
)
from d2v_fast.train.distributed import Ranks
from d2v_fast.train.errors import CheckpointError
from d2v_fast.train.words import counted

logger = logging.getLogger(__name__)


def newest_valid(folder: Path, ranks: Ranks, tick: Callable[[], None] = lambda: None) -> Path | None:
    """The newest checkpoint in ``folder`` that is whole, None if there are none; every rank calls this.

    Rank 0 reads and checks them; it warns of each damaged one that it passes over. That may take longer than
    ``ranks.timeout``: ``tick`` is called on all ranks as long as it gets on.

    Raises:
        CheckpointError: there are checkpoints, and none is whole; the same on every rank.
    """
    if ranks.rank != 0:
        while (told := ranks.gather(None)[0]) is None:
            tick()
    else:
        told = ranks.gather(_newest_valid(folder, _telling(ranks, tick)))[0]
    found, error = told
    raise_first([error])  # all have the same
    return found


def _telling(ranks: Ranks, tick: Callable[[], None]) -> Callable[[], None]:
    """``tick`` of rank 0, which lets the others know from time to time."""
    last = time.monotonic()

    def both() -> None:
        nonlocal last
        tick()
        if time.monotonic() - last > ranks.timeout / 4:
            ranks.gather(None)
            last = time.monotonic()

    return both


def _newest_valid(folder: Path, tick: Callable[[], None]) -> tuple[Path | None, CheckpointError | None]:
    last = None
    for path in reversed(checkpoints(folder)):
        try:
            _check(path, tick)
        except (CheckpointError, OSError) as error:
            logger.warning("passing over the checkpoint %s: %s", path, error)
            last = error
        else:
            return path, None
    if last is None:
        return None, None
    return None, CheckpointError(
        f"{folder} holds checkpoints, but none is whole ({last}). Remove them, or use another out=... to start afresh."
    )


def _check(path: Path, tick: Callable[[], None]) -> None:
    tick()
    if path.is_dir():
        content = read_manifest(path)
        check_files(path, content, tick)
    else:
        content = read_single_file(path)
    if (update := content["progress"]["update"]) != update_of(path):
        raise CheckpointError(f"{path} is damaged: its name must say update {update}, which it holds")


def read(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds for other uses than going on: settings, position and the model, on the CPU.

    Returns:
        "config", "data" (fingerprint and description), "progress" and "world_size" as plain values; "model": whole
        tensors by their names in ``Data2Vec.state_dict``.

    Raises:
        CheckpointError: missing, damaged, or not written by d2v_fast.
    """
    path = Path(path)
    if not path.is_dir():
        return _completed(read_single_file(path), path)
    _refuse_a_run(path)
    manifest = read_manifest(path)
    check_files(path, manifest)
    try:
        reader = ShardReader(path)
        model = {
            name: torch.empty(shape, dtype=dtype)
            for name, (shape, dtype) in reader.tensors.items()
            if not name.startswith(OPTIMIZER)
        }
        reader.fill(model)
        model |= {name: model[other] for name, other in manifest["same"].items()}
    except Exception as error:  # files with the right checksums that were written otherwise
        raise _unreadable(path, error) from error
    return _completed({**manifest, "model": model}, path)


def _refuse_a_run(folder: Path) -> None:
    found = checkpoints(folder)
    if found:
        raise CheckpointError(
            f"{folder} is the folder of a run; give one of its checkpoints, the newest is {found[-1]}"
        )


def load_model(path: str | Path) -> Data2Vec:
    """The model of a checkpoint, on the CPU and in eval mode.

    Raises:
        CheckpointError: see :func:`read`.
    """
    content = read(path)
    try:
        model = Data2Vec(model_config(content["config"]["model"]))
        model.load_state_dict(content["model"])
    except Exception as error:  # whatever sizes that nobody has, or tensors of others, lead to
        raise _unreadable(Path(path), error) from error
    return model.eval()


def restore(
    path: Path,
    model: Data2Vec,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    config: TrainConfig,
    data: dict[str, str],
    tick: Callable[[], None] = lambda: None,
) -> Progress:
    """Put a checkpoint back into a run of the same configuration on the same data; return where it was.

    Every rank does this for itself, and reads what it has of the model. Their number may differ from the one that wrote
    the checkpoint if ``config.accumulate`` makes up for it: an update takes the same micro-batches then.

    Args:
        path: of :func:`newest_valid`, which has checked the files.
        model: on its own, without what DDP or ``torch.compile`` put around it; sharded or not.
        optimizer: the model's.
        ranks: of the run.
        config: of the run.
        data: of :func:`describe_data`.
        tick: called for every piece that was read.

    Raises:
        CheckpointError: configuration, data or micro-batches of an update differ in anything that changes what is
            computed, or the checkpoint cannot be read.
    """
    folder = path.is_dir()
    content = _completed(read_manifest(path) if folder else read_single_file(path), path)
    _check_same_run(path, content, ranks, config, data)
    state = model_tensors(model)
    try:
        if folder:
            reader = ShardReader(path)
            saved = {name: shape for name, shape in reader.tensors.items() if name.startswith(OPTIMIZER)}
            _check_names(path, state, reader.tensors.keys() - saved.keys())
            reader.fill(state | start_optimizer(model, optimizer, saved), tick)
        else:
            whole = named_optimizer(content, model, optimizer)
            shapes = {name: (x.shape, x.dtype) for name, x in whole.items()}
            _check_names(path, state, content["model"].keys(), more=True)
            fill(state | start_optimizer(model, optimizer, shapes), content["model"] | whole)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a file that has changed since makes the readers do
        raise _unreadable(path, error) from error
    model.teacher.follow_()
    progress = Progress(**content["progress"])
    logger.info("continuing from %s (update %d)%s", path, progress.update, _moved(content, ranks, config))
    if ranks.first and content["world_size"] != ranks.world_size and config.model.ema.per == "micro_batch":
        logger.warning(
            "%s was written by %s and goes on with %d: the teacher steps once for each micro-batch of a rank "
            "(model.ema.per=micro_batch), so that this is not the run that it would have been on as many as before",
            path,
            counted(content["world_size"], "rank"),
            ranks.world_size,
        )
    return progress


def _moved(content: dict[str, Any], ranks: Ranks, config: TrainConfig) -> str:
    """How a run goes on otherwise than it was, in words; empty if it does not."""
    mode, alone = content["config"]["distributed"]["mode"], content["world_size"] == 1
    mode = ("none" if alone else "ddp") if mode == "auto" else mode
    then = {"ranks": content["world_size"], "mode": mode, "accumulate": content["config"]["accumulate"]}
    now = {"ranks": ranks.world_size, "mode": ranks.mode, "accumulate": config.accumulate}
    changes = [f"{name} {then[name]} -> {now[name]}" for name in then if then[name] != now[name]]
    return f", with another layout: {', '.join(changes)}" if changes else ""


def _check_same_run(
    path: Path, content: dict[str, Any], ranks: Ranks, config: TrainConfig, data: dict[str, str]
) -> None:
    changed = differences(content["config"], config_to_dict(config), RUN_KEYS)
    if changed:
        longer = any(line.startswith("updates: ") for line in changed)
        raise CheckpointError(
            f"{path} belongs to a run with another configuration ({'; '.join(changed[:6])}). "
            "Use the same settings to continue it, or another out=... to start afresh."
            + " The learning rate goes by updates: give all of them from the start, and stop_after=N to do a part."
            * longer
        )
    _check_micro_batches(path, content["world_size"], content["config"]["accumulate"], ranks, config)
    if content["data"]["fingerprint"] != data["fingerprint"]:
        raise CheckpointError(
            f"the data has changed since {path} was written. Then: {content['data']['description']}. "
            f"Now: {data['description']}. Restore it to continue the run, or use another out=... to start afresh."
        )


def _check_micro_batches(path: Path, world_size: int, accumulate: int, ranks: Ranks, config: TrainConfig) -> None:
    then, now = world_size * accumulate, ranks.world_size * config.accumulate
    if then == now:
        return
    wanted, rest = divmod(then, ranks.world_size)
    remedy = f"set accumulate={wanted}" if not rest else f"use a number of ranks that divides {then}"
    raise CheckpointError(
        f"{path} was written by {counted(world_size, 'rank')} with accumulate={accumulate}, "
        f"{counted(then, 'micro-batch', 'micro-batches')} an update; {counted(ranks.world_size, 'rank')} with "
        f"accumulate={config.accumulate} would take {now}. To continue it, {remedy}."
    )


def _check_names(path: Path, state: dict[str, Tensor], saved: Any, more: bool = False) -> None:
    missing = sorted(state.keys() - saved)
    unknown = [] if more else sorted(saved - state.keys())
    if missing or unknown:
        raise CheckpointError(f"{path} does not fit the model; missing: {missing[:3]}, unknown: {unknown[:3]}")


def _completed(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """``content`` with the keys of the configuration that came later, which then had their defaults' effect."""
    try:
        model = complete_model(content["config"]["model"])
        built = model_config(model)
        defaults = config_to_dict(TrainConfig(model=built, data=DATA_CONFIGS[built.modality](path="unknown")))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds a configuration that this version cannot read: {reason(error)}") from error
    return {**content, "config": _merged(defaults, {**content["config"], "model": model})}


def _merged(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    merged = {**defaults, **values}
    for key, default in defaults.items():
        if isinstance(default, dict) and isinstance(merged[key], dict):
            merged[key] = _merged(default, merged[key])
    return merged


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {reason(error)}")

"""The start of a session: folder, data, model and optimizer, as they were in the newest checkpoint."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from d2v_fast.nn import Data2Vec
from d2v_fast.train import checkpoint
from d2v_fast.train.checkpoint import Progress
from d2v_fast.train.config import RANK_KEYS, TrainConfig, config_to_dict, flatten
from d2v_fast.train.data import PretrainData, build_data
from d2v_fast.train.data.sources import PATIENCE
from d2v_fast.train.distributed import Ranks
from d2v_fast.train.errors import ConfigError
from d2v_fast.train.graph import CapturedStep
from d2v_fast.train.optim import build_optimizer
from d2v_fast.train.parallel import compile_layers, parallelise
from d2v_fast.train.run_folder import open_run, with_own_tokenizer, write_settings, writing
from d2v_fast.train.spikes import SpikeLog
from d2v_fast.train.step import StepMetrics, train_step
from d2v_fast.train.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Run:
    """A run that is ready to go on, as one of its ranks has it."""

    config: TrainConfig
    ranks: Ranks
    watchdog: Watchdog
    folder: Path
    data: PretrainData
    model: Data2Vec  # without what DDP or torch.compile put around it
    step: CapturedStep | Callable[..., StepMetrics]  # train_step, or its capture, with this model and its optimizer
    progress: Progress  # where it goes on
    writer: checkpoint.Writer
    spikes: SpikeLog | None  # of rank 0


@contextmanager
def started(config: TrainConfig, ranks: Ranks, watchdog: Watchdog, resume: bool = True) -> Iterator[Run]:
    """The run of ``config``, new or as it is in the newest checkpoint; every rank calls this.

    No other run can use its folder until the end.

    Raises:
        UserError: as :func:`d2v_fast.train.pretrain`.
    """
    config = resolve_precision(config, ranks.device)
    settings = flatten(config_to_dict(config))
    ranks.check_same("the configuration", {k: v for k, v in settings.items() if k not in RANK_KEYS})
    watchdog.at("starting")
    with open_run(config, ranks, resume) as folder:
        found = checkpoint.newest_valid(folder, ranks, partial(watchdog.at, "checking the newest checkpoint"))
        data, described = _open_data(config, ranks, watchdog, folder, found)
        yield _build(config, ranks, watchdog, folder, data, described, found)


def resolve_precision(config: TrainConfig, device: torch.device) -> TrainConfig:
    """``config`` with "auto" replaced by what it means on ``device``, so that a checkpoint says what was computed."""
    if config.precision != "auto":
        return config
    return replace(config, precision="bf16" if device.type == "cuda" else "fp32")


@contextmanager
def _patiently(ranks: Ranks, watchdog: Watchdog, doing: str, limit: float | None = None) -> Iterator[None]:
    """What may take some ranks hours longer than others; ``limit``: seconds in which the watchdog has to hear of it."""
    watchdog.at(doing, limit=limit)
    with ranks.together(doing, max(PATIENCE, ranks.timeout)):
        try:
            yield
        finally:
            watchdog.at(f"waiting for the other ranks, {doing}", limit=_longest(ranks))


def _longest(ranks: Ranks) -> float:
    """Seconds that a rank may be busy with something slow, or wait for others that are."""
    return max(PATIENCE, ranks.timeout) + ranks.timeout  # whatever else ends the wait says more than the watchdog


def _open_data(
    config: TrainConfig, ranks: Ranks, watchdog: Watchdog, folder: Path, found: Path | None
) -> tuple[PretrainData, dict[str, str]]:
    """The data, and what checkpoints keep of it; scanning, tokenizing or unpacking them may take hours."""
    # nobody waits for a run of one process
    limit = math.inf if ranks.control is None else _longest(ranks)
    with _patiently(ranks, watchdog, "opening the data", limit):
        where = with_own_tokenizer(config.data, folder) if found else config.data
        data = build_data(where, config.model, config.seed, static_shapes=config.cuda_graph != "off")
        described = checkpoint.describe_data(data)
    watchdog.at("starting")
    ranks.check_same("the data", described)
    logger.info("%s", data.describe())
    return data, described


def _build(
    config: TrainConfig,
    ranks: Ranks,
    watchdog: Watchdog,
    folder: Path,
    data: PretrainData,
    described: dict[str, str],
    found: Path | None,
) -> Run:
    """The model, with the state of the checkpoint ``found``, and what writes to the folder."""
    watchdog.at("building the model")
    with ranks.together("building the model"):
        model, optimizer, step = _model(config, ranks)
    progress = Progress()
    if found:
        reading = "reading the checkpoint"
        tick = partial(watchdog.at, reading)
        with _patiently(ranks, watchdog, reading):
            progress = checkpoint.restore(found, model, optimizer, ranks, config, described, tick)
    watchdog.at("starting")
    timeout, spikes = config.distributed.timeout, None
    writer = checkpoint.Writer(folder, model, optimizer, ranks, config, described, timeout=timeout, newest=found)
    optimizer.register_step_pre_hook(lambda *_: watchdog.at("optimizer"))
    with ranks.together("writing to the run's folder"), writing(folder):
        if ranks.first:
            write_settings(folder, config, data)
            spikes = SpikeLog(folder, data, config.guards, ranks.world_size, config.accumulate, progress.update)
    return Run(config, ranks, watchdog, folder, data, model, step, progress, writer, spikes)


def _model(
    config: TrainConfig, ranks: Ranks
) -> tuple[Data2Vec, torch.optim.Optimizer, CapturedStep | Callable[..., StepMetrics]]:
    """The model on its device, spread over the ranks, its optimizer, and what makes an update of both."""
    device, bf16 = ranks.device, config.precision == "bf16"
    if config.cuda_graph == "strict" and (device.type != "cuda" or config.accumulate > 1):
        given = f"{device.type} and {config.accumulate}"
        raise ConfigError(f'cuda_graph: "strict" needs a CUDA device and accumulate = 1, got {given}')
    if config.cuda_graph != "off" and ranks.mode != "none":
        raise ConfigError(f"cuda_graph must be off with distributed.mode={ranks.mode}, got {config.cuda_graph!r}")
    torch.manual_seed(config.seed)
    model = Data2Vec(config.model).to(device)
    if config.compile:
        compile_layers(model)
    parallel = parallelise(
        model, ranks, accumulate=config.accumulate, shard_size=config.distributed.shard_size, bf16=bf16
    )
    optimizer = build_optimizer(model, config.optim)
    how = {"clip_norm": config.optim.clip_norm, "autocast": bf16}
    if config.cuda_graph != "off":
        return model, optimizer, CapturedStep(model, optimizer, strict=config.cuda_graph == "strict", **how)
    return model, optimizer, partial(train_step, model, optimizer=optimizer, parallel=parallel, **how)

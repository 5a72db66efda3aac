"""The start of a session: folder, data, model and optimizer, as they were in the newest checkpoint."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from d2v_fast.nn import Data2Vec
from d2v_fast.train import checkpoint
from d2v_fast.train.checkpoint import Progress
from d2v_fast.train.config import RANK_KEYS, TrainConfig, config_to_dict, flatten
from d2v_fast.train.data import PretrainData, build_data
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

PATIENCE = 6 * 3600.0  # seconds that the ranks wait for the one that scans, tokenizes or unpacks the data


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
def started(config: TrainConfig, ranks: Ranks, resume: bool = True) -> Iterator[Run]:
    """The run of ``config``, new or as it is in the newest checkpoint; every rank calls this.

    No other run can use its folder until the end.

    Raises:
        UserError: as :func:`d2v_fast.train.pretrain`.
    """
    config = resolve_precision(config, ranks.device)
    settings = flatten(config_to_dict(config))
    ranks.check_same("the configuration", {k: v for k, v in settings.items() if k not in RANK_KEYS})
    watchdog = Watchdog(ranks)
    with ExitStack() as held:
        with watchdog:
            folder = held.enter_context(open_run(config, ranks, resume))
            checking = partial(watchdog.at, "checking the newest checkpoint")
            found = checkpoint.newest_valid(folder, ranks, checking)
        data, described = _open_data(config, ranks, folder, found)  # which may take hours
        with watchdog:
            watchdog.at("starting")
            run = _build(config, ranks, watchdog, folder, data, described, found)
        yield run


def resolve_precision(config: TrainConfig, device: torch.device) -> TrainConfig:
    """``config`` with "auto" replaced by what it means on ``device``, so that a checkpoint says what was computed."""
    if config.precision != "auto":
        return config
    return replace(config, precision="bf16" if device.type == "cuda" else "fp32")


def _open_data(
    config: TrainConfig, ranks: Ranks, folder: Path, found: Path | None
) -> tuple[PretrainData, dict[str, str]]:
    """The data, and what checkpoints keep of it."""
    with ranks.together("opening the data", PATIENCE):
        where = with_own_tokenizer(config.data, folder) if found else config.data
        data = build_data(where, config.model, config.seed, static_shapes=config.cuda_graph != "off")
        described = checkpoint.describe_data(data)
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
    with ranks.together("building the model"):
        model, optimizer, step = _model(config, ranks)
    progress = checkpoint.restore(found, model, optimizer, ranks, config, described) if found else Progress()
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

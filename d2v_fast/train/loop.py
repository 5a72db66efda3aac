"""The training loop: data in, updates, logs, guards, checkpoints."""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from omegaconf import OmegaConf

from d2v_fast.nn import Batch, Data2Vec
from d2v_fast.train import checkpoint, lock
from d2v_fast.train.checkpoint import Progress
from d2v_fast.train.config import RANK_KEYS, TrainConfig, config_to_dict, flatten
from d2v_fast.train.data import DataConfig, PretrainData, TextData, TextDataConfig, batches, build_data
from d2v_fast.train.data.stand_in import stand_in
from d2v_fast.train.distributed import Ranks, describe, join
from d2v_fast.train.errors import CheckpointError, ConfigError
from d2v_fast.train.files import replace_file
from d2v_fast.train.graph import CapturedStep
from d2v_fast.train.guards import SHARED, Guards, Window
from d2v_fast.train.interrupt import Interrupt, preemptible
from d2v_fast.train.logging import MetricLog, number, plot_curves, read_metrics
from d2v_fast.train.metrics import Meter, combine, peak_memory
from d2v_fast.train.optim import build_optimizer, learning_rate
from d2v_fast.train.parallel import compile_layers, parallelise
from d2v_fast.train.seeds import layerdrop_seed, seed_micro_batch
from d2v_fast.train.spikes import SpikeLog
from d2v_fast.train.step import StepMetrics, train_step
from d2v_fast.train.vote import Abandoned, Vote
from d2v_fast.train.watchdog import Watchdog

logger = logging.getLogger(__name__)

PATIENCE = 6 * 3600.0  # seconds that the ranks wait for the one that scans, tokenizes or unpacks the data


@dataclass(frozen=True)
class PretrainResult:
    """What :func:`pretrain` leaves behind; the same on all ranks."""

    checkpoint: Path
    updates: int
    finished: bool  # False when it was stopped and can be continued
    interrupted: bool  # by Ctrl-C
    first_loss: float  # of the first and the last logged update
    last_loss: float
    target_var: float  # at the last logged update
    pred_var: float
    seconds: float  # of this session
    peak_memory: int  # bytes: of the GPU, or of this process on a CPU


def resolve_precision(config: TrainConfig, device: torch.device) -> TrainConfig:
    """``config`` with "auto" replaced by what it means on ``device``, so that a checkpoint says what was computed."""
    if config.precision != "auto":
        return config
    return replace(config, precision="bf16" if device.type == "cuda" else "fp32")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failing write of logs or settings into an error that names the folder.

    Raises:
        CheckpointError: no space, no permission, or something in the way.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write to the run's folder {folder}: {error}") from error


@contextmanager
def open_run(config: TrainConfig, ranks: Ranks, resume: bool) -> Iterator[Path]:
    """Make the run's folder, and keep other runs out of it until the end; every rank calls this.

    Raises:
        ConfigError: the folder cannot be made.
        CheckpointError: another run uses it, it cannot be written to, or it holds a run and ``resume`` is False.
    """
    folder = Path(config.out).expanduser()
    with ExitStack() as held:
        with ranks.together("opening the run"):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"out: cannot make the folder {folder}: {error.strerror}") from None
            if ranks.first:
                with writing(folder):  # the others wait for this one, no longer than the time-out
                    held.enter_context(lock.locked(folder, min(lock.PATIENCE, ranks.timeout / 2)))
            found = checkpoint.checkpoints(folder)
            if found and not resume:
                newest = found[-1].name
                raise CheckpointError(f"{folder} already holds a run (newest: {newest}); choose another out=...")
        yield folder


class Trainer:
    """One session of a run, on one of its ranks: built from a configuration, continued from the newest checkpoint.

    No other run can use its folder until :meth:`run` has ended.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks, resume: bool = True) -> None:
        self.ranks, self.device = ranks, ranks.device
        self.config = config = resolve_precision(config, self.device)
        settings = flatten(config_to_dict(config))
        ranks.check_same("the configuration", {k: v for k, v in settings.items() if k not in RANK_KEYS})
        self.watchdog = Watchdog(ranks)
        with ExitStack() as held:  # which lets the folder go if the start fails
            with self.watchdog:
                self.folder = held.enter_context(open_run(config, ranks, resume))
                checking = partial(self.watchdog.at, "checking the newest checkpoint")
                found = checkpoint.newest_valid(self.folder, ranks, checking)
            self._open_data(found)  # which may take hours
            with self.watchdog:
                self.watchdog.at("starting")
                self._start(found)
            self._held = held.pop_all()

    def _open_data(self, found: Path | None) -> None:
        config, ranks = self.config, self.ranks
        with ranks.together("opening the data", PATIENCE):
            self.data: PretrainData = build_data(
                self._data_config(found), config.model, config.seed, static_shapes=config.cuda_graph != "off"
            )
            self.described = checkpoint.describe_data(self.data)
        ranks.check_same("the data", self.described)
        logger.info("%s", self.data.describe())

    def _start(self, found: Path | None) -> None:
        config, ranks = self.config, self.ranks
        with ranks.together("building the model"):
            self._build()
        self.progress = Progress()
        if found:
            self.progress = checkpoint.restore(found, self.model, self.optimizer, ranks, config, self.described)
            logger.info("continuing from %s (update %d)", found, self.progress.update)
        self.writer = checkpoint.Writer(
            self.folder,
            self.model,
            self.optimizer,
            ranks,
            config,
            self.described,
            timeout=config.distributed.timeout,
            newest=found,
        )
        self.meter = Meter(config.model, self.device)
        self.guards = Guards(config.guards)
        self.spikes: SpikeLog | None = None  # of rank 0
        self.optimizer.register_step_pre_hook(lambda *_: self.watchdog.at("optimizer"))
        self.empty = stand_in(config.model)
        self.consistent = True  # False while an update is under way
        self.agreed = ranks.control is None  # whether all ranks are at this place
        self.failure: Exception | None = None  # of this rank, of which the others do not know yet
        self.skipped_files: set[str] = set()  # by this rank; those that the scan found are the same everywhere
        with ranks.together("writing to the run's folder"), writing(self.folder):
            if ranks.first:
                self._write_settings()
                self.spikes = SpikeLog(
                    self.folder, self.data, config.guards, ranks.world_size, config.accumulate, self.progress.update
                )

    def _data_config(self, found: Path | None) -> DataConfig:
        """The data's configuration; a continued text run keeps the tokenizer that it was started with."""
        data, tokenizer = self.config.data, self.folder / "tokenizer.json"
        if found and isinstance(data, TextDataConfig) and data.tokenizer is None and tokenizer.exists():
            return replace(data, tokenizer=str(tokenizer))
        return data

    def _build(self) -> None:
        config, ranks, bf16 = self.config, self.ranks, self.config.precision == "bf16"
        if config.cuda_graph == "strict" and (self.device.type != "cuda" or config.accumulate > 1):
            given = f"{self.device.type} and {config.accumulate}"
            raise ConfigError(f'cuda_graph: "strict" needs a CUDA device and accumulate = 1, got {given}')
        if config.cuda_graph != "off" and ranks.mode != "none":
            raise ConfigError(f"cuda_graph must be off with distributed.mode={ranks.mode}, got {config.cuda_graph!r}")
        torch.manual_seed(config.seed)
        self.model = Data2Vec(config.model).to(self.device)
        if config.compile:
            compile_layers(self.model)
        parallel = parallelise(
            self.model, ranks, accumulate=config.accumulate, shard_size=config.distributed.shard_size, bf16=bf16
        )
        self.optimizer = build_optimizer(self.model, config.optim)
        how = {"clip_norm": config.optim.clip_norm, "autocast": bf16}
        self.captured: CapturedStep | None = None
        if config.cuda_graph != "off":
            self.captured = CapturedStep(self.model, self.optimizer, strict=config.cuda_graph == "strict", **how)
        self.step = self.captured or partial(train_step, self.model, optimizer=self.optimizer, parallel=parallel, **how)

    def _write_settings(self) -> None:
        text = OmegaConf.to_yaml(OmegaConf.create(config_to_dict(self.config)))
        replace_file(self.folder / "config.yaml", lambda file: file.write(text.encode()))
        if isinstance(self.data, TextData):
            self.data.save_tokenizer(self.folder / "tokenizer.json")

    def _micro_batches(self) -> Iterator[tuple[int, int, Batch | None]]:
        loader = batches(
            self.data,
            epoch=self.progress.epoch,
            index=self.progress.index,
            num_workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            keep_empty=True,
        )
        for epoch, index, batch in loader:
            if batch is not None:
                self.skipped_files.update(name for name, _ in batch.skipped)
            yield epoch, index, batch

    def run(self) -> PretrainResult:
        """Train to the end, an interruption, or an error; the newest whole state is in a checkpoint afterwards."""
        with self._held:
            return self._run()

    def _run(self) -> PretrainResult:
        config, start = self.config, time.monotonic()
        first = self.progress.update
        last = min(config.updates, first + config.stop_after) if config.stop_after else config.updates
        stream = self._micro_batches()
        with self.watchdog, Interrupt() as interrupt:
            try:
                with self._open_log(first) as log:
                    self._updates(log, last, interrupt, stream)
                with self.ranks.together("the last log"):
                    if self.failure is not None:
                        raise self.failure
                self.agreed = True
            finally:
                self.watchdog.at("ending")
                stream.close()  # ends the loader's workers
                # not if others may be elsewhere, as a save is made together; nor after a start that failed
                if self.consistent and self.agreed and self.progress.update > 0:
                    self._save()
                self.writer.close()
            self._save()
        with self.ranks.together("drawing the curves"), writing(self.folder):
            if self.ranks.first:
                plot_curves(self.folder)
        return self.ranks.gather(self._result(interrupt, time.monotonic() - start) if self.ranks.first else None)[0]

    def _save(self, wait: bool = True) -> None:
        """Save, unless that is done; ``wait`` until it is a whole checkpoint.

        What the save before could not write is no reason to lose what came since: this one is made, and waited for.

        Raises:
            CheckpointError: it could not be written; the same on all ranks.
        """
        self.watchdog.at("saving a checkpoint")
        try:
            self.writer.save(self.progress)
        except CheckpointError as error:
            logger.warning("%s; trying again", error)
            self.writer.save(self.progress)
            wait = True
        if wait:
            self.watchdog.at("waiting for the checkpoint to be written")
            self.writer.wait()

    @contextmanager
    def _open_log(self, first: int) -> Iterator[MetricLog | None]:
        """The log of rank 0; None on other ranks."""
        config, log = self.config, None
        with self.ranks.together("opening the log"), writing(self.folder):
            if self.ranks.first:
                log = MetricLog(
                    self.folder,
                    config.updates,
                    first,
                    tensorboard=config.log.tensorboard,
                    wandb_project=config.log.wandb_project,
                    settings=config_to_dict(config),
                )
        with writing(self.folder), nullcontext() if log is None else closing(log):
            yield log

    def _updates(self, log: MetricLog | None, last: int, interrupt: Interrupt, stream: Iterator) -> None:
        config, window, stop = self.config, Window(), False
        while self.progress.update < last and not stop:
            before = self.progress
            with self.meter.waiting():
                group = self._next(stream)
            micro_batches = [self.empty if batch is None else batch for _, _, batch in group]
            self.meter.add([batch for _, _, batch in group])
            self.watchdog.at("forward and backward")
            vote = Vote(self.ranks, micro_batches, interrupt, self.failure is not None)
            try:
                with self.meter.working():
                    metrics, lr = self._update(micro_batches, vote)
            except Abandoned:
                self.consistent = True
                self._raise_failure(vote)
                self.progress = Progress(self.progress.update, group[-1][0], group[-1][1] + 1)
                continue
            update = self.progress.update + 1
            self.progress = Progress(update, group[-1][0], group[-1][1] + 1)
            self.consistent = True
            window.add(before, metrics)
            # alone, a signal that came during the update counts at once
            stop = vote.stop or (self.ranks.control is None and interrupt.requested)
            if log is not None:
                log.advance(update)
            if update % config.log_every == 0 or update in (1, last):
                self._log(log, window, {"lr": lr, "ema_decay": metrics.ema_decay, "masked": metrics.num_masked})
            if update % config.checkpoint_every == 0:
                self._save(wait=False)

    def _next(self, stream: Iterator) -> list[tuple[int, int, Batch | None]]:
        """This rank's micro-batches of an update; empty ones where they cannot be had any more."""
        with self._announced():
            group = []
            for _ in range(self.config.accumulate):
                self.watchdog.at("loading data", self.progress.update + 1)
                group.append(next(stream))
            return group
        return [(0, 0, None)] * self.config.accumulate

    @contextmanager
    def _announced(self) -> Iterator[None]:
        """Keep an error that only this rank meets until the next vote, after which all ranks end in order."""
        try:
            yield
        except Exception as error:
            if self.ranks.control is None:
                raise
            self.failure = error

    def _raise_failure(self, vote: Vote) -> None:
        """After a vote: the error of this rank, or TrainingStopped for that of another one; nothing if none failed."""
        if not vote.failed:
            return
        failures = self.ranks.gather(None if self.failure is None else describe(self.failure))
        self.agreed = True
        if self.failure is not None:
            raise self.failure
        self.ranks.raise_first(f"update {self.progress.update + 1}", failures)

    def _update(self, micro_batches: list[Batch], vote: Vote) -> tuple[StepMetrics, float]:
        """Make the next update with these micro-batches; its metrics and learning rate.

        Raises:
            Abandoned: it was not made, and nothing has changed.
            RankLost: another rank has ended or hangs.
        """
        config, update = self.config, self.progress.update
        lr = learning_rate(update, config.updates, config.optim, config.schedule)
        self.model.encoder.layerdrop_seed = layerdrop_seed(config.seed, update)
        self.consistent = False
        how = {}
        if self.ranks.control is None:
            vote.counts()
        else:
            how["counts"] = vote.counts
        on_device = [batch.to(self.device) for batch in micro_batches]
        with self.ranks.waiting("gradients or parameters"):
            return self.step(on_device, lr=lr, update=update, prepare=self._prepare, **how), lr

    def _prepare(self, index: int, batch: Batch) -> Batch:
        self.watchdog.at("forward and backward")
        seed_micro_batch(self.config.seed, self.progress.update, index * self.ranks.world_size + self.ranks.rank)
        return self.data.augment(batch)

    def _log(self, log: MetricLog | None, window: Window, record: dict[str, float]) -> None:
        """Write down the window; all ranks' numbers are exchanged at once.

        Raises:
            TrainingStopped: see :meth:`Guards.check`.
        """
        self.watchdog.at("logging")
        own, rates = [*window.take(), len(self.skipped_files)], self.meter.take()
        rows = self.ranks.exchange([*own, *rates, *(one.loss for one in window.taken)])
        first, last = len(own), len(own) + len(rates)
        shared = combine([row[:first] for row in rows], [*SHARED.values(), "sum"])
        record = {"update": self.progress.update, **dict(zip(SHARED, shared, strict=False)), **record}
        record |= self.meter.record([row[first:last] for row in rows])
        record |= {"epoch": self.progress.epoch, "skipped_files": int(shared[-1]) + len(self.data.skipped)}
        if self.captured is not None:
            record |= {"graph_replays": self.captured.replays, "graph_fallbacks": self.captured.fallbacks}
        with self._announced(), writing(self.folder):
            if log is not None:
                log.write(record)
                self.spikes.note(
                    window.taken, [sum(parts) for parts in zip(*[row[last:] for row in rows], strict=True)]
                )
        try:
            self.guards.check(record, window.nonfinite)
        except Exception:
            self.agreed = True
            raise

    def _result(self, interrupt: Interrupt, seconds: float) -> PretrainResult:
        rows = read_metrics(self.folder) or [{}]
        finished = self.progress.update >= self.config.updates
        return PretrainResult(
            checkpoint=checkpoint.checkpoints(self.folder)[-1],
            updates=self.progress.update,
            finished=finished,
            interrupted=interrupt.by_user and not finished,
            first_loss=number(rows[0], "loss"),
            last_loss=number(rows[-1], "loss"),
            target_var=number(rows[-1], "target_var"),
            pred_var=number(rows[-1], "pred_var"),
            seconds=seconds,
            peak_memory=peak_memory(self.device),
        )


def pretrain(config: TrainConfig, *, resume: bool = True) -> PretrainResult:
    """Pretrain a data2vec model as ``config`` says; goes on from the newest checkpoint in ``config.out``.

    On several processes, which torchrun starts, all call it with the same ``config``. SIGTERM and SIGUSR1 end it after
    the update that is under way, and the process where none is (``SystemExit`` with 0).

    Raises:
        UserError: ConfigError, DataError, CheckpointError, TrainingStopped or RankLost (``train/errors.py``).
    """
    with preemptible(), join(config.distributed, config.device) as ranks:
        return Trainer(config, ranks, resume).run()

"""The training loop: data in, updates, logs, guards, checkpoints."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from d2v_fast.nn import Batch
from d2v_fast.train import checkpoint
from d2v_fast.train.checkpoint import Progress
from d2v_fast.train.config import TrainConfig, config_to_dict
from d2v_fast.train.data import batches
from d2v_fast.train.data.bad_items import check_items
from d2v_fast.train.data.stand_in import stand_in
from d2v_fast.train.distributed import describe, join
from d2v_fast.train.errors import CheckpointError, UserError
from d2v_fast.train.graph import CapturedStep
from d2v_fast.train.guards import SHARED, Guards, Window
from d2v_fast.train.interrupt import Interrupt, preemptible
from d2v_fast.train.logging import MetricLog, number, plot_curves, read_metrics
from d2v_fast.train.metrics import Meter, combine, peak_memory
from d2v_fast.train.optim import learning_rate
from d2v_fast.train.run_folder import writing
from d2v_fast.train.seeds import layerdrop_seed, seed_micro_batch
from d2v_fast.train.start import Run, started
from d2v_fast.train.step import StepMetrics
from d2v_fast.train.vote import Abandoned, Vote
from d2v_fast.train.watchdog import Watchdog

logger = logging.getLogger(__name__)


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


class Trainer:
    """One session of a run, on one of its ranks: updates from where it is to its end, or until it is stopped."""

    def __init__(self, run: Run) -> None:
        self.config, self.ranks, self.watchdog = run.config, run.ranks, run.watchdog
        self.folder, self.data, self.model, self.step = run.folder, run.data, run.model, run.step
        self.progress, self.writer, self.spikes = run.progress, run.writer, run.spikes
        self.device = run.ranks.device
        self.meter = Meter(run.config.model, self.device)
        self.guards = Guards(run.config.guards)
        self.empty = stand_in(run.config.model)
        self.consistent = True  # False while an update is under way
        self.agreed = run.ranks.control is None  # whether all ranks are at this place
        self.failure: Exception | None = None  # of this rank, of which the others do not know yet
        # items that could not be read, and why: by any rank up to the last log, and since then by this one
        self.skipped_files: dict[str, str] = {}
        self.newly_skipped: dict[str, str] = {}

    def _micro_batches(self) -> Iterator[tuple[int, int, Batch | None]]:
        return batches(
            self.data,
            epoch=self.progress.epoch,
            index=self.progress.index,
            num_workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            keep_empty=True,
        )

    def run(self) -> PretrainResult:
        """Train to the end, an interruption, or an error; the newest whole state is in a checkpoint afterwards."""
        config, start = self.config, time.monotonic()
        first = self.progress.update
        last = min(config.updates, first + config.stop_after) if config.stop_after else config.updates
        stream = None
        with Interrupt() as interrupt:
            try:
                if first < last:
                    # the workers are forked here, before writers of logs start threads, whose locks they would inherit
                    with self._announced():
                        stream = self._micro_batches()
                with self._open_log(first) as log:
                    self._updates(log, last, interrupt, stream)
                self._raise_failure("the last log")
            finally:
                self.watchdog.at("ending")
                if stream is not None:
                    stream.close()  # ends the workers
                # not if others may be elsewhere, as a save is made together; nor after a start that failed
                if self.consistent and self.agreed and self.progress.update > 0:
                    self._save()
                self.writer.close()
            self._save()
        self.watchdog.at("drawing the curves")
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
        try:
            yield log
        finally:
            if log is not None:
                with self._announced(), writing(self.folder):
                    log.close()

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
                if vote.failed:
                    self._raise_failure(f"update {self.progress.update + 1}")
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

    def _next(self, stream: Iterator | None) -> list[tuple[int, int, Batch | None]]:
        """This rank's micro-batches of an update; empty ones where they cannot be had any more."""
        if self.failure is None:
            with self._announced():
                group = []
                for _ in range(self.config.accumulate):
                    self.watchdog.at("loading data", self.progress.update + 1)
                    group.append(next(stream))
                for _, _, batch in group:
                    if batch is not None:
                        self.newly_skipped.update(batch.skipped)
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

    def _raise_failure(self, doing: str) -> None:
        """Where all ranks are: the error of this one, or TrainingStopped for another one's; nothing if none failed."""
        failures = self.ranks.gather(None if self.failure is None else describe(self.failure))
        self.agreed = True
        if self.failure is not None:
            raise self.failure
        self.ranks.raise_first(doing, failures)

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
            DataError: too many items could not be read by all ranks together.
        """
        self.watchdog.at("logging")
        new = {name: why for name, why in self.newly_skipped.items() if name not in self.skipped_files}
        own, rates = [*window.take(), len(new)], self.meter.take()
        rows = self.ranks.exchange([*own, *rates, *(one.loss for one in window.taken)])
        first, last = len(own), len(own) + len(rates)
        shared = combine([row[:first] for row in rows], [*SHARED.values(), "sum"])
        if shared[-1] > 0:
            for skipped in self.ranks.gather(new):
                self.skipped_files |= skipped
        self.newly_skipped = {}
        record = {"update": self.progress.update, **dict(zip(SHARED, shared, strict=False)), **record}
        record |= self.meter.record([row[first:last] for row in rows])
        record |= {"epoch": self.progress.epoch, "skipped_files": len(self.skipped_files) + len(self.data.skipped)}
        if isinstance(self.step, CapturedStep):
            record |= {"graph_replays": self.step.replays, "graph_fallbacks": self.step.fallbacks}
        with self._announced(), writing(self.folder):
            if log is not None:
                log.write(record)
                self.spikes.note(
                    window.taken, [sum(parts) for parts in zip(*[row[last:] for row in rows], strict=True)]
                )
        try:
            self.guards.check(record, window.nonfinite)
            if shared[-1] > 0:  # each rank has met a part of them only
                check_items([*self.skipped_files.items()], len(self.data.names), self.data.max_bad_fraction)
        except UserError as error:
            self.agreed = error.everywhere = True
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
    with (
        preemptible(),
        Watchdog(config.distributed.timeout) as watchdog,
        join(config.distributed, config.device) as ranks,
    ):
        try:
            with started(config, ranks, watchdog, resume) as run:
                return Trainer(run).run()
        finally:
            watchdog.at("leaving")

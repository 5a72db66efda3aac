"""The training loop: data in, updates, logs, guards, checkpoints."""

import hashlib
import logging
import os
import resource
import signal
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf

from d2v_fast.nn import Batch, Data2Vec
from d2v_fast.train import checkpoint
from d2v_fast.train.checkpoint import Progress
from d2v_fast.train.config import TrainConfig, config_to_dict
from d2v_fast.train.data import PretrainData, TextData, batches, build_data
from d2v_fast.train.errors import CheckpointError, ConfigError, TrainingStopped
from d2v_fast.train.logging import MetricLog, plot_curves, read_metrics
from d2v_fast.train.optim import build_optimizer, learning_rate
from d2v_fast.train.step import StepMetrics, train_step

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainResult:
    """What :func:`pretrain` leaves behind."""

    checkpoint: Path
    updates: int
    finished: bool  # False when it was interrupted and can be continued
    first_loss: float  # of the first and the last logged update
    last_loss: float
    target_var: float  # at the last logged update
    pred_var: float
    seconds: float  # of this session
    peak_memory: int  # bytes: of the GPU, or of this process on a CPU


class Interrupt:
    """Makes the first Ctrl-C or SIGTERM a request to stop after the current update; a second Ctrl-C is immediate."""

    def __enter__(self) -> "Interrupt":
        self.requested = False
        self._old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        for number in self._old:
            signal.signal(number, self._request)
        return self

    def _request(self, number: int, frame: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._old[signal.SIGINT])

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


class Window:
    """The updates' metrics since the last log, left on the device; reading them is the loop's only synchronisation."""

    def __init__(self) -> None:
        self._rows: list[torch.Tensor] = []
        self.nonfinite = 0  # length of the current run of skipped updates

    def add(self, m: StepMetrics) -> None:
        """Take in one update."""
        self._rows.append(torch.stack([m.loss, m.target_var, m.pred_var, m.grad_norm, m.skipped]))

    def read(self) -> dict[str, float]:
        """Means over the window's updates that were not skipped (NaN if all were), and the number of skipped ones."""
        rows = torch.stack(self._rows).tolist()
        self._rows.clear()
        for row in rows:
            self.nonfinite = self.nonfinite + 1 if row[4] else 0
        kept = [row for row in rows if not row[4]]
        means = [sum(column) / len(kept) for column in zip(*kept, strict=True)] if kept else [float("nan")] * 5
        names = ("loss", "target_var", "pred_var", "grad_norm")
        return {**dict(zip(names, means[:4], strict=True)), "skipped": len(rows) - len(kept)}


def check_guards(window: Window, record: dict[str, float], config: TrainConfig) -> None:
    """Stop a run that cannot recover.

    Raises:
        TrainingStopped: too many updates in a row were not finite, or targets or predictions have collapsed.
    """
    guards, update = config.guards, record["update"]
    if window.nonfinite > guards.max_nonfinite:
        raise TrainingStopped(
            f"update {update}: loss or gradient was not finite for {window.nonfinite} updates in a row "
            f"(guards.max_nonfinite = {guards.max_nonfinite}). Lower optim.lr or set optim.clip_norm."
        )
    if update < guards.after_updates:
        return
    for name, low in (("target_var", guards.min_target_var), ("pred_var", guards.min_pred_var)):
        if record[name] < low:
            raise TrainingStopped(
                f"update {update}: the representations have collapsed: {name} {record[name]:.4f} is below "
                f"guards.min_{name} = {low}. Lower optim.lr, raise ema.decay, or mask more."
            )


def resolve_device(name: str) -> torch.device:
    """The device of a run; "auto" is CUDA if there is any.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device must be auto, cpu or cuda[:N], got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} was asked for, and PyTorch {torch.__version__} sees no CUDA device")
    return device


def seed_update(seed: int, update: int) -> None:
    """Seed PyTorch for one update, so that a resumed run draws the same dropout, LayerDrop and augmentations."""
    digest = hashlib.blake2b(f"{seed}/{update}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def open_run(config: TrainConfig, resume: bool) -> tuple[Path, Path | None]:
    """Make the run's folder; return it and the checkpoint to go on from, if any.

    Raises:
        ConfigError: the folder cannot be made.
        CheckpointError: it holds a run and ``resume`` is False.
    """
    folder = Path(config.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out: cannot make the folder {folder}: {error.strerror}") from None
    found = checkpoint.checkpoints(folder)
    if found and not resume:
        raise CheckpointError(f"{folder} already holds a run (newest: {found[-1].name}); choose another out=...")
    return folder, found[-1] if found else None


class Trainer:
    """One session of a run: built from a configuration, continued from the newest checkpoint in its folder."""

    def __init__(self, config: TrainConfig, resume: bool = True) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("training on several processes is not supported yet: run without torchrun")
        self.config = config
        self.device = resolve_device(config.device)
        self.autocast = config.precision == "bf16" or (config.precision == "auto" and self.device.type == "cuda")
        self.folder, found = open_run(config, resume)
        self.data: PretrainData = build_data(config.data, config.model, config.seed)
        logger.info("%s", self.data.describe())
        torch.manual_seed(config.seed)
        self.model = Data2Vec(config.model).to(self.device)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.progress = Progress()
        if found:
            content = checkpoint.read(found, self.device)
            self.progress = checkpoint.restore(content, found, self.model, self.optimizer, config)
            logger.info("continuing from %s (update %d)", found, self.progress.update)
        OmegaConf.save(OmegaConf.create(config_to_dict(config)), self.folder / "config.yaml")
        if isinstance(self.data, TextData):
            self.data.save_tokenizer(self.folder / "tokenizer.json")
        self.skipped_files: set[str] = {name for name, _ in self.data.skipped}

    def _micro_batches(self) -> Generator[tuple[int, int, Batch]]:
        loader = batches(
            self.data,
            epoch=self.progress.epoch,
            index=self.progress.index,
            num_workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
        )
        for epoch, index, batch in loader:
            self.skipped_files.update(name for name, _ in batch.skipped)
            yield epoch, index, batch

    def run(self) -> PretrainResult:
        """Train to the end, an interruption, or an error; always leaves the newest state in a checkpoint."""
        config, start = self.config, time.monotonic()
        first = self.progress.update
        last = min(config.updates, first + config.stop_after) if config.stop_after else config.updates
        log = MetricLog(self.folder, config.updates, first)
        self.model.train()
        stream = self._micro_batches()
        try:
            with Interrupt() as interrupt:
                self._updates(log, last, interrupt, stream)
        finally:
            stream.close()  # ends the loader's workers
            log.close()
        path = checkpoint.checkpoint_path(self.folder, self.progress.update)
        if not path.exists():
            path = self.save()
        plot_curves(self.folder)
        return self._result(path, time.monotonic() - start)

    def _updates(self, log: MetricLog, last: int, interrupt: Interrupt, stream: Iterator) -> None:
        config, window = self.config, Window()
        mark, waited, since = time.monotonic(), 0.0, 0
        while self.progress.update < last and not interrupt.requested:
            update, before = self.progress.update, time.monotonic()
            group = [next(stream) for _ in range(config.accumulate)]
            waited += time.monotonic() - before
            seed_update(config.seed, update)
            metrics = train_step(
                self.model,
                [self.data.augment(batch.to(self.device)) for _, _, batch in group],
                self.optimizer,
                lr=(lr := learning_rate(update, config.updates, config.optim, config.schedule)),
                update=update,
                clip_norm=config.optim.clip_norm,
                autocast=self.autocast,
            )
            window.add(metrics)
            self.progress = Progress(update + 1, group[-1][0], group[-1][1] + 1)
            since += 1
            log.advance(update + 1)
            if (update + 1) % config.log_every == 0 or update + 1 == last or update == 0:
                record = {"update": update + 1, **window.read(), "lr": lr, "ema_decay": metrics.ema_decay}
                elapsed = time.monotonic() - mark
                record |= {"masked": metrics.num_masked, "seconds_per_update": elapsed / since}
                record |= {"data_wait": waited / elapsed, "epoch": self.progress.epoch}
                record |= {"skipped_files": len(self.skipped_files)}
                mark, waited, since = time.monotonic(), 0.0, 0
                log.write(record)
                check_guards(window, record, config)
            if (update + 1) % config.checkpoint_every == 0:
                self.save()

    def save(self) -> Path:
        """Write a checkpoint of the current state and remove those that are no longer kept."""
        path = checkpoint.save(self.folder, self.model, self.optimizer, self.progress, self.config)
        checkpoint.prune(self.folder, self.config.keep_checkpoints)
        return path

    def _result(self, path: Path, seconds: float) -> PretrainResult:
        rows = read_metrics(self.folder)
        memory = (
            torch.cuda.max_memory_allocated(self.device)
            if self.device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        return PretrainResult(
            checkpoint=path,
            updates=self.progress.update,
            finished=self.progress.update >= self.config.updates,
            first_loss=rows[0]["loss"],
            last_loss=rows[-1]["loss"],
            target_var=rows[-1]["target_var"],
            pred_var=rows[-1]["pred_var"],
            seconds=seconds,
            peak_memory=memory,
        )


def pretrain(config: TrainConfig, *, resume: bool = True) -> PretrainResult:
    """Pretrain a data2vec model as ``config`` says; goes on from the newest checkpoint in ``config.out``.

    Raises:
        UserError: ConfigError, DataError, CheckpointError or TrainingStopped (``train/errors.py``).
    """
    return Trainer(config, resume).run()

"""The training loop: data in, updates, logs, guards, checkpoints."""

import hashlib
import logging
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from omegaconf import OmegaConf

from d2v_fast.nn import Batch, Data2Vec
from d2v_fast.train import checkpoint
from d2v_fast.train.checkpoint import Progress
from d2v_fast.train.config import TrainConfig, config_to_dict
from d2v_fast.train.data import DataConfig, PretrainData, TextData, TextDataConfig, batches, build_data
from d2v_fast.train.errors import CheckpointError, ConfigError, TrainingStopped
from d2v_fast.train.files import replace_file
from d2v_fast.train.graph import CapturedStep
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
        # only the main thread may set handlers; elsewhere its owner decides
        main = threading.current_thread() is threading.main_thread()
        self._old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)} if main else {}
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
    if update <= guards.after_updates:
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
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda[:N], got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} was asked for, and PyTorch {torch.__version__} sees no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r} was asked for, and there are {torch.cuda.device_count()} CUDA devices")
    return device


def resolve_precision(config: TrainConfig, device: torch.device) -> TrainConfig:
    """``config`` with "auto" replaced by what it means on ``device``, so that a checkpoint says what was computed."""
    if config.precision != "auto":
        return config
    return replace(config, precision="bf16" if device.type == "cuda" else "fp32")


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU, or of this process (without the loader's workers) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
    folder = Path(config.out).expanduser()
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
        self.device = resolve_device(config.device)
        self.config = config = resolve_precision(config, self.device)
        self.folder, found = open_run(config, resume)
        self.data: PretrainData = build_data(
            self._data_config(found), config.model, config.seed, static_shapes=config.cuda_graph != "off"
        )
        logger.info("%s", self.data.describe())
        self.described = checkpoint.describe_data(self.data)
        torch.manual_seed(config.seed)
        self.model = Data2Vec(config.model).to(self.device)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.progress, self.saved = Progress(), -1  # saved: update of the newest checkpoint
        if found:
            content = checkpoint.read(found, self.device)
            self.progress = checkpoint.restore(content, found, self.model, self.optimizer, config, self.described)
            self.saved = self.progress.update
            logger.info("continuing from %s (update %d)", found, self.progress.update)
        how = {"clip_norm": config.optim.clip_norm, "autocast": config.precision == "bf16"}
        self.captured: CapturedStep | None = None
        if config.cuda_graph != "off":
            strict = config.cuda_graph == "strict"
            if strict and (self.device.type != "cuda" or config.accumulate > 1):
                given = f"{self.device.type} and {config.accumulate}"
                raise ConfigError(f'cuda_graph: "strict" needs a CUDA device and accumulate = 1, got {given}')
            self.captured = CapturedStep(self.model, self.optimizer, strict=strict, **how)
        self.step = self.captured or partial(train_step, self.model, optimizer=self.optimizer, **how)
        self.consistent = True  # False while an update is under way
        self.skipped_files: set[str] = {name for name, _ in self.data.skipped}
        with writing(self.folder):
            text = OmegaConf.to_yaml(OmegaConf.create(config_to_dict(config)))
            replace_file(self.folder / "config.yaml", lambda file: file.write(text.encode()))
            if isinstance(self.data, TextData):
                self.data.save_tokenizer(self.folder / "tokenizer.json")

    def _data_config(self, found: Path | None) -> DataConfig:
        """The data's configuration; a continued text run keeps the tokenizer that it was started with."""
        data, tokenizer = self.config.data, self.folder / "tokenizer.json"
        if found and isinstance(data, TextDataConfig) and data.tokenizer is None and tokenizer.exists():
            return replace(data, tokenizer=str(tokenizer))
        return data

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
        """Train to the end, an interruption, or an error; the newest whole state is in a checkpoint afterwards."""
        config, start = self.config, time.monotonic()
        first = self.progress.update
        last = min(config.updates, first + config.stop_after) if config.stop_after else config.updates
        stream = self._micro_batches()
        try:
            with (
                writing(self.folder),
                closing(MetricLog(self.folder, config.updates, first)) as log,
                Interrupt() as interrupt,
            ):
                self._updates(log, last, interrupt, stream)
        finally:
            stream.close()  # ends the loader's workers
            if self.consistent and self.progress.update > 0:  # a failed start leaves no run behind
                self.save()
        self.save()
        with writing(self.folder):
            plot_curves(self.folder)
        path = checkpoint.checkpoint_path(self.folder, self.progress.update)
        return self._result(path, time.monotonic() - start)

    def _updates(self, log: MetricLog, last: int, interrupt: Interrupt, stream: Iterator) -> None:
        config, window = self.config, Window()
        mark, waited, since = time.monotonic(), 0.0, 0
        while self.progress.update < last and not interrupt.requested:
            update, before = self.progress.update, time.monotonic()
            group = [next(stream) for _ in range(config.accumulate)]
            waited += time.monotonic() - before
            seed_update(config.seed, update)
            lr = learning_rate(update, config.updates, config.optim, config.schedule)
            self.consistent = False
            micro_batches = [self.data.augment(batch.to(self.device)) for _, _, batch in group]
            metrics = self.step(micro_batches, lr=lr, update=update)
            self.progress = Progress(update + 1, group[-1][0], group[-1][1] + 1)
            self.consistent = True
            window.add(metrics)
            since += 1
            log.advance(update + 1)
            if (update + 1) % config.log_every == 0 or update + 1 == last or update == 0:
                record = {"update": update + 1, **window.read(), "lr": lr, "ema_decay": metrics.ema_decay}
                elapsed = time.monotonic() - mark
                record |= {"masked": metrics.num_masked, "seconds_per_update": elapsed / since}
                record |= {"data_wait": waited / elapsed, "epoch": self.progress.epoch}
                record |= {"skipped_files": len(self.skipped_files)}
                if self.captured is not None:
                    record |= {"graph_replays": self.captured.replays, "graph_fallbacks": self.captured.fallbacks}
                mark, waited, since = time.monotonic(), 0.0, 0
                log.write(record)
                check_guards(window, record, config)
            if (update + 1) % config.checkpoint_every == 0:
                self.save()

    def save(self) -> None:
        """Write a checkpoint of the current state, unless there is one, and remove those that are no longer kept."""
        if self.progress.update != self.saved:
            checkpoint.save(self.folder, self.model, self.optimizer, self.progress, self.config, self.described)
            self.saved = self.progress.update
            checkpoint.prune(self.folder, self.config.keep_checkpoints)

    def _result(self, path: Path, seconds: float) -> PretrainResult:
        nothing = {"loss": math.nan, "target_var": math.nan, "pred_var": math.nan}
        rows = read_metrics(self.folder) or [nothing]
        return PretrainResult(
            checkpoint=path,
            updates=self.progress.update,
            finished=self.progress.update >= self.config.updates,
            first_loss=rows[0]["loss"],
            last_loss=rows[-1]["loss"],
            target_var=rows[-1]["target_var"],
            pred_var=rows[-1]["pred_var"],
            seconds=seconds,
            peak_memory=peak_memory(self.device),
        )


def pretrain(config: TrainConfig, *, resume: bool = True) -> PretrainResult:
    """Pretrain a data2vec model as ``config`` says; goes on from the newest checkpoint in ``config.out``.

    Raises:
        UserError: ConfigError, DataError, CheckpointError or TrainingStopped (``train/errors.py``).
    """
    return Trainer(config, resume).run()

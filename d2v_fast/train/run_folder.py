"""The folder of a run: opened by one run at a time, with its settings in it."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from omegaconf import OmegaConf

from d2v_fast.train import checkpoint, lock
from d2v_fast.train.config import TrainConfig, config_to_dict
from d2v_fast.train.data import DataConfig, PretrainData, TextData, TextDataConfig
from d2v_fast.train.distributed import Ranks
from d2v_fast.train.errors import CheckpointError, ConfigError
from d2v_fast.train.files import replace_file

CONFIG, TOKENIZER = "config.yaml", "tokenizer.json"


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
        CheckpointError: another run uses it, it cannot be locked, or it holds a run and ``resume`` is False.
    """
    folder = Path(config.out).expanduser()
    with ExitStack() as held:
        with ranks.together("opening the run"):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                reason = error.strerror
                if os.path.islink(error.filename) and not os.path.exists(error.filename):
                    reason = f"{error.filename} is a link to {os.readlink(error.filename)}, which does not exist"
                raise ConfigError(f"out: cannot make the folder {folder}: {reason}") from None
            if ranks.first:  # the others wait for this one, no longer than the time-out
                held.enter_context(lock.locked(folder, min(lock.PATIENCE, ranks.timeout / 2)))
            found = checkpoint.checkpoints(folder)
            if found and not resume:
                newest = found[-1].name
                raise CheckpointError(f"{folder} already holds a run (newest: {newest}); choose another out=...")
        yield folder


def write_settings(folder: Path, config: TrainConfig, data: PretrainData) -> None:
    """Write down the configuration, and the tokenizer of text.

    Raises:
        OSError: no space, no permission.
    """
    text = OmegaConf.to_yaml(OmegaConf.create(config_to_dict(config)))
    replace_file(folder / CONFIG, lambda file: file.write(text.encode()))
    if isinstance(data, TextData):
        data.save_tokenizer(folder / TOKENIZER)


def with_own_tokenizer(data: DataConfig, folder: Path) -> DataConfig:
    """``data`` for a run that is continued: of text, with the tokenizer that it was started with."""
    tokenizer = folder / TOKENIZER
    if isinstance(data, TextDataConfig) and data.tokenizer is None and tokenizer.exists():
        return replace(data, tokenizer=str(tokenizer))
    return data

"""Saving while the run goes on."""

import json
import logging
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from d2v_fast import __version__
from d2v_fast.nn import Data2Vec
from d2v_fast.train import lock
from d2v_fast.train.checkpoint.folder import (
    FORMAT,
    Progress,
    checkpoint_path,
    checkpoints,
    checksums,
    discard,
    partial_path,
    prune,
    remove_partial,
    sync_folder,
    update_of,
    write_manifest,
)
from d2v_fast.train.checkpoint.shards import ShardWriter
from d2v_fast.train.checkpoint.state import model_tensors, optimizer_tensors, same_tensors
from d2v_fast.train.checkpoint.together import raise_first, reason
from d2v_fast.train.config import TrainConfig, config_to_dict
from d2v_fast.train.data import PretrainData
from d2v_fast.train.distributed import Ranks
from d2v_fast.train.errors import CheckpointError
from d2v_fast.train.files import replace_file

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05


def describe_data(data: PretrainData) -> dict[str, str]:
    """What a checkpoint keeps of the data, to notice on a later start that it has changed."""
    return {"fingerprint": data.fingerprint(), "description": data.describe()}


class Writer:
    """Saves a run's state on all of its ranks; at most one save is under way.

    A save copies the state to the host, and a thread writes the copy. Ranks talk to each other in :meth:`save` and
    :meth:`wait` only; the threads meet in the folder: each leaves the checksums of its files there, and rank 0 renames
    the folder when all have. Random numbers need no state: every update draws from a seed made of the run's and the
    update.

    Args:
        folder: the run's, seen by all ranks.
        model: on its own, without what DDP or ``torch.compile`` put around it.
        optimizer: the model's.
        ranks: of the run.
        config: of the run.
        data: of :func:`describe_data`.
        timeout: seconds after which all ranks have given up a save: on the other ranks' files after half of them, on
            a disk that does not answer after three quarters.
        newest: the checkpoint that the run goes on from, if any.
    """

    def __init__(
        self,
        folder: Path,
        model: Data2Vec,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        config: TrainConfig,
        data: dict[str, str],
        *,
        timeout: float = 600.0,
        newest: Path | None = None,
    ) -> None:
        self._folder, self._model, self._optimizer, self._ranks = folder, model, optimizer, ranks
        self._config, self._data, self._timeout = config, data, timeout
        self._saved = -1 if newest is None else update_of(newest)  # the last update that was saved, or is being
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._clean()

    def save(self, progress: Progress) -> None:
        """Begin to save the state after ``progress.update`` updates; every rank calls this after the same update.

        Waits for the save before. Nothing happens if this update is saved already.

        Raises:
            CheckpointError: a rank could not write, in this save or the one before; the same in all of them. Earlier
                checkpoints are untouched.
        """
        if progress.update == self._saved:
            return
        shards = ShardWriter(model_tensors(self._model) | optimizer_tensors(self._model, self._optimizer))
        token = secrets.token_hex(8)
        self._join()
        if self._error is None and self._ranks.rank == 0:
            self._make(partial_path(self._folder, progress.update, token), progress.update)
        told = self._ranks.gather((self._error, token, shards.local_plan))
        self._raise([error for error, _, _ in told])
        shards.copy([plan for _, _, plan in told], self._ranks.rank)
        self._saved = progress.update
        partial = partial_path(self._folder, progress.update, told[0][1])
        arguments = (partial, shards, Progress(**vars(progress)), same_tensors(self._model))
        # A daemon: a process that has to end does not wait for a disk that does not answer.
        self._thread = threading.Thread(target=self._work, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until what was saved is a whole checkpoint; every rank calls this.

        Raises:
            CheckpointError: as :meth:`save`.
        """
        self._join()
        self._raise(self._ranks.gather(self._error))

    def close(self) -> None:
        """Let this rank's thread end its work, and log its error. For the end of a run that failed."""
        self._join()
        if self._error is not None:
            logger.error("%s", self._error)
            self._clean()

    def _clean(self) -> None:
        """Remove what a failed save has left. No thread writes there any more, or it is of no use."""
        if self._ranks.rank == 0:
            with suppress(CheckpointError):  # then it may be what another run writes
                lock.check(self._folder)
                remove_partial(self._folder)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join(0.75 * self._timeout)
            if self._thread.is_alive():
                self._error = self._failed(self._saved, f"not done in {0.75 * self._timeout:g} s (distributed.timeout)")
            self._thread = None

    def _raise(self, errors: list[CheckpointError | None]) -> None:
        if any(error is not None for error in errors):
            self._error = None  # it is told once
            self._saved = -1
            self._clean()
        raise_first(errors)

    def _make(self, partial: Path, update: int) -> None:
        try:
            lock.check(self._folder)
            partial.mkdir()
        except (OSError, CheckpointError) as error:
            self._error = self._failed(update, reason(error))

    def _work(self, partial: Path, shards: ShardWriter, progress: Progress, same: dict[str, str]) -> None:
        """In the thread: this rank's files, and on rank 0 the rest."""
        rank = self._ranks.rank
        try:
            files = checksums(partial, shards.write(partial))
            _tell(partial, rank, {"files": files})
            if rank == 0:
                self._finish(partial, progress, same)
        except Exception as error:  # disk full, no permission, a lost mount: whatever the writers raise
            self._error = self._failed(progress.update, reason(error))
            if rank != 0:
                self._tell_error(partial, reason(error))

    def _finish(self, partial: Path, progress: Progress, same: dict[str, str]) -> None:
        content = {
            "format": FORMAT,
            "d2v_fast": __version__,
            "config": config_to_dict(self._config),
            "data": self._data,
            "progress": vars(progress),
            "world_size": self._ranks.world_size,
            "same": same,
            "files": self._collect(partial),
        }
        write_manifest(partial, content)
        sync_folder(partial)
        path = checkpoint_path(self._folder, progress.update)
        if path.exists():  # damaged, or the run would not have come from an earlier one to this update again
            discard(path)
        partial.rename(path)
        sync_folder(self._folder)
        prune(self._folder, progress.update, self._config.keep_checkpoints, self._config.keep_every)

    def _collect(self, partial: Path) -> dict[str, Any]:
        """The files of all ranks with their checksums, when all are there.

        Nothing here depends on the clocks of others.
        """
        files, waiting, seconds = {}, list(range(self._ranks.world_size)), self._timeout / 2
        deadline = time.monotonic() + seconds
        while True:
            for rank in list(waiting):
                note = _note(partial, rank)
                if note.exists():
                    told = json.loads(note.read_text(encoding="utf-8"))
                    if "error" in told:
                        raise CheckpointError(f"rank {rank}: {told['error']}")
                    files |= told["files"]
                    waiting.remove(rank)
                    note.unlink()
            if not waiting:
                return files
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"rank {', '.join(map(str, waiting[:8]))} of {self._ranks.world_size} did not write its part "
                    f"within {seconds:g} s (half of distributed.timeout): it hangs, or does not see this folder"
                )
            time.sleep(POLL_SECONDS)

    def _failed(self, update: int, why: str) -> CheckpointError:
        whole = [path for path in checkpoints(self._folder) if update_of(path) < update]
        kept = f"the last whole one is {whole[-1]}" if whole else "there is no earlier one"
        return CheckpointError(f"could not write {checkpoint_path(self._folder, update)}: {why}; {kept}")

    def _tell_error(self, partial: Path, why: str) -> None:
        try:
            _tell(partial, self._ranks.rank, {"error": why})
        except OSError:  # then rank 0 waits until its time is up
            logger.error("%s", self._error)


def _note(partial: Path, rank: int) -> Path:
    return partial / f"rank-{rank:05d}.json"


def _tell(partial: Path, rank: int, content: dict[str, Any]) -> None:
    replace_file(_note(partial, rank), lambda file: file.write(json.dumps(content).encode()))

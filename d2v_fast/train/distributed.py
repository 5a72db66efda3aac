"""The processes ("ranks") of a run: which one this is, and what they tell each other on the host.

torchrun starts them and says in the environment who is who. Two process groups: gradients, and parameters of sharded
models, go through NCCL (gloo on a CPU); whatever the host has to know of all ranks goes through a gloo group of its
own, the control group, which waits for no device.
"""

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from d2v_fast.train.errors import ConfigError, RankLost, TrainingStopped, UserError

logger = logging.getLogger(__name__)

Mode = Literal["none", "ddp", "fsdp2", "hsdp"]
LONGEST = 30 * 24 * 3600  # seconds of a time-out
SAID_AFTER = 10.0  # seconds that a rank which failed waits for the others before it says so itself
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # as torchrun sets them


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How a run is spread over processes (docs/distributed.md)."""

    # ddp: a whole model on each rank; fsdp2: parameters, averages and optimizer state in shards over all ranks; hsdp:
    # in shards over shard_size ranks, and replicas of these. auto: ddp on several ranks, none on one
    mode: Literal["auto", "none", "ddp", "fsdp2", "hsdp"] = "auto"
    # seconds that a rank waits for the others before it gives up, and that the watchdog lets a phase of a run take
    timeout: float = 600.0
    shard_size: int = 0  # hsdp: ranks that share one copy of the model; 0 = those of one machine

    def __post_init__(self) -> None:
        if not 0 < self.timeout <= LONGEST:
            raise ValueError(f"distributed.timeout must be above 0 and at most {LONGEST} seconds, got {self.timeout}")
        if self.shard_size < 0:
            raise ValueError(f"distributed.shard_size must be at least 0, got {self.shard_size}")


class PendingSum:
    """A sum over ranks that is under way."""

    def __init__(self, ranks: "Ranks", numbers: torch.Tensor, work: dist.Work | None) -> None:
        self._ranks, self._numbers, self._work = ranks, numbers, work

    def read(self) -> list[int]:
        """The sums; waits for the other ranks.

        Raises:
            RankLost: they did not come.
        """
        if self._work is not None:
            with self._ranks.waiting("the others' numbers of this update"):
                self._work.wait()
            self._work = None
        return self._numbers.tolist()


@dataclass(frozen=True, eq=False)
class Ranks:
    """The ranks of a run, as one of them sees them. Collectives are called by all, in the same order."""

    rank: int
    world_size: int
    local_rank: int  # among those of this machine
    local_world_size: int
    device: torch.device
    mode: Mode = "none"
    timeout: float = DistributedConfig.timeout  # seconds
    control: dist.ProcessGroup | None = None  # None: no other ranks

    @classmethod
    def alone(cls, device: torch.device | str = "cpu", timeout: float = DistributedConfig.timeout) -> "Ranks":
        """One process that needs no others."""
        return cls(0, 1, 0, 1, torch.device(device), timeout=timeout)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which prints and writes for all."""
        return self.rank == 0

    def sum(self, numbers: Sequence[int]) -> PendingSum:
        """Begin to add up ``numbers``, as many on every rank; returns at once."""
        own = torch.tensor(numbers, dtype=torch.int64)
        if self.control is None:
            return PendingSum(self, own, None)
        with self.waiting("the others' numbers of this update"):
            return PendingSum(self, own, dist.all_reduce(own, group=self.control, async_op=True))

    def exchange(self, numbers: Sequence[float]) -> list[list[float]]:
        """The ``numbers`` of every rank, as many on each, in one collective."""
        if self.control is None:
            return [list(numbers)]
        own = torch.tensor(numbers, dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.world_size)]
        with self.waiting("the others' metrics"):
            dist.all_gather(found, own, group=self.control)
        return [x.tolist() for x in found]

    def gather(self, value: Any) -> list[Any]:
        """The ``value`` of every rank: anything that can be pickled."""
        if self.control is None:
            return [value]
        found: list[Any] = [None] * self.world_size
        with self.waiting("the others"):
            dist.all_gather_object(found, value, group=self.control)
        return found

    @contextmanager
    def together(self, doing: str, patience: float = 0.0) -> Iterator[None]:
        """Around what every rank does: if it fails on one, it fails on all.

        ``patience``: seconds, more than ``timeout``, that it may take some ranks longer than others. A rank that
        has failed logs why if it has to wait for them.

        Raises:
            TrainingStopped: it failed on another rank, whose own error says why.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        told = None if failure is None else describe(failure)
        found: list[str | None] = []
        try:
            if patience > 0:
                with _said(f"{doing} failed: {told}; waiting for the other ranks", wanted=failure is not None):
                    self._meet(doing, patience)
            found = self.gather(told)
        except RankLost:
            if failure is None:
                raise
        if failure is not None:
            if isinstance(failure, UserError) and found and set(found) == {told}:
                failure.everywhere = True
            raise failure
        self.raise_first(doing, found)

    def _meet(self, doing: str, patience: float) -> None:
        """Wait until all ranks are here, some of them up to ``patience`` seconds later than others.

        Rank 0 hears from each, then answers each. Collectives, ``monitored_barrier`` on ranks other than 0 among them,
        wait no longer than their group does, and a group that waits for hours would do so while it is made as well.
        """
        if self.control is None:
            return
        token, limit = torch.zeros(1), timedelta(seconds=patience)
        others = range(1, self.world_size) if self.first else [0]
        with self.waiting(doing, patience):
            for transfer in (dist.irecv, dist.isend) if self.first else (dist.isend, dist.irecv):
                for other in others:
                    transfer(token, other, self.control).wait(limit)

    def raise_first(self, doing: str, failures: Sequence[str | None]) -> None:
        """Raise TrainingStopped for the first of ``failures``, one of every rank, unless there is none."""
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise TrainingStopped(f"{doing} failed on rank {rank}: {failure}")

    def check_same(self, what: str, values: Mapping[str, Any]) -> None:
        """Refuse to go on with ranks that were told different things.

        Raises:
            ConfigError: a value differs; all of them are named, and the ranks that have them.
        """
        everyone = self.gather({name: repr(value) for name, value in values.items()})
        lines = []
        for name in sorted(set().union(*everyone)):
            found: dict[str, list[int]] = {}
            for rank, theirs in enumerate(everyone):
                found.setdefault(theirs.get(name, "missing"), []).append(rank)
            if len(found) > 1:
                lines.append(f"{name}: " + ", ".join(f"{value} on {_named(ranks)}" for value, ranks in found.items()))
        if lines:
            error = ConfigError(f"{what} must be the same on all ranks, and differs: {'; '.join(lines)}")
            error.everywhere = True
            raise error

    @contextmanager
    def waiting(self, what: str, patience: float | None = None) -> Iterator[None]:
        """Around collectives: what they raise when a rank is gone or hangs becomes a UserError.

        ``patience``: seconds that they wait; None: ``timeout``.

        Raises:
            RankLost: another rank has ended, or did not come within the time-out.
        """
        try:
            yield
        except RuntimeError as error:
            if not (isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL"))):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            most = f"{self.timeout:g} s (distributed.timeout)" if patience is None else f"{patience:g} s"
            raise RankLost(
                f"rank {self.rank} waited for {what} in vain, at most {most}: a rank has ended or hangs "
                f"({reason}). Its own message says more; the same command continues the run."
            ) from error


@contextmanager
def _said(text: str, wanted: bool) -> Iterator[None]:
    """Log ``text``, if it is wanted, when what is inside has taken a while."""
    timer = threading.Timer(SAID_AFTER, logger.error, ["%s", text])
    timer.daemon = True
    if wanted:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def describe(error: BaseException) -> str:
    """One line for other ranks."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _named(ranks: Sequence[int]) -> str:
    few = ", ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "")
    return f"rank {few}" if len(ranks) == 1 else f"ranks {few}"


@dataclass(frozen=True)
class _Environment:
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def read_environment(environment: Mapping[str, str]) -> _Environment | None:
    """What torchrun says; None where it did not start this process.

    Raises:
        ConfigError: only a part of the variables is there, or one is no number that fits.
    """
    if "RANK" not in environment and environment.get("WORLD_SIZE", "1") == "1":
        return None
    missing = [name for name in VARIABLES if not environment.get(name)]
    if missing:
        given = ", ".join(f"{name}={environment[name]}" for name in VARIABLES if environment.get(name))
        raise ConfigError(
            f"the environment says {given}, but not {', '.join(missing)}: start all ranks by torchrun, which sets "
            f"{', '.join(VARIABLES)}, or unset these for a run of one process"
        )
    local = environment.get("LOCAL_WORLD_SIZE") or "1"
    values = {name: environment[name] for name in VARIABLES if name != "MASTER_ADDR"} | {"LOCAL_WORLD_SIZE": local}
    for name, value in values.items():
        if not value.isdecimal():
            raise ConfigError(f"{name} in the environment must be a number, got {value!r}")
    rank, world_size, local_rank = (int(values[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if not (rank < world_size and local_rank < world_size):
        raise ConfigError(
            f"RANK and LOCAL_RANK in the environment must be below WORLD_SIZE={world_size}, got {rank}, {local_rank}"
        )
    return _Environment(rank, world_size, local_rank, max(int(local), local_rank + 1))


def resolve_mode(mode: str, world_size: int) -> Mode:
    """What "auto" means.

    Raises:
        ConfigError: "none" for several ranks.
    """
    if mode == "auto":
        return "ddp" if world_size > 1 else "none"
    if mode == "none" and world_size > 1:
        raise ConfigError(f"distributed.mode must be ddp, fsdp2, hsdp or auto for {world_size} ranks, got none")
    return mode


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of a rank; "auto" is CUDA if there is any, and a CUDA device without number is the rank's own.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device must be auto, cpu or cuda[:N], got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda[:N], got {name!r}")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} was asked for, and PyTorch {torch.__version__} sees no CUDA device")
    index, count = local_rank if device.index is None else device.index, torch.cuda.device_count()
    if device.index is not None and local_rank > 0:
        raise ConfigError(f"device must be auto, cpu or cuda with several ranks on a machine, got {name!r}")
    if index >= count:
        there = "there is 1 CUDA device" if count == 1 else f"there are {count} CUDA devices"
        raise ConfigError(f"device cuda:{index} was asked for, and {there} here")
    return torch.device("cuda", index)


@contextmanager
def join(config: DistributedConfig, device: str = "auto") -> Iterator[Ranks]:
    """Meet the other ranks, and part from them afterwards; alone where neither environment nor mode ask for others.

    A process group that is there already is used, and left.

    Raises:
        ConfigError: the environment is incomplete, the device is not there, or the ranks did not find each other.
    """
    where = read_environment(os.environ)
    mode = resolve_mode(config.mode, 1 if where is None else where.world_size)
    own = resolve_device(device, 0 if where is None else where.local_rank)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if mode == "none":
        yield Ranks.alone(own, config.timeout)
        return
    where = where or _Environment(0, 1, 0, 1)
    made, control, ended_well = not dist.is_initialized(), None, False
    if made:
        with _meeting(where, config.timeout):
            _meet(where, own, config.timeout)
    try:
        with _meeting(where, config.timeout):
            control = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.timeout))
        yield Ranks(
            rank=where.rank,
            world_size=where.world_size,
            local_rank=where.local_rank,
            local_world_size=where.local_world_size,
            device=own,
            mode=mode,
            timeout=config.timeout,
            control=control,
        )
        ended_well = True
    finally:
        if not made:
            if control is not None:  # its threads poll
                dist.destroy_process_group(control)
        # after an error others may still be in a collective: NCCL would wait for them here
        elif ended_well or own.type == "cpu":
            dist.destroy_process_group()


def _meet(where: _Environment, device: torch.device, timeout: float) -> None:
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout)}
    if device.type == "cuda":
        options["device_id"] = device
    if "MASTER_PORT" not in os.environ:  # one process without torchrun
        options["store"] = dist.HashStore()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=where.rank, world_size=where.world_size, **options)


@contextmanager
def _meeting(where: _Environment, timeout: float) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConfigError(
            f"rank {where.rank} of {where.world_size} did not meet the others at {address}, with {timeout:g} s "
            f"(distributed.timeout) for each step of that: {error}"
        ) from error

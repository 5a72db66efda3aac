"""Run by torchrun on two ranks: checkpoints written and read by both, replicated and in shards, and what can go wrong.

The first argument is a folder; a part ``one`` of it holds checkpoints of one process. Every check runs on both ranks.
"""

import errno
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import torch
from run_folders import DATA, Run, flipped
from tiny import tiny_batch
from torch.distributed.tensor import DTensor

from d2v_fast.train import checkpoint
from d2v_fast.train.checkpoint import Progress, Writer, shards
from d2v_fast.train.distributed import DistributedConfig, Ranks, join
from d2v_fast.train.errors import CheckpointError, TrainingStopped
from d2v_fast.train.optim import build_optimizer
from d2v_fast.train.parallel import parallelise
from d2v_fast.train.step import Counts, train_step

MODES = {"ddp": 0, "fsdp2": 0, "hsdp": 1}  # and ranks of a shard
write = shards.ShardWriter.write


class Shared(Run):
    """A run on several ranks."""

    def __init__(self, mode: str, ranks: Ranks, updates: int = 0) -> None:
        super().__init__("text")
        self.ranks, self.mode = ranks, mode
        self.parallel = parallelise(self.model, replace(ranks, mode=mode), shard_size=MODES[mode])
        self.optimizer = build_optimizer(self.model, self.config.optim)
        for update in range(updates):
            self.update(update)

    def update(self, update: int) -> None:
        torch.manual_seed(update)
        self.model.encoder.layerdrop_seed = update
        batches = [tiny_batch(self.config.model, 10 * update + self.ranks.rank)]
        counts = lambda: Counts(*self.ranks.sum([*Counts.of(batches)]).read())  # noqa: E731
        train_step(self.model, batches, self.optimizer, lr=1e-3, update=update, parallel=self.parallel, counts=counts)

    def writer(self, out: Path, **how) -> Writer:
        return Writer(out, self.model, self.optimizer, self.ranks, self.config, DATA, **how)

    def save(self, out: Path, update: int = 1) -> Path:
        writer = self.writer(out)
        writer.save(Progress(update, 2, 3))
        writer.wait()
        return checkpoint.checkpoint_path(out, update)

    def restore(self, path: Path) -> Progress:
        with self.ranks.together("reading"):
            return checkpoint.restore(path, self.model, self.optimizer, self.ranks, self.config, DATA)


def whole(run: Run) -> dict[str, torch.Tensor]:
    """Every tensor of a run."""
    state = dict(run.model.state_dict())
    for name, p in run.model.named_parameters():
        state |= {f"optimizer.{name}.{key}": x for key, x in run.optimizer.state.get(p, {}).items()}
    return {name: (x.full_tensor() if isinstance(x, DTensor) else x).clone() for name, x in state.items()}


def assert_equal(got: dict, want: dict, what: str) -> None:
    assert got.keys() == want.keys(), (what, got.keys() ^ want.keys())
    for name, x in want.items():
        assert torch.equal(got[name], x), (what, name)


def refused(ranks: Ranks, call, *expected: str) -> None:
    """``call`` raises the same CheckpointError on both ranks."""
    try:
        call()
    except CheckpointError as error:
        text = str(error)
    else:
        text = "nothing was raised"
    texts = ranks.gather(text)
    assert texts[0] == texts[1] and all(part in text for part in expected), texts


def check_from_and_to_every_mode(ranks: Ranks, folder: Path) -> None:
    """What one mode writes every other one reads; a mode that goes on with its own does so bit for bit."""
    saved = {}
    for mode in MODES:
        run = Shared(mode, ranks, updates=2)
        path = run.save(folder / mode)
        state = whole(run)
        saved[path] = state
        run.update(2)
        other = Shared(mode, ranks)
        assert other.restore(path) == Progress(1, 2, 3)
        assert_equal(whole(other), state, mode)
        other.update(2)
        assert_equal(whole(other), whole(run), f"{mode} goes on")
        if ranks.first:
            torch.save(state, folder / f"{mode}.state")
        # each rank has written its share, and nothing was written twice
        sizes = sorted(file.stat().st_size for file in path.glob("*.safetensors"))
        content = checkpoint.read(path)
        student = {name for name in content["same"]}
        bytes_of_all = sum(x.numel() * x.element_size() for name, x in state.items() if name not in student)
        assert len(sizes) == 2 and sizes[0] > 0.4 * sum(sizes), sizes
        assert bytes_of_all < sum(sizes) < 1.2 * bytes_of_all, (sizes, bytes_of_all)
        assert_equal(content["model"], {name: state[name] for name in content["model"]}, f"{mode} read")
    one = torch.load(folder / "one.state")
    alone = {path: one for path in checkpoint.checkpoints(folder / "one")}
    for mode in MODES:
        run = Shared(mode, ranks)
        for path, state in {**saved, **alone}.items():
            if path.parent.name != mode:
                run.config = replace(run.config, accumulate=1)
                run.restore(path)
                assert_equal(whole(run), state, f"{path.parent.name} to {mode}")


def check_two_collectives_a_save(ranks: Ranks, folder: Path) -> None:
    """One to begin it and one to see its end; none in the thread, which would meet those of the run."""
    calls, real = [], Ranks.gather
    run, writer = Shared("ddp", ranks), None

    def gather(self, value):
        calls.append(threading.current_thread())
        return real(self, value)

    Ranks.gather = gather
    writer = run.writer(folder / "calls")
    writer.save(Progress(1))
    writer.wait()
    Ranks.gather = real
    assert calls == [threading.main_thread()] * 2


def check_errors_reach_both(ranks: Ranks, folder: Path) -> None:
    out, run = folder / "errors", Shared("fsdp2", ranks, updates=1)
    good = run.save(out)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    for bad in (0, 1):
        writer = run.writer(out)
        shards.ShardWriter.write = full if ranks.rank == bad else write
        writer.save(Progress(2))
        refused(ranks, writer.wait, "No space left on device", f"the last whole one is {good}")
        shards.ShardWriter.write = write
        assert ranks.gather(os.listdir(out))[0] == [good.name]  # as rank 0 sees it, which cleans up

    if ranks.first:
        real, Path.mkdir = Path.mkdir, full
    refused(ranks, lambda: run.writer(out).save(Progress(2)), "No space left on device")
    if ranks.first:
        Path.mkdir = real

    hold = threading.Event()
    shards.ShardWriter.write = (lambda *args: hold.wait()) if ranks.rank == 1 else write
    writer = run.writer(out, timeout=2)
    writer.save(Progress(2))
    refused(ranks, writer.wait, "rank 1 of 2 did not write its part within 1 s", f"the last whole one is {good}")
    shards.ShardWriter.write = write
    assert ranks.gather(os.listdir(out))[0] == [good.name]
    assert run.save(out, 2).exists()  # and then it can be saved


def check_both_agree_on_the_start(ranks: Ranks, folder: Path) -> None:
    out, run = folder / "start", Shared("fsdp2", ranks, updates=1)
    first, second = run.save(out, 1), run.save(out, 2)
    assert checkpoint.newest_valid(out, ranks) == second
    ranks.gather(None)
    if ranks.first:
        flipped(second)
    assert checkpoint.newest_valid(out, ranks) == first
    ranks.gather(None)
    if ranks.first:
        (first / "manifest.json").unlink()
    refused(ranks, lambda: checkpoint.newest_valid(out, ranks), "none is whole", "no file at")
    config = run.config
    run.config = replace(config, seed=config.seed + ranks.rank)
    third = run.save(out, 3)
    run.config = replace(config, seed=config.seed + ranks.rank)  # another one on rank 1 only
    try:
        run.restore(third)
    except (CheckpointError, TrainingStopped) as error:
        ends = ranks.gather(str(error))
    assert "another configuration (seed: 1 -> 2)" in ends[1] and ends[0] == f"reading failed on rank 1: {ends[1]}"
    run.config = replace(config, accumulate=2)
    refused(ranks, lambda: run.restore(third), "2 micro-batches an update", "set accumulate=1")


def kill_one_in_a_save(ranks: Ranks, folder: Path) -> None:
    """The last: this launch ends here."""

    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    run = Shared("fsdp2", ranks, updates=1)
    run.save(folder / "killed", 1)
    shards.ShardWriter.write = die if ranks.rank == 1 else write
    writer = run.writer(folder / "killed")
    writer.save(Progress(2))
    writer.wait()


def main(folder: Path) -> None:
    with join(DistributedConfig(mode="ddp", timeout=20), "cpu") as ranks:
        for name in ("ddp", "fsdp2", "hsdp", "calls", "errors", "start", "killed"):
            (folder / name).mkdir(exist_ok=True)
        check_from_and_to_every_mode(ranks, folder)
        check_two_collectives_a_save(ranks, folder)
        check_errors_reach_both(ranks, folder)
        check_both_agree_on_the_start(ranks, folder)
        (folder / f"checked-{ranks.rank}").touch()
        kill_one_in_a_save(ranks, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Every fault as a run that meets it and the next start after it; each function asserts what has to hold.

``SCENARIOS`` has them by name: the tests run each of them once, benchmarks/fault_runs.py as often as it is told.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from faults.stage import TIMEOUT, UPDATES, Stage, expect, first, on, saved, says, weights

from d2v_fast.train import checkpoint
from d2v_fast.train.logging import read_metrics, read_records


def different_settings(stage: Stage) -> None:
    out = stage.new()
    results = stage.run(out, of_rank={"1": ["optim.lr=0.5"]})
    expect(results, 1, 1)
    says(results[0], "the configuration must be the same on all ranks, and differs: optim.lr", "0.5 on rank 1")
    assert "error" not in results[1].err  # once is enough
    assert not out.exists()
    stage.continues(out, 0)


def other_number_of_ranks(stage: Stage) -> None:
    """Refused with the setting that fits; with it, the run of two ranks goes on on one."""
    out, wanted = stage.new(), stage.wanted()
    expect(stage.run(out, stop_after=4), 0, 0)
    results = stage.run(out, ranks=1)
    expect(results, 1)
    says(results[0], "2 micro-batches an update", "set accumulate=2")
    assert saved(out) == [3, 4]
    expect(stage.run(out, ranks=1, accumulate=2), 0)
    for name, x in weights(out).items():
        torch.testing.assert_close(x, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


def damaged_checkpoint(stage: Stage, how: str) -> None:
    """The newest one is passed over by name, on all ranks."""
    out = stage.new()
    expect(stage.run(out, stop_after=6), 0, 0)
    newest = checkpoint.checkpoint_path(out, 6)
    file = sorted(newest.glob("*.safetensors"))[-1]
    if how == "missing":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    else:
        content = bytearray(file.read_bytes())
        content[-9] ^= 1
        file.write_bytes(content)
    results = stage.continues(out, 3)
    says(results[0], str(newest), file.name)


def damaged_data(stage: Stage, how: str) -> None:
    """Missing and empty files end the start; others than before are refused. With the old ones it goes on."""
    out, text = stage.new(), stage.new()
    shutil.copytree(stage.text, text)
    expect(stage.run(out, data__path=text, stop_after=4), 0, 0)
    file = text / "a.txt"
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
        words = f"data path {text} holds no"
    elif how == "empty":
        file.write_bytes(b"")
        words = str(text)
    else:
        file.write_bytes(content[: len(content) // 2])
        words = "the data has changed since"
    results = stage.run(out, data__path=text)
    expect(results, 1, 1)
    says(results[0], words)
    assert saved(out) == [3, 4]
    file.write_bytes(content)
    stage.continues(out, 4, data__path=text)


def dead_worker(stage: Stage) -> None:
    """Of one rank, in the middle of an update; that is finished, and all end in order, with everything saved."""
    out = stage.new()
    results = stage.run(out, on(1, "kill_worker", call=2), workers=1)
    expect(results, 1, 1)
    says(results[1], "rank 1: error: a worker of the data loader has ended", "The same command continues the run")
    done = saved(out)[-1]
    says(results[0], f"error: update {done + 1} failed on rank 1: a worker of the data loader has ended")
    assert 2 <= done < UPDATES
    stage.continues(out, done, workers=1)


def killed_in_step(stage: Stage, rank: int, mode: str = "ddp") -> None:
    out = stage.new()
    results = stage.run(out, on(rank, "kill_in_step", call=5, after=first(out)), distributed__mode=mode)
    expect(results, *((-9, 1) if rank == 0 else (1, -9)))
    says(results[1 - rank], "a rank has ended or hangs", "the same command continues the run")
    assert saved(out) == [3]
    stage.continues(out, 3, mode)


def killed_in_save(stage: Stage, rank: int) -> None:
    """Of the second checkpoint."""
    out = stage.new()
    results = stage.run(out, on(rank, "kill_in_save", call=2))
    expect(results, *((-9, 1) if rank == 0 else (1, -9)))
    assert saved(out) == [3]
    stage.continues(out, 3)


def full_disk(stage: Stage, rank: int) -> None:
    out = stage.new()
    results = stage.run(out, on(rank, "full_disk", call=2))
    expect(results, 1, 1)
    says(results[0], "could not write", "No space left on device", "the last whole one is", "checkpoint-00000003")
    assert saved(out) == [3] and not list(out.glob(".*.tmp"))
    stage.continues(out, 3)


def full_disk_once(stage: Stage, rank: int) -> None:
    """The next save is tried again: the run itself meets no harm."""
    out = stage.new()
    results = stage.run(out, on(rank, "full_disk", call=1, times=1))
    expect(results, 0, 0)
    says(results[0], "could not write", "No space left on device", "trying again")
    assert saved(out) == [6, 8]
    stage.continues(out, 8)


def signal_in_save(stage: Stage, rank: int, number: str) -> None:
    """What schedulers send: the save is finished, what was done since is saved as well, and the exit code is 0."""
    out = stage.new()
    results = stage.run(out, on(rank, "signal_in_save", call=1, number=number))
    expect(results, 0, 0)
    says(results[0], "the same command continues from there")
    assert len(saved(out)) == 2 and saved(out)[0] == 3 and 3 < saved(out)[1] < UPDATES
    stage.continues(out, saved(out)[1])


def nan_on_one_rank(stage: Stage, mode: str) -> None:
    """All skip the update together, and its batches are named; too many of them end the run on all."""
    out = stage.new()
    expect(stage.run(out, on(1, "nan", call=4), distributed__mode=mode), 0, 0)
    assert [row["skipped"] for row in read_metrics(out)] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert all(x.isfinite().all() for x in weights(out).values() if x.is_floating_point())
    (spike,) = read_records(out / "spikes.jsonl")
    assert spike["update"] == 4 and spike["loss"] is None and [b["rank"] for b in spike["batches"]] == [0, 1]
    out = stage.new()
    results = stage.run(out, on(1, "nan", call=4, times=9), distributed__mode=mode, guards__max_nonfinite=1)
    expect(results, 1, 1)
    says(results[0], "update 5: loss or gradient was not finite for 2 updates in a row", "Lower optim.lr")
    assert saved(out) == [3, 5]
    assert read_metrics(out)[-1]["skipped"] == 1


@contextmanager
def writable_again(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        os.chmod(folder, 0o755)


def read_only_folder(stage: Stage) -> None:
    """From the start, and from the fifth update on."""
    above = stage.new()
    above.mkdir()
    os.chmod(above, 0o555)
    with writable_again(above):
        results = stage.run(above / "run", on(None, "no_privileges"))
        expect(results, 1, 1)
        says(results[0], f"out: cannot make the folder {above / 'run'}: Permission denied")
    out = stage.new()
    with writable_again(out):
        results = stage.run(
            out, on(None, "no_privileges"), on(0, "read_only_after", call=5, after=first(out), folder=str(out))
        )
        expect(results, 1, 1)
        says(results[0], "could not write", "Permission denied", "the last whole one is")
        assert saved(out) == [3]
    stage.continues(out, 3)


def wrong_clocks(stage: Stage) -> None:
    """Ranks a day apart, and files whose times say that the older checkpoint is the newer one."""
    out = stage.new()
    skewed = (on(0, "clock", seconds=-86_400.0), on(1, "clock", seconds=86_400.0))
    expect(stage.run(out, *skewed, stop_after=6), 0, 0)
    for update, day in ((3, 86_400), (6, -86_400)):
        for path in (checkpoint.checkpoint_path(out, update), *checkpoint.checkpoint_path(out, update).iterdir()):
            os.utime(path, (time.time() + day,) * 2)
    stage.continues(out, 6)


def hangs(stage: Stage, rank: int, where: str, mode: str = "ddp") -> None:
    """The rank says itself that it hangs and where; nobody waits longer than the time-out and a little."""
    out = stage.new()
    doing, name = {"loader": ("loading data", "hang_in_loader"), "step": ("forward and backward", "hang_in_step")}[
        where
    ]
    results = stage.run(out, on(rank, name, call=5, after=first(out)), distributed__mode=mode)
    expect(results, *[124 if number == rank else (1, 124) for number in range(2)])
    says(
        results[rank],
        f"error: rank {rank} of 2 hangs: no progress for {TIMEOUT} s (distributed.timeout) in update 5, {doing}.",
        "in _hang",
    )
    assert max(r.seconds for r in results) < 4 * TIMEOUT
    assert saved(out) == [3]
    stage.continues(out, 3, mode)


def hanging_disk(stage: Stage) -> None:
    """The thread of one rank does not get its part of a checkpoint written."""
    out = stage.new()
    results = stage.run(out, on(1, "hang_in_save", call=2))
    expect(results, 1, 1)
    says(results[0], "checkpoint-00000006", "distributed.timeout")
    assert saved(out) == [3] and max(r.seconds for r in results) < 4 * TIMEOUT
    stage.continues(out, 3)


SCENARIOS: dict[str, Callable[[Stage], None]] = {
    "ranks with different settings": different_settings,
    "another number of ranks": other_number_of_ranks,
    **{f"{how} file of a checkpoint": partial(damaged_checkpoint, how=how) for how in ("missing", "empty", "corrupt")},
    **{f"{how} data": partial(damaged_data, how=how) for how in ("missing", "empty", "changed")},
    "kill -9 of a loader's worker": dead_worker,
    "kill -9 of rank 0 in a step": partial(killed_in_step, rank=0),
    "kill -9 of rank 1 in a step": partial(killed_in_step, rank=1),
    "kill -9 of rank 1 in a step, shards": partial(killed_in_step, rank=1, mode="fsdp2"),
    "kill -9 of rank 0 in a save": partial(killed_in_save, rank=0),
    "kill -9 of rank 1 in a save": partial(killed_in_save, rank=1),
    "full disk, rank 0": partial(full_disk, rank=0),
    "full disk, rank 1": partial(full_disk, rank=1),
    "full disk for a moment": partial(full_disk_once, rank=1),
    "SIGTERM in a save": partial(signal_in_save, rank=0, number="SIGTERM"),
    "SIGUSR1 in a save": partial(signal_in_save, rank=1, number="SIGUSR1"),
    "NaN on one rank": partial(nan_on_one_rank, mode="ddp"),
    "NaN on one rank, shards": partial(nan_on_one_rank, mode="fsdp2"),
    "read-only folder": read_only_folder,
    "wrong clocks": wrong_clocks,
    "a loader that hangs": partial(hangs, rank=1, where="loader"),
    "a step that hangs": partial(hangs, rank=0, where="step"),
    "a step that hangs, shards": partial(hangs, rank=1, where="step", mode="fsdp2"),
    "a disk that hangs": hanging_disk,
}

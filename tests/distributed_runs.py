"""Run by torchrun: several short runs one after the other, each with what is to go wrong in it. Results to a JSON file.

A case: ``overrides`` of text_demo; ``of_rank`` more of them for one rank; and faults, {"rank": .., "call": ..} each:
``fail`` (the loader raises), ``empty`` (nothing could be read), ``nan`` (a loss), ``signal`` (with its ``number``),
``close`` (the log cannot be closed); and ``skipped``: for each rank the items that its batches, one
after the other, do not have.
"""

import errno
import hashlib
import json
import logging
import os
import signal
import sys
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from d2v_fast.train import load_config, loop, start, step
from d2v_fast.train.distributed import Ranks, join
from d2v_fast.train.errors import DataError, UserError
from d2v_fast.train.watchdog import Watchdog

RANK = int(os.environ["RANK"])
COLLECTIVES = ("sum", "exchange", "gather")


class Fault:
    """Counts calls on its rank; true at the one that is asked for."""

    def __init__(self, wanted: dict | None) -> None:
        self.wanted, self.calls = wanted or {}, 0

    def now(self) -> bool:
        self.calls += 1
        return self.wanted.get("rank") == RANK and self.wanted["call"] == self.calls


def install(case: dict) -> dict:
    """Put the faults of a case in; the functions that were there."""
    kept = {"batches": loop.batches, "backward": step.backward, "close": loop.MetricLog.close}
    kept |= {n: getattr(Ranks, n) for n in COLLECTIVES}
    fail, empty, nan, stop, full = (Fault(case.get(name)) for name in ("fail", "empty", "nan", "signal", "close"))
    skipped = iter(case.get("skipped", {}).get(str(RANK), ()))

    def batches(data, **kwargs):
        data.names = [""] * 200
        for epoch, index, batch in kept["batches"](data, **kwargs):
            batch = replace(batch, skipped=tuple((name, "broken") for name in next(skipped, ())))
            if fail.now():
                raise DataError("the disk is gone")
            yield epoch, index, None if empty.now() else batch

    def backward(output, *args):
        if stop.now():
            os.kill(os.getpid(), getattr(signal, stop.wanted["number"]))
        return kept["backward"](output._replace(loss=output.loss * float("nan")) if nan.now() else output, *args)

    def close(log):
        kept["close"](log)
        if full.now():
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    loop.batches, step.backward, loop.MetricLog.close = batches, backward, close
    for name in COLLECTIVES:

        def counted(self, *args, name=name):
            counts[name] += 1
            return kept[name](self, *args)

        setattr(Ranks, name, counted)
    counts = dict.fromkeys(COLLECTIVES, 0)
    kept["counts"] = counts
    return kept


def restore(kept: dict) -> None:
    loop.batches, step.backward, loop.MetricLog.close = kept["batches"], kept["backward"], kept["close"]
    for name in COLLECTIVES:
        setattr(Ranks, name, kept[name])


def digest(model: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for p in model.parameters():
        found.update(p.detach().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def run(case: dict) -> dict:
    overrides = case["overrides"] + case.get("of_rank", {}).get(str(RANK), [])
    kept = install(case)
    found = {"rank": RANK, "counts": kept["counts"]}
    try:
        config = load_config("text_demo", overrides)
        with (
            Watchdog(config.distributed.timeout) as watchdog,
            join(config.distributed, config.device) as ranks,
            start.started(config, ranks, watchdog) as started,
        ):
            result = loop.Trainer(started).run()
            found |= {"updates": result.updates, "finished": result.finished, "interrupted": result.interrupted}
            found["checkpoint"] = result.checkpoint.name
            if ranks.mode == "ddp":
                found["model"] = digest(started.model)
    except UserError as error:
        found |= {"error": type(error).__name__, "message": str(error), "everywhere": error.everywhere}
    finally:
        restore(kept)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return everyone


def main() -> None:
    cases, target = json.loads(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    loop.plot_curves = lambda folder: None  # takes longer than all the rest of such a run
    logging.basicConfig(level=logging.WARNING, format=f"rank {RANK}: %(message)s")
    dist.init_process_group("gloo", timeout=timedelta(seconds=90))
    found = {name: run(case) for name, case in cases.items()}
    if RANK == 0:
        with open(target, "w", encoding="utf-8") as file:
            json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

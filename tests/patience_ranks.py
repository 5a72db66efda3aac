"""Ranks that come late, fail or die while others wait for hours; argv: a case. Two forked processes meet in each.

Prints a line of JSON for each rank: what it ended with, when it did, and what it has logged.
"""

import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable

import torch

from d2v_fast.train import distributed
from d2v_fast.train.distributed import DistributedConfig, Ranks, join
from d2v_fast.train.errors import DataError

TIMEOUT, LATE, PATIENCE = 3.0, 6.0, 60.0
distributed.SAID_AFTER = 0.5


def opened(ranks: Ranks, action: Callable[[], None]) -> str:
    with ranks.together("opening", PATIENCE):
        action()
    return str(ranks.sum([1]).read())


def late(ranks: Ranks, which: int) -> str:
    return opened(ranks, lambda: time.sleep(LATE if ranks.rank == which else 0))


def dies(ranks: Ranks, which: int) -> str:
    def action() -> None:
        if ranks.rank == which:
            time.sleep(LATE / 6)  # until the other one has made its groups as well
            os._exit(3)

    return opened(ranks, action)


def fails(ranks: Ranks, which: int) -> str:
    def action() -> None:
        if ranks.rank == which:
            raise DataError("no such folder")
        time.sleep(LATE / 3)

    return opened(ranks, action)


def fails_alone(ranks: Ranks, which: int) -> str:
    """The other one is gone before it is asked."""

    def action() -> None:
        if ranks.rank == which:
            time.sleep(LATE / 6)
            raise DataError("no such folder")
        time.sleep(LATE / 12)
        os._exit(3)

    return opened(ranks, action)


def fail(ranks: Ranks, which: int) -> str:
    def action() -> None:
        raise DataError("no such folder")

    return opened(ranks, action)


CASES = {function.__name__: function for function in (late, dies, fails, fails_alone, fail)}


def be_rank(rank: int, port: int, case: str, which: int) -> dict:
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger("d2v_fast").addHandler(handler)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    start, everywhere = time.monotonic(), False
    try:
        with join(DistributedConfig(mode="ddp", timeout=TIMEOUT), "cpu") as ranks:
            start = time.monotonic()
            end = CASES[case](ranks, which)
    except Exception as error:
        end, everywhere = f"{type(error).__name__}: {error}", getattr(error, "everywhere", None)
    seconds = time.monotonic() - start
    return {"rank": rank, "end": end, "everywhere": everywhere, "seconds": seconds, "logged": logged}


def main() -> None:
    torch.set_num_threads(1)
    for one in sys.argv[1:]:
        case, _, which = one.partition("-")
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        pids = []
        for rank in range(2):
            if (pid := os.fork()) == 0:
                line = json.dumps({"case": one, **be_rank(rank, port, case, int(which))})
                os.write(1, f"{line}\n".encode())
                os._exit(0)
            pids.append(pid)
        for pid in pids:
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main()

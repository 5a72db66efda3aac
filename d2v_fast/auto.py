"""``import d2v_fast.auto`` is :func:`d2v_fast.patch_all`; with ``D2V_FAST_DISABLE=1`` nothing but a line in the log.

``D2V_FAST_WITHOUT=encoder,masks`` and ``D2V_FAST_STRICT=1`` are its switches.
"""

import multiprocessing
import os
import sys
from multiprocessing import util

import torch

from d2v_fast.patches.all import patch_all_as_told, report

handle = patch_all_as_told()
_reporter = os.environ.get("D2V_FAST_REPORT")  # the process of the command, whatever that does to its environment
_calls_before = 0  # of the process that this one was forked from


def _rank() -> int:
    """This process among those that train together; 0 where it is alone, or nobody says."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    if (rank := os.environ.get("RANK", "")).isdecimal():
        return int(rank)
    process = multiprocessing.current_process()
    target, arguments = getattr(process, "_target", None), getattr(process, "_args", ())
    if getattr(target, "__module__", "") == "torch.multiprocessing.spawn" and len(arguments) > 1:
        return arguments[1]  # the number that mp.spawn gives to its function
    return 0


def _print_report() -> None:
    """At the end of the command of ``d2v-fast run``, of what a launcher started, and of ``multiprocessing``'s children.

    Of launched processes the first rank prints, if something was replaced there; of children the first rank, if ours
    was called in it. Workers of data loaders are silent.
    """
    if multiprocessing.parent_process() is None:
        wanted = _reporter == str(os.getpid()) or (_rank() == 0 and bool(handle.patches))
    else:
        loads_data = torch.utils.data.get_worker_info() is not None
        wanted = handle.calls > _calls_before and not loads_data and _rank() == 0
    if wanted:
        print(report(), file=sys.stderr, flush=True)


def _at_the_end(_: object = None) -> None:
    """Print then; ``atexit`` does not run in forked children of ``multiprocessing``, which end by ``os._exit``."""
    global _calls_before
    _calls_before = handle.calls
    util.Finalize(None, _print_report, exitpriority=0)


if _reporter is not None:
    _at_the_end()
    util.register_after_fork(handle, _at_the_end)  # forked children forget what was registered

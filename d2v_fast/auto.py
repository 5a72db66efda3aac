"""``import d2v_fast.auto`` is :func:`d2v_fast.patch_all`; with ``D2V_FAST_DISABLE=1`` nothing but a line in the log."""

import atexit
import multiprocessing
import os
import sys

from d2v_fast.patches.all import patch_all, report

handle = patch_all()


def _print_report() -> None:
    """At the end of the command of ``d2v-fast run``, and of the first rank that it launched by a launcher."""
    command = os.environ["D2V_FAST_REPORT"] == str(os.getpid())
    first = os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None
    if command or (first and handle.patches):
        print(report(), file=sys.stderr, flush=True)


if "D2V_FAST_REPORT" in os.environ:
    atexit.register(_print_report)

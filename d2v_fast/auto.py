"""``import d2v_fast.auto`` is :func:`d2v_fast.patch_all`; with ``D2V_FAST_DISABLE=1`` nothing but a line in the log."""

import atexit
import os
import sys

from d2v_fast.patches.all import patch_all, report

handle = patch_all()
if os.environ.get("D2V_FAST_REPORT") == str(os.getpid()):  # this process is the command of ``d2v-fast run``
    atexit.register(lambda: print(report(), file=sys.stderr, flush=True))

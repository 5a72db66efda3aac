"""A process that hangs ends itself, says where it was, and takes its children along; one that is stopped does not."""

import os
import signal
import subprocess
import sys
import time

# argv: what to do. The watchdog of rank 3 of 4 has 1.5 s, and 2 s where it is told so
SCRIPT = """
import multiprocessing, os, signal, sys, threading, time
from d2v_fast.train.watchdog import Watchdog

os.environ |= {"RANK": "3", "WORLD_SIZE": "4"}

def the_place_that_hangs():
    threading.Event().wait(60)

def working(seconds):
    with Watchdog(1.5) as watchdog:
        for update in range(10):
            watchdog.at("loading data", update)
            time.sleep(seconds / 20)
            watchdog.at("forward and backward")
            time.sleep(seconds / 20)

if sys.argv[1] == "hang":
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    child.start()
    print(child.pid, flush=True)
    with Watchdog(1.5) as watchdog:
        watchdog.at("loading data", 17)
        watchdog.at("optimizer")
        the_place_that_hangs()
elif sys.argv[1] == "slow":
    with Watchdog(1.5) as watchdog:
        watchdog.at("meeting", limit=30)
        time.sleep(3)
        print("allowed", flush=True)
        watchdog.at("opening", limit=2)
        the_place_that_hangs()
else:
    working(4)
    print("worked", threading.active_count(), flush=True)
    with Watchdog(1.5) as watchdog:
        watchdog.at("logging", 1)
        os.kill(os.getpid(), signal.SIGSTOP)
        print("woke up", flush=True)
    time.sleep(2)
    print("left alone", flush=True)
"""


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_that_hangs():
    command = [sys.executable, "-c", SCRIPT, "hang"]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 124, done.stderr
    assert time.monotonic() - start < 60
    assert (
        "error: rank 3 of 4 hangs: no progress for 1.5 s (distributed.timeout) in update 17, optimizer. It ends now; "
        "the same command continues from the newest checkpoint. If it was only slow, raise distributed.timeout."
    ) in done.stderr
    assert "in the_place_that_hangs" in done.stderr
    while alive(int(done.stdout)) and time.monotonic() - start < 60:  # it was killed, which takes a moment
        time.sleep(0.05)
    assert time.monotonic() - start < 60


def test_a_phase_may_have_a_limit_of_its_own():
    command = [sys.executable, "-c", SCRIPT, "slow"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 124 and done.stdout == "allowed\n", done.stderr
    assert (
        "error: rank 3 of 4 hangs: no progress for 2 s in update 0, opening. It ends now; the same command continues "
        "from the newest checkpoint. What its threads do:"
    ) in done.stderr


def test_a_process_that_gets_on_or_was_stopped():
    """Longer than its time in all, and then stopped from outside for longer than that."""
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "work"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "worked 1\n"
        while True:
            pid, status = os.waitpid(child.pid, os.WUNTRACED | os.WNOHANG)
            if pid and os.WIFSTOPPED(status):
                break
            time.sleep(0.05)
        time.sleep(3)
        os.kill(child.pid, signal.SIGCONT)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert out == "woke up\nleft alone\n" and child.returncode == 0, err

"""The emulator of csrc/emulator: good kernels run, and every kind of fault in emulator_kernels.cu is caught."""

import ctypes
import re
import sys
from pathlib import Path

import emulator
import numpy as np
import pytest

TESTS = Path(__file__).parent
SIZE = 288
# runs one launcher in a process of its own: LIBRARY NAME ARGUMENT
RUN = f"""
import ctypes, sys
import numpy as np
library = ctypes.CDLL(sys.argv[1])
library.d2v_error_text.restype = ctypes.c_char_p
x, y = np.arange({SIZE}, dtype=np.float32), np.zeros({SIZE}, dtype=np.float32)
code = getattr(library, sys.argv[2])(*(ctypes.c_void_p(a.ctypes.data) for a in (x, y)), int(sys.argv[3]))
print(library.d2v_error_text(code).decode() if code else "done")
"""


def build(kind: str | None) -> Path:
    folder = emulator.ROOT / "build" / f"emulator-kernels-{kind}"
    flags = emulator.SANITIZERS[kind][0] if kind else ["-O2"]
    steps = emulator.kernel_steps([TESTS / "emulator_kernels.cu", emulator.CSRC / "runtime.cu"], folder, flags)
    return emulator.make([*steps, emulator.link(steps, folder / "kernels.so", flags)], folder)


@pytest.fixture(scope="module")
def plain():
    library = ctypes.CDLL(str(build(None)))
    library.d2v_error_text.restype = ctypes.c_char_p
    return library


def run(library, name: str, argument: int, seed: int = 1) -> tuple[np.ndarray, str]:
    """What the launcher wrote, and its error ("" without one)."""
    x, y = np.arange(SIZE, dtype=np.float32), np.zeros(SIZE, dtype=np.float32)
    library.d2v_emulator_seed(ctypes.c_uint64(seed))
    code = getattr(library, name)(*(ctypes.c_void_p(a.ctypes.data) for a in (x, y)), argument)
    return y, library.d2v_error_text(code).decode() if code else ""


REVERSED = np.arange(288, dtype=np.float32).reshape(3, 96)[:, ::-1].ravel()
REUSED = np.concatenate([(np.arange(64) + np.arange(64, 128))[::-1], np.zeros(SIZE - 128 + 64)]).astype(np.float32)


@pytest.mark.parametrize(("name", "expected"), [("reverse", REVERSED), ("reuse", REUSED)])
def test_good_kernels_give_the_same_in_any_order(plain, name, expected):
    for seed in range(1, 6):
        y, error = run(plain, name, 1, seed)
        assert not error
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(("name", "expected"), [("reverse", REVERSED), ("reuse", REUSED)])
def test_a_missing_barrier_shows_in_the_result(plain, name, expected):
    assert any(not np.array_equal(run(plain, name, 0, seed)[0], expected) for seed in range(1, 4))


def test_shared_memory_starts_as_nan(plain):
    y, _ = run(plain, "reverse", 0)
    assert np.isnan(y).any()


def test_the_seed_decides_the_order(plain):
    def order(seed):
        y, counter = np.zeros(64, dtype=np.float32), np.zeros(1, dtype=np.int32)
        plain.d2v_emulator_seed(ctypes.c_uint64(seed))
        assert plain.order(ctypes.c_void_p(y.ctypes.data), ctypes.c_void_p(counter.ctypes.data)) == 0
        return y.tolist()

    assert order(1) == order(1) != order(2)
    assert sorted(order(2)) == list(range(64)) != order(2)


def test_asynchronous_copies_arrive_with_their_wait(plain):
    good, _ = run(plain, "copy", 1)
    np.testing.assert_array_equal(good[:128], np.arange(128, dtype=np.float32))
    early, _ = run(plain, "copy", 0)
    assert np.isnan(early[:128]).all()


FAULTS = [
    (
        "leave",
        37,
        r"deadlock: kernel faults::leave_kernel, block \(\d, 0, 0\), thread 0 waits at a block barrier \(63 of",
    ),
    (
        "diverge",
        1,
        r"kernel faults::diverge_kernel, .* thread \d+: is at a (warp barrier|shuffle), while thread \d+ waits",
    ),
    ("write_shared", 16, r"wrote past the 64 bytes of shared memory"),
    ("write_shared", -1, r"wrote before shared memory"),
    ("matrix_row", 8, r"a matrix row in shared memory is not on its boundary"),
    ("matrix_row", 16, r"thread 31: a matrix row at byte 512 of 512 bytes of shared memory"),
    ("ask_for_shared", 200_000, r"200000 bytes of shared memory, sm_80 has 166912"),
]


@pytest.mark.parametrize(("name", "argument", "message"), FAULTS)
def test_faults_are_named(plain, name, argument, message):
    _, error = run(plain, name, argument)
    assert re.search(message, error), error
    assert run(plain, "reverse", 1)[1] == ""  # the next launch is not affected


@pytest.mark.parametrize(
    ("kind", "name", "argument", "message"),
    [
        ("address", "write_shared", 16, r"heap-buffer-overflow[\s\S]* in faults::write_shared_kernel"),
        ("address", "write_global", SIZE + 1, r"heap-buffer-overflow[\s\S]* in faults::write_global_kernel"),
        ("thread", "reverse", 0, r"data race .*emulator_kernels.cu:\d+ in faults::reverse_kernel"),
        ("thread", "reuse", 0, r"data race .*emulator_kernels.cu:\d+ in faults::reuse_kernel"),
        ("thread", "overlap", 1, r"data race .*emulator_kernels.cu:\d+ in faults::overlap_kernel"),
    ],
)
def test_sanitizers_find(kind, name, argument, message):
    done = emulator.run_sanitized(kind, [sys.executable, "-c", RUN, str(build(kind)), name, str(argument)])
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr


@pytest.mark.parametrize("kind", emulator.SANITIZERS)
@pytest.mark.parametrize(("name", "argument"), [("reverse", 1), ("reuse", 1), ("copy", 1), ("overlap", 0)])
def test_sanitizers_are_content_with_good_kernels(kind, name, argument):
    done = emulator.run_sanitized(kind, [sys.executable, "-c", RUN, str(build(kind)), name, str(argument)])
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.timeout(900)  # a minute on two idle cores, compilation included
@pytest.mark.parametrize(("kind", "seeds"), [("address", 2), ("thread", 1)])  # races show in any order
def test_every_launcher_of_csrc_is_clean(kind, seeds):
    """Out of bounds, undefined behaviour and races, over the cases of emulated_cases_*.py."""
    command = [sys.executable, str(TESTS / "emulated_cases.py"), str(emulator.sanitized(kind)), "--seeds", str(seeds)]
    done = emulator.run_sanitized(kind, command)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    text = "".join(path.read_text() for path in emulator.CSRC.glob("*.h"))
    launchers = set(re.findall(r"^int (d2v_\w+)\(", text, flags=re.MULTILINE))
    assert launchers <= set(done.stdout.splitlines()[-1].split()) and len(launchers) >= 4

"""``csrc/`` compiled for the CPU (``-DD2V_EMULATE``), kept in ``build/`` between runs: ninja makes what has changed."""

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

from d2v_fast.ops import _build, _extension

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
FLAGS = ["-DD2V_EMULATE", "-std=c++17", "-fPIC", "-fno-gnu-unique", "-g1", f"-I{CSRC}"]
# What each sanitizer is for: "address" (and undefined behaviour): out of bounds; "thread": a barrier that is missing.
SANITIZERS = {
    "address": (["-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"], ("libasan.so", "libubsan.so")),
    "thread": (["-O1", "-fsanitize=thread"], ("libtsan.so",)),
}


def kernel_steps(sources: list[Path], folder: Path, flags: list[str]) -> list[_build.Step]:
    """Commands that compile ``.cu`` files as C++, and the emulator's own file."""
    sources = [*sources, CSRC / "emulator" / "control.cpp"]
    return [
        _build.Step(
            folder / f"{source.name}.o",
            ["g++", "-c", "-o", str(folder / f"{source.name}.o"), *FLAGS, *flags, "-x", "c++", str(source)],
        )
        for source in sources
    ]


def link(steps: list[_build.Step], output: Path, flags: list[str]) -> _build.Step:
    objects = tuple(step.output for step in steps)
    command = ["g++", "-shared", "-Wl,-Bsymbolic", "-o", str(output), *map(str, objects), *flags]
    return _build.Step(output, command, objects)


def make(steps: list[_build.Step], folder: Path) -> Path:
    """Run ``steps``, the link last; the path of its output."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    with _build.locked(folder):
        _build.run(steps, folder)
    return steps[-1].output


@cache
def library() -> Path:
    """All of ``csrc/`` with its bindings, for :func:`d2v_fast.ops._extension.load`."""
    folder = ROOT / "build" / f"emulated-torch{torch.__version__}"
    steps = kernel_steps(sorted(CSRC.glob("*.cu")), folder, ["-O2"])
    torch_folder = Path(torch.__file__).parent
    facts = _build.Facts(_build.source_hash(CSRC), "0.0", _build.EMULATED)
    steps += _build.binding_steps(CSRC, folder, "g++", torch_folder, facts)
    return make([*steps, link(steps, folder / "_C.emulated.so", _build.link_flags(torch_folder))], folder)


@cache
def sanitized(kind: str) -> Path:
    """The launchers of ``csrc/`` without torch, compiled for a sanitizer; :func:`run_sanitized` runs them."""
    folder = ROOT / "build" / f"emulated-{kind}"
    flags, _ = SANITIZERS[kind]
    steps = kernel_steps(sorted(CSRC.glob("*.cu")), folder, flags)
    return make([*steps, link(steps, folder / f"launchers-{kind}.so", flags)], folder)


def run_sanitized(kind: str, command: list[str]) -> subprocess.CompletedProcess:
    """Run ``command`` in a process of its own, with the runtime of a sanitizer loaded first."""
    _, runtimes = SANITIZERS[kind]
    paths = [_runtime(name) for name in runtimes]
    environment = {
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
        "LD_PRELOAD": " ".join(paths),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "TSAN_OPTIONS": "exitcode=66",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel: it randomises addresses too widely")
    return done


@cache
def _runtime(name: str) -> str:
    said = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    path = said.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"needs {name} of g++")
    return path


def seed(value: int) -> None:
    """Another order of threads and blocks for what follows; needs the fixture ``emulated``."""
    ctypes.CDLL(str(library())).d2v_emulator_seed(ctypes.c_uint64(value))


def use(monkeypatch) -> None:
    """From here on, CPU tensors take the path of CUDA tensors through the emulated library."""
    _extension.load(library())
    monkeypatch.setattr(_extension, "use_emulated", True)
    seed(1)

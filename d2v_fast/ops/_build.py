"""Compiles ``csrc/`` into the extension ``d2v_fast._C``. Standard library only: ``setup.py`` loads it by its path.

The ``.cu`` files see no torch header and the bindings use the stable ABI of torch 2.11 only, so that one library runs
with every later torch, and loads on a torch without CUDA.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TORCH_TARGET = (2, 11)  # oldest torch whose stable ABI the bindings may use
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"
NAME = "_C.abi3.so"
EMULATED = "emulated"  # stands for the architectures in the facts of a build with D2V_EMULATE
TAIL = 30  # lines of a compiler's output in an error


class BuildError(RuntimeError):
    """The extension cannot be compiled here; the message says why, and ends with the compiler's last lines."""


@dataclass
class Step:
    """One command that makes ``output``; ``depends``: outputs of other steps that it needs."""

    output: Path
    command: list[str]
    depends: tuple[Path, ...] = ()


@dataclass
class Toolchain:
    """What to compile with, and for: ``architectures`` as in TORCH_CUDA_ARCH_LIST."""

    nvcc: str
    cuda: tuple[int, int]  # version of nvcc
    cxx: str
    torch: Path  # folder of the package
    architectures: str


@dataclass(frozen=True)
class Facts:
    """What a library was compiled from and for. Written into the file, so that it can be asked without loading it."""

    sources: str  # source_hash
    cuda: str
    architectures: str

    def __str__(self) -> str:
        return f"d2v_fast._C sources={self.sources} cuda={self.cuda} architectures={self.architectures}"

    @classmethod
    def read(cls, path: Path) -> "Facts | None":
        """The facts in the library ``path``; None when it is not one of ours."""
        found = re.search(rb"d2v_fast\._C sources=(\w+) cuda=([\d.]+) architectures=([^\0]+)\0", path.read_bytes())
        return cls(*(group.decode() for group in found.groups())) if found else None


def source_folder(package: Path) -> Path:
    """``csrc`` of an installed package (inside it) or of a checkout (beside it)."""
    inside = package / "csrc"
    return inside if inside.is_dir() else package.parent / "csrc"


def source_hash(csrc: Path) -> str:
    """Hash over the names and contents of everything that is compiled into the extension."""
    digest = hashlib.sha256()
    names = [path.relative_to(csrc) for path in csrc.rglob("*") if path.suffix in (".cu", ".cuh", ".h", ".cpp")]
    files = sorted(name for name in names if "emulator" not in name.parts)
    if not files:
        raise BuildError(f"no sources in {csrc}")
    for name in files:
        digest.update(f"{name.as_posix()}\0".encode())
        digest.update((csrc / name).read_bytes())
    return digest.hexdigest()[:16]


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME (or CUDA_PATH), else of PATH, else of /usr/local/cuda; None without one."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return shutil.which("nvcc", path=str(Path(os.environ[name]) / "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def nvcc_version(nvcc: str) -> tuple[int, int]:
    """(major, minor) that nvcc says of itself."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    if not found:
        raise BuildError(f"{nvcc} --version names no release: {said[:200]!r}")
    return int(found[1]), int(found[2])


def find_toolchain(torch: Path, torch_cuda: str | None) -> Toolchain:
    """nvcc, g++ and architectures of this machine, or BuildError with the reason.

    ``torch``: folder of the torch package; ``torch_cuda``: its ``torch.version.cuda``.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("nvcc not found: install the CUDA toolkit, or set CUDA_HOME to it")
    cxx = shutil.which(os.environ.get("CXX", "g++"))
    if cxx is None:
        raise BuildError(f"C++ compiler {os.environ.get('CXX', 'g++')} not found; set CXX")
    major, minor = nvcc_version(nvcc)
    if torch_cuda is not None and int(torch_cuda.split(".")[0]) != major:
        raise BuildError(f"{nvcc} is of CUDA {major}.{minor}, but this torch is built for CUDA {torch_cuda}")
    return Toolchain(nvcc, (major, minor), cxx, torch, os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES)


def architecture_flags(architectures: str) -> list[str]:
    """``-gencode`` flags of a list such as "8.0;9.0+PTX" (separators: semicolon, comma or space)."""
    flags = []
    for major, minor, variant, ptx in parse_architectures(architectures):
        number = f"{major}{minor}{variant}"
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def parse_architectures(architectures: str) -> list[tuple[int, int, str, bool]]:
    """(major, minor, "a" or "f" or "", with PTX) for every entry."""
    entries = []
    for name in re.split(r"[;, ]+", architectures.strip("; ,")):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if not found:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: expected entries such as 8.0, 9.0a or 9.0+PTX, got {name!r}")
        if int(found[1]) < 8:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: the kernels need compute capability 8.0 or newer, got {name}")
        entries.append((int(found[1]), int(found[2]), found[3], found[4] is not None))
    return entries


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a library compiled for ``architectures`` runs on a GPU of this compute capability."""
    for major, minor, variant, ptx in parse_architectures(architectures):
        exact = (major, minor) == capability
        if exact or (not variant and (major == capability[0] and minor <= capability[1])):
            return True
        if ptx and not variant and (major, minor) <= capability:
            return True
    return False


def binding_steps(csrc: Path, folder: Path, cxx: str, torch: Path, facts: Facts) -> list[Step]:
    """The commands that compile the bindings, which are the same in the emulated build."""
    target = f"0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
    flags = ["-O3", "-DNDEBUG", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", f"-I{csrc}"]
    flags += ["-isystem", str(torch / "include"), f"-DTORCH_TARGET_VERSION={target}"]
    if facts.architectures == EMULATED:
        flags.append("-DD2V_EMULATE")
    steps = []
    for source in sorted(csrc.glob("*.cpp")):
        output = folder / f"{source.name}.o"
        extra = [f'-DD2V_FACTS="{facts}"'] if source.name == "bindings.cpp" else []
        steps.append(Step(output, [cxx, "-c", str(source), "-o", str(output), *flags, *extra]))
    return steps


def link_flags(torch: Path) -> list[str]:
    """Flags of the linker; libtorch stays needed, because through it the stream of a torch with CUDA is found."""
    keep = ["-Wl,-Bsymbolic", "-Wl,--no-as-needed", f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch"]
    return [*keep, "-Wl,-rpath,$ORIGIN/../torch/lib"]


def extension_steps(csrc: Path, folder: Path, tools: Toolchain, output: Path) -> list[Step]:
    """The commands that compile ``csrc`` into ``output``, with object files in ``folder``."""
    architectures = architecture_flags(tools.architectures)
    threads = str(min(len(architectures), max_jobs()))
    nvcc_flags = ["-O3", "-DNDEBUG", "-std=c++17", "-lineinfo", "--threads", threads, f"-I{csrc}", *architectures]
    steps = []
    for source in sorted(csrc.glob("*.cu")):
        target = folder / f"{source.name}.o"
        command = [tools.nvcc, "-c", str(source), "-o", str(target), *nvcc_flags]
        steps.append(Step(target, [*command, "-Xcompiler", "-fPIC,-fvisibility=hidden,-fno-gnu-unique"]))
    facts = Facts(source_hash(csrc), f"{tools.cuda[0]}.{tools.cuda[1]}", tools.architectures)
    steps += binding_steps(csrc, folder, tools.cxx, tools.torch, facts)
    objects = tuple(step.output for step in steps)
    link = [flag.replace("-Wl,", "-Xlinker=", 1) for flag in link_flags(tools.torch)]
    runtime = ["-cudart=static", "-ldl", "-lrt", "-lpthread"]
    command = [tools.nvcc, "-shared", "--no-device-link", "-o", str(output), *map(str, objects), *link, *runtime]
    return [*steps, Step(output, command, objects)]


def max_jobs() -> int:
    """MAX_JOBS, else the cores of this process."""
    given = os.environ.get("MAX_JOBS")
    if given:
        return max(1, int(given))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(steps: list[Step], folder: Path, verbose: bool = False) -> None:
    """Run ``steps`` (links last) in ``folder``: with ninja, which skips what is up to date, or one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        step.output.parent.mkdir(parents=True, exist_ok=True)
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if ninja:
        (folder / "build.ninja").write_text(_ninja_file(steps), encoding="utf-8")
        _call([ninja, "-C", str(folder), "-j", str(max_jobs()), *(["-v"] if verbose else [])], verbose)
        return
    with ThreadPoolExecutor(max_jobs()) as pool:
        for wave in ([s for s in steps if not s.depends], [s for s in steps if s.depends]):
            list(pool.map(lambda step: _call(step.command, verbose), wave))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create ``folder`` and keep other processes from building in it."""
    import fcntl  # not on every system that imports this module

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _ninja_file(steps: list[Step]) -> str:
    lines = ["ninja_required_version = 1.3"]
    for i, step in enumerate(steps):
        source = [word for word in step.command if word.endswith((".cu", ".cpp"))]
        inputs = [str(path).replace(" ", "$ ") for path in (*source, *step.depends)]
        words = [*step.command, *(["-MD", "-MF", f"{step.output}.d"] if source else [])]
        command = shlex.join(words).replace("$", "$$")
        lines += [f"rule r{i}", f"  command = {command}"]
        if source:
            lines += [f"  depfile = {str(step.output).replace(' ', '$ ')}.d", "  deps = gcc"]
        lines.append(f"build {str(step.output).replace(' ', '$ ')}: r{i} {' '.join(inputs)}")
    return "\n".join(lines) + "\n"


def _call(command: list[str], verbose: bool) -> None:
    if verbose:
        print(shlex.join(command), flush=True)
    pipe = None if verbose else subprocess.PIPE
    done = subprocess.run(command, stdout=pipe, stderr=subprocess.STDOUT if pipe else None, text=True, check=False)
    if done.returncode:
        tail = "\n".join((done.stdout or "").splitlines()[-TAIL:])
        raise BuildError(f"{Path(command[0]).name} failed with exit status {done.returncode}\n{tail}".rstrip())

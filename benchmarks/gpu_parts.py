"""What ``gpu_check.py`` can run: its parts, what each needs, and the command line of each."""

import ast
import importlib.util
import os
import re
import shutil
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from checkout import ADDED, ROOT

TESTS, BENCHMARKS = ROOT / "tests", ROOT / "benchmarks"
STAND_INS = BENCHMARKS / "stand_ins"  # on the path of the tests where the real module is missing
EXTENSION = BENCHMARKS / "extension_check.py"
STEP = BENCHMARKS / "bench_train_step.py"
THROUGH_TORCH = {"torch.utils.tensorboard": "tensorboard"}  # parts of PyTorch that need another package
CUDA = "/usr/local/cuda/bin"  # where the toolkit is when PATH does not say
SANITIZERS = ("memcheck", "racecheck")
TEST_KINDS = ("build", "gpu tests", "sanitizer", "tests")  # in the order in which they run
MEASURED = ("bench", "step")  # kinds that have the device for themselves
RECIPES = ("speech_base", "text_base", "image_base", "speech_large", "image_large")
# measurements, the most telling first; other benchmarks follow
ORDER = ("bench_data2vec_loss", "bench_ema", "step_speech_base", "bench_conv_encoder", "step_text_base")
ORDER += ("step_image_base", "bench_conv0", "bench_strided_conv", "bench_pos_conv", "bench_bias_attention")
ORDER += ("bench_attention", "bench_encoder", "bench_adamw_ema", "bench_layer_norm_gelu", "bench_bias_gelu")
ORDER += ("bench_residual_dropout_layer_norm", "step_speech_large", "step_image_large")
TEST_ORDER = ("conv0", "pos_conv", "strided_conv", "speech_frontend")  # first among tests: what the extension runs
WEIGHTS = {"step": 4.0, "bench": 1.0}  # of the time that measurements share: whole steps compile for long
NO_MEMORY = "GB of GPU memory"  # in the reason of a test that is skipped, after how many
CONTEXT = 2  # GB of any process that uses the device, for its context and small tensors
CODE = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"  # unlike -m pytest, leaves the root off the path


@dataclass
class Part:
    """One process of the check. ``needs``: modules or programs that are not installed, so that it cannot run."""

    name: str
    kind: str  # one of TEST_KINDS or MEASURED
    file: Path
    needs: list[str]
    memory: int = 0  # GB of the device that its largest test needs, of tests that run beside others


@dataclass
class Outcome:
    """What came of a part."""

    name: str
    status: str  # passed, failed, incomplete, skipped, passed before
    seconds: float = 0.0
    detail: str = ""
    commit: str = ""


@cache
def imported_names(source: str) -> frozenset[str]:
    """Modules that the top level of ``source`` imports."""
    names: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names if node.module.startswith("d2v_fast"))
    return frozenset(names)


def missing_modules(file: Path, seen: set[Path] | None = None) -> set[str]:
    """Modules outside of this repository that importing ``file`` needs and that are not installed."""
    seen = set() if seen is None else seen
    if file in seen:
        return set()
    seen.add(file)
    missing: set[str] = set()
    for name in imported_names(file.read_text(encoding="utf-8")):
        own = own_file(name, file.parent)
        if own:
            missing |= missing_modules(own, seen)
        elif not name.startswith("d2v_fast") and not is_installed(name):
            missing.add(name.split(".")[0])
        elif name in THROUGH_TORCH and not is_installed(THROUGH_TORCH[name]):
            missing.add(THROUGH_TORCH[name])
    return missing - stand_ins()


def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module.split(".")[0]) is not None


def stand_ins() -> set[str]:
    """Modules that the tests can do without."""
    return {file.stem for file in STAND_INS.glob("*.py")}


def own_file(module: str, folder: Path) -> Path | None:
    """The source of a module of this repository, seen from a script in ``folder``."""
    parts = module.split(".")
    if parts[:2] == ["d2v_fast", "kernels"]:
        parts = parts[1:]
    elif parts[0] != "d2v_fast":
        if folder not in (TESTS, BENCHMARKS):
            return None
        # tests of the benchmarks put these on the path
        candidates = [where / f"{parts[0]}.py" for where in (folder, BENCHMARKS)]
        return next((p for p in candidates if p.exists()), None)
    path = ROOT.joinpath(*parts)
    candidates = [path.with_suffix(".py"), path / "__init__.py"]
    return next((p for p in candidates if p.exists()), None)


def program(name: str) -> str | None:
    """The path of a program of the CUDA toolkit."""
    return shutil.which(name) or shutil.which(name, path=CUDA)


def extension_parts() -> list[Part]:
    """Compiling the extension, and its kernels under compute-sanitizer."""
    missing = sorted(missing_modules(EXTENSION))
    nvcc, sanitizer = ([] if program(name) else [name] for name in ("nvcc", "compute-sanitizer"))
    build = Part("extension", "build", EXTENSION, missing + nvcc)
    return [build, *(Part(tool, "sanitizer", EXTENSION, missing + nvcc + sanitizer) for tool in SANITIZERS)]


def find_parts() -> list[Part]:
    """The extension, every test file that runs something on a GPU, and every benchmark, the most important first."""
    found = extension_parts()
    for file in sorted(TESTS.glob("test_*.py")):
        source = file.read_text(encoding="utf-8")
        nodes = list(ast.walk(ast.parse(source)))
        gpu = any(isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.gpu" for node in nodes)
        device = any(isinstance(node, ast.Name) and node.id == "DEVICE" for node in nodes)
        if gpu or device:
            needs = sorted(missing_modules(file) | (set() if is_installed("pytest") else {"pytest"}))
            memory = CONTEXT + max(map(int, re.findall(rf"needs (\d+) {NO_MEMORY}", source)), default=0)
            found += [Part(f"gpu-{file.stem}", "gpu tests", file, needs, memory)] if gpu else []
            found += [Part(file.stem, "tests", file, needs)] if device else []
    first = {f"test_{name}": i for i, name in enumerate(TEST_ORDER)}
    found.sort(key=lambda part: (TEST_KINDS.index(part.kind), first.get(part.file.stem, len(first))))
    measured = [(file, file.stem, "bench") for file in sorted(BENCHMARKS.glob("bench_*.py")) if file != STEP]
    measured += [(STEP, f"step_{recipe}", "step") for recipe in RECIPES]
    rank = {name: i for i, name in enumerate(ORDER)}
    measured.sort(key=lambda one: rank.get(one[1], len(ORDER)))
    return found + [Part(name, kind, file, sorted(missing_modules(file))) for file, name, kind in measured]


def select(parts: list[Part], which: str) -> list[Part]:
    """Parts of a kind or with a name like ``which``, and the extension, which they are run with."""
    kinds = {"all": (*TEST_KINDS, *MEASURED), "tests": TEST_KINDS, "bench": MEASURED}
    kinds = (kinds | {"ops": ("bench",), "steps": ("step",)}).get(which, ())
    names = {part.name for part in parts if part.kind in kinds or which in part.name}
    return [part for part in parts if names and (part.kind == "build" or part.name in names)]


def command(part: Part, out: Path, commit: str, seconds: float, resume: bool) -> list[str]:
    """The command line of a part that has ``seconds``."""
    if part.kind == "build":
        return [sys.executable, str(part.file), "build"]
    if part.kind == "sanitizer":
        start = [program("compute-sanitizer"), "--tool", part.name, "--error-exitcode", "9"]
        return [*start, sys.executable, str(part.file), "run"]
    if part.kind in MEASURED:
        start = [sys.executable, str(part.file), "--commit", commit]
        if part.kind == "step":
            start += ["--recipe", part.name.removeprefix("step_"), "--json", str(out / f"train_{part.name}.json")]
        elif part.name == "bench_conv_encoder":  # its other parts are files of their own
            start += ["--parts", "whole", "lengths", "--out", str(out.parent)]
        else:
            start += ["--json", str(out / f"{part.name.removeprefix('bench_')}.json")]
        start += ["--budget", f"{seconds:.0f}"]
        return [*start, "--resume"] if resume else start
    # the project's addopts name a plugin that may be missing
    options = ["-q", "-o", "addopts=", "--strict-markers", "--tb=short", "-rfEs", "-p", "no:cacheprovider"]
    if is_installed("pytest_timeout"):
        options += ["--timeout=120", "--timeout-method=thread"]  # a signal waits for a kernel that never ends
    only = "gpu" if part.kind == "gpu tests" else "not gpu"
    return [sys.executable, "-c", CODE, *options, "-m", only, str(part.file)]


def child_environment() -> dict[str, str]:
    """This process's, with the checkout on the path unless it is what is installed."""
    path = [str(ROOT)] if ADDED else []
    path += [] if all(map(is_installed, stand_ins())) else [str(STAND_INS)]
    inherited = os.environ.get("PYTHONPATH")
    joined = os.pathsep.join(path + ([inherited] if inherited else []))
    result = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"), "PYTHONUNBUFFERED": "1"}
    result.pop("TRITON_INTERPRET", None)
    return {**result, **({"PYTHONPATH": joined} if joined else {})}

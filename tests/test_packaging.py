"""The wheel: built, unpacked away from the source tree, imported and used there; without and with the extension."""

import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from d2v_fast.ops import _build

ROOT = Path(__file__).parent.parent
# looked for, not imported: setuptools refuses to be imported after the standard library's distutils
HAS_SETUPTOOLS = importlib.util.find_spec("setuptools") is not None
pytestmark = pytest.mark.skipif(not HAS_SETUPTOOLS, reason="the wheel is built without isolation: needs setuptools")

USE = """
import importlib.resources, sys, torch
sys.path.insert(0, sys.argv[1])
import d2v_fast, d2v_fast.kernels, d2v_fast.train
assert d2v_fast.__file__.startswith(sys.argv[1]), d2v_fast.__file__
assert d2v_fast.kernels.__file__.startswith(sys.argv[1]), d2v_fast.kernels.__file__
x = torch.randn(3, 8, requires_grad=True)
d2v_fast.masked_smooth_l1(x, torch.randn(3, 8), beta=0.5).backward()
from d2v_fast.train.config import presets
from d2v_fast.ops import _build, _extension
print(len(presets()), d2v_fast.__version__, _build.source_hash(_build.source_folder(_extension.PACKAGE)))
"""
# No torch, as in an isolated build, whatever is installed: this folder is searched first.
NO_TORCH = "raise ImportError('no torch in this environment')\n"


def copy_tracked(source: Path) -> Path:
    """A copy of what git tracks: the build must not depend on, or leave, anything else in the tree."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    return source


def build_wheel(source: Path, out: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", str(source)]
    done = subprocess.run(
        [*command, "--wheel-dir", str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> dict[str, str]:
    """Environment variables of a machine without torch and nvcc."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "torch.py").write_text(NO_TORCH)
    return {"PYTHONPATH": str(folder), "CUDA_HOME": str(folder)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, bare) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    return build_wheel(copy_tracked(out / "source"), out, **bare)


def test_wheel_works_outside_the_tree(wheel, tmp_path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [sys.executable, "-c", USE, str(site)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    count, version, sources = done.stdout.split()
    assert int(count) >= 8 and version in wheel.name
    assert sources == _build.source_hash(ROOT / "csrc")
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [site / "bin/d2v-fast", "info"], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("d2v_fast "), done.stderr


def test_wheel_contents_and_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert "d2v_fast/kernels/ema.py" in names and "d2v_fast/train/presets/speech_base.yaml" in names
    assert "d2v_fast/csrc/bindings.cpp" in names and "d2v_fast/csrc/kernels/simt.cuh" in names
    assert not [n for n in names if n.endswith(".so") or "emulator" in n]
    assert not [n for n in names if n.startswith(("kernels/", "tests/", "benchmarks/"))]
    assert "Requires-Python: >=3.10" in metadata and "License-Expression: MIT" in metadata
    for extra in (
        "train",
        "tables",
        "test",
        "bench",
        "dropin",
        "checkpoints",
        "transformers",
        "fairseq",
        "flash",
        "xformers",
    ):
        assert f"Provides-Extra: {extra}" in metadata
    core = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert sorted(line.split()[1].split(">")[0].rstrip(";") for line in core) == ["numpy", "torch", "triton"]


def setup_py(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, check=False
    )


def test_setup_says_why_there_is_no_extension(bare):
    for want, code in (("auto", 0), ("1", 1)):
        done = setup_py("--name", D2V_FAST_BUILD_CUDA=want, **bare)
        assert done.returncode == code
        assert "torch is not importable in the build environment; use --no-build-isolation" in done.stderr
    assert "D2V_FAST_BUILD_CUDA=1, but torch" in done.stderr
    assert setup_py("--name", D2V_FAST_BUILD_CUDA="0", **bare).stderr == ""
    assert "must be auto, 0 or 1, got 'yes'" in setup_py("--name", D2V_FAST_BUILD_CUDA="yes").stderr


def test_setup_fails_without_nvcc(bare):
    done = setup_py("--name", D2V_FAST_BUILD_CUDA="1", CUDA_HOME=bare["CUDA_HOME"])
    assert done.returncode == 1
    assert "D2V_FAST_BUILD_CUDA=1, but nvcc not found: install the CUDA toolkit, or set CUDA_HOME to it" in done.stderr


LOAD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from d2v_fast.ops import _extension
(library,) = _extension.PACKAGE.glob("_C*.so")
_extension.load(library)
print(library.name, torch.ops.d2v_fast.finds_stream() == (torch.version.cuda is not None), _extension.describe()[0])
"""


@pytest.mark.skipif(_build.find_nvcc() is None, reason="needs nvcc")
def test_wheel_with_the_extension(tmp_path):
    """Compiled for CUDA, and loaded by a torch that may have none. The kernels themselves: test_csrc_offline.py."""
    source = copy_tracked(tmp_path / "source")
    for path in (source / "csrc").iterdir():
        if path.suffix in (".cu", ".cpp") and path.name not in ("runtime.cu", "bindings.cpp"):
            path.unlink()
    wheel = build_wheel(source, tmp_path, D2V_FAST_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0")
    assert "-cp310-abi3-linux" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "site")]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("_C.abi3.so True ") and done.stdout.endswith("GPUs 8.0\n")


def test_source_distribution_has_all_of_csrc(tmp_path):
    source = copy_tracked(tmp_path / "source")
    code = f"import setuptools.build_meta as build; print(build.build_sdist({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=source, check=False)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = {str(path.relative_to(source)) for path in (source / "csrc").rglob("*") if path.is_file()}
    assert tracked <= names and "setup.py" in names and "kernels/rows.py" in names

"""The wheel: built, unpacked away from the source tree, imported and used there."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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
print(len(presets()), d2v_fast.__version__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    # a copy of what git tracks: the build must not depend on, or leave, anything else in the tree
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", str(source)]
    done = subprocess.run([*command, "--wheel-dir", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_wheel_works_outside_the_tree(wheel, tmp_path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [sys.executable, "-c", USE, str(site)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    count, version = done.stdout.split()
    assert int(count) >= 8 and version in wheel.name
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
    assert not [n for n in names if n.startswith(("kernels/", "tests/", "benchmarks/"))]
    assert "Requires-Python: >=3.10" in metadata and "License-Expression: MIT" in metadata
    for extra in ("train", "test", "bench", "transformers", "fairseq", "flash", "xformers"):
        assert f"Provides-Extra: {extra}" in metadata
    core = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert sorted(line.split()[1].split(">")[0].rstrip(";") for line in core) == ["numpy", "torch", "triton"]

"""Packages, the mapping of kernels/ and csrc/ into d2v_fast, and the CUDA extension where it can be built.

D2V_FAST_BUILD_CUDA             auto (default): when torch has CUDA and nvcc is found | 1: build or fail | 0: never
TORCH_CUDA_ARCH_LIST, MAX_JOBS  as for any PyTorch extension; GPUs by default 8.0;9.0+PTX

The extension needs ``pip install --no-build-isolation``: an isolated build has no torch. Metadata is in pyproject.toml.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
WANT = os.environ.get("D2V_FAST_BUILD_CUDA", "auto")


def load_build():
    """``d2v_fast/ops/_build.py`` by its path: importing the package would import torch."""
    spec = importlib.util.spec_from_file_location("d2v_fast_build", ROOT / "d2v_fast" / "ops" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def find_toolchain(build):
    """What to compile with, or BuildError with the reason not to."""
    try:
        import torch
    except ImportError as error:
        raise build.BuildError("torch is not importable in the build environment; use --no-build-isolation") from error
    if torch.version.cuda is None and WANT == "auto":
        raise build.BuildError(f"torch {torch.__version__} is built without CUDA")
    return build.find_toolchain(Path(torch.__file__).parent, torch.version.cuda)


def cuda_extension():
    """(ext_modules, cmdclass); ([], {}) where the extension is not built, with the reason printed."""
    if WANT not in ("auto", "0", "1"):
        raise SystemExit(f"D2V_FAST_BUILD_CUDA must be auto, 0 or 1, got {WANT!r}")
    if WANT == "0":
        return [], {}
    build = load_build()
    try:
        tools = find_toolchain(build)
    except build.BuildError as error:
        if WANT == "1":
            raise SystemExit(f"D2V_FAST_BUILD_CUDA=1, but {error}") from error
        print(f"d2v_fast: CUDA extension not built: {error}", file=sys.stderr)
        return [], {}

    class BuildExtension(build_ext):
        def build_extension(self, ext):
            folder = Path(self.build_temp).resolve() / "csrc"
            output = Path(self.get_ext_fullpath(ext.name)).resolve()
            build.run(build.extension_steps(ROOT / "csrc", folder, tools, output), folder, verbose=True)

    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").iterdir() if p.suffix in (".cpp", ".cu"))
    return [Extension("d2v_fast._C", sources, py_limited_api=True)], {"build_ext": BuildExtension}


ext_modules, cmdclass = cuda_extension()
# one wheel for every Python from 3.10: the library has no Python in it
options = {"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {}
setup(
    packages=[
        *find_packages(include=["d2v_fast", "d2v_fast.*"]),
        "d2v_fast.kernels",
        "d2v_fast.csrc",
        "d2v_fast.csrc.kernels",
    ],
    package_dir={"d2v_fast.kernels": "kernels", "d2v_fast.csrc": "csrc"},
    exclude_package_data={"d2v_fast.csrc": ["emulator/*"]},
    package_data={"d2v_fast.csrc": ["*.cu", "*.cpp", "*.h"], "d2v_fast.csrc.kernels": ["*.cuh"]},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    options=options,
)

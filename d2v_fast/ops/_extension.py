"""The CUDA extension ``d2v_fast._C``: found and loaded when an op first asks for it, never by an import.

It is looked for in the installed package, then in the cache that :func:`build_extension` fills. Without a usable one
the ops take their PyTorch or Triton path, and ``d2v_fast.info()`` says why.
"""

import os
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from d2v_fast.ops import _build

PACKAGE = Path(__file__).parent.parent
REFUSED = "D2V_FAST_NO_EXTENSION"  # environment variable: 1 keeps the extension from being loaded
HINT = 'python -c "import d2v_fast; d2v_fast.build_extension()"'

# Set by tests after load() of the emulated build: CPU tensors then take the path of CUDA tensors.
use_emulated = False


class ExtensionError(RuntimeError):
    """The extension cannot be used; the message says why in one line."""


def ops(x: Tensor):
    """The namespace with the extension's functions for tensors on the device of ``x``; see :func:`takes`."""
    return torch.ops.d2v_fast if x.is_cuda else torch.ops.d2v_fast_emulated


def takes(x: Tensor) -> bool:
    """Whether the extension has kernels for tensors on the device of ``x``."""
    if x.is_cuda:  # asked at every call of an op: not as thorough as available()
        return not _refused() and not _why_not(x.device.index)
    return use_emulated and x.device.type == "cpu"


def emulated() -> bool:
    """Whether CPU tensors run the CUDA sources on the CPU. Only in tests: it is thousands of times slower."""
    return use_emulated


def available(device: int | None = None) -> bool:
    """Whether the extension is loaded and runs on CUDA device ``device`` (default: the current one)."""
    return not why_not(device)


def why_not(device: int | None = None) -> str:
    """Why :func:`available` is false, in one line; empty when it is true."""
    if _refused():
        return f"refused by {REFUSED}={os.environ[REFUSED]}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return _why_not(torch.cuda.current_device() if device is None else device)


def _refused() -> bool:
    return os.environ.get(REFUSED, "0") not in ("", "0")


@cache
def _why_not(device: int) -> str:
    library, reason = _find(torch.cuda.get_device_capability(device))
    if library is None:
        return reason
    try:
        load(library)
    except ExtensionError as error:
        return str(error)
    return "" if torch.ops.d2v_fast.finds_stream() else f"{library} does not find the CUDA stream of this torch"


def require(device: int | None = None) -> None:
    """Raise ExtensionError with the reason unless the extension is available."""
    reason = why_not(device)
    if reason:
        raise ExtensionError(f"the CUDA extension is needed here: {reason}")


def load(path: str | os.PathLike) -> None:
    """Register the functions of the library ``path``, real or emulated; ExtensionError when this torch cannot."""
    path = Path(path).resolve()
    facts = _build.Facts.read(path) if path.is_file() else None
    if facts is None:
        raise ExtensionError(f"{path} is not a d2v_fast extension")
    emulated_build = facts.architectures == _build.EMULATED
    namespace = torch.ops.d2v_fast_emulated if emulated_build else torch.ops.d2v_fast
    if str(path) in torch.ops.loaded_libraries:
        return
    if hasattr(namespace, "finds_stream"):
        raise ExtensionError(f"{path}: another build of the extension is loaded already; restart Python")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ExtensionError(f"{path} does not load with torch {torch.__version__}: {error}") from error


def cache_folder() -> Path:
    """Where :func:`build_extension` keeps libraries: ``$XDG_CACHE_HOME/d2v_fast``, by default ``~/.cache/d2v_fast``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "d2v_fast"


def libraries() -> list[Path]:
    """Every library there is: the package's own, then those of the cache, newest first."""
    cached = sorted(cache_folder().glob(f"*/{_build.NAME}"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [*PACKAGE.glob("_C*.so"), *cached]


def describe() -> list[str]:
    """One line for every library there is: its path, and the CUDA and GPUs that it was built for."""
    lines = []
    for path in libraries():
        facts = _build.Facts.read(path)
        known = f"CUDA {facts.cuda}, GPUs {facts.architectures}" if facts else "not a d2v_fast extension"
        stale = facts and facts.sources != _build.source_hash(_build.source_folder(PACKAGE))
        lines.append(f"{path}: {known}{', compiled from other sources' if stale else ''}")
    return lines


def _find(capability: tuple[int, int]) -> tuple[Path | None, str]:
    """The first library that fits this package, torch and GPU; else None and why the best known one does not."""
    reason = ""
    for path in libraries():
        misfit = _misfit(path, capability)
        if not misfit:
            return path, ""
        reason = reason or f"{path} {misfit}; rebuild with {HINT}"
    where = "" if _build.find_nvcc() else " where the CUDA toolkit (nvcc) is installed"
    return None, reason or f"not built; run {HINT}{where}"


def _misfit(path: Path, capability: tuple[int, int]) -> str:
    facts = _build.Facts.read(path)
    if facts is None:
        return "is not a d2v_fast extension"
    if facts.sources != _build.source_hash(_build.source_folder(PACKAGE)):
        return "was compiled from other sources than this d2v_fast"
    if facts.cuda.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"was built for CUDA {facts.cuda}, this torch for CUDA {torch.version.cuda}"
    if not _build.covers(facts.architectures, capability):
        return f"was built for GPUs {facts.architectures}, this one is {capability[0]}.{capability[1]}"
    return ""


def build_extension(verbose: bool = False, force: bool = False) -> Path:
    """Compile the CUDA extension with the nvcc of this machine, keep it in a per-user cache, load it; returns its path.

    A library already in the cache for these sources, architectures (``TORCH_CUDA_ARCH_LIST``, default 8.0;9.0+PTX) and
    nvcc is taken unless ``force``. ``verbose`` shows the commands and the compilers' output. Processes that build at
    the same time wait for each other. Raises ``d2v_fast.ops._build.BuildError``, with the compiler's last lines.
    """
    torch_folder = Path(torch.__file__).parent
    tools = _build.find_toolchain(torch_folder, torch.version.cuda)
    csrc = _build.source_folder(PACKAGE)
    targets = "-".join(flag.rsplit("=", 1)[1] for flag in _build.architecture_flags(tools.architectures))
    folder = cache_folder() / f"{_build.source_hash(csrc)}-{targets}-cuda{tools.cuda[0]}.{tools.cuda[1]}"
    library = folder / _build.NAME
    with _build.locked(folder):
        found = library.exists() and not force
        if not found:
            with tempfile.TemporaryDirectory(dir=folder) as work:
                fresh = Path(work) / _build.NAME
                _build.run(_build.extension_steps(csrc, Path(work), tools, fresh), Path(work), verbose)
                fresh.replace(library)
    _why_not.cache_clear()
    if hasattr(torch.ops.d2v_fast, "finds_stream") and not (found and str(library) in torch.ops.loaded_libraries):
        warnings.warn(f"{library} is used after a restart: another build is loaded in this process", stacklevel=2)
    else:
        load(library)
    return library

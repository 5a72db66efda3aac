"""The loader of the CUDA extension: which library is taken, and what is said about one that is not. No GPU needed."""

import os
import subprocess
import sys
from pathlib import Path

import emulator
import pytest
import torch

import d2v_fast
from d2v_fast.ops import _build, _extension


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A torch with CUDA 13.0 and an H100, as far as the loader can tell, and an empty cache."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(_extension.REFUSED, raising=False)
    monkeypatch.setattr(_extension, "PACKAGE", tmp_path / "package")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "csrc").symlink_to(emulator.CSRC)
    _extension._why_not.cache_clear()
    yield
    _extension._why_not.cache_clear()


def put(name: str, sources: str = "", cuda: str = "13.0", architectures: str = "8.0;9.0+PTX") -> Path:
    """A file with the facts of a library, and nothing else, in the cache. ``sources``: by default those of csrc/."""
    sources = sources or _build.source_hash(emulator.CSRC)
    path = _extension.cache_folder() / name / _build.NAME
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF" + str(_build.Facts(sources, cuda, architectures)).encode() + b"\0")
    return path


def test_every_source_counts(tmp_path):
    """A library that was compiled from other sources is not taken, whichever of them has changed."""
    names = ("launch.h", "x.cu", "x_bindings.cpp", "kernels/x.cuh", "emulator/simt.h")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("// one")
    seen = [_build.source_hash(tmp_path)]
    for name in names:
        (tmp_path / name).write_text("// two")
        seen.append(_build.source_hash(tmp_path))
    assert len(set(seen)) == 5 and seen[-1] == seen[-2]  # the emulator is not compiled into it
    (tmp_path / "launch.h").rename(tmp_path / "other.h")
    assert _build.source_hash(tmp_path) not in seen
    with pytest.raises(_build.BuildError, match="no sources in"):
        _build.source_hash(tmp_path / "nothing")


def test_this_machine(monkeypatch):
    monkeypatch.delenv(_extension.REFUSED, raising=False)
    if torch.cuda.is_available():
        pytest.skip("says why there is no extension on a machine without a GPU")
    reason = _extension.why_not()
    assert reason == "torch finds no CUDA device" or reason.endswith("is built without CUDA")
    assert not _extension.available() and not _extension.takes(torch.ones(2))
    assert f"not used: {reason}" in d2v_fast.info()
    with pytest.raises(_extension.ExtensionError, match="the CUDA extension is needed here: torch"):
        _extension.require()


def test_refused(gpu, monkeypatch):
    monkeypatch.setenv(_extension.REFUSED, "1")
    assert _extension.why_not() == "refused by D2V_FAST_NO_EXTENSION=1"
    monkeypatch.setenv(_extension.REFUSED, "0")
    assert _extension.why_not().startswith("not built")


def test_not_built(gpu, monkeypatch):
    monkeypatch.setattr(_build, "find_nvcc", lambda: "/usr/local/cuda/bin/nvcc")
    assert _extension.why_not() == f"not built; run {_extension.HINT}"
    _extension._why_not.cache_clear()
    monkeypatch.setattr(_build, "find_nvcc", lambda: None)
    assert _extension.why_not().endswith("where the CUDA toolkit (nvcc) is installed")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"sources": "0" * 16}, "was compiled from other sources than this d2v_fast"),
        ({"cuda": "12.8"}, "was built for CUDA 12.8, this torch for CUDA 13.0"),
        ({"architectures": "10.0"}, "was built for GPUs 10.0, this one is 9.0"),
    ],
)
def test_a_library_that_does_not_fit(gpu, facts, message):
    path = put("other", **facts)
    reason = _extension.why_not()
    assert reason == f"{path} {message}; rebuild with {_extension.HINT}" and not _extension.available()
    report = d2v_fast.info()
    assert reason in report and f"{path}: CUDA" in report
    assert "op conv0_norm_gelu             CUDA: PyTorch" in report  # the fallback is visible


def test_a_file_of_another_kind(gpu):
    path = put("other")
    path.write_bytes(b"something else")
    assert f"{path} is not a d2v_fast extension" in _extension.why_not()
    assert f"{path}: not a d2v_fast extension" in d2v_fast.info()


def test_a_library_that_does_not_load(gpu):
    path = put("broken")
    assert f"{path} does not load with torch {torch.__version__}" in _extension.why_not()
    with pytest.raises(_extension.ExtensionError, match="does not load with torch"):
        _extension.load(path)


def test_load_refuses_other_files(tmp_path):
    with pytest.raises(_extension.ExtensionError, match=r"nothing\.so is not a d2v_fast extension"):
        _extension.load(tmp_path / "nothing.so")


def test_the_first_that_fits_is_taken(gpu):
    old, new, misfit = put("old"), put("new"), put("misfit", cuda="12.8")
    for age, path in enumerate((misfit, new, old)):
        os.utime(path, (1e9 - age, 1e9 - age))
    assert _extension.libraries() == [misfit, new, old]
    assert _extension._find((9, 0)) == (new, "")
    own = _extension.PACKAGE / _build.NAME
    own.write_bytes(new.read_bytes())
    assert _extension._find((9, 0)) == (own, "")


def test_which_gpus_a_library_covers():
    covered = {
        capability: _build.covers("8.0;9.0+PTX", capability)
        for capability in [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
    }
    assert covered == {**dict.fromkeys(covered, True), (7, 5): False}
    assert _build.covers("9.0a", (9, 0)) and not _build.covers("9.0a+PTX", (10, 0))
    assert not _build.covers("8.6", (8, 0)) and not _build.covers("8.0", (9, 0))


def test_architecture_flags():
    assert _build.architecture_flags("8.0; 9.0a+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    with pytest.raises(_build.BuildError, match=r"TORCH_CUDA_ARCH_LIST: expected entries such as .*, got 'Hopper'"):
        _build.architecture_flags("Hopper")
    with pytest.raises(_build.BuildError, match=r"need compute capability 8.0 or newer, got 7.5"):
        _build.architecture_flags("7.5")


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(_build.BuildError, match="nvcc not found: install the CUDA toolkit, or set CUDA_HOME"):
        d2v_fast.build_extension()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(_build.BuildError, match="C\\+\\+ compiler no-such-compiler not found; set CXX"):
        d2v_fast.build_extension()
    monkeypatch.delenv("CXX")
    with pytest.raises(_build.BuildError, match=r"is of CUDA 13.0, but this torch is built for CUDA 12.8"):
        _build.find_toolchain(tmp_path, "12.8")


FAKE_NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo 'Cuda compilation tools, release 13.0, V13.0.88';;
  *-shared*) for word; do [ "$last" = -o ] && cp "$LIBRARY" "$word"; last=$word; done;;
  *) if [ -n "$FAIL" ]; then echo "x.cu(3): error: something is undefined" >&2; exit 2; fi
     for word; do [ "$last" = -o ] && : > "$word"; [ "$last" = -MF ] && : > "$word"; last=$word; done;;
esac
exit 0
"""


@pytest.fixture
def fake_nvcc(monkeypatch, tmp_path):
    """An nvcc that compiles nothing and links by copying a library that is there: the rest of build_extension runs."""
    for name in ("nvcc", "g++"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(FAKE_NVCC)
        path.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "bin" / "g++"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LIBRARY", str(emulator.library()))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


@pytest.mark.parametrize("with_ninja", [True, False])
def test_build_is_kept_and_reused(fake_nvcc, monkeypatch, with_ninja):
    if not with_ninja:
        which = _build.shutil.which
        monkeypatch.setattr(_build.shutil, "which", lambda name, **k: None if name == "ninja" else which(name, **k))
    loaded = []
    monkeypatch.setattr(_extension, "load", loaded.append)
    path = d2v_fast.build_extension()
    sources = _build.source_hash(emulator.CSRC)
    assert path == _extension.cache_folder() / f"{sources}-sm_80-sm_90-compute_90-cuda13.0" / _build.NAME
    assert loaded == [path] and [p.name for p in path.parent.iterdir() if p.is_dir()] == []
    before = path.stat().st_mtime_ns, path.stat().st_ino
    assert d2v_fast.build_extension() == path
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
    d2v_fast.build_extension(force=True)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) != before
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert d2v_fast.build_extension().parent.name.endswith("-sm_90a-cuda13.0")


@pytest.mark.parametrize("with_ninja", [True, False])
def test_a_failed_build_says_what_the_compiler_said(fake_nvcc, monkeypatch, with_ninja):
    if not with_ninja:
        which = _build.shutil.which
        monkeypatch.setattr(_build.shutil, "which", lambda name, **k: None if name == "ninja" else which(name, **k))
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(_build.BuildError, match=r"failed with exit status \d\n(.*\n)*.*error: something is undefined"):
        d2v_fast.build_extension()
    assert not list(_extension.cache_folder().glob(f"*/{_build.NAME}"))


def test_emulated_library(emulated):
    x = torch.ones(2)
    assert _extension.takes(x) and _extension.emulated()
    assert _extension.ops(x) is torch.ops.d2v_fast_emulated and torch.ops.d2v_fast_emulated.finds_stream()
    _extension.load(emulator.library())  # once more is nothing
    assert not _extension.available() or torch.cuda.is_available()


GARBAGE = {
    "Tensor": torch.zeros(1, dtype=torch.uint8),
    "List[Tensor]": [],
    "Optional[Tensor]": None,
    "int": 1,
    "float": 1.0,
    "bool": False,
}


def test_bindings_check_their_arguments(emulated):
    """Every function of the extension names itself and the argument, instead of reading what is not there."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("d2v_fast_emulated::")]
    functions = sorted(name.partition("::")[2] for name in names if name.endswith("_cuda"))
    assert len(functions) >= 4
    for name in functions:
        function = getattr(torch.ops.d2v_fast_emulated, name)
        arguments = function.default._schema.arguments
        values = [GARBAGE[str(argument.type)] for argument in arguments]
        with pytest.raises(RuntimeError, match=rf"^{name}: ({'|'.join(a.name for a in arguments)}) must "):
            function(*values)


def test_emulated_library_is_off_elsewhere():
    assert not _extension.takes(torch.ones(2))


def test_info_does_not_load_anything():
    code = "import d2v_fast; d2v_fast.info(); import torch; print([p for p in torch.ops.loaded_libraries])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=emulator.ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]" or torch.cuda.is_available()

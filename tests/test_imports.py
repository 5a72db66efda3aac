"""Importing is free of side effects, and imports between the rooms go one way only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# each room, and the rooms it may import from (docs/architecture.md)
ARROWS = {
    "kernels": set(),
    "ops": {"kernels"},
    "nn": {"ops"},
    "optim": {"ops"},
    "errors": set(),
    "files": set(),
    "launch": {"errors"},
    "auto": {"patches"},
    "checkpoints": {"nn", "ops", "errors", "files"},
    "patches": {"nn", "ops", "checkpoints", "errors", "files", "launch"},
    "train": {"nn", "ops", "optim", "checkpoints", "errors", "files"},
    "demo": {"train", "nn"},
}
# the model's own methods that load and save it import the formats when they are called
EXCEPTIONS = {"d2v_fast/nn/interchange.py": {"checkpoints"}}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def room(module: str) -> str | None:
    """The room of ``d2v_fast.<room>...``; None outside of the package."""
    parts = module.split(".")
    return parts[1] if parts[0] == "d2v_fast" and len(parts) > 1 else None


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("name", ARROWS)
def test_arrows(name):
    folder = ROOT / name if name == "kernels" else ROOT / "d2v_fast" / name
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    assert files
    for path in files:
        for module in imports(path):
            target = room(module)
            rooms = ARROWS.get(name, set()) | EXCEPTIONS.get(str(path.relative_to(ROOT)), set())
            assert target in rooms | {name, None, "__version__"}, f"{path} imports {module}"
            if name in ("kernels", "ops", "nn", "optim"):
                top = module.split(".")[0]
                allowed = {"torch", "triton", "numpy", "d2v_fast"} | sys.stdlib_module_names
                assert top in allowed, f"{path} imports {module}, which is not a core dependency"


def test_import_is_clean():
    code = (
        "import sys, torch, d2v_fast\n"
        "bad = [m for m in ('triton', 'd2v_fast._C', 'omegaconf', 'd2v_fast.ops') if m in sys.modules]\n"
        "print(bad, torch.cuda.is_initialized())"
    )
    assert run(code) == "[] False"


def test_ops_do_not_import_triton():
    assert (
        run("import sys, torch; import d2v_fast.nn\nprint('triton' in sys.modules or torch.cuda.is_initialized())")
        == "False"
    )


def test_the_drop_in_does_not_import_the_compiler():
    """Which takes a second or two."""
    assert run("import sys, torch; import d2v_fast.auto\nprint('torch._dynamo' in sys.modules)") == "False"


def test_import_adds_little_to_torch():
    code = "import time, torch\nt = time.perf_counter()\nimport d2v_fast\nprint(time.perf_counter() - t)"
    assert min(float(run(code)) for _ in range(2)) < 0.2


def test_public_names():
    import d2v_fast

    assert sorted(d2v_fast.__all__) == [
        "Data2Vec",
        "Data2VecConfig",
        "Data2VecPretraining",
        "__version__",
        "adamw_ema_",
        "beit_loss",
        "beit_targets",
        "bias_attention",
        "bias_gelu",
        "build_extension",
        "conv0_norm_gelu",
        "data2vec_loss",
        "ema_update_",
        "info",
        "l2_norm",
        "layer_norm_gelu",
        "layer_targets",
        "load_beit",
        "load_fairseq",
        "load_transformers",
        "masked_smooth_l1",
        "patch",
        "patch_all",
        "pos_conv",
        "residual_dropout_layer_norm",
        "strided_conv",
    ]
    for name in d2v_fast.__all__:
        assert getattr(d2v_fast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = d2v_fast.nothing


def test_kernels_folder_is_not_a_package_of_its_own():
    done = subprocess.run(
        [sys.executable, "-c", "import kernels"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode != 0 and "import d2v_fast.kernels, not kernels" in done.stderr


def test_info_reports_without_a_gpu():
    import d2v_fast

    report = d2v_fast.info()
    for word in ("torch", "triton", "op masked_smooth_l1", "attention", "threads"):
        assert word in report


def test_info_says_what_runs_without_triton(monkeypatch):
    from d2v_fast import _info

    monkeypatch.setattr(_info.importlib.util, "find_spec", lambda name: None)
    report = {line.split()[1]: line for line in _info.info().splitlines() if line.startswith("op ")}
    assert "CUDA: PyTorch multi-tensor operators, slower" in report["ema_update_"]
    assert "CUDA: NOT AVAILABLE (install triton)" in report["layer_targets"]

"""patch_all(): once, its switches and its report; real classes of fairseq and Transformers."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import toy_modules
from toy_modules import CLASSES, load

from d2v_fast.errors import UserError
from d2v_fast.launch.switches import PARTS
from d2v_fast.patches import PatchError
from d2v_fast.patches import all as everywhere
from d2v_fast.patches.all import patch_all, report


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Modules of somebody's, toy_modules.py; they are forgotten afterwards."""
    with toy_modules.importable(tmp_path, monkeypatch):
        yield tmp_path


@pytest.fixture
def off(monkeypatch):
    assert everywhere._active is None
    monkeypatch.setattr(everywhere, "_latest", None)
    monkeypatch.setattr(everywhere, "_known_classes", lambda which: CLASSES if which == "CLASSES" else {})
    yield
    if everywhere._active is not None:
        everywhere._active.revert()


def test_patch_all_twice_is_once(off, folder):
    assert report() == "d2v_fast: patch_all() is off"
    with patch_all() as first:
        assert patch_all() is first
        assert "no supported class was imported" in report()
        load("toy_model").ToyModel().forward(3)
        assert report() == str(first) and "ToyModel.forward" in report()
        with pytest.raises(PatchError, match="is in force without switches and was called with strict=True: revert it"):
            patch_all(strict=True)
    assert everywhere._active is None and load("toy_model").ToyModel().forward(3) == 3


def test_switches(off, folder):
    with patch_all(encoder=False, strict=True) as first:
        assert load("toy_model").ToyModel().forward(3) == 3
        assert [s.reason for patch in first.patches for s in patch.skipped] == ["encoder=False"]
        assert patch_all() is patch_all(strict=True, encoder=False) is first
        expected = "in force with encoder=False, strict=True and was called with encoder=False, masks=False: revert"
        with pytest.raises(PatchError, match=expected):
            patch_all(encoder=False, masks=False)
    with patch_all(masks=False):
        assert load("toy_model").ToyModel().forward(3) == 6


def test_switches_that_there_are_not(off):
    with pytest.raises(TypeError, match=r"'mask' is no switch \(nearest: masks\); switches are ema, loss, .*metrics"):
        patch_all(mask=False)
    with pytest.raises(TypeError, match=r"encoder must be True or False, got 'no' \(str\)"):
        patch_all(encoder="no")
    with pytest.raises(TypeError, match="strict must be True or False, got 1"):
        patch_all(strict=1)
    assert everywhere._active is None


def test_switches_of_the_environment(off, folder, monkeypatch):
    monkeypatch.setenv("D2V_FAST_WITHOUT", "masks, encoder")
    monkeypatch.setenv("D2V_FAST_STRICT", "1")
    with everywhere.patch_all_as_told() as patched:
        assert patched.options.strict and set(PARTS) - patched.options.parts == {"encoder", "masks"}
        assert load("toy_model").ToyModel().forward(3) == 3
    monkeypatch.setenv("D2V_FAST_WITHOUT", "encodr")
    with pytest.raises(
        UserError, match=r"D2V_FAST_WITHOUT: 'encodr' is no switch \(nearest: encoder\); switches are ema,"
    ):
        everywhere.patch_all_as_told()
    monkeypatch.setenv("D2V_FAST_WITHOUT", "")
    monkeypatch.setenv("D2V_FAST_STRICT", "yes")
    with pytest.raises(UserError, match="D2V_FAST_STRICT must be 1 or 0, got 'yes'"):
        everywhere.patch_all_as_told()


def test_report_table(off, folder):
    with patch_all() as patched:
        (folder / "a" / "toy_model.py").write_text("")
        load("a.toy_model")
        model = load("toy_model").ToyModel()
        idle = "; nothing of ours was called in this process (children print their own table)"
        assert str(patched).splitlines()[:2] == [
            f"d2v_fast: 1 replaced, 1 left as they were{idle}",
            "  replaced    1 x ToyModel.forward  encoder    twice as much  never called",
        ]
        assert [model.forward(x) for x in (3, -3, -4)] == [6, -3, -4]
        del model
        assert str(patched).splitlines() == [
            "d2v_fast: 1 replaced, 1 left as they were",
            "  replaced    1 x ToyModel.forward  encoder    twice as much  3 calls",
            "  left        1 x ToyModel          all        there is no such class in this version",
            "  upstream    2 x ToyModel.forward  of calls   negative",
        ]
    assert report().splitlines() == [
        "d2v_fast, taken back: 1 were replaced, 1 left as they were",
        "  was replaced    1 x ToyModel.forward  encoder    twice as much  3 calls",
        "  left            1 x ToyModel          all        there is no such class in this version",
        "  upstream        2 x ToyModel.forward  of calls   negative",
    ]
    assert str(patched) == report()


def test_disabled(off, folder, monkeypatch, caplog):
    monkeypatch.setenv("D2V_FAST_DISABLE", "1")
    before = list(sys.meta_path)
    with patch_all() as patched:
        assert "D2V_FAST_DISABLE=1" in caplog.text and "D2V_FAST_DISABLE=1" in str(patched)
        assert load("toy_model").ToyModel().forward(3) == 3
        assert sys.meta_path == before and "D2V_FAST_DISABLE=1" in report()


def run(code: str, cwd: Path | None = None, **environment) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_auto_costs_little_and_imports_no_framework():
    out = run("""
        import sys, time, torch
        before = set(sys.modules)
        start = time.process_time()  # whatever else this machine does
        import d2v_fast.auto
        print(time.process_time() - start)
        tops = {name.partition(".")[0] for name in set(sys.modules) - before}
        heavy = {"d2v_fast.nn", "d2v_fast.ops", "d2v_fast.checkpoints"} & set(sys.modules)
        print(sorted(tops - sys.stdlib_module_names), sorted(heavy))
    """)
    seconds, names = out.splitlines()
    assert float(seconds) < 0.3 and names == "['d2v_fast'] []"


def test_real_classes(tmp_path):
    """Imported before, and a user_dir's later. Those of spawned workers are in test_launcher.py."""
    fairseq = pytest.importorskip("fairseq", reason="needs ve-fairseq (requirements/peers.txt)")
    source = Path(fairseq.__file__).parent / "examples/data2vec/models/data2vec_audio.py"
    for name in ("data2vec/models/data2vec_audio.py", "data2vec/__init__.py", "data2vec/models/__init__.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source.read_text() if path.name == source.name else "")
    code = """
        from types import SimpleNamespace
        from fairseq import utils
        from fairseq.models import MODEL_REGISTRY
        from fairseq.modules import EMAModule
        theirs = EMAModule._step_internal
        import d2v_fast
        with d2v_fast.patch_all(strict=True) as handle:
            print(EMAModule._step_internal is not theirs and "EMAModule._step_internal" in str(handle))
            utils.import_user_module(SimpleNamespace(user_dir=USER_DIR))
            model = MODEL_REGISTRY["data2vec_audio"]
            print(model.__module__, hasattr(model.forward, "__d2v_fast__"))
        print(EMAModule._step_internal is theirs, hasattr(model.forward, "__d2v_fast__"))
    """
    out = run(code.replace("USER_DIR", repr(str(tmp_path / "data2vec"))))
    assert out.splitlines() == ["True", "data2vec.models.data2vec_audio True", "True False"]


@pytest.mark.parametrize("disabled", ["0", "1"])
def test_attention_by_name_for_models_that_are_not_replaced(tmp_path, disabled):
    pytest.importorskip("transformers", reason="needs transformers (requirements/peers.txt)")
    code = """
        import d2v_fast.auto, torch
        from transformers import BertConfig, BertModel
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        model = BertModel._from_config(BertConfig(vocab_size=20, **sizes), attn_implementation="d2v_fast").eval()
        found = model(torch.arange(6)[None]).last_hidden_state
        model.set_attn_implementation("eager")
        print(torch.allclose(found, model(torch.arange(6)[None]).last_hidden_state, atol=1e-5))
    """
    # elsewhere: transformers takes our kernels/ in the working directory for another package
    assert run(code, tmp_path, D2V_FAST_DISABLE=disabled).splitlines() == ["True"]


def test_patches_are_found_without_an_import_of_their_own():
    assert run("import d2v_fast\nprint(d2v_fast.patches.compare.__name__)") == "compare"

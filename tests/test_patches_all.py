"""Classes that are imported before and after patch_all(), under any name, and what is left when it is taken back."""

import importlib
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from d2v_fast.errors import UserError
from d2v_fast.launch.hooks import AfterImport
from d2v_fast.launch.switches import PARTS
from d2v_fast.patches import PatchError
from d2v_fast.patches import all as everywhere
from d2v_fast.patches._core import Options, Seam, fall_back, state_of
from d2v_fast.patches.all import PatchAll, patch_all, report

MODEL = """
class ToyModel:
    def forward(self, x):
        return x

class Helper:
    def forward(self, x):
        return -x
"""


def doubled(original, options):
    def forward(self, x):
        state_of(self).cache["calls"] = state_of(self).cache.get("calls", 0) + 1
        if x < 0:
            fall_back(self, "forward", "negative", options)
            return original(self, x)
        return 2 * original(self, x)

    return forward


SEAM = Seam("encoder", "forward", doubled, "twice as much")
CLASSES = {"fairseq": {"toy_model.ToyModel": lambda kind: [SEAM]}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """On sys.path: toy_model.py, and the same file in packages a and b.models; forgotten afterwards."""
    for name in ("toy_model", "a/toy_model", "b/models/toy_model", "not_toy_model"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def handle():
    made = []

    def start(classes=CLASSES, **options):
        made.append(PatchAll(classes, Options(**options)))
        made[-1].start()
        return made[-1]

    yield start
    for each in reversed(made):
        each.revert()


def load(name):
    return importlib.import_module(name)


def test_before_and_after(folder, handle):
    early = load("toy_model").ToyModel()
    assert early.forward(3) == 3
    patched = handle()
    late = load("b.models.toy_model").ToyModel()
    assert (early.forward(3), late.forward(3), load("a.toy_model").ToyModel().forward(3)) == (6, 6, 6)
    assert load("not_toy_model").ToyModel().forward(3) == 3
    assert load("toy_model").Helper().forward(3) == -3
    assert [p.title for p in patched.patches] == ["toy_model", "b.models.toy_model", "a.toy_model"]


def test_revert_leaves_nothing(folder, handle):
    before = list(sys.meta_path)
    module = load("toy_model")
    theirs, kept = module.ToyModel.forward, dict(vars(module.ToyModel))
    patched = handle()
    assert module.ToyModel.forward is not theirs
    patched.revert()
    assert dict(vars(module.ToyModel)) == kept and sys.meta_path == before
    assert load("a.toy_model").ToyModel().forward(3) == 3
    patched.revert()


def test_modules_look_as_if_nobody_watched(folder, handle):
    handle()
    module = load("toy_model")
    assert type(module.__loader__) is type(module.__spec__.loader) is type(load("not_toy_model").__loader__)
    spec = importlib.util.find_spec("a.toy_model")
    assert spec.loader.get_source("a.toy_model") == MODEL  # others may ask the loader before it runs


def test_reload(folder, handle):
    handle()
    module = load("toy_model")
    first = module.ToyModel
    importlib.reload(module)
    assert module.ToyModel is not first and module.ToyModel().forward(3) == 6


def test_failing_import_is_not_changed(folder, handle):
    (folder / "a" / "toy_model.py").write_text("class ToyModel: pass\nraise OSError('theirs')")
    handle()
    for _ in range(2):
        with pytest.raises(OSError, match="theirs"):
            load("a.toy_model")
    assert "a.toy_model" not in sys.modules
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'c\.toy_model'|No module named 'c'"):
        load("c.toy_model")
    (folder / "a" / "toy_model.py").write_text(MODEL)
    importlib.invalidate_caches()
    assert load("a.toy_model").ToyModel().forward(3) == 6


def test_threads(folder, handle):
    count = 16
    for i in range(count):
        (folder / f"thread{i}").mkdir()
        (folder / f"thread{i}" / "toy_model.py").write_text("import toy_model\n" + MODEL)
    importlib.invalidate_caches()
    patched, results = handle(), []
    start = threading.Barrier(count)

    def work(i):
        start.wait()
        results.append(load(f"thread{i}.toy_model").ToyModel().forward(3))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [6] * count and len(patched.patches) == count + 1


def test_two_finders_ask_each_other(folder):
    seen = []
    finders = [AfterImport(lambda name: name == "toy_model", lambda module, i=i: seen.append(i)) for i in range(3)]
    for finder in finders:
        finder.install()
    try:
        load("toy_model")
    finally:
        for finder in finders:
            finder.remove()
            finder.remove()
    assert sorted(seen) == [0, 1, 2]


def test_class_that_is_gone(folder, handle):
    (folder / "toy_model.py").write_text("ToyModel = None")
    patched = handle()
    load("toy_model")
    (skipped,) = patched.patches[0].skipped
    assert (skipped.name, skipped.reason) == ("ToyModel", "there is no such class in this version")


def test_strict_fails_the_import_and_changes_nothing(folder, handle):
    def known(kind):
        return [SEAM, Seam("ema", "no_such_method", doubled, "nothing")]

    handle({"toy": {"toy_model.ToyModel": known}}, strict=True)
    with pytest.raises(PatchError, match="no_such_method"):
        load("a.toy_model")
    assert "a.toy_model" not in sys.modules


def test_strict_at_the_start_takes_everything_back(folder):
    module, before = load("toy_model"), list(sys.meta_path)
    other = load("a.toy_model")
    other.ToyModel.forward = None
    with pytest.raises(PatchError, match="no such method"):
        PatchAll(CLASSES, Options(strict=True)).start()
    assert module.ToyModel().forward(3) == 3 and sys.meta_path == before


def test_wrapped_by_somebody_else(folder, handle):
    module = load("toy_model")
    patched = handle()
    ours = module.ToyModel.forward
    module.ToyModel.forward = lambda self, x: ours(self, x) + 1
    other = load("a.toy_model").ToyModel()
    with pytest.raises(PatchError, match="take that back first"):
        patched.revert()
    assert other.forward(3) == 6 and load("b.models.toy_model").ToyModel().forward(3) == 6  # all is in force
    module.ToyModel.forward = ours
    patched.revert()
    assert module.ToyModel().forward(3) == 3


REGISTRY = """
MODEL_REGISTRY = {}
def register_model(name, dataclass=None):
    def register(kind):
        return MODEL_REGISTRY.setdefault(name, kind)
    return register
"""
REGISTERED = """
from fairseq.models import register_model
@register_model("toy", dataclass=None)
class ToyModel:
    def forward(self, x):
        return x
"""


@pytest.mark.parametrize("early", [True, False])
def test_registry_finds_a_class_in_any_module(tmp_path, monkeypatch, handle, early):
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "fairseq"}
    (tmp_path / "fairseq").mkdir()
    (tmp_path / "fairseq" / "__init__.py").write_text("")
    (tmp_path / "fairseq" / "models.py").write_text(REGISTRY)
    (tmp_path / "somebodys_copy.py").write_text(REGISTERED)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        if early:
            load("somebodys_copy")
        patched = handle()
        kind = load("somebodys_copy").ToyModel
        models = sys.modules["fairseq.models"]
        assert kind().forward(3) == 6 and models.MODEL_REGISTRY["toy"] is kind
        assert [p.title for p in patched.patches] == ["somebodys_copy (registered)"]
        assert models.register_model.__name__ == "register_model"
        patched.revert()
        assert kind().forward(3) == 3 and models.register_model.__module__ == "fairseq.models"
        assert not hasattr(models.register_model, "__wrapped__")
    finally:
        for name in ("fairseq", "fairseq.models", "somebodys_copy"):
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


@pytest.fixture
def off(monkeypatch):
    assert everywhere._active is None
    monkeypatch.setattr(everywhere, "_latest", None)
    monkeypatch.setattr(everywhere, "_known_classes", lambda which: CLASSES if which == "CLASSES" else {})
    yield
    if everywhere._active is not None:
        everywhere._active.revert()


def test_only_fairseq_registers(folder, handle):
    """Transformers has classes of the same names."""
    patched = handle({"transformers": CLASSES["fairseq"]})
    kind = load("not_toy_model").ToyModel
    patched._registered(kind)
    assert kind().forward(3) == 3 and not patched.patches


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

"""Classes that are imported before and after the drop-in, under any name; failing imports, threads, registries."""

import importlib
import sys
import threading

import pytest
import toy_modules
from toy_modules import CLASSES, MODEL, SEAM, doubled, load

from d2v_fast.launch.hooks import AfterImport
from d2v_fast.patches import PatchError
from d2v_fast.patches._core import Options, Seam
from d2v_fast.patches.all import PatchAll


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Modules of somebody's, toy_modules.py; they are forgotten afterwards."""
    with toy_modules.importable(tmp_path, monkeypatch):
        yield tmp_path


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


def test_only_fairseq_registers(folder, handle):
    """Transformers has classes of the same names."""
    patched = handle({"transformers": CLASSES["fairseq"]})
    kind = load("not_toy_model").ToyModel
    patched._registered(kind)
    assert kind().forward(3) == 3 and not patched.patches

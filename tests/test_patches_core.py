"""Swapping methods: all or nothing, taken back without a trace, and through copies, pickles, wrappers and compilers."""

import copy
import functools
import gc
import inspect
import io
import logging
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from types import MethodType

import pytest
import torch
import toy_patches as toy
from torch import nn

import d2v_fast.patches as patches
from d2v_fast.patches._core import STATE, Options, Patch, PatchError, Seam, Site, State, fall_back, is_ours, state_of
from d2v_fast.patches._fingerprint import fingerprint

X = torch.linspace(-1, 1, 8).reshape(2, 4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = toy.Toy()
    for layer in model.layers:
        nn.init.zeros_(layer.linear.bias)
    return model


def patched(model, *seams, strict=False):
    return Patch("toy").apply(toy.sites(model, *seams), Options(strict=strict))


def two_layers(model, x=X):
    """What upstream computes."""
    return model.layers[1].linear(model.layers[0].linear(x))


def doubled(model, x=X) -> bool:
    return torch.equal(model(x), 4 * two_layers(model, x))


# in place, and back


def test_swap_and_revert_leave_no_trace(model):
    before, keys = toy.snapshot(model), list(model.state_dict())
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    with patched(model, toy.SPREAD) as patch:
        assert doubled(model) and model.spread(X) == 20
        assert list(model.state_dict()) == keys
        assert [name for name, _ in (*model.named_parameters(), *model.named_buffers())] == names
        assert [site.name for site in patch.applied] == [
            "layers.0 Layer.forward",
            "layers.1 Lazy.forward",
            "Toy.spread",
        ]
    assert toy.snapshot(model) == before
    assert torch.equal(model(X), two_layers(model)) and model.spread(X) == 2
    patch.revert()
    assert patch.reverted and toy.snapshot(model) == before


def test_again_changes_nothing(model, caplog):
    first = patched(model)
    inside = toy.snapshot(model)
    second = patched(model)
    assert not second.applied and {s.reason for s in second.skipped} == {"already replaced"}
    second.revert()
    assert toy.snapshot(model) == inside and doubled(model)
    assert "its own handle takes it back" in caplog.text
    caplog.clear()
    first.revert()
    assert not caplog.text


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_patches_of_one_object_come_off_in_either_order(model, order):
    before = toy.snapshot(model)
    both = [Patch("a").apply([Site("", model, seam)], Options()) for seam in (toy.SPREAD, inner_seam("forward"))]
    copied = copy.deepcopy(model)
    both[order[0]].revert()
    assert state_of(model) is model.__dict__[STATE]
    both[order[1]].revert()
    for each in (model, copied):
        assert [set(inside) for inside in toy.snapshot(each)] == [set(inside) for inside in before]
    assert toy.snapshot(model) == before


def test_a_patch_that_was_taken_back_counts_no_more(model):
    first = patched(model)
    second = Patch("b").apply([Site("layers.0", model.layers[0], inner_seam("extra_repr"))], Options())
    copied = copy.deepcopy(model)
    copied(X[:1])
    counts = first.fallbacks()
    assert counts == {("Layer.forward", "a single row"): 1, ("Lazy.forward", "a single row"): 1}
    first.revert()
    assert first.fallbacks() == counts
    second_copy = copy.deepcopy(model)
    assert second_copy.layers[0].extra_repr.__self__ is second_copy.layers[0]
    state_of(second_copy.layers[0]).fallbacks["extra_repr", "none"] += 1
    assert first.fallbacks() == counts and second.fallbacks()["Layer.extra_repr", "none"] == 1
    second.revert()
    assert "extra_repr" not in second_copy.layers[0].__dict__


def inner_seam(attribute, **options):
    def make(original, options):
        return lambda self, *args: original(self, *args) + 1

    return Seam("loss", attribute, make, "one more", **options)


def test_signature_is_the_original_s(model):
    forward = inspect.signature(model.layers[0].forward)
    with Patch("toy").apply([Site("", model.layers[0], inner_seam("forward"))], Options()):
        ours = model.layers[0].forward
        assert inspect.signature(ours) == forward and ours.__name__ == "forward"
        assert not hasattr(ours, "__wrapped__"), "somebody who unwraps would strip ours off"


def test_static_methods_at_classes_and_instances(model):
    at_class = Patch("classes").apply([Site("", toy.Toy, toy.SPREAD)], Options())
    assert toy.Toy.spread(X) == 20 and model.spread(X) == 20
    at_class.revert()
    assert toy.Toy.spread(X) == 2 and isinstance(toy.Toy.__dict__["spread"], staticmethod)


# what does not fit


@pytest.mark.parametrize(
    ("seam", "reason"),
    [
        (inner_seam("nothing"), "there is no such method"),
        (inner_seam("depth"), "it is a property, not a method"),
        (inner_seam("build"), "it is a classmethod, not a method"),
        (inner_seam("forward", known=frozenset({"0" * 16})), "its source is not one that ours was written from"),
        (inner_seam("forward", refuses=lambda owner: f"{type(owner).__name__} is odd"), "Toy is odd"),
    ],
)
def test_skipped_with_its_reason(model, seam, reason, caplog):
    before = toy.snapshot(model)
    patch = patched(model, seam)
    assert len(patch.applied) == 2 and reason in patch.skipped[0].reason and reason in caplog.text
    patch.revert()
    with pytest.raises(PatchError, match=f"strict=True: Toy.{seam.attribute}: .*{reason}"):
        patched(model, seam, strict=True)
    assert toy.snapshot(model) == before


def test_foreign_replacement_stays(model):
    model.forward = MethodType(lambda self, x: x, model)
    patch = patched(model, inner_seam("forward"))
    assert "somebody else replaced it already" in patch.skipped[0].reason and torch.equal(model(X), X)


def test_an_object_that_is_copied_its_own_way_stays(model):
    model.layers[0].__dict__["__deepcopy__"] = lambda memo: "mine"
    patch = patched(model)
    assert "this object has a __deepcopy__ of its own" in patch.skipped[0].reason and len(patch.applied) == 1
    patch.revert()
    assert copy.deepcopy(model.layers[0]) == "mine"


def test_fingerprint_follows_the_source():
    assert fingerprint(toy.Layer.forward) == fingerprint(toy.Lazy().forward) != fingerprint(toy.Toy.forward)
    assert fingerprint(toy.Toy.__dict__["spread"]) == fingerprint(toy.Toy.spread)
    assert fingerprint(len) == "unknown"


@pytest.mark.parametrize("where", ["refuses", "make", "prepare"])
def test_nothing_is_half_patched_after_an_error(model, where):
    def broken(*args):
        raise OSError(where)

    before = toy.snapshot(model)
    keys = {where: broken}
    make = keys.pop("make", None)
    seam = Seam("loss", "forward", make or toy.make_double, "never", **keys)
    patch = Patch("toy").apply([Site("", model, toy.SPREAD)], Options())
    with pytest.raises(OSError, match=where):
        patch.apply(toy.sites(model, seam), Options())
    assert len(patch.applied) == 1 and model.spread(X) == 20, "what an earlier apply() did stays"
    patch.revert()
    assert toy.snapshot(model) == before


def test_nothing_is_half_patched_after_an_error_in_a_swap(model):
    before = toy.snapshot(model)
    with pytest.raises(TypeError, match="immutable"):
        Patch("toy").apply([*toy.sites(model), Site("", int, inner_seam("bit_length"))], Options())
    assert toy.snapshot(model) == before


def test_make_that_returns_the_original_is_an_error(model):
    with pytest.raises(TypeError, match=r"seam at Toy.forward returned the original"):
        patched(model, Seam("loss", "forward", lambda original, options: original, "nothing"))
    assert not is_ours(toy.Toy.forward)


def test_one_object_in_two_places(model):
    model.layers[1] = model.layers[0]
    patch = patched(model)
    assert [s.reason for s in patch.skipped] == ["the same object as layers.0 Layer.forward"] and doubled(model)
    patch.revert()
    assert torch.equal(model(X), two_layers(model))


def test_revert_under_somebody_else_changes_nothing(model):
    patch = patched(model)
    ours = model.layers[0].forward
    model.layers[0].forward = functools.wraps(ours)(lambda x: ours(x))
    with pytest.raises(PatchError, match=r"layers.0 Layer.forward was replaced by .*: take that back first"):
        patch.revert()
    assert doubled(model)
    model.layers[0].__dict__["forward"] = ours
    patch.revert()
    assert torch.equal(model(X), two_layers(model))
    patch = patched(model)
    del model.layers[1].forward
    with pytest.raises(PatchError, match=r"layers.1 Lazy.forward was removed"):
        patch.revert()


def test_no_patch_during_a_capture(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    before = toy.snapshot(model)
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        patched(model)
    assert toy.snapshot(model) == before


# classes


def test_class_and_instance_in_either_order(model):
    classes = [Site("", kind, toy.DOUBLE) for kind in (toy.Layer, toy.Lazy)]
    before = toy.snapshot(model)
    at_class = Patch("classes").apply(classes, Options())
    assert doubled(model), "Lazy inherits a method that was replaced, and is doubled once"
    at_instance = patched(model)
    assert not at_instance.applied and doubled(model)
    at_class.revert()
    assert "forward" not in vars(toy.Lazy) and torch.equal(model(X), two_layers(model))
    at_instance = patched(model)
    at_class = Patch("classes").apply(classes, Options())
    assert doubled(model)
    at_instance.revert()
    assert doubled(model)
    at_class.revert()
    assert torch.equal(model(X), two_layers(model)) and toy.snapshot(model) == before


def test_state_of_an_instance_goes_with_the_last_patch(model):
    before = toy.snapshot(model)
    at_instance = patched(model)
    at_class = Patch("classes").apply([Site("", toy.Layer, toy.DOUBLE)], Options())
    at_instance.revert()
    at_class.revert()
    assert toy.snapshot(model) == before


def test_states_of_a_class_go_with_its_patch(model):
    before = toy.snapshot(model)
    patch = Patch("classes").apply([Site("", toy.Layer, toy.DOUBLE)], Options())
    model(X)
    model(X[:1])
    copied = copy.deepcopy(model)
    assert state_of(copied.layers[0]).cache == {} and state_of(model.layers[0]).cache
    assert patch.fallbacks() == {("Layer.forward", "a single row"): 1, ("Lazy.forward", "a single row"): 1}
    assert b"d2v_fast" not in pickle.dumps(model).replace(STATE.encode(), b"")
    patch.revert()
    assert toy.snapshot(model) == before
    assert all(STATE not in module.__dict__ for module in copied.modules())
    assert patch.fallbacks()["Layer.forward", "a single row"] == 1, "the record stays"


# calls that ours leaves to the original


def test_fallbacks_are_counted_and_logged_once(model, caplog):
    patch = patched(model)
    for _ in range(3):
        assert torch.equal(model(X[:1]), two_layers(model, X[:1]))
    assert patch.fallbacks() == {("Layer.forward", "a single row"): 3, ("Lazy.forward", "a single row"): 3}
    told = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert told == [f"{kind}.forward runs as upstream wrote it: a single row" for kind in ("Layer", "Lazy")]
    patch.revert()
    patched(model, strict=True)
    with pytest.raises(PatchError, match=r"strict=True: Layer\.forward would run as upstream wrote it: a single row"):
        model(X[:1])


@pytest.mark.parametrize("at_class", [False, True])
def test_parts_of_calls_are_told_from_whole_calls(caplog, at_class):
    def make(original, options):
        def forward(self, x, scale=1.0):
            fall_back(self, "forward", "the draws", options, whole=False)
            if len(x) == 1:
                fall_back(self, "forward", "a single row", options)
                return original(self, x, scale)
            return original(self, x, scale) * 2

        return forward

    kind = type("Layer", (toy.Layer,), {})
    layer = kind()
    seam = Seam("norms", "forward", make, "for the test")
    patch = Patch("toy").apply([Site("", kind if at_class else layer, seam)], Options())
    for each in (layer, layer if at_class else copy.deepcopy(layer)):
        each(X[:1]), each(X)
    for _ in range(2):
        draws, row = ("Layer.forward", "the draws"), ("Layer.forward", "a single row")
        assert patch.fallbacks() == {draws: 4, row: 2} and patch.partial_fallbacks() == {draws: 4}
        assert (patch.calls, patch.calls_left) == (4, 2)
        lines = [" ".join(line.split()) for line in str(patch).splitlines()[2:]]
        expected = ["2 x Layer.forward of calls a single row", "4 x Layer.forward in part the draws"]
        assert lines == [f"upstream {line}" for line in expected]
        patch.revert()
    told = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    runs = ("runs in part as upstream wrote it: the draws", "runs as upstream wrote it: a single row")
    assert told == [f"Layer.forward {how}" for how in runs]
    message = r"strict=True: Layer\.forward would run in part as upstream wrote it: the draws"
    with (
        Patch("toy").apply([Site("", layer, seam)], Options(strict=True)),
        pytest.raises(PatchError, match=message),
    ):
        layer(X)


def test_calls_are_counted_wherever_they_come_from(model):
    patch = patched(model, toy.SPREAD)
    assert patch.calls == 0
    model(X)
    copied = copy.deepcopy(model)
    copied.layers[0](X)
    copied.spread(X)
    assert patch.calls == 4
    with pytest.raises(TypeError):
        model.layers[1](None)
    assert patch.calls == 5, "a call that fails was a call"
    patch.revert()
    model(X)
    copied(X)
    assert patch.calls == 5
    with Patch("classes").apply([Site("", toy.Layer, toy.DOUBLE), Site("", toy.Toy, toy.SPREAD)], Options()) as patch:
        model(X)
        toy.Toy.spread(X)
        assert patch.calls == 3, "subclasses inherit ours"


# copies, pickles, wrappers, compilers


def test_copies_are_patched_and_die(model):
    patch = patched(model, toy.SPREAD)
    model(X)
    copied = copy.deepcopy(copy.deepcopy(model))
    layer = copy.deepcopy(model.layers[0])
    for each in (*copied.layers, layer):
        assert each.forward.__self__ is each and state_of(each).cache == {}
    with torch.no_grad():
        copied.layers[0].linear.weight.mul_(2)
    assert doubled(copied) and doubled(model) and torch.equal(copied.layers[1](X), 2 * copied.layers[1].linear(X))
    layer(X[:1])
    assert patch.fallbacks() == {("Layer.forward", "a single row"): 1}
    gone = [weakref.ref(each) for each in copied.modules()]
    del copied, each
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)
    copied = copy.deepcopy(copy.deepcopy(model))
    patch.revert()
    assert torch.equal(copied(X), two_layers(copied)) and copied.spread(X) == 2
    assert all("forward" not in module.__dict__ for module in copied.modules())


def test_copies_are_prepared(model):
    def prepare(owner):
        state_of(owner).cache["plan"] = owner

    Patch("toy").apply([Site("", model, inner_seam("forward", prepare=prepare))], Options())
    copied = copy.deepcopy(model)
    assert state_of(model).cache["plan"] is model and state_of(copied).cache["plan"] is copied


def test_patch_does_not_keep_the_model(model):
    ref = weakref.ref(model.layers[0])
    patched(model)
    model.layers[0] = nn.Identity()
    gc.collect()
    assert ref() is None


def test_copies_by_the_class_s_own_deepcopy(model):
    class Own(toy.Toy):
        def __deepcopy__(self, memo):
            made = type(self)()
            made.load_state_dict(self.state_dict())
            return made

    own = Own()
    patch = patched(own, inner_seam("forward"))
    copied = copy.deepcopy(own)
    assert copied.forward.__self__ is copied and copied is not own
    patch.revert()
    assert not any(map(is_ours, copied.__dict__.values())) and STATE not in copied.__dict__


def test_copies_and_replicas_under_somebody_else_s_wrapper(model):
    patched(model)
    layer = model.layers[0]
    around = functools.wraps(layer.forward.__func__)(lambda self, x: toy.Layer.forward(self, x) + 1)
    layer.forward = MethodType(around, layer)
    copied = copy.deepcopy(layer)
    assert copied.forward.__self__ is copied and torch.equal(copied(X), layer(X))
    assert torch.equal(layer._replicate_for_data_parallel().forward(X), layer(X))
    layer = model.layers[1]
    ours = layer.forward
    layer.forward = functools.update_wrapper(functools.partial(lambda self, x: self.linear(x), layer), ours)
    assert copy.deepcopy(layer).forward.args[0] is not layer, "a partial that looks like ours is copied as what it is"


@pytest.mark.parametrize("dump", ["pickle", "torch.save", "protocol 0"])
def test_pickles_are_as_upstream_s(model, dump):
    unpatched = [set(inside) for inside in toy.snapshot(model)]
    patched(model, toy.SPREAD)
    model(X)
    file = io.BytesIO()
    if dump == "torch.save":
        torch.save(model, file)
        loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    else:
        pickle.dump(model, file, protocol=0 if dump == "protocol 0" else None)
        loaded = pickle.loads(file.getvalue())
    assert b"d2v_fast" not in file.getvalue()
    assert [set(inside) for inside in toy.snapshot(loaded)] == unpatched
    assert torch.equal(loaded(X), two_layers(model)) and doubled(model)
    assert patched(loaded).applied


class Plain:
    """Not a module, as fairseq's ``EMAModule``."""

    def forward(self, x):
        return x


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_pickles_of_plain_objects(protocol):
    plain = Plain()
    plain.kept = 1
    with Patch("toy").apply([Site("", plain, inner_seam("forward"))], Options()):
        assert pickle.loads(pickle.dumps(plain, protocol)).__dict__ == {"kept": 1}
        assert plain.forward(1) == 2 and copy.deepcopy(plain).forward(1) == 2
    assert plain.__dict__ == {"kept": 1}


def test_pickle_of_a_state_is_nothing():
    assert pickle.loads(pickle.dumps({"a": State()})) == {"a": None}
    layer = toy.Layer()
    layer.__dict__[STATE] = None
    assert isinstance(state_of(layer), State)


def test_replicas_of_data_parallel_call_themselves(model):
    patch = patched(model)
    layer = model.layers[0]
    replica = layer._replicate_for_data_parallel()
    assert replica.forward.__self__ is replica and state_of(replica) is not state_of(layer)
    replica.linear = nn.Identity()
    assert torch.equal(replica(X), 2 * X) and torch.equal(replica(X[:1]), X[:1])
    assert patch.fallbacks() == {("Layer.forward", "a single row"): 1}
    patch.revert()
    assert "_replicate_for_data_parallel" not in layer.__dict__


def test_replicas_under_a_class_level_patch_have_a_state_of_their_own(model):
    layer = model.layers[0]
    with Patch("classes").apply([Site("", toy.Layer, toy.DOUBLE)], Options()):
        layer(X)
        for other in (layer._replicate_for_data_parallel(), copy.copy(layer)):
            assert state_of(other) is not state_of(layer) and state_of(other).cache == {}
        assert state_of(layer).cache


@pytest.mark.parametrize("level", ["instance", "class"])
def test_compiled_in_one_graph(model, level):
    torch.compiler.reset()
    places = [Site("", kind, toy.DOUBLE) for kind in (toy.Layer, toy.Lazy)] if level == "class" else toy.sites(model)
    with Patch("toy").apply(places, Options()) as patch:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(X), 4 * two_layers(model))
        torch.testing.assert_close(compiled(X[:1]), two_layers(model, X[:1]))
        assert patch.fallbacks()["Layer.forward", "a single row"] >= 1
        compiled(X)  # once more for the toy: its own note in the cache is new to a guard
        traced = patch.calls
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(3):
                compiled(X)
        assert patch.calls == traced >= 2, "calls are counted where they are traced, and no guard depends on the count"
    torch.testing.assert_close(compiled(X), two_layers(model))
    torch.compiler.reset()


DISTRIBUTED = """
import sys
sys.path.append(sys.argv[1])
import torch, toy_patches as toy
from d2v_fast.patches._core import Options, Patch
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)
torch.manual_seed(0)
model, x = toy.Toy(), torch.ones(2, 4)
patch = Patch("toy").apply(toy.sites(model), Options())
model(x).sum().backward()
want = [p.grad.clone() for p in model.parameters()]
for patched_first in (True, False):
    model.zero_grad()
    patch.revert()
    if patched_first:
        patch = Patch("toy").apply(toy.sites(model), Options())
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    if not patched_first:
        patch = Patch("toy").apply(toy.sites(model), Options())
    wrapped(x).sum().backward()
    assert all(map(torch.equal, want, (p.grad for p in model.parameters())))
torch.distributed.destroy_process_group()
print("done")
"""


def test_distributed_data_parallel(tmp_path):
    arguments = [sys.executable, "-c", DISTRIBUTED, str(Path(__file__).parent), str(tmp_path / "store")]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.strip() == "done", done.stderr


# d2v_fast.patch


def test_patch_finds_the_model_and_parts(model, monkeypatch):
    toy.install(monkeypatch)
    with patches.patch(model) as patch:
        assert doubled(model) and len(patch.applied) == 3 and repr(patch).startswith("<d2v_fast on Toy: 3 replaced")
    outer = nn.ModuleDict({"student": nn.Sequential(model), "head": nn.Linear(4, 4)})
    with patches.patch(outer) as patch:
        assert [s.path for s in patch.applied] == ["student.0.layers.0", "student.0.layers.1", "student.0"]
    with patches.patch(nn.DataParallel(model)) as patch:
        assert len(patch.applied) == 3


def test_patch_takes_a_teacher(model, monkeypatch):
    teacher = toy.Toy()
    toy.install(monkeypatch)
    with patches.patch(model, teacher=teacher) as patch:
        assert [s.path for s in patch.applied[3:]] == ["teacher.layers.0", "teacher.layers.1", "teacher"]
    with pytest.raises(PatchError, match="teacher must be of a supported class as model is, got Linear"):
        patches.patch(model, teacher=nn.Linear(2, 2))
    seen = []
    toy.install(monkeypatch, TAKES_TEACHER=True, sites=lambda model, patch, options: seen.append(options.teacher) or [])
    patches.patch(model, teacher=teacher)
    assert seen == [teacher]


def test_switches(model, monkeypatch):
    toy.install(monkeypatch)
    patch = patches.patch(model, norms=False, strict=True)
    assert [s.seam.part for s in patch.applied] == ["metrics"]
    assert {s.reason for s in patch.skipped} == {"norms=False"}
    with pytest.raises(
        TypeError, match=r"'nroms' is no switch \(nearest: norms\); switches are ema, loss, .*; and strict"
    ):
        patches.patch(model, nroms=False)
    with pytest.raises(TypeError, match=r"'flash' is no switch; switches are"):
        patches.patch(model, flash=True)
    for name, value in (("encoder", "no"), ("masks", 0), ("strict", "yes"), ("ema", None)):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got {value!r} \\({type(value).__name__}"):
            patches.patch(model, **{name: value})


def test_a_seam_of_two_parts_needs_both(model, monkeypatch):
    both = inner_seam("forward", also=frozenset({"targets"}))
    toy.install(monkeypatch, sites=lambda model, patch, options: [Site("", model, both)])
    for off, reason in (({"loss": False}, "loss=False"), ({"targets": False}, "targets=False")):
        patch = patches.patch(model, strict=True, **off)
        assert not patch.applied and [s.reason for s in patch.skipped] == [reason]
    assert patches.patch(model, loss=False, targets=False).skipped[0].reason == "loss=False, targets=False"
    assert patches.patch(model, masks=False).applied


def test_classes_are_not_asked_whether_ours_fits(model):
    """Instances may differ; ``refuses`` looks at one."""
    seam = inner_seam("forward", refuses=lambda owner: f"{owner.counter.shape} is odd")
    with Patch("classes").apply([Site("", toy.Toy, seam)], Options(strict=True)) as patch:
        assert patch.applied and torch.equal(model(X), two_layers(model) + 1)
    assert "is odd" in Patch("toy").apply([Site("", model, seam)], Options()).skipped[0].reason


@pytest.mark.parametrize(
    ("model", "got"), [(nn.Linear(2, 2), "Linear"), ("toy", "str"), (toy.Toy, r"the class Toy; patch_all\(\)")]
)
def test_unknown_models_are_told_what_is_supported(model, got, monkeypatch):
    toy.install(monkeypatch, SUPPORTED=("Toy", "Other"), matches=lambda model: False)
    with pytest.raises(PatchError, match=f"model must be one of Toy, Other, or have one .*, got {got}"):
        patches.patch(model)


def test_wrappers_that_come_after_the_patch(model, monkeypatch):
    toy.install(monkeypatch)
    with pytest.raises(PatchError, match=r"went through torch\.compile already: patch it before that"):
        patches.patch(torch.compile(model, backend="aot_eager"))
    itself = toy.Toy()
    itself.compile(backend="aot_eager")
    with pytest.raises(PatchError, match=r"went through its own compile\(\) already"):
        patches.patch(itself)
    sharded = type("FSDPToy", (type("FSDPModule", (), {}), toy.Toy), {})()
    with pytest.raises(PatchError, match="went through FSDP already"):
        patches.patch(sharded)


def test_disabled_is_a_logged_no_op(model, monkeypatch, caplog):
    toy.install(monkeypatch)
    monkeypatch.setenv("D2V_FAST_DISABLE", "1")
    before = toy.snapshot(model)
    patch = patches.patch(model, strict=True)
    assert toy.snapshot(model) == before and "D2V_FAST_DISABLE=1: Toy stays as it is" in caplog.text
    assert not patch.applied and patch.skipped[0].reason == "D2V_FAST_DISABLE=1"


REPORT = """\
d2v_fast on Toy: 3 replaced, 2 left as they were
  replaced    2 x layers.* Layer.forward  norms      twice as much  3 calls
  replaced    1 x Toy.spread              metrics    ten times as much  never called
  left        1 x Toy.nothing             loss       there is no such method in this version
  left        1 x Toy.forward             loss       loss=False
  upstream    2 x Layer.forward           of calls   a single row"""
TAKEN_BACK = """\
d2v_fast on Toy, taken back: 3 were replaced, 2 left as they were
  was replaced    2 x layers.* Layer.forward  norms      twice as much  3 calls
  was replaced    1 x Toy.spread              metrics    ten times as much  1 call
  left            1 x Toy.nothing             loss       there is no such method in this version
  left            1 x Toy.forward             loss       loss=False
  upstream        2 x Layer.forward           of calls   a single row"""


def test_report(model, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "d2v_fast.patches")
    model.layers[1] = toy.Layer()
    seams = (toy.SPREAD, inner_seam("nothing"))
    both = lambda model, patch, options: toy.sites(model, *seams)  # noqa: E731
    toy.install(monkeypatch, sites=both)
    patch = patches.patch(model)
    assert "twice as much" in caplog.text and "called" not in caplog.text, "nothing can have been called yet"
    patch.skip("Toy.forward", "loss", "loss=False", harmless=True)
    model(X[:1])
    model.layers[0](X)
    assert str(patch) == REPORT
    model.spread(X)
    patch.revert()
    model(X)
    assert str(patch) == TAKEN_BACK and repr(patch) == f"<{TAKEN_BACK.splitlines()[0]}>"

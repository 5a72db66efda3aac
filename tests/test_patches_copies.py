"""Patched objects through copies, pickles, replicas, compilers and DistributedDataParallel."""

import copy
import functools
import gc
import io
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
from toy_patches import X, doubled, inner_seam, patched, two_layers

from d2v_fast.patches._core import STATE, Options, Patch, Site, State, is_ours, state_of


@pytest.fixture
def model():
    return toy.make()


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

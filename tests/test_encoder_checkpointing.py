"""Activations computed again in backward: equal bits of every gradient, and fewer bytes kept."""

from collections.abc import Iterable
from unittest import mock

import pytest
import torch
from checks import INTERPRET, no_synchronisation
from test_encoder_packed import MASKED, VALID, T, among, encoder_of
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from d2v_fast.nn import checkpointing
from d2v_fast.nn.sequences import Sequences

RATES = {"dropout": 0.2, "attention_dropout": 0.1, "drop_path": 0.3}
MODES = ("none", "selective", "full")


def gradients(mode: str, modality: str, rows: str = "dense", autocast: bool = False, **options) -> list[torch.Tensor]:
    """Output, last result and gradients of a training run with a fixed seed."""
    torch.manual_seed(0)
    encoder = encoder_of(modality, checkpointing=mode, **{**RATES, **options}).train()
    x, arguments = torch.randn(3, T, 32, requires_grad=True), {}
    if rows == "selected":
        arguments = {"select": Sequences.from_mask(MASKED)}
    elif rows == "packed":
        packing = Sequences.from_mask(VALID)
        arguments = {"sequences": packing, "select": among(MASKED, packing)}
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = encoder(packing.take(x.flatten(0, 1)) if rows == "packed" else x, top_k=1, **arguments)
    upstream = torch.randn_like(output.x)
    output.x.backward(upstream)
    return [output.x, *output.layer_results, x.grad, *(p.grad for p in encoder.parameters() if p.grad is not None)]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize(
    ("modality", "rows", "options"),
    [
        ("speech", "packed", {}),
        ("text", "dense", {"activation_dropout": 0.2}),
        ("text", "selected", {"layer_scale": 0.0, "key_bias": False}),
        ("image", "dense", {}),
        ("image", "selected", {"layer_result": "ffn"}),
    ],
)
def test_gradients_are_equal_with_dropout(modality, rows, options, autocast):
    want = gradients("none", modality, rows, autocast, **options)
    assert len(want) > 30
    for mode in ("selective", "full"):
        got = gradients(mode, modality, rows, autocast, **options)
        assert len(got) == len(want)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), mode


@pytest.mark.parametrize("modality", ["text", "image"])
def test_random_numbers_are_kept_while_a_graph_is_captured(modality, monkeypatch):
    """There no generator can be read or set. PyTorch's CPU dropout, which works in place, is not in this test."""
    rates = {"dropout": 0.2 if INTERPRET else 0.0, "attention_dropout": 0.0}
    want = gradients("none", modality, **rates)
    monkeypatch.setattr(checkpointing, "capturing", lambda x: True)
    with mock.patch.object(torch, "get_rng_state", side_effect=AssertionError("the generator was read")):
        got = gradients("full", modality, **rates)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(got, gradients("none", modality, dropout=0.5), strict=True))


class Storages(TorchDispatchMode):
    """Remembers what operators write, and how much of it is alive."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        return out

    def alive(self, without: Iterable[torch.Tensor]) -> int:
        for x in without:
            self.sizes.pop(StorageWeakRef(x.untyped_storage()), None)
        return sum(size for ref, size in self.sizes.items() if not ref.expired())


def kept_bytes(mode: str, modality: str, layers: int) -> int:
    """Bytes that a forward in training without dropout leaves for backward, without parameters and its input."""
    encoder = encoder_of(modality, checkpointing=mode, layers=layers, ffn_dim=128).train()
    x = torch.randn(2, T, 32)
    with Storages() as storages:
        output = encoder(x).x
    assert output.requires_grad
    return storages.alive(without=[x, *encoder.parameters()])


@pytest.mark.parametrize("modality", ["text", "image"])
def test_bytes_kept(modality):
    """A layer of N rows and C channels keeps 16 N C numbers and more; "selective" leaves out 6 N C of them.

    Those are the outputs of two norms and of GELU. "full" keeps the input alone, N C (images: the stream as well).
    """
    unit = 2 * T * 32 * 4
    a_layer = {mode: (kept_bytes(mode, modality, 5) - kept_bytes(mode, modality, 2)) / 3 / unit for mode in MODES}
    assert a_layer["none"] - a_layer["selective"] == pytest.approx(6, abs=0.1)
    assert a_layer["none"] > 15.9
    assert a_layer["full"] <= (2.1 if modality == "image" else 1.1)
    assert a_layer["full"] < a_layer["selective"] < 0.75 * a_layer["none"]


def test_no_gradient_means_no_second_computation():
    """In evaluation nothing is kept, and nothing differs."""
    encoders = [encoder_of("text", checkpointing=mode).eval() for mode in MODES]
    for encoder in encoders[1:]:
        encoder.load_state_dict(encoders[0].state_dict())
    x = torch.randn(2, T, 32)
    with torch.no_grad():
        want, *others = [encoder(x).x for encoder in encoders]
    assert all(torch.equal(want, y) for y in others)


def captured_gradients(mode: str) -> list[torch.Tensor]:
    """Gradients of a CUDA graph's replay with a fixed seed: packed rows, selected rows, LayerDrop, all dropouts."""
    torch.manual_seed(0)
    encoder = encoder_of("text", checkpointing=mode, layerdrop=0.3, **RATES).cuda().train()
    packing = Sequences.from_mask(VALID)
    options = {
        name: s.map(torch.Tensor.cuda) for name, s in (("sequences", packing), ("select", among(MASKED, packing)))
    }
    x = torch.randn(packing.num_rows, 32, device="cuda")
    upstream = torch.randn(int(MASKED.sum()), 32, device="cuda")

    def run():
        with torch.autocast("cuda", torch.bfloat16):
            y = encoder(x, **options).x
        return torch.autograd.grad(y, list(encoder.parameters()), upstream.to(y.dtype))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        with no_synchronisation():
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = run()
    results = []
    for seed in (1, 1, 2):
        torch.cuda.manual_seed(seed)
        graph.replay()
        results.append([grad.clone() for grad in grads])
    first, again, other = results
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    return first


@pytest.mark.gpu
def test_captured_without_waiting():
    """The host never waits, replays draw anew, and recomputation in a graph uses the numbers that forward drew."""
    want = captured_gradients("none")
    for mode in ("selective", "full"):
        assert all(torch.equal(a, b) for a, b in zip(captured_gradients(mode), want, strict=True)), mode

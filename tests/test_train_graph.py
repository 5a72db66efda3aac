"""The captured training step: what a CUDA graph would replay, run eagerly on the same static memory, and on a GPU."""

import copy
import logging
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from checks import no_synchronisation
from tiny import NO_DROPOUT, tiny_batch, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from d2v_fast.nn import Data2Vec, make_batch
from d2v_fast.train.graph import WARM_UP, CapturedStep, signature, tensors_of
from d2v_fast.train.optim import OptimConfig, build_optimizer
from d2v_fast.train.step import train_step

MODALITIES = ["speech", "image", "text"]
RATES = [float(np.float32(x)) for x in (1e-3, 5e-4, 2e-3, 0.0, 1e-3, 7e-4, 1e-4, 3e-3)]  # a graph reads float32


def record(body):
    """Stands in for the capture of a graph: a replay runs ``body`` again."""
    result = torch.zeros(6)
    return lambda: result.copy_(body()), result


def static_batch(config, seed, padded=False, size=3):
    """A batch whose shapes do not depend on ``seed``."""
    batch = tiny_batch(config, seed, padded, size)
    T = batch.mask.shape[1]
    lengths = None if batch.lengths is None else batch.lengths.numpy()
    most, rows = size * config.mask.most(T), None if lengths is None else size * T
    return make_batch(batch.inputs, batch.mask.numpy(), lengths, num_masked=most, num_valid=rows)


def trained(modality, captured, *, one_pass=False, padded=False, device="cpu", updates=8, **options):
    """A model after some updates of changing batches, its optimizer, the metrics of each, and the captured step."""
    torch.manual_seed(0)
    encoder = {"layerdrop": 0.0, **options.pop("encoder", {})}
    model = Data2Vec(tiny_config(modality, options.pop("profile", "paper"), **encoder)).to(device).train()
    optimizer = build_optimizer(model, OptimConfig(one_pass=one_pass, decay_vectors=False, weight_decay=0.1))
    step = CapturedStep(model, optimizer, clip_norm=0.5, **options) if captured else None
    metrics = []
    for update, lr in enumerate(RATES[:updates]):
        batch = static_batch(model.config, update, padded).to(device)
        torch.manual_seed(update)
        if step is None:
            how = {"clip_norm": 0.5, "autocast": options.get("autocast", False)}
            metrics.append(train_step(model, [batch], optimizer, lr=lr, update=update, **how))
        else:
            metrics.append(step([batch], lr=lr, update=update))
    return model, optimizer, metrics, step


def assert_same(a, b):
    """Everything that two runs of :func:`trained` leave behind, bit for bit."""
    (model, optimizer, metrics, _), (other, other_optimizer, other_metrics, _) = a, b
    assert [[float(x) for x in m] for m in metrics] == [[float(x) for x in m] for m in other_metrics]
    for (name, x), y in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    old, new = optimizer.state_dict(), other_optimizer.state_dict()
    assert old["param_groups"] == new["param_groups"]  # numbers, nothing that only a graph could use
    for index, state in old["state"].items():
        assert all(torch.equal(x, new["state"][index][key]) for key, x in state.items())


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("modality", MODALITIES)
def test_equals_the_eager_step(modality, one_pass):
    """Dropout and DropPath included; learning rate, decay, number of masked positions differ at every update."""
    eager = trained(modality, False, one_pass=one_pass)
    captured = trained(modality, True, one_pass=one_pass, record=record)
    assert captured[3].replays == len(RATES) - WARM_UP and captured[3].fallbacks == 0
    assert len({m.num_masked for m in captured[2]}) > 1 or modality == "image"
    assert_same(eager, captured)


@pytest.mark.parametrize("modality,profile", [("speech", "paper"), ("text", "paper"), ("text", "fairseq")])
def test_padded_batches(modality, profile):
    options = {"padded": True, "profile": profile}
    captured = trained(modality, True, record=record, **options)
    assert captured[3].replays == len(RATES) - WARM_UP
    assert_same(trained(modality, False, **options), captured)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("modality", MODALITIES)
def test_fixed_shapes_change_no_result(modality, padded):
    """Rows that only fill up: the same losses and gradients as of the batch without them."""
    if padded and modality == "image":
        pytest.skip("images have no padding")
    config = tiny_config(modality, **NO_DROPOUT)
    if modality == "text":
        config = replace(config, frontend=replace(config.frontend, dropout=0.0))
    torch.manual_seed(0)
    model = Data2Vec(config).train()
    results = []
    for batch in (tiny_batch(config, 5, padded), static_batch(config, 5, padded)):
        output = model(batch)
        output.loss.backward()
        results.append([output.loss.detach(), output.target_var, output.pred_var])
        results[-1] += [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        assert output.num_masked == int(batch.mask.sum())
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_most_masked():
    """No mask has more entries than a fixed shape has room for."""
    for modality in MODALITIES:
        config = tiny_config(modality)
        T = {"speech": 25, "image": 36, "text": 30}[modality]
        counts = [config.mask.draw(np.random.default_rng(i), np.full(8, T), T).sum(1).max() for i in range(50)]
        assert max(counts) <= config.mask.most(T) <= T


def test_several_shapes_and_a_maximum(caplog):
    torch.manual_seed(0)
    model = Data2Vec(tiny_config("text")).train()
    step = CapturedStep(model, build_optimizer(model, OptimConfig()), max_graphs=2, record=record)
    caplog.set_level(logging.INFO)
    for update in range(16):
        step([static_batch(model.config, update, size=2 + update % 4)], lr=1e-3, update=update)
    assert (step.replays, step.fallbacks) == (4, 4)  # two sizes, after their third turn; the others' fourth and third
    assert [r.message for r in caplog.records] == [
        "no CUDA graph for this update: more than max_graphs = 2 shapes of batches"
    ]


def test_signatures():
    config = tiny_config("text")
    a, b, other = static_batch(config, 0), static_batch(config, 5), static_batch(config, 0, size=2)
    assert signature(a) == signature(b) != signature(other)
    assert a.num_masked != b.num_masked and signature(a) != signature(static_batch(config, 0, padded=True))
    shapes = [(x.shape, x.dtype) for x in tensors_of(a)]
    assert shapes == [(x.shape, x.dtype) for x in tensors_of(b)]
    assert {x.data_ptr() for x in (a.inputs, a.mask, a.positions, a.masked.rows)} <= {
        x.data_ptr() for x in tensors_of(a)
    }
    longer = replace(a.masked, max_length=a.masked.max_length + 1)  # the grid that a kernel was launched with
    assert signature(a) != signature(replace(a, masked=longer))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_falls_back_visibly(caplog):
    torch.manual_seed(0)
    model = Data2Vec(tiny_config("text")).train()
    optimizer = build_optimizer(model, OptimConfig())
    step = CapturedStep(model, optimizer)
    for update in range(3):
        step([static_batch(model.config, update)], lr=1e-3, update=update)
    assert (step.replays, step.fallbacks) == (0, 3)
    assert [r.message for r in caplog.records] == [
        "no CUDA graph for this update: the model is on cpu: CUDA graphs need a CUDA device"
    ]
    with pytest.raises(RuntimeError, match="cannot run as a CUDA graph: the model is on cpu"):
        CapturedStep(model, optimizer, strict=True)([static_batch(model.config, 0)], lr=1e-3, update=3)


def test_micro_batches_are_not_captured(caplog):
    torch.manual_seed(0)
    model = Data2Vec(tiny_config("text")).train()
    step = CapturedStep(model, build_optimizer(model, OptimConfig()), record=record)
    for update in range(4):
        step([static_batch(model.config, i) for i in range(2)], lr=1e-3, update=update)
    assert step.fallbacks == 4 and "an update of 2 micro-batches is not captured" in caplog.text


def test_failed_capture_says_what_to_do():
    """Not an eager update instead: PyTorch leaves neither stream nor generator usable. No weight has changed."""

    def capture(body):
        raise RuntimeError("operation not permitted when stream is capturing")

    model, *_, step = trained("text", True, updates=WARM_UP, record=capture)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="set cuda_graph to off: operation not permitted"):
        step([static_batch(model.config, 0)], lr=1e-3, update=WARM_UP)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert step.fallbacks == 0 and not step._graphs


def freeze(model, optimizer):
    model.head[0].bias.requires_grad_(False)


def decay_more(model, optimizer):
    optimizer.param_groups[0]["weight_decay"] = 0.2


CHANGES = {
    "moved optimizer state": lambda model, optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "moved parameters": lambda model, optimizer: model.double().float(),
    "frozen": freeze,
    "weight decay": decay_more,
    "mode": lambda model, optimizer: model.eval(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_captured_again_after_a_change(change):
    """What a graph has for good: the step after the change is that of a new capture."""
    model, optimizer, _, step = trained("text", True, record=record)
    (graph,) = step._graphs.values()
    batch = static_batch(model.config, 0)
    step([batch], lr=1e-3, update=len(RATES))
    assert list(step._graphs.values()) == [graph]
    change(model, optimizer)
    step([batch], lr=1e-3, update=len(RATES) + 1)
    assert len(step._graphs) == 1 and graph not in step._graphs.values()
    assert step.fallbacks == 0 and step.replays == len(RATES) - WARM_UP + 2


def test_captured_again_with_other_copies_of_the_teacher():
    """Its low-precision matrices, under autocast: gone after a conversion, even one that moves nothing."""
    model, _, _, step = trained("text", True, record=record, autocast=True)
    (graph,) = step._graphs.values()
    batch = static_batch(model.config, 0)
    step([batch], lr=1e-3, update=len(RATES))
    assert list(step._graphs.values()) == [graph]
    model.float()
    step([batch], lr=1e-3, update=len(RATES) + 1)
    assert len(step._graphs) == 1 and graph not in step._graphs.values()


class Calls(TorchDispatchMode):
    """Counts what reaches the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("modality", MODALITIES)
def test_host_work_of_a_replay(modality):
    """Few calls, none that waits for the device, and less than 2 ms: also with as many parameters as a base model."""

    def empty(body):
        return lambda: None, torch.zeros(6)

    model, _, _, step = trained(modality, True, record=empty, encoder={"layers": 12}, updates=WARM_UP + 2)
    batch = static_batch(model.config, 0)
    calls = Calls()
    with calls:
        step([batch], lr=1e-3, update=9)
    assert len(calls.names) <= 12, calls.names
    assert not {"aten::_local_scalar_dense", "aten::item", "aten::nonzero"} & set(calls.names)
    times = []
    for update in range(10, 30):
        start = time.perf_counter()
        step([batch], lr=1e-3, update=update)
        times.append(time.perf_counter() - start)
    assert min(times) < 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("modality", MODALITIES)
def test_graph_equals_the_eager_step(modality, one_pass, autocast):
    """Dropout included: a replay draws what an eager update would, from the seed that was set before it."""
    options = {"one_pass": one_pass, "device": "cuda", "autocast": autocast}
    model, _, metrics, _ = trained(modality, False, **options)
    other, optimizer, captured, step = trained(modality, True, strict=True, **options)
    assert step.replays == len(RATES) - WARM_UP
    for a, b in zip(metrics, captured, strict=True):
        assert [float(x) for x in b] == pytest.approx([float(x) for x in a], rel=2e-2 if autocast else 1e-3)
    tolerance = {"rtol": 1e-2, "atol": 5e-3} if autocast else {"rtol": 1e-3, "atol": 1e-4}
    for (name, x), y in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, **tolerance, msg=name)
    assert all(isinstance(group["lr"], float) and not group["capturable"] for group in optimizer.param_groups)


@pytest.mark.gpu
@pytest.mark.parametrize("encoder", [{}, {"layerdrop": 0.5}, {"checkpointing": "full"}, {"checkpointing": "selective"}])
@pytest.mark.parametrize("modality", MODALITIES)
def test_replays_draw_anew_and_do_not_wait(modality, encoder):
    """The seed alone decides what is dropped; nothing waits for the device but the test."""
    model, _, _, step = trained(modality, True, strict=True, device="cuda", encoder={"dropout": 0.2, **encoder})
    batch = static_batch(model.config, 0).to("cuda")
    losses = []
    for update, seed in enumerate((1, 2, 1), start=len(RATES)):
        torch.manual_seed(seed)
        with no_synchronisation():
            metrics = step([batch], lr=0.0, update=update)
        losses.append(metrics.loss)
    losses = [x.item() for x in losses]
    assert all(np.isfinite(losses)) and losses[0] != losses[1]
    assert step.replays == len(RATES) - WARM_UP + 3


@pytest.mark.gpu
def test_graphs_of_several_shapes_share_memory():
    """Replays of one do not disturb what another keeps: metrics read late, weights, optimizer state."""
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        model = Data2Vec(tiny_config("text", layerdrop=0.0)).cuda().train()
        optimizer = build_optimizer(model, OptimConfig())
        step = CapturedStep(model, optimizer, strict=True)
        metrics = []
        for update in range(12):
            batch = static_batch(model.config, update, size=2 + update % 2).to("cuda")
            torch.manual_seed(update)
            if captured:
                metrics.append(step([batch], lr=1e-3, update=update))
            else:
                metrics.append(train_step(model, [batch], optimizer, lr=1e-3, update=update))
        results.append([m.loss.item() for m in metrics])
    assert results[1] == pytest.approx(results[0], rel=1e-3)


@pytest.mark.gpu
def test_other_threads_go_on_during_capture():
    """As the data loader's does, which pins batches."""
    stop, failed = threading.Event(), []

    def pin():
        while not stop.is_set():
            try:
                torch.ones(1 << 16).pin_memory().cuda(non_blocking=True)
            except RuntimeError as error:
                failed.append(error)
                return

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        *_, step = trained("text", True, strict=True, device="cuda")
    finally:
        stop.set()
        thread.join()
    assert not failed and step.replays == len(RATES) - WARM_UP


@pytest.mark.gpu
def test_host_time_of_a_replay():
    """A base model's update, from the call to its return: at most 2 ms of host time."""
    model = Data2Vec(tiny_config("text", layers=12, dim=768, ffn_dim=3072, heads=12)).cuda().train()
    step = CapturedStep(model, build_optimizer(model, OptimConfig()), strict=True)
    batch = static_batch(model.config, 0).to("cuda")
    times = []
    for update in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step([batch], lr=1e-4, update=update)
        times.append(time.perf_counter() - start)
    assert step.replays == 20 - WARM_UP and min(times[WARM_UP + 1 :]) < 2e-3

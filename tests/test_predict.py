"""Bytes of a run's state against those of real tensors, and times only where something was measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from tiny import tiny_batch, tiny_config
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from d2v_fast.nn import Data2Vec, Data2VecConfig
from d2v_fast.train.config import load_config
from d2v_fast.train.optim import OptimConfig, build_optimizer
from d2v_fast.train.parallel import shard
from d2v_fast.train.predict import measurements, seconds_to_train, state_memory, suitable, units
from d2v_fast.train.step import train_step

ROOT = Path(__file__).parent.parent
MODALITIES = ["speech", "image", "text"]


def nbytes(tensors) -> int:
    """Of distinct memory; of DTensors their local part."""
    local = [x.to_local() if hasattr(x, "to_local") else x for x in tensors]
    return sum({x.data_ptr(): x.numel() * x.element_size() for x in local if x.numel()}.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("modality", MODALITIES)
def test_one_copy(modality, bf16):
    model = Data2Vec(tiny_config(modality)).train()
    optimizer = build_optimizer(model, OptimConfig())
    grads = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p, name=name: grads.update({name: p.grad}))
    train_step(model, [tiny_batch(model.config)], optimizer, lr=1e-3, update=0, autocast=bf16)
    found = state_memory(model.config, bf16=bf16)
    student = [p for p in model.parameters() if p.requires_grad]
    moments = [x for state in optimizer.state.values() for x in state.values() if x.dim() > 0]
    assert found.parameters == nbytes(student) and found.moments == nbytes(moments)
    assert found.gradients == nbytes(grads.values())
    assert found.averages == nbytes(model.teacher.averages().values())
    assert found.copies == (nbytes(model.teacher._low.copies) if bf16 else 0)
    assert found.total == sum((found.parameters, found.gradients, found.moments, found.averages, found.copies))


@pytest.fixture
def three_ranks():
    """A group of three ranks, of which only the first is there: nothing is sent."""
    dist.init_process_group("fake", rank=0, world_size=3, store=FakeStore())
    yield init_device_mesh("cpu", (3,), mesh_dim_names=("shard",))
    dist.destroy_process_group()


@pytest.mark.parametrize("modality", MODALITIES)
def test_shards(modality, three_ranks):
    """The first of three ranks holds what FSDP2 gave it."""
    model = Data2Vec(tiny_config(modality))
    shard(model, three_ranks, bf16=True)
    found = state_memory(model.config, 3)
    assert found.parameters == nbytes(p for p in model.parameters() if p.requires_grad)
    assert found.averages == nbytes(model.teacher.module.parameters())
    assert found.copies == 0 and found.moments == 2 * found.parameters
    assert found.total < 0.5 * state_memory(model.config).total


def test_published_sizes():
    """93.8 M parameters of speech base with its head: four numbers of each, and the teacher's encoder once more."""
    config = load_config("speech_base", ["data.path=x"]).model
    memory = state_memory(config)
    assert memory.parameters == 4 * 93_754_880 and memory.moments == 8 * 93_754_880
    assert 0.9 < memory.averages / memory.parameters < 1


def test_nothing_is_computed():
    """Initial values would bring Dynamo along, which takes longer than all the rest."""
    code = (
        "import sys; from d2v_fast.nn import Data2VecConfig; from d2v_fast.train.predict import state_memory\n"
        "print([state_memory(getattr(Data2VecConfig, m)('base')).parameters for m in ('speech', 'text')])\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    sizes = [state_memory(getattr(Data2VecConfig, modality)("base")).parameters for modality in ("speech", "text")]
    assert done.stdout.splitlines() == [str(sizes), "False"]


def result(folder, device, rows, recipe="speech_base") -> None:
    (folder / device).mkdir(parents=True, exist_ok=True)
    content = {"environment": {"device": device}, "benchmark": "train_step", "results": rows}
    (folder / device / f"train_step_{recipe}.json").write_text(json.dumps(content))


def row(provider="d2v_fast", modality="speech", units_per_s=100.0, layers=12, dim=768):
    named = {"provider": provider, "case": f"{modality}_any", "modality": modality}
    return {**named, "layers": layers, "dim": dim, "units_per_s": units_per_s}


def test_no_measurement_is_no_number(tmp_path):
    assert measurements(tmp_path) == []
    result(tmp_path, "cpu", {"speech": {"patched": {"wall": 1.3}}})  # ratios only
    result(tmp_path, "old", [{"provider": "d2v_fast", "modality": "speech", "status": "skipped: out of time"}])
    assert measurements(tmp_path) == []


def test_time_from_a_measurement(tmp_path):
    rows = [row(), row("d2v_fast graph", units_per_s=200.0), row("as written", units_per_s=900.0), row(modality="text")]
    rows += [row("d2v_fast again", units_per_s=300.0), row("d2v_fast, nothing left out", units_per_s=300.0)]
    result(tmp_path, "gpu-a", rows)
    result(tmp_path, "gpu-b", [row(units_per_s=50.0)])
    config = load_config("speech_base", ["data.path=x"])
    found = suitable(config, measurements(tmp_path))
    assert [(m.gpu, m.units_per_s) for m in found] == [("gpu-a", 200.0), ("gpu-b", 50.0)]
    # 400 k updates of 3800 s of audio on 16 GPUs of 200 s a second each
    assert seconds_to_train(config, 60_800_000, 16, found[0]) == 400_000 * 3800 / (16 * 200)
    large = load_config("speech_large", ["data.path=x"])
    assert suitable(large, measurements(tmp_path)) == []
    result(tmp_path, "gpu-a", [row(units_per_s=70.0, layers=24, dim=1024)], "speech_large")  # beside the other's file
    assert [m.units_per_s for m in suitable(large, measurements(tmp_path))] == [70.0]
    assert suitable(config, measurements(tmp_path)) == found


def test_units():
    text, image = (load_config(f"{name}_base", ["data.path=x"]) for name in ("text", "image"))
    assert units(text, 256) == 131_072 and units(image, 2048) == 2048

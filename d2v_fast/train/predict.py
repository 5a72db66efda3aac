"""What a run will need: bytes, by arithmetic, and time, from measurements where there are any. Nothing is guessed."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from d2v_fast.nn import Data2Vec, Data2VecConfig
from d2v_fast.train.config import TrainConfig
from d2v_fast.train.data.audio import SAMPLE_RATE

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"  # in a source checkout
FLOAT, BF16 = 4, 2
MOMENTS = 2  # of AdamW


@dataclass(frozen=True)
class StateMemory:
    """Bytes on the GPU that holds most, without activations and without what is gathered or cast while a layer runs."""

    parameters: int
    gradients: int
    moments: int  # of the optimizer
    averages: int  # the teacher's own parameters
    copies: int  # of the teacher's matrices in bfloat16

    @property
    def total(self) -> int:
        """All of them."""
        return self.parameters + self.gradients + self.moments + self.averages + self.copies


def state_memory(config: Data2VecConfig, shards: int = 1, *, bf16: bool = True) -> StateMemory:
    """What a model and its optimizer hold between updates.

    Args:
        config: of the model.
        shards: GPUs that share one copy: 1 for a single one and DDP, all of them for FSDP2, ``distributed.shard_size``
            for HSDP. Each tensor is cut along its first dimension; the first GPU has the longest part.
        bf16: whether the run is in bfloat16, where a teacher that is not sharded has its matrices twice.
    """
    with _Unset(), torch.device("meta"):
        model = Data2Vec(config)
    teacher = model.teacher
    student = [p for p in model.parameters() if p.requires_grad]
    mine = list(teacher.averages().values())
    if shards > 1:  # shards are shared by nobody
        mine = list(teacher.module.parameters())
    trained = FLOAT * _largest(student, shards)
    copies = 0
    if bf16 and config.prune.teacher_copy and shards == 1:
        averaged = {id(x) for x in mine}
        layers = [m for m in teacher.module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        copies = BF16 * sum(m.weight.numel() for m in layers if id(m.weight) in averaged)
    return StateMemory(trained, trained, MOMENTS * trained, FLOAT * _largest(mine, shards), copies)


class _Unset(TorchFunctionMode):
    """Leaves out initial values, which are nothing on the meta device but load Dynamo for a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") == "torch.nn.init" or func in (Tensor.normal_, Tensor.uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _largest(tensors: list[Tensor], shards: int) -> int:
    """Elements of the first of ``shards`` parts of each tensor."""
    return sum(-(-x.shape[0] // shards) * prod(x.shape[1:]) for x in tensors)


@dataclass(frozen=True)
class Measurement:
    """A step of ours that was timed on one GPU."""

    gpu: str
    modality: str
    layers: int
    dim: int
    units_per_s: float  # seconds of audio, images or tokens


def measurements(folder: Path = RESULTS) -> list[Measurement]:
    """The committed ones: the fastest step of ours for each GPU and model in ``<gpu>/train_step*.json``."""
    best: dict[tuple, Measurement] = {}
    for path in sorted(folder.glob("*/train_step*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for row in content["results"] if isinstance(content["results"], list) else ():
            if row["provider"] not in ("d2v_fast", "d2v_fast graph") or "units_per_s" not in row:
                continue
            key = content["environment"]["device"], row["modality"], row["layers"], row["dim"]
            found = Measurement(*key, row["units_per_s"])
            if key not in best or best[key].units_per_s < found.units_per_s:
                best[key] = found
    return list(best.values())


def units(config: TrainConfig, items: int) -> float:
    """``items`` (samples of speech, images, blocks of text) as seconds of audio, images or tokens."""
    if config.model.modality == "speech":
        return items / SAMPLE_RATE
    return items * config.data.tokens_per_sample if config.model.modality == "text" else items


def seconds_to_train(config: TrainConfig, batch: int, gpus: int, measured: Measurement) -> float:
    """Seconds for ``config.updates`` updates of ``batch`` items on ``gpus`` such GPUs, were communication free."""
    return config.updates * units(config, batch) / (gpus * measured.units_per_s)


def suitable(config: TrainConfig, measured: list[Measurement]) -> list[Measurement]:
    """Those of the model that ``config`` trains."""
    encoder = config.model.encoder
    wanted = (config.model.modality, encoder.layers, encoder.dim)
    return [m for m in measured if (m.modality, m.layers, m.dim) == wanted]

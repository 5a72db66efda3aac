"""A model on several ranks: replicas (DDP), shards (FSDP2), or replicas of shards (HSDP). docs/distributed.md."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from d2v_fast.nn import Batch, Data2Vec
from d2v_fast.ops.data2vec_loss import LossOutput
from d2v_fast.train.distributed import Ranks
from d2v_fast.train.errors import ConfigError

# ranks have the same buffers, which never change; torch 2.13 has another name for it
_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_KEEP_BUFFERS = {"forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False}
RECOMPILE_LIMIT = 64  # at least; PyTorch's is 8, which a run of a tiny model may reach


@dataclass(frozen=True, eq=False)
class Parallel:
    """How a training step computes a model together with other ranks; the defaults are for one process."""

    forward: Callable[[Batch], LossOutput]
    world_size: int = 1  # ranks whose gradients are averaged
    syncing: Callable[[bool], AbstractContextManager] = lambda last: nullcontext()  # around each micro-batch
    shards: dist.ProcessGroup | None = None  # ranks that share one copy of the parameters; None: each has all of them


def parallelise(
    model: Data2Vec, ranks: Ranks, *, accumulate: int = 1, shard_size: int = 0, bf16: bool = False
) -> Parallel:
    """Spread ``model``, the same on all ranks, as ``ranks.mode`` says. Build the optimizer afterwards.

    With "fsdp2" and "hsdp" its parameters become DTensors, those of the teacher as well, and ``bf16`` has layers
    gathered in bfloat16; run it under autocast to bfloat16 then. ``accumulate`` micro-batches are an update.

    Raises:
        ConfigError: ``shard_size`` does not divide the number of ranks.
    """
    if ranks.mode == "none":
        return Parallel(model)
    if ranks.mode == "ddp":
        return replicate(model, ranks, accumulate)
    return shard(model, _mesh(ranks, shard_size), bf16)


def replicate(model: Data2Vec, ranks: Ranks, accumulate: int) -> Parallel:
    """DDP: each rank has the whole model, and gradients are averaged in backward.

    Parameters that LayerDrop skips have gradients of 0, so that nothing has to look for parameters without one.
    """
    if getattr(model.frontend, "frozen", False):  # these never get a gradient, and DDP would wait for it
        names = [f"frontend.convs.{name}" for name, _ in model.frontend.convs.named_parameters()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    wrapped = DistributedDataParallel(
        model,
        device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
        **_KEEP_BUFFERS,
        gradient_as_bucket_view=True,
        # DDP fails if the first backward of a static graph does not communicate
        static_graph=model.config.encoder.layerdrop == 0 and accumulate == 1,
    )
    return Parallel(wrapped, ranks.world_size, lambda last: nullcontext() if last else wrapped.no_sync())


def shard(model: Data2Vec, mesh: DeviceMesh, bf16: bool) -> Parallel:
    """FSDP2: each layer of student and teacher is gathered when it runs; averages and optimizer state stay in shards.

    The teacher is sharded as the student is, so that its averages are updated without communication. What is outside
    of the layers is gathered in float32: under autocast embeddings, convolutions and the norms there stay so, too.

    Args:
        model: whole, and the same on all ranks.
        mesh: of one dimension "shard", or of two, "replicate" and "shard".
        bf16: gather layers in bfloat16. Gradients are summed in float32.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard  # takes seconds

    # a warning for code that writes into what a layer returned
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view", category=UserWarning)
    # inputs are cast by autocast, where it casts: the residual stream stays in float32
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    layers = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if bf16 else whole
    teacher = model.teacher.module
    with model.teacher.sharding():
        for encoder in (model.encoder, teacher["encoder"]):
            encoder.separate_layers()
            for layer in encoder.layers:
                fully_shard(layer, mesh=mesh, mp_policy=layers, reshard_after_forward=True)
        for part in teacher.values():
            fully_shard(part, mesh=mesh, mp_policy=whole, reshard_after_forward=True)
        fully_shard(model, mesh=mesh, mp_policy=whole)
    for module in teacher.modules():
        if isinstance(module, FSDPModule):  # the last of these is in front of the student's first layer, see below
            module.set_unshard_in_backward(False)  # FSDP2 gathers ahead in reverse order, whether needed or not

    @contextmanager
    def syncing(last: bool) -> Iterator[None]:
        model.set_is_last_backward(last)
        model.set_requires_gradient_sync(last)
        yield

    shards = mesh["shard"].get_group()
    return Parallel(model, mesh.size(), syncing, shards)


def _mesh(ranks: Ranks, shard_size: int) -> DeviceMesh:
    """Ranks that share parameters, in groups with the run's time-out: ``init_device_mesh`` gives them PyTorch's."""
    if ranks.mode == "fsdp2":
        return DeviceMesh.from_group(dist.group.WORLD, ranks.device.type, mesh_dim_names=("shard",))
    shard_size = shard_size or ranks.local_world_size
    if ranks.world_size % shard_size:
        raise ConfigError(f"distributed.shard_size must divide the {ranks.world_size} ranks, got {shard_size}")
    grid = torch.arange(ranks.world_size).view(-1, shard_size)
    timeout = timedelta(seconds=ranks.timeout)
    groups = [dist.new_subgroups_by_enumeration(rows.tolist(), timeout=timeout)[0] for rows in (grid.T, grid)]
    return DeviceMesh.from_group(groups, ranks.device.type, grid, mesh_dim_names=("replicate", "shard"))


def compile_layers(model: Data2Vec) -> None:
    """Let ``torch.compile`` make one graph of each layer of student and teacher, in place, before parallelising.

    What differs from update to update, the layers that run and the collectives, stays outside. Settings of Dynamo
    change with it, for the whole process: it compiles the code that all layers share as often as they need, and leaves
    their graphs whole.
    """
    from torch._dynamo import config  # takes a second

    # teacher and student, the last layers, each rate of DropPath, sizes that become dynamic, other models
    limit = max(config.recompile_limit, RECOMPILE_LIMIT, 8 * len(model.encoder.layers))
    config.recompile_limit = limit
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * limit)
    config.optimize_ddp = False  # it would split a layer's graph at the bounds of DDP's buckets
    encoders: list[nn.Module] = [model.encoder, model.teacher.module["encoder"]]
    for encoder in encoders:
        for layer in encoder.layers:
            layer.compile()

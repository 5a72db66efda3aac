"""Tensors of many ranks to and from safetensors files, by torch.distributed.checkpoint.

Every rank writes its own shards and its share of what is replicated; the files say where in the whole each piece
belongs, so that any other number of ranks can read them. Nothing in them is executed. Planner, writer and reader
are called one by one and not through ``dcp.async_save``: that talks to the other ranks from its thread.
"""

from collections.abc import Callable
from pathlib import Path

import safetensors.torch  # noqa: F401  what writes the files; a run without it should not get as far as its first save
import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    Metadata,
    SavePlan,
)
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem

from d2v_fast.ops._lists import local_shard

FILE_BYTES = 1 << 30  # of whole tensors in a file; while it is written, its size again in host memory


class _HostPlanner(DefaultSavePlanner):
    """Plans with the run's tensors, writes copies of them."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.copies: dict[str, Tensor] = {}

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.copies[index.fqn]


class ShardWriter:
    """One save of ``state``, by all ranks: plans are exchanged, copies made, then written without the others."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self._state, self._planner = state, _HostPlanner()
        self._planner.set_up_planner(state)
        self.local_plan: SavePlan = self._planner.create_local_plan()

    @torch.no_grad()
    def copy(self, plans: list[SavePlan], rank: int) -> None:
        """Take the ``local_plan`` of every rank, and copy to the host what this one has to write.

        The copy is complete when this returns: the run may go on.
        """
        plans, _ = self._planner.create_global_plan(plans)  # the same in every rank
        self._plan = self._planner.finish_plan(plans[rank])
        names = {item.index.fqn for item in self._plan.items}
        for name in names:
            x = local_shard(self._state[name].detach())
            self._planner.copies[name] = torch.empty(x.shape, dtype=x.dtype).copy_(x)
        self._rank, self._files, self._state = rank, _file_numbers(self._state), {}

    def write(self, folder: Path) -> list[str]:
        """Write this rank's files into ``folder``; return their names. They are on the disk then."""
        writer = HuggingFaceStorageWriter(str(folder), self._files, save_distributed=True)
        writer.per_thread_copy_ahead = 0  # all is on the host: no CUDA stream, which would belong to another device
        plans = [SavePlan([])] * self._rank + [self._plan]  # the place in the list becomes a part of the names
        results = writer.write_data(writer.prepare_global_plan(plans)[self._rank], self._planner).wait()
        return sorted({result.storage_data.relative_path for result in results})


def _file_numbers(state: dict[str, Tensor]) -> dict[str, int]:
    """File of each tensor, from 1 on; the same for any number of ranks."""
    numbers, size = {}, 0
    for name, x in state.items():
        numbers[name] = size // FILE_BYTES + 1
        size += x.numel() * x.element_size()
    return numbers


class _TickingPlanner(DefaultLoadPlanner):
    """Calls ``tick`` after each piece that was read."""

    def __init__(self, tick: Callable[[], None]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tick = tick

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        self._tick()


class ShardReader:
    """The files of a checkpoint; every rank reads for itself."""

    def __init__(self, folder: Path) -> None:
        self._reader = HuggingFaceStorageReader(str(folder))
        self._metadata: Metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self.tensors: dict[str, tuple[torch.Size, torch.dtype]] = {
            name: (entry.size, entry.properties.dtype) for name, entry in self._metadata.state_dict_metadata.items()
        }

    @torch.no_grad()
    def fill(self, state: dict[str, Tensor], tick: Callable[[], None] = lambda: None) -> None:
        """Read into the tensors of ``state``: of sharded ones, what this rank has; ``tick`` is called after each piece.

        Raises:
            ValueError, RuntimeError, OSError: a shape differs, or a file cannot be read.
        """
        planner = _TickingPlanner(tick)
        planner.set_up_planner(state, self._metadata, is_coordinator=True)
        plan = self._reader.prepare_local_plan(planner.create_local_plan())
        plan = planner.finish_plan(self._reader.prepare_global_plan([plan])[0])
        self._reader.read_data(plan, planner).wait()

"""Counts what an update communicates: every collective, and the bytes that a rank hands in or gets."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# the argument that has the whole tensor, of which a rank holds a part before or afterwards
WHOLE = {"allreduce_": 0, "_allgather_base_": 0, "_reduce_scatter_base_": 1, "broadcast_": 0, "allgather_": 0}


class Traffic(TorchDispatchMode):
    """Calls and bytes of each kind of collective inside of the block, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.nbytes = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::")
            tensors = [x for x in tree_leaves(args[WHOLE[name]]) if isinstance(x, torch.Tensor)]
            self.calls[name] += 1
            self.nbytes[name] += sum(x.nbytes for x in tensors)
        return function(*args, **(kwargs or {}))

"""A module a second time, with low-precision copies of its matrices: what autocast would cast at every use."""

import copy
from itertools import chain

import torch
from torch import Tensor, nn

from d2v_fast.ops._lists import is_plain

_CAST = (nn.Linear, nn.Conv2d)  # layers whose weight autocast casts as it is, before a matrix product


class LowPrecisionCopy:
    """``module`` is the given one with the weights of its linear layers in ``dtype``; the rest is the same parameters.

    Biases stay as well: some are added in float32 by a fused op, and casting the others costs next to nothing.

    Args:
        module: of float32 masters, which ``refresh_`` reads. Weights in other dtypes, and DTensors, get no copy.
        dtype: that of the copies.
        averaged: (master, whatever it follows); only these masters get one.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, averaged: list[tuple[Tensor, Tensor]]) -> None:
        self.averaged = averaged
        found = {
            id(layer._parameters.get("weight"))
            for layer in module.modules()
            if isinstance(layer, _CAST) and is_plain(layer.weight) and layer.weight.dtype == torch.float32
        }
        copied = [pair for pair in averaged if id(pair[0]) in found]
        others = [pair for pair in averaged if id(pair[0]) not in found]
        self.masters = [master for master, _ in copied]
        self.copies = [nn.Parameter(torch.empty_like(x, dtype=dtype), requires_grad=False) for x in self.masters]
        # (pairs, their copies): what one call each of ema_update_ takes
        self.updates = [(pairs, copies) for pairs, copies in ((copied, self.copies), (others, None)) if pairs]
        known = {id(x): x for x in chain(module.parameters(), module.buffers())}  # deepcopy leaves these as they are
        known.update((id(x), y) for x, y in zip(self.masters, self.copies, strict=True))
        self.module = copy.deepcopy(module, known)
        self.refresh_()

    @torch.no_grad()
    def refresh_(self) -> None:
        """Copy the masters anew, in place."""
        if self.masters:
            torch._foreach_copy_(self.copies, self.masters)
        self.note_()

    def note_(self) -> None:
        """Remember that the copies are those of the masters as they are now."""
        self._versions = [x._version for x in self.masters]

    def stale(self) -> bool:
        """Whether a master was written since; not if through ``.data``."""
        return any(x._version != version for x, version in zip(self.masters, self._versions, strict=True))

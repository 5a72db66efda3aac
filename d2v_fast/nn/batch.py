"""What a data loader hands to the model: inputs, where they are masked, and where they are padding."""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch. ``T`` counts encoder positions: speech frames, image patches or text tokens.

    The masked positions travel twice, as a mask and as indices, so that their number is known on the host and no
    kernel has to wait for a ``nonzero``.
    """

    inputs: Tensor  # speech [B, S] float32 waveforms; images [B, 3, H, W]; text [B, T] int64 token ids (unmasked)
    mask: Tensor  # [B, T] bool, True = masked
    positions: Tensor  # [N] int32, flat b * T + t of the masked positions, ascending
    padding_mask: Tensor | None = None  # [B, T] bool, True = padding; None when there is none
    lengths: Tensor | None = None  # [B] int32 valid positions per row; given exactly when padding_mask is
    skipped: tuple[tuple[str, str], ...] = ()  # (file, reason) for items that could not be read

    @property
    def num_masked(self) -> int:
        """Number of masked positions; a host integer, never read back from the device."""
        return self.positions.numel()

    def _map(self, function) -> "Batch":
        changed = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in changed.items() if isinstance(v, Tensor)})

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        """Copy every tensor to ``device``."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Page-lock every tensor (the hook that ``torch.utils.data.DataLoader(pin_memory=True)`` calls)."""
        return self._map(lambda t: t.pin_memory())


def make_batch(
    inputs: Tensor,  # as in Batch
    mask: np.ndarray,  # [B, T] bool
    lengths: np.ndarray | None = None,  # [B] valid positions per row, or None when every row is full
    skipped: tuple[tuple[str, str], ...] = (),
) -> Batch:
    """Build a :class:`Batch` on the host from a NumPy mask and, for padded batches, the rows' lengths."""
    if mask.dtype != bool or mask.ndim != 2 or mask.shape[0] != inputs.shape[0]:
        raise ValueError(f"mask must be bool [{inputs.shape[0]}, T], got {mask.dtype} {mask.shape}")
    padding_mask = lengths_tensor = None
    if lengths is not None and (lengths < mask.shape[1]).any():
        padding_mask = torch.from_numpy(np.arange(mask.shape[1])[None] >= lengths[:, None])
        lengths_tensor = torch.from_numpy(lengths.astype(np.int32))
    return Batch(
        inputs=inputs,
        mask=torch.from_numpy(mask),
        positions=torch.from_numpy(np.flatnonzero(mask).astype(np.int32)),
        padding_mask=padding_mask,
        lengths=lengths_tensor,
        skipped=skipped,
    )

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
    """Build a :class:`Batch` on the host from a NumPy mask and, for padded batches, the rows' lengths.

    Raises:
        TypeError: ``mask`` is not bool, or ``lengths`` not integers.
        ValueError: their shapes do not fit ``inputs``, a length is not in 1..T, or a masked position is padding.
    """
    if mask.dtype != bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if mask.ndim != 2 or mask.shape[0] != inputs.shape[0]:
        raise ValueError(f"mask must be [{inputs.shape[0]}, T], got {mask.shape}")
    padding_mask = lengths_tensor = None
    if lengths is not None:
        padding = _padding(lengths, *mask.shape)  # [B, T]
        if (mask & padding).any():
            raise ValueError("mask must be False in the padding beyond lengths, got masked positions there")
        if padding.any():
            padding_mask = torch.from_numpy(padding)
            lengths_tensor = torch.from_numpy(lengths.astype(np.int32))
    return Batch(
        inputs=inputs,
        mask=torch.from_numpy(mask),
        positions=torch.from_numpy(np.flatnonzero(mask).astype(np.int32)),
        padding_mask=padding_mask,
        lengths=lengths_tensor,
        skipped=skipped,
    )


def _padding(lengths: np.ndarray, batch_size: int, num_positions: int) -> np.ndarray:
    """Bool [B, T], True from ``lengths`` [B] on."""
    if lengths.dtype.kind not in "iu":
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if lengths.shape != (batch_size,):
        raise ValueError(f"lengths must be [{batch_size}], got {lengths.shape}")
    if ((lengths < 1) | (lengths > num_positions)).any():
        raise ValueError(f"lengths must be in 1..{num_positions}, got {lengths.tolist()}")
    return np.arange(num_positions)[None] >= lengths[:, None]

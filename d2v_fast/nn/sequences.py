"""Sequences of different lengths behind each other in rows, without padding (the "varlen" form of FlashAttention).

Made on the host, where lengths and masks are known, so that nothing has to wait for the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sequences:
    """Sequence u is rows ``cu_seqlens[u]`` to ``cu_seqlens[u + 1]`` of a tensor [N, ...].

    ``rows`` says where each row came from: its index among the rows [B * T] of a padded batch, or of another packing.
    What kernels need to know on the host, ``max_length`` and ``num_rows``, is kept there.
    """

    cu_seqlens: Tensor  # [U + 1] int32, from 0 to num_rows, never falling
    max_length: int  # at least that of the longest sequence
    num_rows: int  # N
    rows: Tensor | None = None  # [N] int64
    real: Tensor | None = None  # [N] bool, False for rows that only fill up to a fixed N; None: all are real

    @property
    def count(self) -> int:
        """Number of sequences U; of those at the end of a table, some may be empty."""
        return self.cu_seqlens.numel() - 1

    def map(self, function: Callable[[Tensor], Tensor]) -> "Sequences":
        """The same with ``function`` applied to every tensor."""
        rows, real = (None if x is None else function(x) for x in (self.rows, self.real))
        return Sequences(function(self.cu_seqlens), self.max_length, self.num_rows, rows, real)

    def take(self, x: Tensor) -> Tensor:
        """The rows [N, ...] out of ``x`` [M, ...], the rows that ``rows`` counts; differentiable."""
        return x.index_select(0, self.rows)

    def put(self, x: Tensor, into: Tensor) -> Tensor:
        """A copy of ``into`` [M, ...] with the rows ``x`` [N, ...] where they came from; differentiable."""
        return into.index_copy(0, self.rows, x)

    @classmethod
    def even(cls, batch_size: int, length: int, device: torch.device | None = None) -> "Sequences":
        """``batch_size`` sequences of ``length`` rows each: the rows of a batch without padding."""
        last = batch_size * length
        return cls(torch.arange(0, last + 1, max(length, 1), dtype=torch.int32, device=device), length, last)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int] | np.ndarray) -> "Sequences":
        """Sequences of ``lengths`` [U] rows, on the CPU.

        Raises:
            TypeError: ``lengths`` are no integers.
            ValueError: there is no sequence, or an empty one.
        """
        lengths = np.asarray(lengths)
        if lengths.dtype.kind not in "iu":
            raise TypeError(f"lengths must be integers, got {lengths.dtype}")
        if lengths.ndim != 1 or lengths.size == 0 or lengths.min() < 1:
            raise ValueError(f"lengths must be [U] with every sequence at least 1 long, got {lengths.tolist()}")
        return cls(_ends(lengths), int(lengths.max()), int(lengths.sum()))

    @classmethod
    def from_mask(cls, mask: np.ndarray, *, num_rows: int | None = None) -> "Sequences":
        """The True entries of ``mask`` bool [B, T], row by row, on the CPU; a row of ``mask`` may have none.

        Args:
            mask: which positions to take.
            num_rows: take so many rows whatever the mask, so that every batch has the same shapes; the others are
                copies of rows that are there, and nothing should be read from them. They belong to sequences of their
                own, at most T long, behind the B; there are as many of these as could be needed, empty if they are not.
                ``max_length`` is T then.

        Raises:
            TypeError: ``mask`` is not bool.
            ValueError: it is not [B, T] with B and T above 0, or has more entries than ``num_rows``.
        """
        if mask.dtype != bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}")
        if mask.ndim != 2 or mask.size == 0:
            raise ValueError(f"mask must be [B, T] with at least one row and position, got {mask.shape}")
        lengths, rows = mask.sum(1), np.flatnonzero(mask)
        if num_rows is None:
            return cls(_ends(lengths), int(lengths.max()), rows.size, torch.from_numpy(rows))
        extra = num_rows - rows.size
        if extra < 0:
            raise ValueError(f"num_rows must be at least {rows.size} for this mask, got {num_rows}")
        T = mask.shape[1]
        tail = np.clip(extra - T * np.arange(-(-num_rows // T)), 0, T)
        rows = np.append(rows, np.zeros(extra, np.int64))
        real = np.arange(num_rows) < num_rows - extra
        return cls(_ends(np.append(lengths, tail)), T, num_rows, torch.from_numpy(rows), torch.from_numpy(real))


def _ends(lengths: np.ndarray) -> Tensor:
    return torch.from_numpy(np.append(0, np.cumsum(lengths, dtype=np.int64)).astype(np.int32))

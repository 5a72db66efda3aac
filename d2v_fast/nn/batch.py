"""What a data loader hands to the model: inputs, where they are masked, and where they are padding."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from d2v_fast.nn.sequences import Sequences


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch. ``T`` counts encoder positions: speech frames, image patches or text tokens.

    The masked positions travel as a mask and as indices, so that their number is known on the host and no kernel has to
    wait for a ``nonzero``; and as :class:`Sequences`, for what is computed at these rows alone. :func:`make_batch`
    makes all of it; replace them together or not at all. On the CPU the model calls :meth:`check`; do so before a batch
    that was changed by hand goes to a device, where nothing is compared.
    """

    inputs: Tensor  # speech [B, S] float32 waveforms; images [B, 3, H, W]; text [B, T] int64 token ids (unmasked)
    mask: Tensor  # [B, T] bool, True = masked
    positions: Tensor  # [M] int32, flat b * T + t of the masked positions, ascending; -1 where a fixed M is filled up
    padding_mask: Tensor | None = None  # [B, T] bool, True = padding, at the ends of rows; None when there is none
    lengths: Tensor | None = None  # [B] int32 valid positions per row; given exactly when padding_mask is
    masked: Sequences | None = None  # the M rows of positions, in their order, among B * T; None: nothing is left out
    masked_alone: Sequences | None = None  # these without the rows that fill up among them; None: the same as masked
    valid: Sequences | None = None  # the positions that are not padding; given exactly when padding_mask is
    masked_in_valid: Sequences | None = None  # masked, as rows of valid, one sequence for each of valid's
    real_masked: int | None = None  # masked positions, where M is fixed; None: all of positions are
    skipped: tuple[tuple[str, str], ...] = ()  # (file, reason) for items that could not be read

    @property
    def num_masked(self) -> int:
        """Number of masked positions; a host integer, never read back from the device."""
        return self.positions.numel() if self.real_masked is None else self.real_masked

    def check(self) -> None:
        """Compare the descriptions of what is masked, and of what is padding, with each other; reads the tensors.

        Raises:
            ValueError: two of them contradict each other.
        """
        where = self.mask.flatten().nonzero().flatten()  # [M]
        given = self.positions[self.positions >= 0].long()
        if given.numel() != where.numel():
            raise ValueError(f"batch.positions must be the {where.numel()} masked positions, got {given.numel()}")
        if not torch.equal(given, where):
            raise ValueError("batch.positions must be the positions where batch.mask is True, ascending, got others")
        if self.real_masked is None and given.numel() != self.positions.numel():
            # its value is not compared: the tensors that a CUDA graph reads belong to one batch after the other
            raise ValueError(f"batch.real_masked must be {given.numel()} with positions of -1, got None")
        self._check_sequences("masked", where)
        self._check_sequences("masked_alone", where)
        if self.masked is not None and not torch.equal(_real(self.masked), self.positions >= 0):
            raise ValueError("batch.masked must have real rows where positions are not -1, got others")
        self._check_padding()

    def _check_padding(self) -> None:
        for name in ("lengths", "valid", "masked_in_valid"):
            if self.padding_mask is None and getattr(self, name) is not None:
                raise ValueError(f"batch.{name} must be None without padding_mask, got one")
        if self.padding_mask is None:
            return
        if (self.mask & self.padding_mask).any():
            raise ValueError("batch.mask must be False in the padding, got masked positions there")
        lengths = (~self.padding_mask).sum(1)
        if self.lengths is None or not torch.equal(self.lengths.long(), lengths):
            found = None if self.lengths is None else self.lengths.tolist()
            raise ValueError(f"batch.lengths must be {lengths.tolist()} as in padding_mask, got {found}")
        if not torch.equal(self.padding_mask, torch.arange(self.mask.shape[1]) >= lengths[:, None]):
            raise ValueError("batch.padding_mask must be True at the ends of rows alone, got some elsewhere")
        self._check_sequences("valid", (~self.padding_mask).flatten().nonzero().flatten())
        if self.masked_in_valid is not None and not self._is_inside():
            raise ValueError("batch.masked_in_valid must be the rows of masked among those of valid, got others")

    def _check_sequences(self, name: str, where: Tensor) -> None:
        """Whether the real rows are those of ``where`` [N], each in the sequence of its row of the batch."""
        sequences = getattr(self, name)
        if sequences is None:
            return
        owners = _owners(sequences)
        if sequences.rows is not None and sequences.rows.shape == owners.shape:
            real = _real(sequences)
            same = torch.equal(sequences.rows[real], where)
            if same and torch.equal(owners[real], where // self.mask.shape[1]):
                return
        what = "padding_mask is False" if name == "valid" else "mask is True"
        raise ValueError(f"batch.{name} must be the positions where batch.{what}, row by row, got others")

    def _is_inside(self) -> bool:
        """Whether ``masked_in_valid`` is ``masked``, counted among the rows of ``valid``."""
        inside, masked, valid = self.masked_in_valid, self.masked, self.valid
        if masked is None or valid is None or not bool((inside.rows < valid.num_rows).all()):
            return False
        pairs = (
            (valid.rows[inside.rows], masked.rows),
            (_owners(inside), _owners(masked)),
            (_real(inside), _real(masked)),
        )
        return all(torch.equal(mine, theirs) for mine, theirs in pairs)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The same with ``function`` applied to every tensor, those of its sequences included."""
        changed = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = function(value)
            elif isinstance(value, Sequences):
                changed[field.name] = value.map(function)
        return replace(self, **changed)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        """Copy every tensor to ``device``."""
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Page-lock every tensor (the hook that ``torch.utils.data.DataLoader(pin_memory=True)`` calls)."""
        return self.map(lambda t: t.pin_memory())


def make_batch(
    inputs: Tensor,  # as in Batch
    mask: np.ndarray,  # [B, T] bool
    lengths: np.ndarray | None = None,  # [B] valid positions per row, or None when every row is full
    skipped: tuple[tuple[str, str], ...] = (),
    *,
    num_masked: int | None = None,
    num_valid: int | None = None,
) -> Batch:
    """Build a :class:`Batch` on the host from a NumPy mask and, for padded batches, the rows' lengths.

    With ``num_masked`` and ``num_valid`` every batch of [B, T] has the same shapes, as a captured CUDA graph needs:
    so many rows are computed at masked, and at valid positions, and what fills them up is not looked at. With
    ``num_valid`` a batch without padding is described as one with padding is.

    Raises:
        TypeError: ``mask`` is not bool, or ``lengths`` not integers.
        ValueError: their shapes do not fit ``inputs``, a length is not in 1..T, a masked position is padding,
            ``num_masked`` is below the number of masked positions or above that of valid ones, or ``num_valid`` below
            the latter.
    """
    if mask.dtype != bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if mask.ndim != 2 or mask.shape[0] != inputs.shape[0]:
        raise ValueError(f"mask must be [{inputs.shape[0]}, T], got {mask.shape}")
    padding = np.zeros_like(mask) if lengths is None else _padding(lengths, *mask.shape)  # [B, T]
    if (mask & padding).any():
        raise ValueError("mask must be False in the padding beyond lengths, got masked positions there")
    masked, alone = _masked(mask, ~padding, num_masked)
    positions = masked.rows.int()
    batch = Batch(
        inputs=inputs,
        mask=torch.from_numpy(mask),
        positions=positions if masked.real is None else torch.where(masked.real, positions, -1),
        masked=masked,
        masked_alone=alone,
        real_masked=None if num_masked is None else int(mask.sum()),
        skipped=skipped,
    )
    if not padding.any() and num_valid is None:
        return batch
    count = int((~padding).sum())
    if num_valid is not None and num_valid < count:
        raise ValueError(f"num_valid must be at least {count}, the valid positions, got {num_valid}")
    valid = Sequences.from_mask(~padding, num_rows=num_valid)
    return replace(
        batch,
        padding_mask=torch.from_numpy(padding),
        lengths=torch.from_numpy((~padding).sum(1).astype(np.int32)),
        valid=valid,
        masked_in_valid=_inside(masked, ~padding, valid.count),
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


def _masked(mask: np.ndarray, valid: np.ndarray, num_masked: int | None) -> tuple[Sequences, Sequences | None]:
    """``Batch.masked`` and ``masked_alone``: a fixed number is filled up with the first valid positions not masked."""
    if num_masked is None:
        return Sequences.from_mask(mask), None
    count, most = int(mask.sum()), int(valid.sum())
    if not count <= num_masked <= most:
        raise ValueError(f"num_masked must be from {count} to {most}, masked and valid positions, got {num_masked}")
    taken = mask.copy()
    taken.flat[np.flatnonzero(valid & ~mask)[: num_masked - count]] = True
    masked = Sequences.from_mask(taken)
    real = torch.from_numpy(mask.flat[masked.rows.numpy()])
    return (
        replace(masked, max_length=mask.shape[1], real=real),
        Sequences.from_mask(mask, num_rows=num_masked),
    )


def _inside(masked: Sequences, valid: np.ndarray, count: int) -> Sequences:
    """``masked``, rows among all positions, as rows among the ``valid`` ones, which are ``count`` sequences."""
    packed = torch.from_numpy(np.cumsum(valid) - 1)  # where a position is among the valid ones
    ends = masked.cu_seqlens
    empty = ends[-1:].expand(count - masked.count)  # nothing is masked in what only fills up
    return replace(masked, cu_seqlens=torch.cat([ends, empty]), rows=packed[masked.rows])


def _real(sequences: Sequences) -> Tensor:
    """Bool [N], False for rows that only fill up."""
    return torch.ones_like(sequences.rows, dtype=torch.bool) if sequences.real is None else sequences.real


def _owners(sequences: Sequences) -> Tensor:
    """The sequence that each row belongs to [N]; another number of them where ``cu_seqlens`` do not rise to N."""
    return torch.repeat_interleave(torch.arange(sequences.count), sequences.cu_seqlens.diff().clamp(min=0))

"""Which rows of a batch student and teacher compute: the plan of a training step that leaves out what nothing needs.

Dims: B batch, T positions, P encoder positions (T, plus the class token of images), N packed rows, M masked positions,
C channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from d2v_fast.nn.batch import Batch
from d2v_fast.nn.config import Data2VecConfig, TargetConfig
from d2v_fast.nn.sequences import Sequences


@dataclass(frozen=True, eq=False)
class Rows:
    """What an encoder computes of a batch: all rows of [B, P, C], or packed ones [N, C]; the last layer perhaps M."""

    packed: Sequences | None  # None: all
    padding_mask: Tensor | None  # [B, T], where padding is computed along
    masked: Sequences | None  # the masked ones among these rows, with what fills up a fixed M; None: not known as such
    pruned: bool  # whether the last layer computes these alone
    positions: Tensor  # [M] int: the same rows, -1 for those that fill up

    @property
    def select(self) -> Sequences | None:
        """What the encoder has to be told."""
        return self.masked if self.pruned else None

    def take(self, x: Tensor) -> Tensor:
        """Of x [B, T, ...] what the encoder reads: x, or the packed rows [N, ...]."""
        return x if self.packed is None else self.packed.take(x.flatten(0, 1))

    def at_masked(self, x: Tensor) -> Tensor:
        """The masked rows [M, C] of what the encoder gave for all of them, or for these alone."""
        if self.pruned:
            return x
        rows = self.positions.clamp(min=0) if self.masked is None else self.masked.rows
        return x.flatten(0, -2).index_select(0, rows)

    def batched(self, x: Tensor, shape: torch.Size) -> Tensor:
        """Packed x [N, C] as [B, T, C] for ``shape`` [B, T], 0 where nothing was computed; another x as it is."""
        if self.packed is None:
            return x
        rows, end = self.packed.rows, shape.numel()
        if self.packed.real is not None:  # rows that fill up are copies of others: they go behind the end
            rows = torch.where(self.packed.real, rows, end)
        return x.new_zeros(end + 1, x.shape[1]).index_copy_(0, rows, x)[:end].view(*shape, x.shape[1])


def uses_time(targets: TargetConfig) -> bool:
    """Whether a target needs statistics over the positions of a row or batch, and so results at all of them."""
    return targets.norm in ("instance", "batch") or targets.post_norm == "instance"


def student_rows(config: Data2VecConfig, batch: Batch) -> Rows:
    """Without padding; the last layer at masked positions only."""
    return _rows(config, batch, _unpads(config, batch), config.prune.student_rows)


def teacher_rows(config: Data2VecConfig, batch: Batch) -> Rows:
    """Without padding, unless that is a part of the statistics; the last layer at masked positions, if there are none.

    A teacher that is shown the masked tokens only computes these only, unless convolutional positions see the gaps.
    """
    targets, prune = config.targets, config.prune
    over_time = uses_time(targets)
    if targets.teacher_input == "full":
        unpads = _unpads(config, batch) and (targets.padding_aware or not over_time)
        return _rows(config, batch, unpads, prune.teacher_rows and not over_time)
    if over_time or not prune.unpad or batch.masked is None or config.encoder.pos_conv_depth > 0:
        rows = _rows(config, batch, False, prune.teacher_rows and not over_time)
        return Rows(None, ~batch.mask, rows.masked, rows.pruned, rows.positions)
    alone, real = batch.masked_alone or batch.masked, batch.masked.real
    if real is None:
        positions = torch.arange(alone.num_rows, device=batch.positions.device)
    else:  # the prediction's rows are filled up in between, the teacher's at the end
        positions = torch.where(real, real.cumsum(0) - 1, -1)
    return Rows(alone, None, None, False, positions)


def _unpads(config: Data2VecConfig, batch: Batch) -> bool:
    """Whether padding can be left out; as released, convolutional positions see it."""
    encoder = config.encoder
    return config.prune.unpad and batch.valid is not None and (encoder.padding_aware or encoder.pos_conv_depth == 0)


def _rows(config: Data2VecConfig, batch: Batch, unpads: bool, prunes: bool) -> Rows:
    masked = batch.masked_in_valid if unpads else batch.masked
    rows = batch.positions if masked is None else masked.rows
    if config.modality == "image":  # a class token in front of every image's T patches
        rows = rows + rows // batch.mask.shape[1] + 1
    if masked is None:
        return Rows(None, batch.padding_mask, None, False, rows)
    masked = Sequences(masked.cu_seqlens, masked.max_length, masked.num_rows, rows, masked.real)
    positions = rows if masked.real is None else torch.where(masked.real, rows, -1)
    packed, padding_mask = (batch.valid, None) if unpads else (None, batch.padding_mask)
    return Rows(packed, padding_mask, masked, prunes, positions)

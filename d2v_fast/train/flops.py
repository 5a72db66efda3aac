"""FLOPs of one micro-batch of a training step, from its shapes alone; docs/metrics.md has the formula.

Counted are the multiplications and additions of matrix products and convolutions, two for each pair of factors: the
student's forward and backward, the teacher's forward. What a step leaves out (``model.prune``) is not counted, nor what
is computed for nothing: guard frames between clips, rows that fill up a fixed shape, the class token's empty patch,
queries that nobody asked for, and anything that is computed a second time in backward.
"""

from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from d2v_fast.nn import Batch, Data2VecConfig
from d2v_fast.nn.rows import Rows, student_rows, teacher_rows

FORWARD = 1
TRAINED = 3  # forward, and the gradients of both factors
INPUT = 2  # the same where one factor is data, which has no gradient


class Plan(NamedTuple):
    """What an encoder computes of a batch."""

    rows: Literal["all", "valid", "masked"]  # positions: padding included, without it, masked ones alone
    pruned: bool  # whether the last layer computes masked rows only


def plans(config: Data2VecConfig, batch: Batch) -> tuple[Plan, Plan]:
    """Of student and teacher; the same for all batches that come with the same descriptions of masks and padding."""
    return _plan(student_rows(config, batch), batch), _plan(teacher_rows(config, batch), batch)


def _plan(rows: Rows, batch: Batch) -> Plan:
    kind = "all" if rows.packed is None else "valid" if rows.packed is batch.valid else "masked"
    return Plan(kind, rows.pruned)


def batch_flops(config: Data2VecConfig, batch: Batch, known: tuple[Plan, Plan] | None = None) -> float:
    """FLOPs of forward and backward for ``batch``, on the host; LayerDrop counts by the layers it leaves on average.

    ``known`` are its :func:`plans`, where the caller has them: making them looks at every masked position.
    """
    student, teacher = known or plans(config, batch)
    layers = config.encoder.layers
    total = TRAINED * _encoder(config, batch, student, layers * (1 - config.encoder.layerdrop))
    total += FORWARD * _encoder(config, batch, teacher, layers)
    total += TRAINED * _head(config, batch.num_masked)
    frontends = {"speech": _speech, "image": _image}  # the tokens of text are looked up
    return total + (frontends[config.modality](config, batch) if config.modality in frontends else 0)


def _product(rows: int, width_in: int, width_out: int) -> int:
    """Of [rows, width_in] and [width_in, width_out]."""
    return 2 * int(rows) * width_in * width_out


def _speech(config: Data2VecConfig, batch: Batch) -> int:
    """Convolutions and projection, once for student and teacher."""
    frontend, (clips, frames) = config.frontend, batch.inputs.shape
    total, width = 0, 1
    frozen = frontend.feature_grad_mult <= 0
    for index, (channels, kernel, stride) in enumerate(frontend.conv_layers):
        frames = (frames - kernel) // stride + 1
        ways = FORWARD if frozen else INPUT if index == 0 else TRAINED
        total += ways * _product(clips * frames, width * kernel, channels)
        width = channels
    return total + TRAINED * _product(clips * frames, width, config.encoder.dim)


def _image(config: Data2VecConfig, batch: Batch) -> int:
    """The embedding of the patches; once more for a teacher that averages it."""
    frontend = config.frontend
    shared = config.prune.share_features and any(name.rstrip(".") == "frontend" for name in config.ema.skip)
    ways = INPUT if shared else INPUT + FORWARD
    return ways * _product(batch.mask.numel(), frontend.channels * frontend.patch_size**2, config.encoder.dim)


def _head(config: Data2VecConfig, masked: int) -> int:
    dim = config.encoder.dim
    widths = [dim, *[2 * dim] * (config.head_layers - 1), dim]
    return sum(_product(masked, a, b) for a, b in pairwise(widths))


def _encoder(config: Data2VecConfig, batch: Batch, plan: Plan, layers: float) -> float:
    """One forward of ``layers`` layers on these rows; the last one computes masked rows only, if they are pruned."""
    c = config.encoder
    masked = np.count_nonzero(batch.mask.numpy(), axis=1)  # [B]
    lengths = _lengths(config, batch, plan, masked)  # [B]
    count, asked = lengths.sum(), masked.sum()

    def layer(queries: int, pairs: int) -> int:
        """Keys and values for all rows, everything else for ``queries``; each sees ``pairs / queries`` keys."""
        keys_values = _product(count, c.dim, 2 * c.dim)
        others = _product(queries, c.dim, 2 * c.dim) + 2 * _product(queries, c.dim, c.ffn_dim)
        return keys_values + others + 2 * _product(pairs, c.dim, 1)

    whole = layer(count, (lengths * lengths).sum())
    last = layer(asked, (masked * lengths).sum()) if plan.pruned else whole
    positions = 0
    if c.pos_conv_depth:
        kernel = c.pos_conv_width if c.pos_conv_depth == 1 else max(3, c.pos_conv_width // c.pos_conv_depth)
        positions = c.pos_conv_depth * _product(count, c.dim // c.pos_conv_groups * kernel, c.dim)
    return positions + (layers - 1) * whole + last


def _lengths(config: Data2VecConfig, batch: Batch, plan: Plan, masked: np.ndarray) -> np.ndarray:
    """Positions [B] int64 that an encoder computes of each row of the batch."""
    if plan.rows == "all":
        size, width = batch.mask.shape
        return np.full(size, width + (config.modality == "image"), dtype=np.int64)
    return batch.lengths.long().numpy() if plan.rows == "valid" else masked

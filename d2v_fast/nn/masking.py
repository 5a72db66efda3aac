"""Which positions the student does not see: span masks (speech, text) and BEiT block masks (images).

Masks are drawn on the host, vectorised over the batch, from an explicit ``numpy.random.Generator``: their number is
known before anything is launched, and a resumed run draws the same ones.
"""

from dataclasses import dataclass

import numpy as np


def _random_subset(rng: np.random.Generator, allowed: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Choose ``count[b]`` of the True entries of every row of ``allowed`` [B, T], uniformly without replacement."""
    keys = np.where(allowed, rng.random(allowed.shape), np.inf)
    rank = np.empty(keys.shape, np.int64)
    np.put_along_axis(rank, np.argsort(keys, axis=1), np.arange(keys.shape[1])[None], axis=1)
    return allowed & (rank < count[:, None])


def spread_spans(starts: np.ndarray, length: int) -> np.ndarray:
    """Mask each start of ``starts`` [B, T] and the ``length - 1`` positions after it."""
    count = np.cumsum(starts, axis=1)
    count[:, length:] -= count[:, :-length].copy()
    return count > 0


def _check_lengths(lengths: np.ndarray, num_positions: int) -> np.ndarray:
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or lengths.size == 0 or lengths.min() < 1 or lengths.max() > num_positions:
        raise ValueError(f"lengths must be [B] with values in 1..{num_positions}, got {lengths.tolist()}")
    return lengths


def _check_probability(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value}")


@dataclass(frozen=True, kw_only=True)
class SpanMask:
    """Spans of fixed length at random starts (fairseq ``compute_mask_indices``, static lengths, overlaps allowed).

    ``prob`` is the share of positions covered if no spans overlapped. A row of n positions gets
    ``floor(prob * n / length + U[0, 1))`` spans, at least ``min_spans``, with starts drawn without replacement from the
    first ``n - length``. With ``equalize`` the rows of a batch are then trimmed at random to the smallest count.
    Where all of a short row got masked, which fairseq refuses, one random position of it is unmasked again.
    """

    prob: float = 0.65
    length: int = 10
    min_spans: int = 1
    equalize: bool = True

    def __post_init__(self) -> None:
        _check_probability("mask.prob", self.prob)
        if self.length < 1 or self.min_spans < 0:
            raise ValueError(f"mask.length must be >= 1 and min_spans >= 0, got {self.length} and {self.min_spans}")

    def draw(self, rng: np.random.Generator, lengths: np.ndarray, num_positions: int) -> np.ndarray:
        """Return a bool mask [B, num_positions], True = masked, never beyond ``lengths`` [B].

        Raises:
            ValueError: a row of one position: a mask that leaves something to see needs two.
        """
        lengths = _check_lengths(lengths, num_positions)
        if lengths.min() < 2:
            raise ValueError(f"lengths must be at least 2 to mask a part of each row, got {lengths.tolist()}")
        spans = np.floor(self.prob * lengths / self.length + rng.random(lengths.size)).astype(np.int64)
        spans = np.maximum(spans, self.min_spans)
        # fairseq shortens the excluded tail when a row has too few possible starts for its spans
        tail = np.where(lengths - self.length <= spans, lengths - spans - 1, self.length)
        time = np.arange(num_positions)
        starts = _random_subset(rng, time < (lengths - tail)[:, None], spans)
        mask = spread_spans(starts, min(self.length, num_positions)) & (time < lengths[:, None])
        count = mask.sum(1)
        whole = count == lengths
        if whole.any():
            count[whole] -= 1
            mask[whole] = _random_subset(rng, mask[whole], count[whole])
        return _random_subset(rng, mask, np.full_like(count, count.min())) if self.equalize else mask

    def most(self, num_positions: int) -> int:
        """No row of so many positions gets more of them masked than this."""
        spans = max(int(self.prob * num_positions / self.length) + 1, self.min_spans)
        return min(spans * self.length, num_positions - 1)


@dataclass(frozen=True, kw_only=True)
class TokenSpanMask:
    """Spans of ``length`` tokens starting anywhere, first and last token included (fairseq ``MaskTokensDataset``).

    A row of n tokens gets ``floor(prob * n / length + U[0, 1))`` starts without replacement, at least one.
    """

    prob: float = 0.35
    length: int = 4

    def __post_init__(self) -> None:
        _check_probability("mask.prob", self.prob)
        if self.length < 1:
            raise ValueError(f"mask.length must be >= 1, got {self.length}")

    def draw(self, rng: np.random.Generator, lengths: np.ndarray, num_positions: int) -> np.ndarray:
        """Return a bool mask [B, num_positions], True = masked, never beyond ``lengths`` [B]."""
        lengths = _check_lengths(lengths, num_positions)
        spans = np.floor(self.prob * lengths / self.length + rng.random(lengths.size)).astype(np.int64)
        inside = np.arange(num_positions) < lengths[:, None]
        starts = _random_subset(rng, inside, np.maximum(spans, 1))
        return spread_spans(starts, min(self.length, num_positions)) & inside

    def most(self, num_positions: int) -> int:
        """No row of so many positions gets more of them masked than this."""
        return min((int(self.prob * num_positions / self.length) + 1) * self.length, num_positions)


@dataclass(frozen=True, kw_only=True)
class BlockMask:
    """Rectangles of patches until ``num_masked`` are covered (BEiT, Bao et al. 2021, algorithm 1; never more).

    Areas are uniform in ``min_block .. what is left`` and aspect ratios log-uniform in
    ``min_aspect .. 1 / min_aspect``; after ten failed attempts in a row an image keeps what it has, or, if that is
    nothing (no block fits a very small grid), one random patch, which the algorithm does not provide for.
    """

    num_masked: int = 120
    min_block: int = 16
    min_aspect: float = 0.3

    ATTEMPTS = 10

    def __post_init__(self) -> None:
        if self.num_masked < 1 or self.min_block < 1:
            raise ValueError(f"mask.num_masked and min_block must be >= 1, got {self.num_masked} and {self.min_block}")
        if self.min_block > self.num_masked:
            raise ValueError(f"mask.min_block must be at most num_masked = {self.num_masked}, got {self.min_block}")
        _check_probability("mask.min_aspect", self.min_aspect)

    def draw(self, rng: np.random.Generator, lengths: np.ndarray, num_positions: int) -> np.ndarray:
        """Return a bool mask [B, num_positions] over a square grid in row-major order, True = masked.

        Raises:
            ValueError: ``num_positions`` is not a square, or is not larger than ``num_masked``.
        """
        lengths = _check_lengths(lengths, num_positions)
        side = int(np.sqrt(num_positions))
        if side * side != num_positions or num_positions <= self.num_masked:
            raise ValueError(f"num_positions must be a square above {self.num_masked}, got {num_positions}")
        mask = np.zeros((lengths.size, side, side), bool)
        row, column = np.arange(side)[:, None], np.arange(side)[None, :]
        failures = np.zeros(lengths.size, np.int64)
        while (live := np.flatnonzero((failures < self.ATTEMPTS) & (mask.sum((1, 2)) < self.num_masked))).size:
            budget = self.num_masked - mask[live].sum((1, 2))
            u = rng.random((4, live.size))
            # the interval may be reversed (budget < min_block); it is still the reference's distribution
            area = self.min_block + (budget - self.min_block) * u[0]
            aspect = np.exp(np.log(self.min_aspect) * (2 * u[1] - 1))
            height = np.rint(np.sqrt(area * aspect)).astype(np.int64)
            width = np.rint(np.sqrt(area / aspect)).astype(np.int64)
            top = np.floor(u[2] * (side - height + 1)).astype(np.int64)[:, None, None]
            left = np.floor(u[3] * (side - width + 1)).astype(np.int64)[:, None, None]
            block = (row >= top) & (row < top + height[:, None, None])
            block = block & (column >= left) & (column < left + width[:, None, None])
            new = (block & ~mask[live]).sum((1, 2))
            accepted = (height < side) & (width < side) & (new > 0) & (new <= budget)
            mask[live[accepted]] |= block[accepted]
            failures[live] = np.where(accepted, 0, failures[live] + 1)
        mask = mask.reshape(lengths.size, num_positions)
        empty = np.flatnonzero(~mask.any(1))
        mask[empty, rng.integers(num_positions, size=empty.size)] = True
        return mask

    def most(self, num_positions: int) -> int:
        """No image gets more patches masked than this."""
        return self.num_masked

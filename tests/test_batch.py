"""Batches: what ``make_batch`` makes agrees with itself, and what contradicts itself is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_batch, tiny_config

from d2v_fast.nn import Batch, Data2Vec, Sequences, make_batch

LENGTHS = np.array([4, 6, 2])
VALID = np.arange(6) < LENGTHS[:, None]
MASK = np.array([[1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]], bool)
OTHER = np.array([[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]], bool)  # of as many positions


def batch_of(mask: np.ndarray = MASK, lengths: np.ndarray | None = LENGTHS, **numbers) -> Batch:
    return make_batch(torch.zeros(3, 6, dtype=torch.long), mask.copy(), lengths, **numbers)


def shifted(sequences: Sequences, by: int = 1) -> Sequences:
    """Ends of sequences elsewhere, which belong to the same number of rows."""
    ends = sequences.cu_seqlens.clone()
    ends[1] += by
    return replace(sequences, cu_seqlens=ends)


def with_a_hole(padding_mask: torch.Tensor) -> torch.Tensor:
    """As much padding in every row, but not at the end of the first."""
    padding_mask = padding_mask.clone()
    padding_mask[0, [3, 4]] = padding_mask[0, [4, 3]]
    return padding_mask


@pytest.mark.parametrize("num_valid", [None, 12, 15, 30])
@pytest.mark.parametrize("num_masked", [None, 0, 5])
def test_what_is_made_agrees(num_masked, num_valid):
    rng = np.random.default_rng(0)
    for lengths in (LENGTHS, None, np.array([6, 6, 6])):
        valid = VALID if lengths is LENGTHS else np.ones_like(VALID)
        for share in (0.0, 0.3, 1.0):
            mask = (rng.random(valid.shape) < share) & valid
            count, most = int(mask.sum()), int(valid.sum())
            numbers = {
                "num_masked": None if num_masked is None else min(count + num_masked, most),
                "num_valid": None if num_valid is None else max(num_valid, most),
            }
            batch = batch_of(mask, lengths, **numbers)
            batch.check()
            batch.map(torch.clone).check()
            replace(batch, masked=None, masked_alone=None, valid=None, masked_in_valid=None).check()


@pytest.mark.parametrize("numbers", [{}, {"num_masked": 5, "num_valid": 15}], ids=["as it is", "fixed"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda b: {"mask": torch.from_numpy(OTHER)}, "positions must be the positions where batch.mask is True"),
        (lambda b: {"mask": torch.zeros(3, 6, dtype=torch.bool)}, "positions must be the 0 masked positions, got 3"),
        (lambda b: {"positions": batch_of(OTHER).positions}, "positions must be the positions where batch.mask"),
        (lambda b: {"positions": b.positions.flip(0)}, "positions must be .* ascending, got others"),
        (
            lambda b: {"positions": torch.cat([b.positions, -torch.ones(2, dtype=torch.int32)]), "real_masked": None},
            "real_masked must be 3 with positions of -1, got None",
        ),
        (lambda b: {"masked": batch_of(OTHER).masked}, "masked must be the positions where batch.mask is True"),
        (lambda b: {"masked": shifted(b.masked)}, "masked must be the positions where batch.mask is True, row by row"),
        (lambda b: {"masked": shifted(b.masked, -9)}, "masked must be the positions where"),
        (lambda b: {"masked": Sequences.from_mask(MASK, num_rows=7)}, "masked must have real rows where positions are"),
        (lambda b: {"masked": replace(b.masked, rows=None)}, "masked must be the positions where"),
        (lambda b: {"masked_alone": batch_of(OTHER).masked}, "masked_alone must be the positions where batch.mask"),
        (
            lambda b: {"valid": Sequences.from_mask(np.roll(VALID, 1, 0))},
            "valid must be .* batch.padding_mask is False",
        ),
        (lambda b: {"valid": shifted(b.valid, -1)}, "valid must be the positions where"),
        (lambda b: {"lengths": b.lengths.flip(0)}, r"lengths must be \[4, 6, 2\] as in padding_mask, got \[2, 6, 4\]"),
        (lambda b: {"lengths": None}, r"lengths must be \[4, 6, 2\] as in padding_mask, got None"),
        (lambda b: {"padding_mask": torch.zeros(3, 6, dtype=torch.bool)}, r"lengths must be \[6, 6, 6\]"),
        (lambda b: {"padding_mask": torch.ones(3, 6, dtype=torch.bool)}, "mask must be False in the padding"),
        (
            lambda b: {"padding_mask": with_a_hole(b.padding_mask)},
            "padding_mask must be True at the ends of rows alone",
        ),
        (lambda b: {"padding_mask": None}, "lengths must be None without padding_mask"),
        (lambda b: {"padding_mask": None, "lengths": None}, "valid must be None without padding_mask"),
        (lambda b: {"masked_in_valid": b.masked}, "masked_in_valid must be the rows of masked among those of valid"),
        (lambda b: {"masked_in_valid": shifted(b.masked_in_valid)}, "masked_in_valid must be the rows of masked"),
        (lambda b: {"masked_in_valid": batch_of(OTHER).masked_in_valid}, "masked_in_valid must be the rows of masked"),
        (lambda b: {"masked": None}, "masked_in_valid must be the rows of masked among those of valid, got others"),
    ],
)
def test_contradictions(change, match, numbers):
    batch = batch_of(**numbers)
    batch.check()
    with pytest.raises(ValueError, match=rf"batch\.{match}"):
        replace(batch, **change(batch)).check()


@pytest.mark.parametrize("modality", ["speech", "image", "text"])
def test_the_model_looks(modality):
    """Each of these once gave the loss of another mask, or of several at once."""
    model = Data2Vec(tiny_config(modality))
    batch = tiny_batch(model.config)
    with pytest.raises(ValueError, match=r"batch\.positions must be the positions where batch\.mask is True"):
        model(replace(batch, mask=batch.mask.roll(1, 0)))
    with pytest.raises(ValueError, match=r"batch\.positions must be the positions where batch\.mask is True"):
        model(replace(batch, positions=(batch.positions + 1) % batch.mask.numel()))
    other = Sequences.from_mask(batch.mask.roll(1, 0).numpy())
    with pytest.raises(ValueError, match=r"batch\.masked must be the positions where batch\.mask is True"):
        model(replace(batch, masked=other))

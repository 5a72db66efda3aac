"""Distributions of the masks against the reference's (fractions, spans, equal counts, block shapes)."""

import numpy as np
import pytest

from d2v_fast.nn.masking import BlockMask, SpanMask, TokenSpanMask

RNG = np.random.default_rng


def runs(row: np.ndarray) -> np.ndarray:
    """Lengths of the runs of True in a row."""
    edges = np.flatnonzero(np.diff(np.r_[0, row.astype(int), 0]))
    return edges[1::2] - edges[::2]


def reference_span_mask(rng, T, prob, length, min_spans):
    """One row, written as the algorithm is described, with loops."""
    n = max(min_spans, int(prob * T / length + rng.random()))
    shortest = length if T - length > n else T - n - 1
    mask = np.zeros(T, bool)
    for start in rng.choice(T - shortest, n, replace=False):
        mask[start : start + length] = True
    return mask


@pytest.mark.parametrize(
    ("batch", "T", "expected"), [(1, 499, 0.494), (4, 499, 0.462), (12, 499, 0.443), (12, 999, 0.456)]
)
def test_span_fraction(batch, T, expected):
    """The share of masked frames measured on fairseq; trimming to the smallest row lowers it as the batch grows."""
    rng, mask = RNG(0), SpanMask()
    share = np.mean([mask.draw(rng, np.full(batch, T), T).mean() for _ in range(200)])
    assert share == pytest.approx(expected, abs=0.008)


def test_span_marginals_match_the_algorithm():
    """Masked share at every position, against the loop version: 4 standard errors."""
    T, rows = 60, 6000
    mask = SpanMask(prob=0.5, length=7, equalize=False)
    got = mask.draw(RNG(0), np.full(rows, T), T).mean(0)
    rng = RNG(1)
    want = np.mean([reference_span_mask(rng, T, 0.5, 7, 1) for _ in range(rows)], axis=0)
    assert np.abs(got - want).max() < 4 * np.sqrt(2 * 0.25 / rows)
    assert got[-1] < 0.02  # spans start before the last `length` positions


def test_span_lengths_and_counts():
    """Unequalised: runs are at least `length` long (unless cut by the end), and the number of spans is n or n + 1."""
    T = 200
    masks = SpanMask(equalize=False).draw(RNG(0), np.full(5000, T), T)
    for row in masks:
        assert runs(row).min() >= 10
    # 13 spans exactly: between 13 * 10 (no overlap) and 13 + 9 (one run) positions
    assert masks.sum(1).max() <= 130 and masks.sum(1).min() >= 22


def test_equalize_gives_equal_counts_and_only_unmasks():
    lengths = np.array([400, 300, 380, 400])
    free = SpanMask(equalize=False).draw(RNG(3), lengths, 400)
    equal = SpanMask(equalize=True).draw(RNG(3), lengths, 400)
    assert len(set(equal.sum(1))) == 1
    assert equal.sum(1)[0] == free.sum(1).min()
    assert not (equal & ~free).any()


def test_trimming_is_uniform_over_masked_frames():
    """A row with more than the minimum loses frames anywhere, not whole spans."""
    lengths = np.array([100, 50])
    kept = np.zeros(100)
    total = np.zeros(100)
    for seed in range(600):
        free = SpanMask(equalize=False).draw(RNG(seed), lengths, 100)
        equal = SpanMask(equalize=True).draw(RNG(seed), lengths, 100)
        kept += equal[0]
        total += free[0]
    share = kept[5:85] / total[5:85]
    assert share.std() < 0.06 and 0.3 < share.mean() < 0.7


def test_masks_stay_off_padding():
    lengths = np.array([100, 37, 64])
    for mask in (SpanMask(), TokenSpanMask()):
        drawn = mask.draw(RNG(0), lengths, 100)
        assert drawn.any(1).all()
        assert not drawn[np.arange(100) >= lengths[:, None]].any()


def test_short_rows():
    """fairseq shortens the excluded tail; a row that would be masked entirely keeps one position to see, anywhere."""
    for T in (2, 5, 12, 14):
        drawn = SpanMask(prob=0.9, equalize=False).draw(RNG(0), np.full(5000, T), T)
        assert ((drawn.sum(1) > 0) & (drawn.sum(1) < T)).all()
        assert T == 14 or not drawn.all(0).any()  # 14 frames are never masked entirely, but some of them always
    equal = SpanMask(prob=0.9).draw(RNG(0), np.array([2, 14, 5]), 14)
    assert equal.sum(1).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match=r"lengths must be at least 2 .* got \[5, 1\]"):
        SpanMask().draw(RNG(0), np.array([5, 1]), 5)


def test_text_fraction_and_ends():
    """0.307 of the tokens for 512-token blocks; first and last token are masked as often as they should be."""
    mask = TokenSpanMask().draw(RNG(0), np.full(3000, 512), 512)
    assert mask.mean() == pytest.approx(0.307, abs=0.003)
    rate = 0.35 / 4  # of starts
    assert mask[:, 0].mean() == pytest.approx(rate, abs=0.02)
    assert mask[:, -1].mean() == pytest.approx(1 - (1 - rate) ** 4, abs=0.03)


def reference_block_mask(rng, side, total, min_block, min_aspect):
    """One image, written as BEiT's algorithm is described, with loops."""
    mask = np.zeros((side, side), bool)
    while mask.sum() < total:
        before = mask.sum()
        for _ in range(10):
            budget = total - before
            area = min_block + (budget - min_block) * rng.random()
            aspect = np.exp(rng.uniform(np.log(min_aspect), -np.log(min_aspect)))
            h, w = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if h < side and w < side:
                top, left = rng.integers(0, side - h + 1), rng.integers(0, side - w + 1)
                new = (~mask[top : top + h, left : left + w]).sum()
                if 0 < new <= budget:
                    mask[top : top + h, left : left + w] = True
                    break
        if mask.sum() == before:
            break
    return mask.reshape(-1)


def test_block_counts():
    """Mean 119.5 of 120, exactly 120 in 69 % of the images, never more (measured on the reference)."""
    counts = BlockMask().draw(RNG(0), np.full(3000, 196), 196).sum(1)
    assert counts.max() == 120
    assert counts.min() >= 100
    assert counts.mean() == pytest.approx(119.5, abs=0.15)
    assert (counts == 120).mean() == pytest.approx(0.69, abs=0.035)


def test_block_distribution_matches_the_algorithm():
    """Share masked per patch and the number of horizontal mask edges (a measure of block shape), against the loops."""
    images = 2500
    got = BlockMask().draw(RNG(0), np.full(images, 196), 196)
    rng = RNG(1)
    want = np.stack([reference_block_mask(rng, 14, 120, 16, 0.3) for _ in range(images)])
    assert np.abs(got.mean(0) - want.mean(0)).max() < 4.5 * np.sqrt(2 * 0.25 / images)

    def edges(masks):
        grid = masks.reshape(-1, 14, 14)
        return (grid[:, :, 1:] != grid[:, :, :-1]).sum((1, 2))

    spread = np.sqrt((edges(got).var() + edges(want).var()) / images)
    assert abs(edges(got).mean() - edges(want).mean()) < 4 * spread


def test_block_mask_is_never_empty():
    """Blocks of 15 patches do not fit a grid of 4 x 4: a block must be smaller than the grid in both directions."""
    drawn = BlockMask(num_masked=15, min_block=15).draw(RNG(0), np.full(400, 16), 16)
    assert (drawn.sum(1) == 1).all() and drawn.any(0).all()


def test_same_generator_same_mask():
    for mask, T in ((SpanMask(), 300), (TokenSpanMask(), 300), (BlockMask(), 196)):
        a, b = (mask.draw(RNG(7), np.full(5, T), T) for _ in range(2))
        assert a.dtype == bool and a.shape == (5, T)
        assert np.array_equal(a, b)
        assert not np.array_equal(a, mask.draw(RNG(8), np.full(5, T), T))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SpanMask(prob=0.0), r"mask.prob must be in \(0, 1\], got 0.0"),
        (lambda: SpanMask(length=0), "mask.length must be >= 1"),
        (lambda: TokenSpanMask(prob=1.5), "mask.prob"),
        (lambda: BlockMask(num_masked=0), "mask.num_masked"),
        (lambda: BlockMask(num_masked=8), "mask.min_block must be at most num_masked = 8, got 16"),
        (lambda: BlockMask(min_aspect=2.0), "mask.min_aspect"),
        (lambda: BlockMask().draw(RNG(0), np.full(2, 150), 150), "must be a square above 120, got 150"),
        (lambda: BlockMask().draw(RNG(0), np.full(2, 100), 100), "must be a square above 120, got 100"),
        (lambda: SpanMask().draw(RNG(0), np.array([50, 101]), 100), r"lengths must be \[B\] with values in 1..100"),
        (lambda: SpanMask().draw(RNG(0), np.array([], int), 100), "lengths must be"),
    ],
)
def test_bad_values(make, match):
    with pytest.raises(ValueError, match=match):
        make()

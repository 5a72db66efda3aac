"""Items of different lengths to batches with little padding or cropping."""

from collections.abc import Callable

import numpy as np


def packed_batches(
    rng: np.random.Generator, lengths: np.ndarray, budget: int, cost: Callable[[int], int] = int
) -> list[tuple[int, ...]]:
    """Longest first with random ties, packed while items times the longest's cost fit ``budget``, batches shuffled.

    Args:
        rng: draws the ties and the order of the batches.
        lengths: [items] of the items; integers.
        budget: bounds items times cost; a batch has one item at least.
        cost: what an item counts for, by the length of the longest in its batch.
    """
    order = np.lexsort((rng.permutation(len(lengths)), -lengths))
    packed: list[tuple[int, ...]] = []
    start = 0
    while start < len(order):
        count = max(1, budget // cost(int(lengths[order[start]])))
        packed.append(tuple(order[start : start + count].tolist()))
        start += count
    return [packed[i] for i in rng.permutation(len(packed))]

"""Random numbers of an update: a function of the run's seed and the place, so that nothing has to be saved.

The micro-batches of an update are numbered over all ranks, so that one rank that takes four of them draws what four
ranks draw that take one each.
"""

import hashlib

import torch


def seed_micro_batch(seed: int, update: int, number: int) -> None:
    """Seed PyTorch's generators for micro-batch ``number`` of an update: augmentations, dropout, DropPath."""
    torch.manual_seed(_seed(seed, update) if number == 0 else _seed(seed, update, number))


def layerdrop_seed(seed: int, update: int) -> int:
    """What LayerDrop draws from: the same in all micro-batches, so that all ranks run the same layers."""
    return _seed(seed, update, "layers")


def _seed(*place: int | str) -> int:
    digest = hashlib.blake2b("/".join(map(str, place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

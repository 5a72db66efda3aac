"""fairseq's block masks (``data_utils.compute_block_mask_1d``, ``_2d``), which data workers draw for data2vec 2.0.

The same masks as upstream's from the same state of torch's generator, which is left in the same state: centres are one
draw, and the trimming of every row to the same count is the draws of one ``torch.multinomial`` a row. Such a draw
takes the k largest of weight / noise, the noise exponential; here rows are filled with noise one by one, and the rest
is done for all of them at once. On one core, as upstream's time over ours: 1.7 for 8 masks of 1000 frames, 2.5 for 16
masks of 14 x 14 patches and 4 for 64 of them; most of what is left is the noise.

Dims: B masks, L positions.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from d2v_fast.patches._core import Options, Patch, Seam, Site, fall_back
from d2v_fast.patches._fingerprint import fingerprint
from d2v_fast.patches.fairseq.masks import original_globals

KNOWN = {"compute_block_mask_1d": "7fed8469f18839a4", "compute_block_mask_2d": "0184ae91c9656a49"}
_source = cache(fingerprint)


def draws_as_known(names: Mapping[str, Any], name: str) -> bool:
    """Whether ``names`` has the ``compute_block_mask_*`` of this name that ours was written from."""
    return _source(names[name]) == KNOWN[name]


def draw_blocks(
    shape: tuple[int, int],  # (B, L)
    mask_prob: float,
    mask_length: int,
    mask_prob_adjust: float = 0.0,
    inverse_mask: bool = False,
    mask_dropout: float = 0.0,
) -> Tensor:
    """Masks [B, L] float32, 1 = masked: blocks of ``mask_length`` positions, ``int(L * mask_prob)`` of every row.

    With ``inverse_mask`` so many are left unmasked, as a share of ``1 - mask_prob``.

    Raises:
        ValueError: ``mask_prob`` is no probability.
    """
    num_positions = shape[1]
    share = _share(mask_prob, inverse_mask)
    centers = _centers(shape, (share + mask_prob_adjust) / mask_length, mask_dropout)
    blocks = (centers[..., None] + _around(mask_length)).clamp_(0, num_positions - 1)
    return _finished(shape, blocks, share, inverse_mask)


def draw_squares(
    shape: tuple[int, int],  # (B, L), L patches of a square grid in row-major order
    mask_prob: float,
    mask_length: int,
    mask_prob_adjust: float = 0.0,
    inverse_mask: bool = False,
    mask_dropout: float = 0.0,
) -> Tensor:
    """As :func:`draw_blocks`, with squares of ``mask_length`` x ``mask_length`` patches.

    Raises:
        ValueError: ``mask_prob`` is no probability, or the grid is no square.
    """
    num_positions = shape[1]
    side = int(num_positions**0.5)
    if side * side != num_positions:
        raise ValueError(f"shape must be (masks, patches of a square grid), got {tuple(shape)}")
    share = _share(mask_prob, inverse_mask)
    centers = _centers(shape, (share + mask_prob_adjust) / mask_length**2, mask_dropout)
    around = _around(mask_length)
    rows = (centers[..., None] // side + around).clamp_(0, side - 1)
    columns = (centers[..., None] % side + around).clamp_(0, side - 1)
    return _finished(shape, rows[..., :, None] * side + columns[..., None, :], share, inverse_mask)


def _share(mask_prob: float, inverse_mask: bool) -> float:
    if not 0 <= mask_prob <= 1:
        raise ValueError(f"mask_prob must be in [0, 1], got {mask_prob}")
    return 1 - mask_prob if inverse_mask else mask_prob


def _centers(shape: tuple[int, int], density: float, dropout: float) -> Tensor:
    """Centres of blocks [B, N], the same one more than once by chance."""
    masks, num_positions = shape
    return torch.randint(0, num_positions, (masks, int(num_positions * density * (1 + dropout))))  # rounds as upstream


def _around(length: int) -> Tensor:
    return torch.arange(length) - length // 2


def _finished(shape: tuple[int, int], blocks: Tensor, share: float, inverse_mask: bool) -> Tensor:
    """Masks [B, L] of the positions in ``blocks`` [B, ...], each with the same count."""
    mask = torch.zeros(shape).scatter_(1, blocks.flatten(1), 1)
    _equalize(mask, int(shape[1] * share))
    return 1 - mask if inverse_mask else mask


def _equalize(mask: Tensor, wanted: int) -> None:
    """Mask or unmask random positions of rows of ``mask`` [B, L], in place, so that all have ``wanted`` of them."""
    excess = mask.sum(1).long() - wanted
    rows = excess.nonzero().squeeze(1)
    if not len(rows):
        return
    found, excess = mask[rows], excess[rows, None]
    weights = torch.where(excess > 0, found, 1 - found)
    noise = torch.empty_like(weights)
    for row in noise.unbind():  # one call would be other numbers where torch draws them by MKL, with a seed a call
        row.exponential_()
    most = int(excess.abs().max())
    largest = weights.div_(noise).topk(most).indices
    changed = torch.zeros_like(found).scatter_(1, largest, (torch.arange(most) < excess.abs()).to(found))
    mask[rows] = (found - changed).abs_()


def _unfit(dataset: Any, original: Callable, names: Mapping[str, Any], name: str) -> str | None:
    """Why upstream's function of this name draws the masks of this data set, or None."""
    if inspect.unwrap(original) is not original:
        return "somebody wrapped the method that ours calls with other masks"
    if not draws_as_known(names, name):
        return f"its masks are drawn by a {name} that ours was not written from"
    if dataset.expand_adjacent or dataset.non_overlapping:
        return "expand_adjacent or non_overlapping: other masks than blocks at random places"
    return None


def _as_upstream(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``draw`` with the arguments of upstream's; of those left out, none has another value where ours draws."""

    def compute_block_mask(*, shape, require_same_masks, expand_adjcent=False, non_overlapping=False, **how):
        return draw(shape, **how)

    return compute_block_mask


DRAWS = {
    "compute_block_mask_1d": _as_upstream(draw_blocks),
    "compute_block_mask_2d": _as_upstream(draw_squares),
}


def _make(original: Callable, options: Options, *, grid: bool) -> Callable:
    names = original_globals(original)
    warned: dict[str, Any] = {}  # which warnings this module gave already

    def __getitem__(self, index):
        """The item with upstream's masks [clone_batch, L] as its ``precomputed_mask``."""
        if not self.is_compute_mask:
            return original(self, index)
        squares = grid and self.mask_length != 1
        reason = _unfit(self, original, names, "compute_block_mask_2d" if squares else "compute_block_mask_1d")
        if reason is not None:
            fall_back(self, "__getitem__", reason, options)
            return original(self, index)
        # upstream's own code on the data set itself, which finds our functions where it looks for its own; whoever
        # else uses its module, in this thread or another, finds upstream's
        seen = {"__warningregistry__": warned} | names | DRAWS
        return FunctionType(original.__code__, seen)(self, index)

    return __getitem__


def _seam(known: str, *, grid: bool = False) -> Seam:
    return Seam(
        "masks",
        "__getitem__",
        partial(_make, grid=grid),
        "block masks by the same random numbers, all rows at once",
        frozenset({known}),
    )


SEAMS = {
    "FileAudioDataset": _seam("6ae1c1bcd20b8168"),
    "BinarizedAudioDataset": _seam("04204b6dc08e030a"),
    "MaeImageDataset": _seam("f323a7599c241e96", grid=True),
}


def seams(kind: type) -> list[Seam]:
    """The masks of one class of data sets."""
    return [SEAMS[kind.__name__]]


def sites(model: nn.Module, patch: Patch, options: Options) -> list[Site]:
    """None: a model has no data sets in it."""
    return []

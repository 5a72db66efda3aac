"""Masks of fairseq's data2vec 2.0: ``compute_mask`` and ``make_maskinfo`` of its encoders.

The same random numbers as upstream's, so the same masks, and its order of the visible tokens. Upstream waits for the
device up to twice a row where it draws spans, and wherever it cuts off the visible tokens. Masks drawn here are known
on the host, which waits for a padding mask and for the samples' numbers at most (upstream's seeds). Masks that come
with the batch are read once; :func:`masked_rows` gives the loss what was learned then. On one core at base sizes,
without the waits, upstream's time over ours is 3 to 5 forward and 2 to 3 backward: visible tokens are picked by rows.

Dims: B samples or clones of them, T tokens, V tokens that are left, N masked tokens, C channels.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2v_fast.patches._core import Options, Seam, fall_back, is_ours
from d2v_fast.patches._fingerprint import fingerprint
from d2v_fast.patches.fairseq.block_masks import draw_squares, draws_as_known
from d2v_fast.patches.fairseq.masks import (
    DRAWN,
    draw_spans,
    frame_lengths,
    hand_on,
    handed_on,
    on_host,
    original_globals,
    to_device,
)

_RANDOM = "37d1f81d386a9167"  # random_masking
_source = cache(fingerprint)


@torch.compiler.disable
def masked_rows(encoder: nn.Module, info: Any) -> Tensor:
    """Places [N] of the masked tokens in the B T of all rows; waits for the device if others made ``info``."""
    rows = handed_on(encoder, "rows", info.mask)
    return info.mask.bool().flatten().nonzero().squeeze(1) if rows is None else rows


def _flat(ids: Tensor, num_tokens: int) -> Tensor:
    """Tokens [B, n] of each row -> their places [B n] in the B T of all rows."""
    return (ids + torch.arange(len(ids), device=ids.device)[:, None] * num_tokens).flatten()


def _info(names: dict[str, Any], x: Tensor | None, mask: Tensor, order: Tensor, kept: int, dim: int) -> Any:
    """Upstream's tuple from the ``order`` [B, T] of tokens, those that are left first; ``x`` [B, T, C] or None."""
    num_tokens = order.shape[1]
    steps = torch.arange(num_tokens, device=order.device).expand_as(order)
    restore = torch.empty_like(order).scatter_(1, order, steps)
    keep, unmasked = order[:, :kept], None
    if x is not None:
        unmasked = x.flatten(0, 1).index_select(0, _flat(keep, num_tokens)).unflatten(0, keep.shape)
        keep = keep.unsqueeze(-1).expand(-1, -1, dim)
    return names["MaskInfo"](
        x_unmasked=unmasked, mask=mask, ids_restore=restore.unsqueeze(-1).expand(-1, -1, dim), ids_keep=keep
    )


@torch.compiler.disable
def _read(self: nn.Module, given: Tensor, mask: Tensor) -> int:
    """Masked tokens of the first row of ``mask`` [B, T] uint8, made of ``given``; hands on those of all rows."""
    values = handed_on(self, "drawn", given)
    if values is None:
        values = mask.cpu().numpy()
    hand_on(self, "rows", mask, to_device(np.flatnonzero(values), mask.device))
    return int(values[0].sum())


def _make_maskinfo(original: Callable, options: Options) -> Callable:
    names = original_globals(original)

    def make_maskinfo(self, x, mask, shape=None):
        """x [B, T, C], or ``shape`` instead, and mask [B, T], 1 or True = masked -> upstream's MaskInfo."""
        rows, num_tokens, dim = x.shape if shape is None else shape
        if mask.shape != (rows, num_tokens):
            reason = "masks are not of as many rows and tokens as x"
            fall_back(self, "make_maskinfo", reason, options)
            return original(self, x, mask, shape)
        given, mask = mask, mask.to(torch.uint8)
        kept = num_tokens - _read(self, given, mask)
        if self.modality_cfg.keep_masked_pct > 0:
            kept += round((num_tokens - kept) * self.modality_cfg.keep_masked_pct)
        order = mask.argsort(dim=1)  # as upstream: equal values have no order of their own
        return _info(names, x if shape is None else None, mask, order, kept, dim)

    return make_maskinfo


def _unfit(self: nn.Module, names: dict[str, Any]) -> str | None:
    """Why upstream has to draw, or None."""
    if self.modality_cfg.mask_length == 1:
        known, name = _source(names["random_masking"]) == _RANDOM, "random_masking"
    else:
        known, name = _source(names["compute_mask_indices"]) in DRAWN, "compute_mask_indices"
        if self.modality_cfg.inverse_mask:
            return "spans that stay unmasked (inverse_mask)"
    return None if known else f"masks are drawn by a {name} that ours was not written from"


def _random(self: nn.Module, x: Tensor, prob: float, seed: Any, names: dict[str, Any]) -> Any:
    """MaskInfo of ``int(T (1 - prob))`` random tokens left of every row (``random_masking``)."""
    B, T, C = x.shape
    kept, generator = int(T * (1 - prob)), None
    if seed is not None:
        number = hash((seed.seed, seed.update, seed.ids.sum().item()))
        generator = torch.Generator(x.device).manual_seed(int(number % 1e6))
    order = torch.rand(B, T, generator=generator, device=x.device).argsort(dim=1)
    mask = x.new_ones(B, T).scatter_(1, order[:, :kept], 0)
    hand_on(self, "rows", mask, _flat(order[:, kept:].sort(dim=1).values, T))
    return _info(names, x, mask, order, kept, C)


def _spans(self: nn.Module, x: Tensor, padding_mask: Tensor | None, prob: float, seed: Any) -> Tensor:
    """Bool mask [B, T] on the device of x (``compute_mask_indices``)."""
    cfg, shape = self.modality_cfg, tuple(x.shape[:2])
    seeds = None
    if seed is not None and None not in (seed.seed, seed.update) and seed.ids is not None:
        numbers = on_host(self, "ids", seed.ids).tolist()
        seeds = [int(hash((seed.seed, seed.update, number)) % 1e6) for number in numbers]
    return _placed(
        self,
        draw_spans(
            frame_lengths(self, padding_mask, shape),
            shape[1],
            prob=prob,
            length=cfg.mask_length,
            min_masks=1,
            mask_dropout=cfg.mask_dropout,
            add_masks=cfg.add_masks,
            seeds=seeds,
        ),
        x.device,
    )


def _placed(self: nn.Module, values: np.ndarray, device: torch.device) -> Tensor:
    """A mask [B, T] on ``device``; for make_maskinfo it is handed on."""
    mask = to_device(values, device)
    hand_on(self, "drawn", mask, values)
    return mask


@torch.compiler.disable
def _draw(self: nn.Module, x: Tensor, padding_mask: Tensor | None, seed: Any, names: dict[str, Any]) -> Any:
    """MaskInfo of a mask that the model draws; None where it masks nothing."""
    cfg = self.modality_cfg
    prob = cfg.mask_prob
    if cfg.mask_prob_min is not None and 0 <= cfg.mask_prob_min < prob:
        prob = np.random.uniform(cfg.mask_prob_min, prob)
    if prob <= 0:
        return None
    if cfg.mask_length == 1:
        return _random(self, x, prob, seed, names)
    return self.make_maskinfo(x, _spans(self, x, padding_mask, prob, seed))


def _make(original: Callable, options: Options) -> Callable:
    names = original_globals(original)

    def compute_mask(self, x, padding_mask, mask_seed, apply, precomputed_mask):
        """(x [B, T, C], with zeros or noise at masked tokens if ``apply``; upstream's MaskInfo)."""
        if precomputed_mask is not None:
            info = self.make_maskinfo(x, precomputed_mask)
        elif (reason := _unfit(self, names)) is not None:
            fall_back(self, "compute_mask", reason, options)
            return original(self, x, padding_mask, mask_seed, apply, precomputed_mask)
        else:
            info = _draw(self, x, padding_mask, mask_seed, names)
        return self.apply_mask(x, info) if apply else x, info

    return compute_mask


@torch.compiler.disable
def _squares(self: nn.Module, shape: tuple[int, int], device: torch.device) -> Tensor:
    """A mask [B, T] float32 on ``device`` (``compute_block_mask_2d``)."""
    cfg = self.modality_cfg
    how = (cfg.mask_prob, cfg.mask_length, cfg.mask_prob_adjust, cfg.inverse_mask, cfg.mask_dropout)
    return _placed(self, draw_squares(shape, *how).numpy(), device)


def _draws_squares() -> bool:
    """Whether upstream would draw squares by the function that ours was written from; it imports it at each call."""
    return draws_as_known(vars(importlib.import_module("fairseq.data.data_utils")), "compute_block_mask_2d")


@torch.compiler.disable
def _single(self: nn.Module, original: Callable, options: Options) -> Callable | None:
    """Ours of the method that ImageEncoder's calls for single tokens; None where ``original`` is to call it."""
    kind = inspect.getclosurevars(inspect.unwrap(original)).nonlocals["__class__"]  # of its super()
    inherited = super(kind, self).compute_mask.__func__
    if is_ours(inherited):
        return None
    if _source(inherited) not in MASK.known:
        reason = "masks of single tokens are drawn by a compute_mask that ours was not written from"
        fall_back(self, "compute_mask", reason, options)
        return None
    return _make(inherited, options)


def _make_images(original: Callable, options: Options) -> Callable:
    def compute_mask(self, x, padding_mask, mask_seed, apply, shape=None, precomputed_mask=None):
        """As the method of the other encoders, which does the masks of single tokens; here, of squares."""
        mask = precomputed_mask
        if self.modality_cfg.mask_length <= 1:
            single = _single(self, original, options)
            if single is not None:
                return single(self, x, padding_mask, mask_seed, apply, mask)
            return original(self, x, padding_mask, mask_seed, apply, shape, mask)
        if mask is None:
            if not _draws_squares():
                fall_back(
                    self,
                    "compute_mask",
                    "masks are drawn by a compute_block_mask_2d that ours was not written from",
                    options,
                )
                return original(self, x, padding_mask, mask_seed, apply, shape, mask)
            mask = _squares(self, tuple((x.shape if shape is None else shape)[:2]), x.device)
        info = self.make_maskinfo(x, mask, shape)
        return self.apply_mask(x, info) if apply else x, info

    return compute_mask


MASK = Seam(
    "masks",
    "compute_mask",
    _make,
    "drawn by the same random numbers, known on the host",
    frozenset({"d42377f619790a03"}),
)
MASK_IMAGES = replace(MASK, make=_make_images, known=frozenset({"171cf485644534f8"}))
MASKINFO = Seam(
    "masks",
    "make_maskinfo",
    _make_maskinfo,
    "the device waited for once at most, for masks that come with the batch; rows without a gather",
    frozenset({"3da522b5eaba4b2a"}),
)

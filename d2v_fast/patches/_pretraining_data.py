"""Batches for :class:`~d2v_fast.patches.pretraining.Data2VecPretraining`: from tensors, or from items in loaders."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2v_fast.nn import Batch, Data2VecConfig, make_batch

INPUTS = {"speech": "input_values", "text": "input_ids", "image": "pixel_values"}


def build_batch(
    recipe: Data2VecConfig,
    inputs: Tensor,
    attention_mask: Tensor | None,
    mask: Tensor | None,
    rng: np.random.Generator,
) -> Batch:
    """A batch on the device of ``inputs``; ``mask`` [B, T] is drawn where there is none. Reads masks on the host.

    Raises:
        TypeError: ``mask`` is not bool.
        ValueError: shapes that do not fit, padding that is not at the ends of rows, or no masked position.
    """
    lengths = None if attention_mask is None else _lengths(recipe, inputs, attention_mask)
    positions = _num_positions(recipe, inputs)
    rows = np.full(len(inputs), positions) if lengths is None else lengths
    drawn = recipe.mask.draw(rng, rows, positions) if mask is None else _given_mask(mask, (len(inputs), positions))
    if not drawn.any():
        raise ValueError("mask must have a masked position, got none: there is nothing to predict")
    padded = lengths is not None and bool((lengths < positions).any())
    return make_batch(inputs, drawn, lengths if padded else None).to(inputs.device)


def _num_positions(recipe: Data2VecConfig, inputs: Tensor) -> int:
    name = INPUTS[recipe.modality]
    dims = {"speech": 2, "text": 2, "image": 4}[recipe.modality]
    if inputs.ndim != dims or 0 in inputs.shape:
        shape = {"speech": "[B, S]", "text": "[B, T]", "image": "[B, C, H, W]"}[recipe.modality]
        raise ValueError(f"{name} must be {shape} with at least one row, got {tuple(inputs.shape)}")
    if recipe.modality == "speech":
        return recipe.frontend.num_frames(inputs.shape[1])
    return recipe.frontend.num_patches if recipe.modality == "image" else inputs.shape[1]


def _lengths(recipe: Data2VecConfig, inputs: Tensor, attention_mask: Tensor) -> np.ndarray:
    """Valid positions [B] of an ``attention_mask`` [B, S] of samples or [B, T] of tokens, 1 = valid."""
    if recipe.modality == "image":
        raise ValueError("attention_mask must be None: images have no padding")
    if tuple(attention_mask.shape) != tuple(inputs.shape):
        shape = tuple(inputs.shape)
        raise ValueError(f"attention_mask must be {shape} like the inputs, got {tuple(attention_mask.shape)}")
    kept = attention_mask.detach().cpu().numpy().astype(bool)
    lengths = kept.sum(1)
    if not (kept == (np.arange(kept.shape[1]) < lengths[:, None])).all():
        raise ValueError("attention_mask must be ones, then zeros in every row: padding is at the ends")
    return recipe.frontend.num_frames(lengths) if recipe.modality == "speech" else lengths


def _given_mask(mask: Tensor, shape: tuple[int, int]) -> np.ndarray:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, got {found}")
    if tuple(mask.shape) != shape:
        raise ValueError(f"mask must be {shape}, frames, tokens or patches of these inputs, got {tuple(mask.shape)}")
    return mask.detach().cpu().numpy()


class Data2VecCollator:
    """Items of a data set to ``{"batch": Batch}``, padded, with masks drawn and all positions known on the host.

    An item is a mapping with ``input_values`` [S] float, ``input_ids`` [T] integers or ``pixel_values`` [C, H, W], and
    possibly ``attention_mask``. Masks come from PyTorch's generator of the process: workers of a ``DataLoader`` draw
    different ones. Loaders are ahead of the model, and workers get new seeds: a run of ``Trainer`` that resumes from a
    checkpoint reads the same items and draws other masks. Where it has to end with the same bits, leave the collator
    out: masks of ``forward`` are of the seed and the update.
    """

    def __init__(self, recipe: Data2VecConfig) -> None:
        self.recipe = recipe

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Batch]:
        """Raise KeyError for items without the inputs, and ValueError as :func:`build_batch` does."""
        name = INPUTS[self.recipe.modality]
        rows = [torch.as_tensor(item[name]) for item in items]
        attention_mask = None
        if self.recipe.modality == "image":
            inputs = torch.stack(rows)
        else:
            kept = [
                row[: int(torch.as_tensor(item["attention_mask"]).sum())] if "attention_mask" in item else row
                for item, row in zip(items, rows, strict=True)
            ]
            padding = self.recipe.frontend.pad_index if self.recipe.modality == "text" else 0
            inputs = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True, padding_value=padding)
            lengths = torch.tensor([len(row) for row in kept])
            attention_mask = torch.arange(inputs.shape[1]) < lengths[:, None]
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        return {"batch": build_batch(self.recipe, inputs, attention_mask, None, rng)}

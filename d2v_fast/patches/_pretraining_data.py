"""Batches for :class:`~d2v_fast.patches.pretraining.Data2VecPretraining`: from tensors, or from items in loaders."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2v_fast.nn import Batch, Data2VecConfig, make_batch

INPUTS = {"speech": "input_values", "text": "input_ids", "image": "pixel_values"}
ATTENTION_MASK = "attention_mask"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = {"speech": FLOATS, "text": (torch.int64, torch.int32), "image": FLOATS}


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

    An item is a mapping with ``input_values`` [S] float, ``input_ids`` [T] integers or ``pixel_values`` [C, H, W] float
    (a tensor, an array or a list), whatever else it has. Floats are float32, float16 or bfloat16, not the float64 of
    many readers of files; integers are int64 or int32. Waveforms and tokens may come padded, all with an
    ``attention_mask`` of the same length: ones, then zeros. An item that is not as that is an error which says which
    one, and what it has. Masks come from PyTorch's generator of the process: workers of a ``DataLoader`` draw different
    ones. Loaders are ahead of the model, and workers get new seeds: a run of ``Trainer`` that resumes from a checkpoint
    reads the same items and draws other masks. Where it has to end with the same bits, leave the collator out: masks of
    ``forward`` are of the seed and the update.
    """

    def __init__(self, recipe: Data2VecConfig) -> None:
        self.recipe = recipe

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Batch]:
        """Batch of ``items``.

        Raises:
            TypeError: an item that is no mapping, or whose values are no numbers or of another dtype.
            ValueError: no items, one without the inputs, or with inputs or an ``attention_mask`` of a wrong shape;
                and as :func:`build_batch`.
        """
        rows, attention_mask = _rows(self.recipe, items), None
        if self.recipe.modality == "image":
            inputs = torch.stack(rows)
        else:
            padding = self.recipe.frontend.pad_index if self.recipe.modality == "text" else 0
            inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
            lengths = torch.tensor([len(row) for row in rows])
            attention_mask = torch.arange(inputs.shape[1]) < lengths[:, None]
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        return {"batch": build_batch(self.recipe, inputs, attention_mask, None, rng)}


def _rows(recipe: Data2VecConfig, items: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """Inputs of the items, without padding."""
    name = INPUTS[recipe.modality]
    if len(items) == 0:
        raise ValueError("items must have at least one item, got none")
    for i, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise TypeError(f"items[{i}] must be a mapping with {name!r}, got {type(item).__name__}")
    masked = any(ATTENTION_MASK in item for item in items)
    if masked and recipe.modality == "image":
        raise ValueError(f"items must have no {ATTENTION_MASK!r}, got one: images have no padding")
    return [_row(recipe, f"items[{i}]", item, masked) for i, item in enumerate(items)]


def _row(recipe: Data2VecConfig, where: str, item: Mapping[str, Any], masked: bool) -> Tensor:
    name = INPUTS[recipe.modality]
    row = _numbers(where, item, name)
    shape = tuple(row.shape)
    if recipe.modality == "image":
        sizes = recipe.frontend
        expected = (sizes.channels, sizes.image_size, sizes.image_size)
        if shape != expected:
            raise ValueError(f"{where}[{name!r}] must be {expected}, got {shape}")
        _check_dtype(recipe, where, row)
        return row
    if row.ndim != 1:
        dim = "S" if recipe.modality == "speech" else "T"
        raise ValueError(f"{where}[{name!r}] must be [{dim}], one sequence, got {shape}")
    if masked:
        kept = _numbers(where, item, ATTENTION_MASK, " as other items have").bool()
        if tuple(kept.shape) != shape:
            raise ValueError(f"{where}[{ATTENTION_MASK!r}] must be {shape} like {name!r}, got {tuple(kept.shape)}")
        row = row[: int(kept.sum())]
        if not kept[: len(row)].all():
            raise ValueError(f"{where}[{ATTENTION_MASK!r}] must be ones, then zeros: padding is at the end")
    least, unit = (recipe.frontend.min_samples, "samples") if recipe.modality == "speech" else (1, "token")
    if len(row) < least:
        raise ValueError(f"{where}[{name!r}] must have at least {least} {unit} without padding, got {len(row)}")
    _check_dtype(recipe, where, row)
    return row


def _check_dtype(recipe: Data2VecConfig, where: str, row: Tensor) -> None:
    known = DTYPES[recipe.modality]
    if row.dtype not in known:
        *first, last = (str(dtype).removeprefix("torch.") for dtype in known)
        found = str(row.dtype).removeprefix("torch.")
        raise TypeError(f"{where}[{INPUTS[recipe.modality]!r}] must be {', '.join(first)} or {last}, got {found}")


def _numbers(where: str, item: Mapping[str, Any], name: str, why: str = "") -> Tensor:
    """What an item has under ``name``."""
    if name not in item:
        keys = ", ".join(map(repr, item)) or "no keys"
        raise ValueError(f"{where} must have {name!r}{why}, got {keys}")
    try:
        return torch.as_tensor(item[name])
    except (RuntimeError, TypeError, ValueError) as error:
        found = type(item[name]).__name__
        raise TypeError(f"{where}[{name!r}] must be a tensor, array or list of numbers, got {found}: {error}") from None

"""The batches and probe sets of ``convergence.py``, read where only NumPy is; ``convergence_prepare.py`` writes them.

A file has the settings of model and training as JSON, the items (16-bit samples, bytes of pixels, token ids), and for
each seed which items are in which batch, where they are cropped, and what is masked.

Dims: B batch, T positions, S samples.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import numpy as np
import torch
from torch import Tensor

from d2v_fast.checkpoints.native import config_from_dict
from d2v_fast.errors import UserError
from d2v_fast.train.optim import OptimConfig, ScheduleConfig

MODALITIES = ("speech", "image", "text")
FULL_SCALE = 2**15  # of 16-bit samples
PLAN = ("items", "starts", "sizes", "counts", "bytes", "masks")  # arrays of each seed


class Prepared:
    """One modality: settings, items and batches.

    Args:
        arrays: of the file, by name.
        settings: configurations as plain values, ``seeds`` and ``updates`` that there are batches for, and for images
            ``mean`` and ``std``.
        digest: of the file.
    """

    def __init__(self, arrays: dict[str, np.ndarray], settings: dict[str, Any], digest: str = "") -> None:
        self.arrays, self.settings, self.digest = arrays, settings, digest
        self.model = config_from_dict("model", settings["model"])
        self.modality = self.model.modality
        self.optim = OptimConfig(**{**settings["optim"], "betas": tuple(settings["optim"]["betas"])})
        self.schedule = ScheduleConfig(**settings["schedule"])

    @classmethod
    def load(cls, path: str | Path) -> "Prepared":
        """Read a file.

        Raises:
            ValueError: there is none, or it is something else.
        """
        try:
            digest = hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            return cls(arrays, json.loads(str(arrays.pop("settings"))), digest)
        except (OSError, KeyError, TypeError, ValueError, UserError) as error:
            raise ValueError(f"{path} must be a file of convergence.py prepare: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write a file; one that is there is replaced."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.stem}.part.npz")
        np.savez_compressed(partial, **self.arrays, settings=np.array(json.dumps(self.settings)))
        partial.replace(path)

    def batches(self, seed: int, updates: int) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Inputs as ``Data2Vec`` takes them and masks [B, T], for each of the first ``updates`` updates.

        Raises:
            ValueError: ``seed`` was not prepared, or not so many updates.
        """
        seeds, most = self.settings["seeds"], self.settings["updates"]
        if seed not in seeds:
            raise ValueError(f"seed must be one of those prepared, {seeds}, got {seed}")
        if not 1 <= updates <= most:
            raise ValueError(f"updates must be from 1 to the {most} prepared, got {updates}")
        return self._batches({name: self.arrays[f"seed{seed}.{name}"] for name in PLAN}, updates)

    def _batches(self, plan: dict[str, np.ndarray], updates: int) -> Iterator[tuple[Tensor, np.ndarray]]:
        items_end, mask_end = plan["counts"].cumsum(), plan["bytes"].cumsum()
        for u in range(updates):
            rows = slice(items_end[u] - plan["counts"][u], items_end[u])
            size = int(plan["sizes"][u])
            inputs = self.inputs("pretrain", plan["items"][rows], plan["starts"][rows], size)
            shape = len(inputs), self._positions(size)
            bits = plan["masks"][mask_end[u] - plan["bytes"][u] : mask_end[u]]
            yield inputs, np.unpackbits(bits, count=shape[0] * shape[1]).astype(bool).reshape(shape)

    def _positions(self, size: int) -> int:
        """T of inputs that long."""
        frontend = self.model.frontend
        if self.modality == "speech":
            return frontend.num_frames(size)
        return frontend.num_patches if self.modality == "image" else size

    def inputs(self, part: str, items: np.ndarray, starts: Sequence[int], size: int) -> Tensor:
        """``size`` samples or tokens of each item of a part, from its start on; whole images.

        Waveforms [B, S] float32, images [B, C, H, H] float32 or ids [B, T] int64, bit for bit as the loaders make them.
        """
        if self.modality == "image":
            pixels = torch.from_numpy(self.arrays[f"{part}.pixels"][items]).float() / 255
            mean, std = (torch.tensor(self.settings[name]).view(-1, 1, 1) for name in ("mean", "std"))
            return (pixels - mean) / std
        if self.modality == "text":
            return torch.from_numpy(self.arrays[f"{part}.ids"][items, :size].astype(np.int64))
        samples, first, mean, std = (self.arrays[f"{part}.{name}"] for name in ("samples", "first", "mean", "std"))
        waves = np.empty((len(items), size), np.float32)
        for row, item, start in zip(waves, items, starts, strict=True):
            begin = first[item] + start
            wave = samples[begin : begin + size].astype(np.float32) / FULL_SCALE
            row[:] = (wave - mean[item]) / std[item]
        return torch.from_numpy(waves)

    def examples(self, part: str, batch_size: int = 64) -> Iterator[tuple[Tensor, Tensor | None, np.ndarray]]:
        """The labelled examples of a part, "train" or "test": inputs, padding mask [B, T] or None, labels [B].

        Clips share a batch with others of their length, so that speech and images have no padding.
        """
        labels, lengths = self.arrays[f"{part}.labels"], self.arrays[f"{part}.lengths"]
        order = np.argsort(lengths, kind="stable")
        while len(order):
            count = batch_size
            if self.modality == "speech":
                count = min(count, int((lengths[order] == lengths[order[0]]).sum()))
            rows, order = order[:count], order[count:]
            size = int(lengths[rows].max())
            padding = torch.from_numpy(np.arange(size)[None] >= lengths[rows][:, None])
            inputs = self.inputs(part, rows, [0] * len(rows), size)
            yield inputs, padding if padding.any() else None, labels[rows]

"""Writes the files of ``convergence_data.py`` from the demo's data, by the training's own loaders (the train extra)."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from convergence_data import FULL_SCALE, Prepared

from d2v_fast.demo.fetch import DemoSet
from d2v_fast.train.config import TrainConfig, load_config
from d2v_fast.train.data import PretrainData, build_data, read_image, read_waveform
from d2v_fast.train.data.base import specs
from d2v_fast.train.probe_readers import folder_examples, text_examples


def prepare(
    modality: str, data: Path, file: Path, seeds: Sequence[int], updates: int, *,
    minutes: float = 10.0, probe_clips: int = 250, probe_seconds: float = 1.5, overrides: Sequence[str] = (),
) -> Prepared:  # fmt: skip
    """Write ``file`` for a modality; each batch is compared with the loader's.

    Args:
        modality: "speech", "image" or "text".
        data: folder of ``python -m d2v_fast.demo.fetch``.
        file: to be written.
        seeds: of which there are batches.
        updates: batches of each.
        minutes: of speech to pretrain on; clips of the demo's lengths in random order, until they are so long together.
        probe_clips: of speech at most, in each part of the probe, as many of each class.
        probe_seconds: of each of them at most, from its middle.
        overrides: ``key=value`` of the preset.

    Raises:
        UserError: data that cannot be read, or a wrong override.
        RuntimeError: a batch made of what was written differs from the loader's.
    """
    found = DemoSet(modality, data / modality)
    with tempfile.TemporaryDirectory() as scratch:
        path = found.pretrain
        if modality == "speech":
            limits = _configured(modality, path, overrides).data
            path = Path(scratch, "clips.tsv")
            _choose_clips(found.pretrain, path, minutes, (limits.min_seconds, limits.max_seconds))
        config = _configured(modality, path, [f"updates={updates}", *overrides])
        source = build_data(config.data, config.model, seeds[0], static_shapes=True)
    settings: dict[str, Any] = {name: asdict(getattr(config, name)) for name in ("model", "optim", "schedule")}
    settings |= {"seeds": list(seeds), "updates": updates}
    settings |= {name: list(getattr(source, name)) for name in ("mean", "std") if hasattr(source, name)}
    settings = json.loads(json.dumps(settings))  # lists for tuples, as in the file
    make_items, make_examples = _MAKERS[modality]
    arrays = {f"pretrain.{name}": x for name, x in make_items(source).items()}
    for part in ("train", "test"):
        limits = (probe_clips, probe_seconds)
        arrays |= {f"{part}.{name}": x for name, x in make_examples(source, found.probe_part(part), limits).items()}
    prepared = Prepared(arrays, settings)
    for seed in seeds:
        arrays |= {f"seed{seed}.{name}": x for name, x in _plan(prepared, source, seed, updates).items()}
    prepared.save(file)
    return prepared


def _configured(modality: str, path: Path, overrides: Sequence[str]) -> TrainConfig:
    fixed = [f"data.path={json.dumps(str(path))}"]
    if modality == "image":  # random crops need a library of their own, and would be the same for both arms
        fixed.append("data.crop_scale=[1.0,1.0]")
    return load_config(f"{modality}_demo", [*fixed, *overrides])


def _choose_clips(folder: Path, manifest: Path, minutes: float, limits: tuple[float, float]) -> None:
    """Write a manifest of clips in ``folder`` between these seconds."""
    files, chosen, total = sorted(folder.glob("*.wav")), [], 0.0
    for index in np.random.default_rng(0).permutation(len(files)):
        info = soundfile.info(files[index])
        if total < 60 * minutes and limits[0] <= info.duration <= limits[1]:
            chosen.append(f"{files[index].name}\t{info.frames}")
            total += info.duration
    manifest.write_text("\n".join([str(folder.resolve()), *chosen]) + "\n", encoding="utf-8")


def _plan(prepared: Prepared, source: PretrainData, seed: int, updates: int) -> dict[str, np.ndarray]:
    """Which items each batch has, and their starts, size and mask."""
    numbers: dict[str, list[int]] = {name: [] for name in ("items", "starts", "sizes", "counts", "bytes")}
    masks = []
    source.seed = seed
    for epoch, index, chosen in islice(specs(source, 0, 0), updates):
        batch = source.load(epoch, index, chosen)
        size, starts = batch.inputs.shape[-1], [0] * len(chosen)
        if prepared.modality == "speech":
            crop = source.rng(source.CROP, epoch, index)
            starts = [int(crop.integers(length - size + 1)) for length in source.lengths[list(chosen)]]
        made = prepared.inputs("pretrain", np.array(chosen), starts, size)
        if not torch.equal(made, source.augment(batch).inputs):
            raise RuntimeError(f"{prepared.modality}: batch {index} of epoch {epoch} differs from the loader's")
        masks.append(np.packbits(batch.mask.numpy()))
        numbers["items"] += chosen
        numbers["starts"] += starts
        for name, value in (("sizes", size), ("counts", len(chosen)), ("bytes", len(masks[-1]))):
            numbers[name].append(value)
    return {**{name: np.array(x, np.int32) for name, x in numbers.items()}, "masks": np.concatenate(masks)}


def _labels(examples: list[tuple[Any, str]]) -> np.ndarray:
    """Numbers of the labels in alphabetical order."""
    return np.unique([label for _, label in examples], return_inverse=True)[1]


# ---- speech ----------------------------------------------------------------------------------------------------------
def _clips(waves: list[np.ndarray], limit: int | None = None) -> dict[str, np.ndarray]:
    """Clips [S], the middle of those longer than ``limit``, as 16 bits behind each other, and what normalises them."""
    means = [wave.mean(dtype=np.float64) for wave in waves]  # of the whole clip, as the loader's and the probe's
    deviations = [np.sqrt(wave.var(dtype=np.float64) + 1e-5) for wave in waves]
    if limit is not None:
        starts = [max(0, (len(wave) - limit) // 2) for wave in waves]
        waves = [wave[start : start + limit] for wave, start in zip(waves, starts, strict=True)]
    samples = np.concatenate(waves) * FULL_SCALE
    if not np.array_equal(samples.astype(np.int16), samples):
        raise RuntimeError("the clips must hold 16-bit samples at 16 kHz, as those of the demo do")
    lengths = np.array([len(wave) for wave in waves])
    return {
        "samples": samples.astype(np.int16),
        "first": lengths.cumsum() - lengths,
        "lengths": lengths,
        "mean": np.array(means),
        "std": np.array(deviations),
    }


def _speech_items(source: PretrainData) -> dict[str, np.ndarray]:
    return _clips([source.source.read(int(item), read_waveform) for item in source.items])


def _speech_examples(source: PretrainData, path: Path, limits: tuple[int, float]) -> dict[str, np.ndarray]:
    classes: dict[str, list] = {}
    for example in folder_examples(path):
        classes.setdefault(example[1], []).append(example)
    count = max(1, limits[0] // len(classes))
    spread = [example for group in classes.values() for example in group[:: -(-len(group) // count)]]
    limit = int(limits[1] * source.model.frontend.sample_rate)
    return _clips([read_waveform(file) for file, _ in spread], limit) | {"labels": _labels(spread)}


# ---- images ----------------------------------------------------------------------------------------------------------
def _image_items(source: PretrainData) -> dict[str, np.ndarray]:
    return {"pixels": np.concatenate([source.load(0, 0, (item,)).inputs.numpy() for item in range(len(source.names))])}


def _image_examples(source: PretrainData, path: Path, limits: tuple[int, float]) -> dict[str, np.ndarray]:
    examples, frontend = folder_examples(path), source.model.frontend
    pixels = np.stack([read_image(file, frontend.image_size, frontend.channels) for file, _ in examples])
    lengths = np.full(len(examples), frontend.num_patches)
    return {"pixels": pixels.transpose(0, 3, 1, 2), "labels": _labels(examples), "lengths": lengths}


# ---- text ------------------------------------------------------------------------------------------------------------
def _text_items(source: PretrainData) -> dict[str, np.ndarray]:
    blocks = [source.load(0, 0, (block,)).inputs.numpy() for block in range(source.num_blocks)]
    return {"ids": np.concatenate(blocks).astype(np.uint16)}


def _text_examples(source: PretrainData, path: Path, limits: tuple[int, float]) -> dict[str, np.ndarray]:
    examples, frontend = text_examples(path), source.model.frontend
    rows = [source.tokenizer.encode(text, add_special_tokens=False).ids for text, _ in examples]
    rows = [[frontend.bos_index, *ids[: frontend.max_positions - 2], frontend.eos_index] for ids in rows]
    ids = np.full((len(rows), max(map(len, rows))), frontend.pad_index, np.uint16)
    for target, row in zip(ids, rows, strict=True):
        target[: len(row)] = row
    return {"ids": ids, "labels": _labels(examples), "lengths": np.array([len(row) for row in rows])}


_MAKERS = {
    "speech": (_speech_items, _speech_examples),
    "image": (_image_items, _image_examples),
    "text": (_text_items, _text_examples),
}

"""The published recipes whose updates ``bench_train_step.py`` times on a GPU, each at its batch for one GPU.

Values are those of ``d2v_fast/train/presets``, which need more than PyTorch to be read (a test compares them). The
model is the released one (profile "fairseq") without LayerDrop, which would make two sides do different work in one
update.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from d2v_fast.nn import Batch, Data2VecConfig, make_batch
from d2v_fast.train.optim import OptimConfig

NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "drop_path": 0.0}


@dataclass(frozen=True)
class Recipe:
    """One published recipe; ``size`` are samples, pixels along a side or tokens of each of ``rows``."""

    modality: Literal["speech", "image", "text"]
    model: Literal["base", "large"]
    rows: int
    size: int
    optim: OptimConfig


SPEECH = OptimConfig(lr=5e-4)
IMAGE = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05, "decay_vectors": False, "clip_norm": 3.0}
RECIPES = {
    # 780 and 938 frames of equal clips; with an odd number fairseq pads one, and attends with a mask
    "speech_base": Recipe("speech", "base", 15, 249_920, SPEECH),
    "speech_large": Recipe("speech", "large", 4, 300_240, SPEECH),
    "image_base": Recipe("image", "base", 128, 224, OptimConfig(lr=2e-3, **IMAGE)),
    "image_large": Recipe("image", "large", 64, 224, OptimConfig(lr=1e-3, **IMAGE)),
    "text_base": Recipe("text", "base", 16, 512, OptimConfig(lr=2e-4, clip_norm=5.0)),
}


def make_config(modality: str, model: str = "base", dropout: bool = True, layers: int | None = None) -> Data2VecConfig:
    """The released model without LayerDrop; ``layers``: only so many."""
    if modality == "text":  # has one size
        config = Data2VecConfig.text(profile="fairseq")
    else:
        config = getattr(Data2VecConfig, modality)(model, profile="fairseq")
    layers = min(layers or config.encoder.layers, config.encoder.layers)
    encoder = replace(config.encoder, layerdrop=0.0, layers=layers, **({} if dropout else NO_DROPOUT))
    frontend = config.frontend
    if modality == "text" and not dropout:
        frontend = replace(frontend, dropout=0.0)
    top_k = min(config.targets.top_k, layers)
    return replace(config, encoder=encoder, frontend=frontend, targets=replace(config.targets, top_k=top_k))


def random_batch(config: Data2VecConfig, rows: int, size: int, static: bool = False) -> Batch:
    """Noise, and a mask of the recipe, on the host; ``static`` computes as many masked rows as any mask can have."""
    frontend = config.frontend
    if config.modality == "text":
        inputs, positions = torch.randint(4, frontend.vocab_size - 1, (rows, size)), size
    elif config.modality == "speech":
        inputs, positions = torch.randn(rows, size), frontend.num_frames(size)
    else:
        inputs, positions = torch.randn(rows, 3, size, size), frontend.num_patches
    mask = config.mask.draw(np.random.default_rng(0), np.full(rows, positions), positions)
    return make_batch(inputs, mask, num_masked=rows * config.mask.most(positions) if static else None)

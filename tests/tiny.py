"""Tiny models of the three modalities, and batches for them."""

from dataclasses import replace

import numpy as np
import torch

from d2v_fast.nn import Batch, Data2VecConfig, make_batch

CONVS = ((16, 10, 5), *((16, 3, 2),) * 4, *((16, 2, 2),) * 2)
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "drop_path": 0.0, "layerdrop": 0.0}


def tiny_config(modality: str, profile: str = "paper", **encoder) -> Data2VecConfig:
    """The recipe of ``modality`` with three layers of 32 channels; ``encoder`` overrides fields of the encoder."""
    config = getattr(Data2VecConfig, modality)(profile=profile)
    frontend = {
        "speech": {"conv_layers": CONVS},
        "image": {"image_size": 24, "patch_size": 4},
        "text": {"vocab_size": 50, "max_positions": 30},
    }[modality]
    mask = {"num_masked": 20, "min_block": 4} if modality == "image" else {}
    return replace(
        config,
        frontend=replace(config.frontend, **frontend),
        encoder=replace(config.encoder, **{"layers": 3, "dim": 32, "ffn_dim": 48, "heads": 2, **encoder}),
        mask=replace(config.mask, **mask),
        targets=replace(config.targets, top_k=2),
        ema=replace(config.ema, decay=0.9, end_decay=0.99, anneal_updates=10),
    )


def tiny_batch(config: Data2VecConfig, seed: int = 0, padded: bool = False, size: int = 3) -> Batch:
    """A random batch of ``size`` rows: 0.5 s clips, 24-pixel images or 21 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = None
    if config.modality == "speech":
        inputs = torch.randn(size, 8_000, generator=generator)
        positions = config.frontend.num_frames(8_000)
    elif config.modality == "image":
        inputs = torch.randn(size, 3, 24, 24, generator=generator)
        positions = config.frontend.num_patches
    else:
        positions = 21
        inputs = torch.randint(4, 49, (size, positions), generator=generator)
    rows = np.full(size, positions)
    if padded:
        rows = lengths = positions - 3 * np.arange(size)
    if padded and config.modality == "text":
        inputs[torch.arange(positions) >= torch.from_numpy(rows)[:, None]] = config.frontend.pad_index
    mask = config.mask.draw(np.random.default_rng(seed), rows, positions)
    return make_batch(inputs, mask, lengths)

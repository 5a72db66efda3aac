"""Tiny encoders of transformers for the tests of Data2VecPretraining, and what they read."""

import numpy as np
import pytest
import torch

from d2v_fast.nn.config import EMAConfig
from d2v_fast.patches._pretraining_data import INPUTS, build_batch

transformers = pytest.importorskip("transformers")
MODALITIES = ("speech", "text", "image")
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
EMA = EMAConfig(decay=0.8, end_decay=0.9, anneal_updates=10)


def encoder(modality, kind="Model", dropout=0.0, **options):
    """A tiny model of transformers."""
    torch.manual_seed(0)
    if modality == "speech":
        rates = {f"{name}_dropout": dropout for name in ("hidden", "attention", "activation")}
        options = {"conv_dim": (16,) * 7, "layerdrop": dropout, **rates, **options}
        name = "Audio"
    else:
        rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        if modality == "text":
            options, name = {"vocab_size": 50, "max_position_embeddings": 40, **rates, **options}, "Text"
        else:
            shape = {"image_size": 8, "patch_size": 2, "drop_path_rate": dropout, "layer_norm_eps": 1e-6}
            tokens = {"use_mask_token": True, "use_mean_pooling": False, "use_shared_relative_position_bias": True}
            options, name = {**shape, **tokens, **rates, **options}, "Vision"
    config = getattr(transformers, f"Data2Vec{name}Config")(**SIZES | options)
    model = getattr(transformers, f"Data2Vec{name}{kind}")(config)
    with torch.no_grad():
        for parameter in model.parameters():  # no token stays zero, no norm one
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def inputs(modality, padded=False, seed=0):
    """Arguments of forward."""
    g = torch.Generator().manual_seed(seed)
    if modality == "image":
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=g)}
    n = 4000 if modality == "speech" else 21
    x = torch.randn(3, n, generator=g) if modality == "speech" else torch.randint(4, 49, (3, n), generator=g)
    if not padded:
        return {INPUTS[modality]: x}
    kept = torch.arange(n) < torch.tensor([n, n * 3 // 4, n // 2])[:, None]
    return {INPUTS[modality]: x.masked_fill(~kept, 0 if modality == "speech" else 1), "attention_mask": kept.long()}


def draw(model, given, seed=1):
    """The batch that forward would make, with its mask."""
    x, attention_mask = given[INPUTS[model.recipe.modality]], given.get("attention_mask")
    return build_batch(model.recipe, x, attention_mask, None, np.random.default_rng(seed))


def grads(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}

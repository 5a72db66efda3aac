"""A row of a batch by itself, behind padding, and packed with others: the same hidden states and gradients.

And twenty updates that leave out what no result depends on, against twenty that compute everything.
"""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from parity import TOLERANCE, assert_equal, float64, gradients, relative
from tiny import NO_DROPOUT, tiny_config

from d2v_fast.nn import Data2Vec, make_batch
from d2v_fast.nn.config import PruneConfig
from d2v_fast.nn.sequences import Sequences
from d2v_fast.train.optim import OptimConfig, build_optimizer
from d2v_fast.train.step import train_step

BASE = {"layers": 2, "dim": 768, "ffn_dim": 3072, "heads": 12}  # the published widths
SAMPLES = np.array([8000, 6500, 2000])
TOKENS = np.array([21, 13, 1])


def without_dropout(modality, profile="paper", **encoder):
    config = tiny_config(modality, profile, **NO_DROPOUT, **encoder)
    if modality == "text":
        config = replace(config, frontend=replace(config.frontend, dropout=0.0))
    return config


def inputs_of(config):
    """(inputs [B, ..], input and encoder lengths of each row)."""
    if config.modality == "speech":
        waves = torch.randn(3, 8000).masked_fill(torch.arange(8000) >= torch.from_numpy(SAMPLES)[:, None], 0)
        return waves, SAMPLES, config.frontend.num_frames(SAMPLES)
    tokens = torch.randint(4, 49, (3, 21))
    return tokens.masked_fill(torch.arange(21) >= torch.from_numpy(TOKENS)[:, None], 1), TOKENS, TOKENS


def packed_states(model, inputs, valid):
    """Hidden states [N, C] of the ``valid`` [B, T] rows behind each other."""
    rows = Sequences.from_mask(valid.numpy())
    if model.config.modality == "speech":
        x = rows.take(model.frontend.features(inputs).flatten(0, 1))
    else:
        x = model.frontend(rows.take(inputs.flatten(0, 1)), sequences=rows)
    return model.encoder(x, sequences=rows, hidden_states=True).hidden_states


def with_gradients(model, states, upstream):
    """``states``, and the gradients that ``upstream`` of the last of them gives."""
    model.zero_grad()
    states[-1].backward(upstream)
    return states, {name: x.clone() for name, x in gradients(model).items() if name.startswith(("front", "encoder"))}


@pytest.mark.parametrize("sizes", [{}, BASE], ids=["tiny", "base"])
@pytest.mark.parametrize("modality", ["speech", "text"])
def test_alone_padded_and_packed(modality, sizes):
    model = Data2Vec(without_dropout(modality, **sizes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    inputs, samples, lengths = inputs_of(model.config)
    valid = torch.arange(lengths.max()) < torch.from_numpy(lengths)[:, None]  # [B, T]
    upstream = torch.randn(int(lengths.sum()), model.config.encoder.dim)
    single = [model.hidden_states(row[None, :n]) for row, n in zip(inputs, samples, strict=True)]
    states = [torch.cat([x[0] for x in layer]) for layer in zip(*single, strict=True)]  # [N, C] each
    want, expected = with_gradients(model, states, upstream)
    padded = [x[valid] for x in model.hidden_states(inputs, ~valid)]
    for states in (padded, packed_states(model, inputs, valid)):
        got, grads = with_gradients(model, states, upstream)
        assert len(got) == len(want) == model.config.encoder.layers + 1
        assert all(relative(a, b) <= TOLERANCE for a, b in zip(got, want, strict=True))
        assert_equal(grads, expected)


NONE = PruneConfig(**{field.name: False for field in fields(PruneConfig)})


def batches(config, fixed):
    """One batch an update, every other one with padding; ``fixed``: all of the same shapes."""
    for update in range(20):
        if config.modality == "image":
            inputs, lengths = torch.randn(3, 3, 24, 24), np.full(3, config.frontend.num_patches)
        else:
            inputs, _, lengths = inputs_of(config)
        if update % 2 == 0:
            lengths = np.full_like(lengths, lengths.max())
        T = lengths.max()
        mask = config.mask.draw(np.random.default_rng(update), lengths, T)
        shapes = {"num_masked": int(lengths.sum()), "num_valid": 3 * T} if fixed else {}
        if config.modality == "image":
            shapes = {"num_masked": 70} if fixed else {}
        yield make_batch(inputs, mask, lengths, **shapes)


def losses_of_a_run(config, prune, fixed):
    """Loss and spreads of every update, and the weights that 20 of them lead to."""
    torch.manual_seed(0)
    model = Data2Vec(replace(config, prune=prune))
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3))
    torch.manual_seed(1)
    found = {}
    for update, batch in enumerate(batches(config, fixed)):
        metrics = train_step(model, [batch], optimizer, lr=1e-3, update=update)
        kept = ("loss", "target_var", "pred_var", "grad_norm")
        found |= {f"{name} {update}": getattr(metrics, name) for name in kept}
    return found | dict(model.named_parameters())


@pytest.mark.parametrize(
    ("modality", "profile"),
    [("speech", "paper"), ("speech", "fairseq"), ("text", "paper"), ("text", "fairseq"), ("image", "paper")],
)
def test_twenty_updates_without_what_nothing_needs(modality, profile):
    with float64():
        config = without_dropout(modality, profile)
        want = losses_of_a_run(config, NONE, fixed=False)
        for fixed in (False, True):
            assert_equal(losses_of_a_run(config, PruneConfig(), fixed), want, 1e-10)

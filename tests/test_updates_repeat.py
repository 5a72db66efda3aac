"""Whole updates give the same bits again, forward, backward, optimizer and teacher, dropout included."""

import os

import pytest
import torch
from checks import DEVICE
from tiny import tiny_batch, tiny_config

from d2v_fast.nn import Data2Vec
from d2v_fast.train.optim import OptimConfig, build_optimizer
from d2v_fast.train.step import train_step

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts: what PyTorch wants for equal bits


@pytest.fixture
def deterministic():
    """PyTorch's own operators included, where they have a choice."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def weights_after(modality, updates=3):
    torch.manual_seed(0)
    model = Data2Vec(tiny_config(modality)).to(DEVICE).train()
    optimizer = build_optimizer(model, OptimConfig())
    for update in range(updates):
        batch = tiny_batch(model.config, update).to(DEVICE)
        train_step(model, [batch], optimizer, lr=1e-3, update=update, autocast=DEVICE == "cuda")
    return model.state_dict()


@pytest.mark.parametrize("modality", ["speech", "text", "image"])
def test_updates_repeat_bit_for_bit(modality, deterministic):
    first, again = weights_after(modality), weights_after(modality)
    different = [name for name, x in first.items() if isinstance(x, torch.Tensor) and not torch.equal(x, again[name])]
    assert not different
    start = Data2Vec(tiny_config(modality)).state_dict()
    assert any(not torch.equal(first[name].cpu(), x) for name, x in start.items() if isinstance(x, torch.Tensor))

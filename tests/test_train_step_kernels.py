"""Whole updates with every op a Triton kernel, on the CPU; needs TRITON_INTERPRET=1."""

import importlib
from dataclasses import replace

import pytest
import torch
from checks import INTERPRET
from test_data2vec import references_on_the_cpu
from tiny import NO_DROPOUT, tiny_batch, tiny_config

from d2v_fast.nn import Data2Vec
from d2v_fast.train.optim import OptimConfig, build_optimizer
from d2v_fast.train.step import train_step

pytestmark = pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")


def trained(updates: int = 2, **encoder):
    """A text model with two layers after some updates in one pass, its optimizer, and the metrics of the updates."""
    torch.manual_seed(0)
    config = tiny_config("text", layers=2, **encoder)
    config = replace(config, frontend=replace(config.frontend, dropout=encoder.get("dropout", 0.0)))
    model = Data2Vec(config).train()
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3, eps=1e-3, one_pass=True))
    torch.manual_seed(7)
    metrics = [
        train_step(model, [tiny_batch(config, seed=i, size=2)], optimizer, lr=1e-3, update=i, clip_norm=0.5)
        for i in range(updates)
    ]
    return model, optimizer, metrics


def test_one_pass_of_the_kernels_is_that_of_the_references(monkeypatch):
    """Loss, norm of the gradients, AdamW and averages; the kernels of the last two must have run in the first model."""
    ran = set()
    for name in ("adamw_ema", "l2_norm", "data2vec_loss"):
        module = importlib.import_module(f"d2v_fast.kernels.{name}")
        for attribute, kernel in list(vars(module).items()):
            if attribute.endswith("_kernel"):
                monkeypatch.setattr(module, attribute, Watched(kernel, ran, name))
    model, optimizer, metrics = trained(**NO_DROPOUT)
    assert ran == {"adamw_ema", "l2_norm", "data2vec_loss"}
    references_on_the_cpu(monkeypatch)
    ran.clear()
    other, other_optimizer, wanted = trained(**NO_DROPOUT)
    assert not ran
    for a, b in zip(metrics, wanted, strict=True):
        for x, y in zip(a, b, strict=True):
            assert float(x) == pytest.approx(float(y), rel=1e-4)
    for (name, x), y in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, msg=name)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state.get(p, {}).keys() == other_optimizer.state.get(q, {}).keys()
        for key, x in optimizer.state.get(p, {}).items():
            torch.testing.assert_close(x, other_optimizer.state[q][key], rtol=1e-4, atol=1e-7, msg=key)


class Watched:
    """A kernel that notes down its launches."""

    def __init__(self, kernel, ran: set, name: str) -> None:
        self.kernel, self.ran, self.name = kernel, ran, name

    def __getitem__(self, grid):
        self.ran.add(self.name)
        return self.kernel[grid]


def test_updates_with_dropout_are_finite_and_repeat():
    rates = {"dropout": 0.2, "attention_dropout": 0.1, "drop_path": 0.1, "layerdrop": 0.0}
    (model, _, metrics), (again, _, _), (plain, _, _) = trained(**rates), trained(**rates), trained(**NO_DROPOUT)
    assert all(m.loss.isfinite() and m.grad_norm.isfinite() and m.skipped.item() == 0.0 for m in metrics)
    pairs = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)
    weight = "encoder.layers.0.fc1.weight"
    assert not torch.equal(model.state_dict()[weight], plain.state_dict()[weight])
    assert all(x.isfinite().all() for x in model.state_dict().values() if x.is_floating_point())

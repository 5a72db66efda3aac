"""Patched models of other people beside the same without: what the tests of ``d2v_fast.patches`` share."""

from itertools import count

import numpy as np
import pytest
import torch
from torch import nn


def perturb(module: nn.Module, size: float = 0.02) -> None:
    """Move every parameter, whatever its dtype and whether it is trained."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn_like(p))


def dictionaries(module: nn.Module) -> dict[str, dict[str, int]]:
    """What is in the ``__dict__`` of every module, by identity; ``_buffers`` and the like by their contents."""

    def seen(x: object) -> object:
        return {name: id(value) for name, value in x.items()} if isinstance(x, dict) else id(x)

    return {path: {name: seen(x) for name, x in m.__dict__.items()} for path, m in module.named_modules()}


def repeat_masks(monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> None:
    """From now on generators that NumPy would seed by chance are a fixed row of them."""
    real, number = np.random.Generator, count()
    monkeypatch.setattr(
        np.random,
        "default_rng",
        lambda given=None: real(np.random.PCG64([seed, next(number)] if given is None else given)),
    )


def same_as_upstream(got: dict, want: dict, tolerance: float) -> None:
    """Two results of a fairseq model: the same keys in the same order, numbers equal, tensors within ``tolerance``."""
    assert list(got) == list(want)
    for name, value in want.items():
        if isinstance(value, dict):
            same_as_upstream(got[name], value, tolerance)
        elif isinstance(value, torch.Tensor):
            assert got[name].shape == value.shape
            assert got[name].dtype == value.dtype
            torch.testing.assert_close(got[name], value, rtol=tolerance, atol=0)
        else:
            assert type(got[name]) is type(value)
            assert got[name] == value


def allow_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models can be run on the device "meta" then, where reading a tensor on the host is an error."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type=None: False)  # knows no such device

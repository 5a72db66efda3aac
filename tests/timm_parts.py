"""The four parts of timm that fairseq's data2vec 2.0 is built of, for machines where timm does not import.

timm itself needs torchvision, which does not load beside a PyTorch for the CPU alone.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Stochastic depth: drops whole samples."""

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0 or not self.training:
            return x
        kept = torch.rand(len(x), *(1,) * (x.dim() - 1)) >= self.drop_prob
        return x * kept / (1 - self.drop_prob if self.scale_by_keep else 1.0)


class Mlp(nn.Module):
    def __init__(self, in_features: int, hidden_features: int, act_layer: type = nn.GELU, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden_features, in_features)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class PatchEmbed(nn.Module):
    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).mT


class Block(nn.Module):
    """Imported by fairseq's masked autoencoder, which no test builds."""


@contextmanager
def installed() -> Iterator[None]:
    """timm can be imported inside: the real one where it works, otherwise these parts of it."""
    try:
        importlib.import_module("timm.models.vision_transformer")
        importlib.import_module("timm.models.layers")
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] in ("timm", "torchvision")]:
            del sys.modules[name]
    else:
        yield
        return
    parts = {"DropPath": DropPath, "Mlp": Mlp, "PatchEmbed": PatchEmbed, "Block": Block, "to_2tuple": lambda x: (x, x)}
    names = ("timm", "timm.models", "timm.models.layers", "timm.models.vision_transformer")
    for name in names:
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(parts)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]

"""Sizes of the published recipes, and inputs of those sizes."""

import torch
from common import DEVICE
from torch import Tensor

# per GPU: B sequences of T positions, C channels, K averaged layers, N masked positions
SPEECH_BASE = {"B": 15, "T": 780, "C": 768, "K": 8, "N": 5230}
SPEECH_LARGE = {"B": 4, "T": 938, "C": 1024, "K": 8, "N": 1677}
TEXT_BASE = {"B": 16, "T": 512, "C": 768, "K": 10, "N": 1229}
VISION_BASE = {"B": 128, "T": 196, "C": 768, "K": 6, "N": 128 * 120}
VISION_LARGE = {"B": 64, "T": 196, "C": 1024, "K": 6, "N": 64 * 120}


def masked(B: int, T: int, N: int) -> tuple[Tensor, Tensor]:
    """N random positions: flat and sorted [N] int64, and as a mask [B, T]."""
    positions = torch.randperm(B * T, device=DEVICE)[:N].sort().values
    mask = torch.zeros(B * T, dtype=torch.bool, device=DEVICE)
    mask[positions] = True
    return positions, mask.view(B, T)


def layer_results(B: int, T: int, C: int, K: int, dtype: torch.dtype) -> list[Tensor]:
    """K x [B, T, C] whose channels differ in mean and spread."""
    shift, spread = torch.randn(C, device=DEVICE), 0.3 + torch.rand(C, device=DEVICE)
    return [(shift + spread * torch.randn(B, T, C, device=DEVICE)).to(dtype) for _ in range(K)]


def layer_bytes(dtype: str, norm: str, B: int, T: int, C: int, K: int, N: int) -> int:
    """Least traffic of the layer results: all of them for statistics over time, then the rows that are asked for.

    Statistics over time need every frame before the first row can be normalised, and K layers do not fit on the chip.
    """
    item = 4 if dtype == "float32" else 2
    return item * C * K * (N + (B * T if norm in ("instance", "batch") else 0))


def time_major(x: Tensor) -> Tensor:
    """Equal to ``x`` [B, T, C], but [T, B, C] in memory, as fairseq's transformers leave it."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def channel_major(x: Tensor) -> Tensor:
    """Equal to ``x`` [B, T, C], but [B, C, T] in memory, as a convolution leaves it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def transformer(width: int, layers: int, extra: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Shapes of a transformer's parameters: 16 tensors a layer, and ``extra`` in front."""
    C, F = width, 4 * width
    attention = [(C, C), (C,)] * 4
    layer = [*attention, (C,), (C,), (F, C), (F,), (C, F), (C,), (C,), (C,)]
    return [*extra, *(layer * layers)]


def _speech(width: int) -> list[tuple[int, ...]]:
    positions = [(width, width // 16, 19), (width,)] * 5
    return [*positions, (width,), (width,)]


PARAMETERS = {
    "speech base": transformer(768, 12, _speech(768)),
    "text base": transformer(768, 12, [(50265, 768), (514, 768), (768,), (768,)]),
    "speech large": transformer(1024, 24, _speech(1024)),
    "vision huge": transformer(1280, 32, [(1280, 3, 14, 14), (1280,), (1, 1, 1280)]),
    "smoke": transformer(64, 2, [(1000, 64), (7,), (1,)]),
}


def count(model: str) -> int:
    """Number of parameters."""
    return sum(torch.Size(shape).numel() for shape in PARAMETERS[model])


def parameters(model: str, dtype: torch.dtype = torch.float32, std: float = 1.0) -> list[Tensor]:
    """Random tensors of a model's shapes."""
    return [(std * torch.randn(shape, device=DEVICE)).to(dtype) for shape in PARAMETERS[model]]

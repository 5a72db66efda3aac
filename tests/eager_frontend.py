"""The speech front-end in PyTorch's own operators, and the yardsticks of its tests."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def eager(frontend: nn.Module, waveforms: Tensor) -> Tensor:
    """Waveforms [B, S] -> features [B, T, C], channels first up to the projection, as fairseq writes it."""
    x = waveforms[:, None]
    for layer in frontend.convs:
        x = F.conv1d(x, layer.conv.weight, layer.conv.bias, layer.conv.stride)
        if isinstance(layer.norm, nn.LayerNorm):
            x = layer.norm(x.mT).mT
        elif layer.norm is not None:
            x = layer.norm(x)
        x = F.gelu(x)
    return frontend.proj(frontend.norm(x.mT))


def relative(got: Tensor, want: Tensor) -> float:
    """Size of the difference by size of ``want``, where that is not 0."""
    difference, size = (v.double().norm().item() for v in (got.double() - want.double(), want))
    return difference / size if size > 0 else difference


def saved_bytes(module, function):
    """Bytes of the tensors kept for backward, parameters and what shares memory counted as one."""
    own = {p.data_ptr() for p in module.parameters()}
    kept = {}

    def pack(v):
        if v.data_ptr() not in own:
            kept[v.data_ptr()] = max(kept.get(v.data_ptr(), 0), v.numel() * v.element_size())
        return v

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        y = function()
    return sum(kept.values()), y

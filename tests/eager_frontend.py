"""The speech front-end in PyTorch's own operators, and the yardsticks of its tests."""

from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LENGTHS = [5000, 400, 1234, 719, 3200]  # a frame, a multiple of the stride, one sample less than another frame needs


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


def assert_as_accurate(errors: list[float], of_eager: list[float]) -> None:
    """Relative errors of several tensors, each at most twice eager's, or twice the median of eager's: that of a few
    numbers is a matter of luck."""
    for index, (error, budget) in enumerate(zip(errors, of_eager, strict=True)):
        assert error <= 2 * max(budget, median(of_eager)) + 1e-6, f"tensor {index}: {error:.1e}, eager {budget:.1e}"


def padded_batch(waves, fill=float("nan")):
    """[B, S] and lengths; what is behind a clip must not matter."""
    batch = torch.full((len(waves), max(w.numel() for w in waves)), fill, device=waves[0].device, dtype=waves[0].dtype)
    for row, wave in zip(batch, waves, strict=True):
        row[: wave.numel()] = wave
    return batch, [w.numel() for w in waves]


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

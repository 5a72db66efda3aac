"""What is known and checked about waveforms before they meet a convolution: lengths, finite samples, normalisation."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from d2v_fast.nn.frontends.checks import check_tensor

Lengths = Sequence[int] | np.ndarray | Tensor  # samples of each waveform; known on the host


def host_lengths(lengths: Lengths, count: int, shortest: int, longest: int) -> tuple[int, ...]:
    """``lengths`` as Python integers.

    Raises:
        TypeError: they are no integers.
        ValueError: not ``count`` of them, on a GPU (reading them would wait for it), or one that is not between
            ``shortest`` and ``longest``.
    """
    if isinstance(lengths, Tensor) and lengths.device.type != "cpu":
        raise ValueError(f"lengths must be on the CPU, where the host knows them, got {lengths.device}")
    values = np.asarray(lengths)
    if values.shape != (count,):
        raise ValueError(f"lengths must be [{count}], one for each waveform, got shape {values.shape}")
    if values.dtype.kind not in "iu":
        raise TypeError(f"lengths must be integers, got {values.dtype}")
    wrong = np.flatnonzero((values < shortest) | (values > longest))
    if wrong.size:
        at = wrong[0]
        raise ValueError(f"lengths must be in {shortest}..{longest} samples, got {values[at]} for waveform {at}")
    return tuple(values.tolist())


def check_finite(name: str, waveforms: Tensor, check: bool) -> None:
    """Raise ValueError for samples that are NaN or inf: always on the CPU, on a GPU (which has to be waited for) where
    ``check`` asks for it."""
    if torch.compiler.is_compiling() or not (check or waveforms.device.type == "cpu"):
        return
    finite = waveforms.isfinite()
    if not finite.all():
        bad = (~finite).nonzero()
        raise ValueError(f"{name} must be finite, got {len(bad)} samples that are not, the first at {bad[0].tolist()}")


def normalise(waveforms: Tensor, lengths: Lengths | None = None, *, eps: float = 1e-5) -> Tensor:
    """Each waveform less its mean, divided by its deviation, over its own samples.

    What the speech models are trained on (fairseq ``normalize``: ``F.layer_norm`` of the whole file), and what
    :mod:`d2v_fast.train.data.audio` does to a file. Computed in float64.

    Args:
        waveforms: [B, S] or [S], floating point.
        lengths: [B] samples of each, known on the host; what is behind them becomes 0. All of S by default.
        eps: added to the variance.

    Returns:
        As ``waveforms``, in their dtype.

    Raises:
        TypeError: ``waveforms`` are no floating point tensor, or ``lengths`` no integers.
        ValueError: ``waveforms`` are not [B, S] or [S] with a sample each, ``lengths`` not [B] in 1..S, or on a GPU.
    """
    check_tensor("waveforms", waveforms)
    if not waveforms.is_floating_point():
        raise TypeError(f"waveforms must be floating point, got {waveforms.dtype}")
    if waveforms.dim() not in (1, 2) or waveforms.numel() == 0:
        raise ValueError(f"waveforms must be [B, S] or [S], none 0, got shape {tuple(waveforms.shape)}")
    x = waveforms.double().view(-1, waveforms.shape[-1])
    B, S = x.shape
    inside = count = None
    if lengths is not None:
        count = torch.tensor(host_lengths(lengths, B, 1, S), device=x.device)[:, None]
        inside = torch.arange(S, device=x.device) < count
        x = torch.where(inside, x, 0.0)
    count = S if count is None else count
    x = x - x.sum(1, keepdim=True) / count
    x = x if inside is None else torch.where(inside, x, 0.0)
    variance = x.square().sum(1, keepdim=True) / count
    return (x / (variance + eps).sqrt()).to(waveforms.dtype).view(waveforms.shape)

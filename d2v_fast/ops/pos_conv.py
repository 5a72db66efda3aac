"""Convolutional positions: grouped convolutions over the frames, each followed by a layer norm and GELU.

fairseq: ``make_conv_pos`` of ``wav2vec2`` and ``pos_conv_depth`` (data2vec speech: five layers of kernel 19 with norm;
wav2vec 2.0 and HuBERT: one of kernel 128 without). Padding keeps the number of frames: k // 2 zeros on either side, and
one frame less where k is even. Backward keeps each convolution's result z in the input's dtype, and mean and
1 / deviation of its frames; inputs of the inner layers, ``gelu(norm(z))``, are computed again.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_fast.ops import _extension, _lists, _pos_conv_extension, _rows
from d2v_fast.ops._dispatch import accumulation_dtype, check_device, check_float, check_index
from d2v_fast.ops.layer_norm_gelu import _bwd as norm_gelu_bwd
from d2v_fast.ops.layer_norm_gelu import _fwd as norm_gelu_fwd
from d2v_fast.ops.layer_norm_gelu import layer_norm_gelu


class _Spread(NamedTuple):
    """Rows of segments moved apart, so that one convolution over all of them mixes none; what lies between is 0."""

    where: Tensor  # [N] new place of each row
    inside: Tensor  # [N, 1] bool, whether the row is in a segment
    length: int

    def __call__(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [1, length, C], 0 outside the segments."""
        rows = torch.where(self.inside, x.reshape(1, -1, x.shape[-1]), 0)
        return rows.new_zeros((1, self.length, x.shape[-1])).index_copy(1, self.where, rows)


def _spread(segments: Tensor | None, rows: int, taps: int) -> _Spread | None:
    """Computed on the device of the segments [U, 2], without waiting for it."""
    if segments is None:
        return None
    first, order = segments[:, 0].long().sort()
    last = F.pad(first + segments[:, 1][order], (1, 0)).cummax(0).values
    row = torch.arange(rows, device=segments.device)
    begun = torch.searchsorted(first, row, right=True)  # segments up to the row's
    return _Spread(row + begun * taps, (row < last[begun])[:, None], rows + len(first) * taps)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, spread: _Spread | None) -> Tensor:
    """One convolution of x [B, T, C], every segment on its own; rows outside are anything."""
    frames = x if spread is None else spread(x)
    weight, bias = _rows.cast(x.dtype, weight, bias)
    z = F.conv1d(frames.mT, weight, bias, padding=weight.shape[2] // 2, groups=groups)[..., : frames.shape[1]].mT
    return z if spread is None else z[0, spread.where].view(x.shape)


def pos_conv_ref(
    x: Tensor,  # [B, T, C]
    weights: Sequence[Tensor],  # [C, C / groups, k] each
    biases: Sequence[Tensor | None],  # [C] each
    groups: int,
    norm: bool = True,
    eps: float = 1e-5,
    segments: Tensor | None = None,  # [U, 2]
) -> Tensor:
    """The op in plain PyTorch, differentiable."""
    spread = _spread(segments, x.shape[:2].numel(), max(w.shape[2] for w in weights))
    for weight, bias in zip(weights, biases, strict=True):
        z = _conv(x, weight, bias, groups, spread)
        x = layer_norm_gelu(z, eps=eps) if norm else F.gelu(z).contiguous()
    return x if spread is None else torch.where(spread.inside.view(*x.shape[:2], 1), x, 0)


def _forward(x, weights, bias, groups, norm, eps, segments, keep) -> tuple[Tensor, Tensor, Tensor]:
    """The general path: z of every layer written channels last, from which the norm reads it."""
    spread = _spread(segments, x.shape[:2].numel(), max(w.shape[2] for w in weights))
    z = x.new_empty((len(weights) if keep else 1, *x.shape))
    stats = []
    for i, weight in enumerate(weights):
        kept = z[i % len(z)].copy_(_conv(x, weight, None if bias is None else bias[i], groups, spread))
        if norm:
            x, *row_stats = norm_gelu_fwd(kept, None, None, eps)
            stats += row_stats
        else:
            x = F.gelu(kept)
    if spread is not None:
        x = torch.where(spread.inside.view(*x.shape[:2], 1), x, 0)
    z, stats = (z, stats) if keep else (x.new_empty((0, *x.shape)), [])
    stats = torch.stack(stats) if stats else x.new_empty((0, x.shape[:2].numel()), dtype=accumulation_dtype(x))
    return x, z, stats.view(-1, 2, stats.shape[1])


def _conv_grad(
    grad: Tensor, x: Tensor, weight: Tensor, has_bias: bool, groups: int, spread: _Spread | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`_conv` in x and the weight, in their dtypes, and in the bias."""
    frames, upstream = (x, grad) if spread is None else (spread(x), spread(grad))
    C, _, k = weight.shape
    upstream = F.pad(upstream.mT, (0, 1 - k % 2))  # the frame that is dropped where k is even
    w, mask = weight.to(x.dtype), [True, True, has_bias]
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        upstream, frames.mT, w, [C] if has_bias else None, [1], [k // 2], [1], False, [0], groups, mask
    )
    grad_x = grad_x.mT
    if spread is not None:
        grad_x = torch.where(spread.inside.view(*x.shape[:2], 1), grad_x[0, spread.where].view(x.shape), 0)
    return grad_x, grad_weight.to(weight.dtype), grad_bias


def _backward(grad, x, z, stats, weights, has_bias, groups, norm, segments) -> tuple[Tensor, list[Tensor], Tensor]:
    spread = _spread(segments, x.shape[:2].numel(), max(w.shape[2] for w in weights))
    grad_weights, grad_biases = [], []
    for i in reversed(range(len(weights))):
        if norm:
            grad, _ = norm_gelu_bwd(grad.contiguous(), z[i], *stats[i], None, None)
        else:
            grad = torch.ops.aten.gelu_backward(grad.contiguous(), z[i])
        source = _activation(z[i - 1], stats[i - 1] if norm else None) if i else x
        grad, grad_weight, grad_bias = _conv_grad(grad, source, weights[i], has_bias, groups, spread)
        grad_weights.append(grad_weight)
        grad_biases.append(grad_bias)
    acc = accumulation_dtype(x)
    biases = torch.stack(grad_biases[::-1]).to(acc) if has_bias else x.new_empty((0, x.shape[2]), dtype=acc)
    return grad.contiguous(), grad_weights[::-1], biases


def _activation(z: Tensor, stats: Tensor | None) -> Tensor:
    """gelu(norm(z)) of z [B, T, C] again, from mean and 1 / deviation [2, B * T]."""
    if stats is None:
        return F.gelu(z)
    mean, rstd = stats.view(2, *z.shape[:2], 1)
    return F.gelu((z - mean) * rstd).to(z.dtype)


@torch.library.custom_op("d2v_fast::pos_conv_fwd", mutates_args=(), device_types=("cpu", "cuda"))
def _fwd(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    groups: int,
    norm: bool,
    eps: float,
    segments: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    path = _pos_conv_extension.forward if _pos_conv_extension.fits(x, weights, groups) else _forward
    return path(x, weights, bias, groups, norm, eps, segments, keep)


@torch.library.custom_op("d2v_fast::pos_conv_bwd", mutates_args=(), device_types=("cpu", "cuda"))
def _bwd(
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    stats: Tensor,
    weights: Sequence[Tensor],
    has_bias: bool,
    groups: int,
    norm: bool,
    segments: Tensor | None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    path = _pos_conv_extension.backward if _pos_conv_extension.fits(x, weights, groups) else _backward
    return path(grad, x, z, stats, weights, has_bias, groups, norm, segments)


@_fwd.register_fake
def _(x, weights, bias, groups, norm, eps, segments, keep):
    kept = len(weights) if keep else 0
    stats = x.new_empty((kept if norm else 0, 2, x.shape[0] * x.shape[1]), dtype=accumulation_dtype(x))
    return _rows.empty_like_rows(x), x.new_empty((kept, *x.shape)), stats


@_bwd.register_fake
def _(grad, x, z, stats, weights, has_bias, groups, norm, segments):
    biases = x.new_empty((len(weights) if has_bias else 0, x.shape[2]), dtype=accumulation_dtype(x))
    return _rows.empty_like_rows(x), [w.new_empty(w.shape) for w in weights], biases


def _setup_context(ctx, inputs, output):
    x, weights, bias, ctx.groups, ctx.norm, _, segments, _ = inputs
    _, z, stats = output
    ctx.mark_non_differentiable(z, stats)
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, z, stats, segments, *weights)


def _autograd(ctx, grad, *_):
    x, z, stats, segments, *weights = ctx.saved_tensors
    grad_x, grad_weights, grad_bias = _bwd(grad, x, z, stats, weights, ctx.has_bias, ctx.groups, ctx.norm, segments)
    return grad_x, grad_weights, grad_bias if ctx.has_bias else None, *(None,) * 5


_fwd.register_autograd(_autograd, setup_context=_setup_context)


def pos_conv(
    x: Tensor,  # [B, T, C]
    weights: Sequence[Tensor],  # [C, C / groups, k] each
    biases: Sequence[Tensor | None] | None = None,  # [C] each
    *,
    groups: int,
    norm: bool = True,
    eps: float = 1e-5,
    segments: Tensor | None = None,  # [U, 2]
) -> Tensor:
    """Grouped convolutions over the frames of ``x``, one per entry of ``weights``, each with norm and GELU.

    Per layer: convolution with k // 2 zeros on either side, the last frame dropped where k is even, plus bias; layer
    norm over C without weight and bias, if ``norm``; exact GELU. For wav2vec 2.0's positions apply the weight norm in
    front (``torch._weight_norm(v, g, 2)``), and pass ``norm=False``.

    bfloat16 and float16 on a GPU run the CUDA extension where it is available and a group has 32, 48, 64 or 80
    channels; everything else PyTorch's convolution. Nothing waits for the device, also not for ``segments``.

    Memory for backward: ``x``, and per layer B T C elements of x's dtype and 8 B T bytes of statistics (none of these
    without ``norm``): 5 layers of 768 channels in bfloat16 keep 7720 bytes a frame.

    Args:
        x: [B, T, C] float32, bfloat16 or float16 (float64 on CPU), T >= 1; under autocast it is cast to that dtype.
        weights: tensors of any of these dtypes, cast to that of x; k >= 1 may differ from layer to layer.
        biases: one for each of ``weights``, or None where a layer has none; added in float32.
        groups: blocks of C / groups channels that do not see each other.
        norm: False leaves the layer norm out.
        eps: added to the variance.
        segments: [U, 2] int32 or int64 (first, count), rows of the flattened [B * T] frames, disjoint, each inside one
            batch row: sequences of their own, with zeros around each. Rows in none are 0 and get no gradient. None:
            every batch row is one.

    Returns:
        [B, T, C] contiguous, in x's dtype (under autocast in that one). Differentiable in x, weights and biases;
        deterministic with the extension. Each convolution adds up in float32 and rounds once; the norm is that of the
        rounded values. A NaN reaches the frames that see it, and no others.

    Raises:
        ValueError: a shape does not fit, ``weights`` is empty, ``biases`` has another length, ``groups`` does not
            divide C, devices differ, ``eps`` is not positive, or, on the CPU, segments leave their row or overlap.
        TypeError: a tensor is missing or has another dtype, float64 is on a GPU, ``groups`` is no integer.
    """
    groups = _rows.check_integer("groups", groups)
    weights = _check(x, weights, groups, eps)
    biases = _check_biases(biases, weights, x)
    if segments is not None:
        _check_segments(segments, x)
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if x.device.type != "cuda" and not _extension.emulated():
        return pos_conv_ref(x, weights, biases, groups, norm, eps, segments)
    bias = _stack(biases, x)
    keep = _rows.wants_grad(x, bias, *weights)
    return _fwd(x, weights, bias, groups, bool(norm), float(eps), segments, keep)[0]


def _check(x: Tensor, weights: Sequence[Tensor], groups: int, eps: float) -> list[Tensor]:
    """Raise unless x [B, T, C], the weights [C, C / groups, k] and the numbers fit; the weights as a list."""
    _rows.check_rows("x", x)
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x must be [B, T, C] with T >= 1, got shape {tuple(x.shape)}")
    C = x.shape[2]
    if groups < 1 or C % groups:
        raise ValueError(f"groups must divide the {C} channels of x, got {groups}")
    weights = _lists.tensor_list("weights", weights)
    if not weights:
        raise ValueError("weights must have at least one entry, got none")
    for i, w in enumerate(weights):
        check_float(f"weights[{i}]", w)
        if w.dim() != 3 or w.shape[:2] != (C, C // groups) or w.shape[2] == 0:
            raise ValueError(f"weights[{i}] must have shape ({C}, {C // groups}, k >= 1), got {tuple(w.shape)}")
        check_device(f"weights[{i}]", w, x.device)
    _rows.check_eps(eps)
    return weights


def _check_biases(biases: Sequence[Tensor | None] | None, weights: list[Tensor], x: Tensor) -> list[Tensor | None]:
    """One [C] or None for each of the weights, or raise."""
    if biases is None:
        return [None] * len(weights)
    biases = _lists.tensor_list("biases", biases, optional=True)
    if len(biases) != len(weights):
        raise ValueError(f"biases must have one entry for each of the {len(weights)} weights, got {len(biases)}")
    for i, b in enumerate(biases):
        _rows.check_vector(f"biases[{i}]", b, x.shape[2], x.device)
    return biases


def _stack(biases: list[Tensor | None], x: Tensor) -> Tensor | None:
    """[L, C] in the dtype of accumulation, zeros for those that are not there; None if none is."""
    if all(b is None for b in biases):
        return None
    acc = accumulation_dtype(x)
    return torch.stack([x.new_zeros(x.shape[2], dtype=acc) if b is None else b.to(acc) for b in biases])


def _check_segments(segments: Tensor, x: Tensor) -> None:
    """Raise unless the segments are [U, 2] and, where looking at them costs no waiting, lie apart in rows of x."""
    _rows.check_tensor("segments", segments)
    check_index("segments", segments, x.device)
    if segments.dim() != 2 or segments.shape[1] != 2:
        raise ValueError(f"segments must have shape [U, 2], got {tuple(segments.shape)}")
    if segments.device.type != "cpu" or torch.compiler.is_compiling():
        return
    B, T, _ = x.shape
    stop = 0
    for first, count in sorted(segments.tolist()):
        if count < 0 or first < 0 or first + count > B * T or (count and first // T != (first + count - 1) // T):
            raise ValueError(f"segments must lie inside one of {B} rows of {T} frames each, got ({first}, {count})")
        if count and first < stop:
            raise ValueError(f"segments must not overlap, got ({first}, {count}) after one that ends at {stop}")
        stop = max(stop, first + count)

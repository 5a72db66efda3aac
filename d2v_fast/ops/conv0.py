"""``gelu(norm(conv1d(waveform)))``: the first layer of the speech front-end, from one channel to C, channels last.

fairseq: the first block of ``ConvFeatureExtractionModel``, in extractor mode "layer_norm" (norm over channels) and
"default" (group norm with a group per channel, over time). GELU is the exact one. The result is far larger than
the waveform, so backward keeps the waveform and recomputes the rest.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_fast.ops import _conv0_blocks, _conv0_extension, _rows
from d2v_fast.ops._dispatch import check_device, check_float, check_index

NORMS = ("layer", "group")


def conv0_norm_gelu_ref(
    waveforms: Tensor,  # [B, S]
    weight: Tensor,  # [C, 1, k]
    bias: Tensor | None = None,  # [C]
    norm_weight: Tensor | None = None,  # [C]
    norm_bias: Tensor | None = None,  # [C]
    segments: Tensor | None = None,  # [U, 2] first, count
    *,
    stride: int,
    norm: str = "layer",
    eps: float = 1e-5,
    dtype: torch.dtype,
) -> Tensor:
    """The op in plain PyTorch, differentiable in everything: [B, T, C] in ``dtype``."""
    wide = _rows.accumulation(waveforms, weight, bias, norm_weight, norm_bias)
    x, w, b, gamma, beta = _rows.cast(wide, waveforms, weight, bias, norm_weight, norm_bias)
    with torch.autocast(x.device.type, enabled=False):
        z = F.linear(x.unfold(1, w.shape[2], stride), w[:, 0], b)
        if norm == "layer":
            return F.gelu(F.layer_norm(z, z.shape[2:], gamma, beta, eps)).to(dtype)
        rows = z.flatten(0, 1)
        whole_rows = [(b * z.shape[1], z.shape[1]) for b in range(z.shape[0])]
        ranges = whole_rows if segments is None else segments.tolist()
        y = torch.zeros_like(rows)
        for first, count in ranges:
            part = rows[first : first + count]
            d = part - part.mean(0)
            u = d * (d.square().mean(0) + eps).rsqrt()
            u = u if gamma is None else u * gamma
            y = y.slice_scatter(F.gelu(u if beta is None else u + beta), 0, first, first + count)
        return y.view(z.shape).to(dtype)


def _frames(waveforms: Tensor, weight: Tensor, stride: int) -> int:
    return (waveforms.shape[1] - weight.shape[2]) // stride + 1


def _empty_stats(tensors: Sequence[Tensor | None], stride: int, norm: str) -> Tensor:
    """Layer norm: 1 / deviation of each frame. Group norm: mean and covariance of the taps in each segment, float64."""
    waveforms, weight, *_, segments = tensors
    if norm == "layer":
        shape = (waveforms.shape[0] * _frames(waveforms, weight, stride),)
        return waveforms.new_empty(shape, dtype=_rows.accumulation(*tensors[:-1]))
    k = weight.shape[2]
    count = waveforms.shape[0] if segments is None else segments.shape[0]
    return waveforms.new_empty((count, k + k * k), dtype=torch.float64)


@torch.library.custom_op("d2v_fast::conv0_norm_gelu_fwd", mutates_args=(), device_types=("cpu", "cuda"))
def _fwd(
    waveforms: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    segments: Tensor | None,
    stride: int,
    norm: str,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    tensors = (waveforms, weight, bias, norm_weight, norm_bias, segments)
    shape = (waveforms.shape[0], _frames(waveforms, weight, stride), weight.shape[0])
    y = torch.empty(shape, device=waveforms.device, dtype=dtype)
    if _conv0_extension.fits(waveforms, weight, dtype):
        stats = _empty_stats(tensors, stride, norm)
        _conv0_extension.forward(y, stats, *tensors, stride, norm, eps)
        return y, stats
    with torch.autocast(waveforms.device.type, enabled=False):
        forward = _conv0_blocks.layer_forward if norm == "layer" else _conv0_blocks.group_forward
        return y, forward(_conv0_blocks.Problem.of(*tensors, stride, eps), y.flatten(0, 1))


@torch.library.custom_op("d2v_fast::conv0_norm_gelu_bwd", mutates_args=(), device_types=("cpu", "cuda"))
def _bwd(
    grad: Tensor,
    stats: Tensor,
    waveforms: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    segments: Tensor | None,
    stride: int,
    norm: str,
    eps: float,
) -> Tensor:
    tensors = (waveforms, weight, bias, norm_weight, norm_bias, segments)
    if _conv0_extension.fits(waveforms, weight, grad.dtype):
        return _conv0_extension.backward(grad.contiguous(), stats, *tensors, stride, norm, eps)
    with torch.autocast(waveforms.device.type, enabled=False):
        backward = _conv0_blocks.layer_backward if norm == "layer" else _conv0_blocks.group_backward
        problem = _conv0_blocks.Problem.of(*tensors, stride, eps)
        grad_weight, *vectors = backward(problem, grad.flatten(0, 1), stats)
        return torch.cat([grad_weight, torch.stack(vectors, 1)], 1)


@_fwd.register_fake
def _(waveforms, weight, bias, norm_weight, norm_bias, segments, stride, norm, eps, dtype):
    shape = (waveforms.shape[0], _frames(waveforms, weight, stride), weight.shape[0])
    tensors = (waveforms, weight, bias, norm_weight, norm_bias, segments)
    return waveforms.new_empty(shape, dtype=dtype), _empty_stats(tensors, stride, norm)


@_bwd.register_fake
def _(grad, stats, waveforms, weight, bias, norm_weight, norm_bias, segments, stride, norm, eps):
    wide = _rows.accumulation(waveforms, weight, bias, norm_weight, norm_bias)
    return weight.new_empty((weight.shape[0], weight.shape[2] + 3), dtype=wide)


def _setup_context(ctx, inputs, output):
    *tensors, stride, norm, eps, _ = inputs
    _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(stats, *tensors)
    ctx.settings = stride, norm, eps


def _backward(ctx, grad, _):
    _, _, weight, *vectors, _ = ctx.saved_tensors
    grads = _bwd(grad, *ctx.saved_tensors, *ctx.settings)  # [C, k + 3]: weight, bias, norm_weight, norm_bias
    k = weight.shape[2]
    grad_weight = grads[:, :k].unsqueeze(1).to(weight.dtype)
    of_vectors = [None if v is None else grads[:, k + i].to(v.dtype) for i, v in enumerate(vectors)]
    return None, grad_weight, *of_vectors, None, None, None, None, None


_fwd.register_autograd(_backward, setup_context=_setup_context)


def conv0_norm_gelu(
    waveforms: Tensor,  # [B, S]
    weight: Tensor,  # [C, 1, k]
    bias: Tensor | None = None,  # [C]
    norm_weight: Tensor | None = None,  # [C]
    norm_bias: Tensor | None = None,  # [C]
    *,
    stride: int,
    norm: str = "layer",
    eps: float = 1e-5,
    segments: Tensor | None = None,  # [U, 2]
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Exact GELU of the norm of a convolution without padding over waveforms: frames, channels last.

    Args:
        waveforms: [B, S] float32, bfloat16 or float16 (float64 on CPU), S at least k.
        weight: [C, 1, k] of the convolution, as ``nn.Conv1d`` has it; of any of these dtypes, as are the vectors.
        bias: [C] of the convolution, 0 when None. Without effect under group norm, which takes it away again.
        norm_weight: [C] factor on the normalised values, 1 when None.
        norm_bias: [C] added after it, 0 when None.
        stride: samples from one frame to the next.
        norm: "layer", over the channels of a frame, or "group", over the frames of a segment for each channel.
        eps: added to the variance.
        segments: for group norm: int32 or int64 [U, 2], (first, count) of ranges of the B * T frames, apart, each in
            one row of the batch. Frames outside of all are 0 and get no gradient. By default each row is a segment.
            Layer norm treats all frames alike and does not look at it.
        dtype: of the result; by default that of autocast where it is on (and nothing is float64), else that of
            ``weight``.

    Returns:
        [B, T, C] contiguous with T = (S - k) // stride + 1, computed in float32. Differentiable in weight, bias and
        the norm's tensors, and deterministic. For backward it keeps the arguments and 4 B T bytes (layer norm) or
        8 U (k + k * k) bytes (group norm), against 2 B T C and more for separate operators. NaN and inf in a waveform
        make the frames that see it NaN (layer norm), or its segment (group norm).

        On a GPU with the extension, bfloat16 and float16 results with C a multiple of 64 and k up to 16 come from one
        CUDA kernel each way. Other cases, and the CPU, take blocks of frames through PyTorch's operators; so does
        ``waveforms.requires_grad``, with PyTorch's autograd, its memory, and segments read on the host.

    Raises:
        ValueError: shapes do not fit, the batch is empty, S is below k, ``norm`` is unknown, ``stride`` or ``eps`` is
            not positive, or (on the CPU) segments overlap or are out of range.
        TypeError: a tensor is no floating point tensor, or float64 on a GPU; ``dtype`` is not a floating point dtype.
    """
    _check_waveforms(waveforms, weight)
    for name, v in (("bias", bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        _rows.check_vector(name, v, weight.shape[0], waveforms.device)
    _check_settings(waveforms, weight, stride, norm, eps)
    dtype = _result_dtype(waveforms, weight, dtype)
    segments = segments if norm == "group" else None
    if segments is not None:
        _check_segments(segments, waveforms, _frames(waveforms, weight, stride))
    tensors = (waveforms, weight, bias, norm_weight, norm_bias, segments)
    if torch.is_grad_enabled() and waveforms.requires_grad:
        return conv0_norm_gelu_ref(*tensors, stride=stride, norm=norm, eps=eps, dtype=dtype)
    return _fwd(*tensors, int(stride), norm, float(eps), dtype)[0]


def _check_waveforms(waveforms: Tensor, weight: Tensor) -> None:
    _rows.check_tensor("waveforms", waveforms)
    _rows.check_tensor("weight", weight)
    check_float("waveforms", waveforms)
    check_float("weight", weight)
    check_device("weight", weight, waveforms.device)
    if waveforms.dim() != 2 or waveforms.shape[0] == 0:
        raise ValueError(f"waveforms must be [B, S] with at least one row, got shape {tuple(waveforms.shape)}")
    if weight.dim() != 3 or weight.shape[1] != 1 or 0 in weight.shape:
        raise ValueError(f"weight must be [C, 1, k], got shape {tuple(weight.shape)}")
    if waveforms.shape[1] < weight.shape[2]:
        raise ValueError(f"waveforms must have at least {weight.shape[2]} samples, got {waveforms.shape[1]}")


def _check_settings(waveforms: Tensor, weight: Tensor, stride: int, norm: str, eps: float) -> None:
    if _rows.check_integer("stride", stride) < 1:
        raise ValueError(f"stride must be > 0, got {stride}")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    _rows.check_eps(eps)


def _result_dtype(waveforms: Tensor, weight: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    device = waveforms.device.type
    if dtype is None:
        mixed = torch.is_autocast_enabled(device) and torch.float64 not in (waveforms.dtype, weight.dtype)
        dtype = torch.get_autocast_dtype(device) if mixed else weight.dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {type(dtype).__name__}")
    check_float("dtype", torch.empty(0, dtype=dtype, device=device))
    return dtype


def _check_segments(segments: Tensor, waveforms: Tensor, T: int) -> None:
    _rows.check_tensor("segments", segments)
    check_index("segments", segments, waveforms.device)
    if segments.dim() != 2 or segments.shape[1] != 2:
        raise ValueError(f"segments must be [U, 2], got shape {tuple(segments.shape)}")
    if segments.device.type != "cpu" or torch.compiler.is_compiling():
        return
    first, count = segments.long().unbind(1)
    frames, last = waveforms.shape[0] * T, first + count - 1
    bad = (first < 0) | (count < 0) | (first + count > frames) | ((count > 0) & (first // T != last // T))
    if bad.any():
        pair = segments[int(bad.nonzero()[0])].tolist()
        raise ValueError(f"segments must be ranges (first, count) in one of the rows of {T} frames, got {pair}")
    order = first[count > 0].argsort()
    first, last = first[count > 0][order], last[count > 0][order]
    if (first[1:] <= last[:-1]).any():
        index = int((first[1:] <= last[:-1]).nonzero()[0])
        raise ValueError(f"segments must not overlap, got frame {int(first[index + 1])} in two")

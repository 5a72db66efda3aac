"""Training targets of data2vec: normalise the top K layer outputs, average them, keep the masked positions.

Paper section 3.3 (targets); fairseq: ``Data2VecAudioModel.forward`` from ``instance_norm_target_layer`` to
``layer_norm_targets``. With ``x_k`` [B, T, C] the K layer results:

    y = post_norm(1/K sum_k norm(x_k)),   returned at ``positions`` or everywhere

    "instance"  over T for each (b, c)     "layer"  over C for each (b, t)
    "batch"     over (B, T) for each c     "none"   x itself

All norms use the biased variance, ``eps`` inside the root and no affine part. Statistics are two-pass or shifted,
so channels whose mean is far larger than their spread keep their precision.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_fast.ops._dispatch import accumulation_dtype, check_device, check_float, check_index, cpu_runs_triton
from d2v_fast.ops._lists import tensor_list
from d2v_fast.ops._rows import check_tensor

NORMS = ("instance", "layer", "batch", "none")
POST_NORMS = ("none", "layer", "instance")
_DIMS = {"instance": (1,), "batch": (0, 1)}  # reduced dims of [B, T, C]


def layer_targets_ref(
    layers: Sequence[Tensor],  # K x [B, T, C]
    positions: Tensor | None = None,  # [N] int, flat b * T + t
    lengths: Tensor | None = None,  # [B] int
    norm: str = "instance",
    post_norm: str = "none",
    eps: float = 1e-5,
) -> Tensor:
    """The definition of the op in plain PyTorch: [B, T, C], or [N, C] at ``positions``."""
    acc = accumulation_dtype(*layers)
    valid = None
    if lengths is not None:
        valid = (torch.arange(layers[0].shape[1], device=lengths.device) < lengths[:, None])[..., None]  # [B, T, 1]
    y = sum(_standardise(x.to(acc), norm, valid, eps) for x in layers) / len(layers)
    y = _standardise(y, post_norm, valid, eps)
    return y if positions is None else y.flatten(0, 1)[positions]


def _standardise(x: Tensor, norm: str, valid: Tensor | None, eps: float) -> Tensor:
    if norm == "none" or x.numel() == 0:
        return x
    if norm == "layer":
        return F.layer_norm(x, x.shape[2:], eps=eps)
    dims = _DIMS[norm]
    if valid is None:
        var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    else:
        count = valid.sum(dims, keepdim=True).clamp(min=1)
        mean = torch.where(valid, x, 0).sum(dims, keepdim=True) / count
        var = torch.where(valid, x - mean, 0).square().sum(dims, keepdim=True) / count
    return (x - mean) * (var + eps).rsqrt()


@torch.library.custom_op("d2v_fast::layer_targets", mutates_args=(), device_types="cpu")
def _op(
    layers: list[Tensor], positions: Tensor | None, lengths: Tensor | None, norm: str, post_norm: str, eps: float
) -> Tensor:
    _check_ranges(layers[0], positions, lengths)
    if cpu_runs_triton(layers[0].dtype):
        return _op_triton(layers, positions, lengths, norm, post_norm, eps)
    return layer_targets_ref(layers, positions, lengths, norm, post_norm, eps).contiguous()


@_op.register_kernel("cuda")
def _op_triton(
    layers: list[Tensor], positions: Tensor | None, lengths: Tensor | None, norm: str, post_norm: str, eps: float
) -> Tensor:
    from d2v_fast.kernels import layer_targets as kernels

    return kernels.layer_targets(layers, positions, lengths, norm, post_norm, eps)


@_op.register_fake
def _(layers, positions, lengths, norm, post_norm, eps):
    batch, frames, width = layers[0].shape
    shape = (batch, frames, width) if positions is None else (positions.shape[0], width)
    return torch.empty(shape, device=layers[0].device, dtype=accumulation_dtype(*layers))


def layer_targets(
    layer_results: Sequence[Tensor],  # K x [B, T, C] or [T, B, C]
    *,
    norm: str = "instance",
    post_norm: str = "none",
    layout: str = "BTC",
    positions: Tensor | None = None,  # [N] int, flat b * T + t
    lengths: Tensor | None = None,  # [B] int
    eps: float = 1e-5,
    check: bool = False,
) -> Tensor:
    """Average of K normalised layer results: data2vec's regression target. No gradient flows through it.

    Args:
        layer_results: K tensors of one shape, dtype and device; float32, bfloat16 or float16 (float64 on CPU).
            Views are read in place as long as all K have the same strides and a unit stride in the last dim, such
            as ``x[:, 1:]`` without a class token; others are copied first.
        norm: applied to each layer result; see the module's docstring.
        post_norm: applied to the average: "none", "layer" (over C) or "instance" (over T).
        layout: "BTC", or "TBC" as in fairseq's transformers. The result is always batch first.
        positions: [N] int32 or int64 flat indices ``b * T + t`` of the rows to return, in any order. On a GPU a row
            outside [0, B * T) is NaN, see ``check``.
        lengths: [B] int32 or int64 valid frames per sequence. None takes the statistics of "instance" and "batch"
            over all T, padding included, as fairseq does. Frames past the length are normalised with the same
            statistics, not zeroed; a sequence of length 0 has mean 0 and variance 0.
        eps: added to the variance.
        check: also check the ranges of ``positions`` and ``lengths`` on a GPU, which waits for the device. Without
            it lengths are clamped to [0, T] there. On the CPU both are always checked.

    Returns:
        float32 (float64 for float64 inputs), contiguous: [B, T, C], or [N, C] when ``positions`` are given.

    Raises:
        ValueError: no layers, shapes or devices differ, an option is unknown, "instance" with T < 2 or "batch"
            with a single frame (0 everywhere; fairseq raises as well), or an index out of range where that is checked.
        TypeError: an argument is no tensor (no list of tensors), dtypes differ or are not floating point, indices
            are not integers, or float64 on a GPU.
    """
    layers = check_layers(layer_results, norm, post_norm, layout, positions, lengths, eps)
    if check:
        _check_ranges(layers[0], positions, lengths)
    return _op(layers, positions, lengths, norm, post_norm, float(eps))


def check_layers(
    layer_results: Sequence[Tensor],
    norm: str,
    post_norm: str,
    layout: str,
    positions: Tensor | None,
    lengths: Tensor | None,
    eps: float,
) -> list[Tensor]:
    """The layer results as [B, T, C] views without gradient, after every check that needs no device."""
    layers = _check_tensors(layer_results)
    _check_options(norm, post_norm, layout, eps)
    if layout == "TBC":
        layers = [x.transpose(0, 1) for x in layers]
    _check_shapes(layers[0], norm, post_norm, positions, lengths)
    return layers


def _check_tensors(layer_results: Sequence[Tensor]) -> list[Tensor]:
    layers = tensor_list("layer_results", layer_results)
    if not layers:
        raise ValueError("layer_results must hold at least one tensor, got none")
    first = layers[0]
    check_float("layer_results[0]", first)
    if first.dim() != 3:
        raise ValueError(f"layer_results must have 3 dims, got shape {tuple(first.shape)}")
    for i, x in enumerate(layers):
        if x.shape != first.shape:
            raise ValueError(f"layer_results[{i}] must have shape {tuple(first.shape)}, got {tuple(x.shape)}")
        if x.dtype != first.dtype:
            raise TypeError(f"layer_results[{i}] must be {first.dtype} like the first, got {x.dtype}")
        check_device(f"layer_results[{i}]", x, first.device)
    return [x.detach() for x in layers]


def _check_options(norm: str, post_norm: str, layout: str, eps: float) -> None:
    for name, value, choices in (
        ("norm", norm, NORMS),
        ("post_norm", post_norm, POST_NORMS),
        ("layout", layout, ("BTC", "TBC")),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps}")


def _check_shapes(x: Tensor, norm: str, post_norm: str, positions: Tensor | None, lengths: Tensor | None) -> None:
    batch, frames, _ = x.shape
    if "instance" in (norm, post_norm) and frames < 2:
        raise ValueError(f"instance norm needs at least 2 frames, got layer_results with T = {frames}")
    if norm == "batch" and batch * frames == 1:
        raise ValueError("batch norm needs at least 2 frames, got layer_results with B * T = 1")
    if positions is not None:
        check_tensor("positions", positions)
        check_index("positions", positions, x.device)
        if positions.dim() != 1:
            raise ValueError(f"positions must have shape [N], got {tuple(positions.shape)}")
    if lengths is not None:
        check_tensor("lengths", lengths)
        check_index("lengths", lengths, x.device)
        if lengths.shape != (batch,):
            raise ValueError(f"lengths must have shape ({batch},), got {tuple(lengths.shape)}")


def _check_ranges(x: Tensor, positions: Tensor | None, lengths: Tensor | None) -> None:
    batch, frames, _ = x.shape
    check_range("positions", positions, batch * frames - 1)
    check_range("lengths", lengths, frames)


def check_range(name: str, values: Tensor | None, last: int) -> None:
    """Raise ValueError unless all ``values`` lie in [0, last]. Called inside the ops, so compiled code checks too."""
    if values is not None and values.numel() > 0:
        if last < 0:
            raise ValueError(f"{name} must be empty where layer_results has no frames, got {values.numel()} values")
        low, high = values.aminmax()
        if low < 0 or high > last:
            raise ValueError(f"{name} must lie in [0, {last}], got values from {low.item()} to {high.item()}")

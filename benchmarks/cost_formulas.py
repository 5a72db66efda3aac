"""Bytes that our kernels move, as functions of the shape: each address once per launch, tables of addresses left out.

Partial sums and per-tensor constants are left out too: static_cost.py adds those that ATen reduces, and holds the
formulas against the bytes counted in the interpreter. The arguments are those of the builders in recorded_cases.py.
"""

from math import prod
from typing import Any

import torch
from conv_shapes import steps

FP32, BF16 = torch.float32, torch.bfloat16
FLOAT = INDEX32 = 4
INDEX = 8
Shape = tuple[int, int, int]


def masked_smooth_l1(rows: int, width: int, pred=BF16, target=FP32, kept=1.0, **_: Any) -> int:
    """Forward and backward both read the rows that are kept; loss and gradient are written for every row."""
    read = round(kept * rows) * width * (pred.itemsize + target.itemsize) + (rows if kept < 1 else 0)
    return 2 * read + FLOAT * rows + rows * width * pred.itemsize


def _statistics(shape: Shape, layers: int, dtype: torch.dtype) -> int:
    return layers * prod(shape) * dtype.itemsize + _planes(shape, layers)


def _planes(shape: Shape, layers: int) -> int:
    return layers * shape[0] * 2 * shape[2] * FLOAT  # mean and reciprocal deviation of each sequence and channel


def layer_targets(shape: Shape, num_layers: int, fraction: float, dtype=BF16, norm="instance", **_: Any) -> int:
    """Statistics over time need all frames; after that only masked rows are read and written."""
    rows = round(shape[0] * shape[1] * fraction)
    total = rows * (INDEX + shape[2] * (num_layers * dtype.itemsize + FLOAT))
    if norm == "instance":
        total += _statistics(shape, num_layers, dtype) + _planes(shape, num_layers)
    return total


def data2vec_loss(
    shape: Shape, num_layers: int, fraction: float, dtype=BF16, pred=BF16, clones=1, norm="instance", **_: Any
) -> int:
    """Targets are never written; pred is read and its gradient written, and scaled once more in the backward."""
    rows = round(shape[0] * shape[1] * clones * fraction)
    total = rows * (INDEX + shape[2] * (num_layers * dtype.itemsize + 4 * pred.itemsize))
    if norm == "instance":
        total += _statistics(shape, num_layers, dtype) + _planes(shape, num_layers)
    return total


def elements(sizes: list[tuple[int, ...]]) -> int:
    return sum(map(prod, sizes))


def ema_update(sizes: list[tuple[int, ...]], student=FP32, copies=None, **_: Any) -> int:
    """The teacher is read and written, the student read, the copy written."""
    return elements(sizes) * (2 * FLOAT + student.itemsize + (copies.itemsize if copies else 0))


def l2_norm(sizes: list[tuple[int, ...]], dtype=FP32, **_: Any) -> int:
    """Every element is read once."""
    return elements(sizes) * dtype.itemsize


def adamw_ema(sizes: list[tuple[int, ...]], grad=FP32, ema=True, param_copies=None, ema_copies=None, **_: Any) -> int:
    """Parameter, two moments and teacher are read and written, the gradient read, the copies written."""
    copies = sum(copy.itemsize for copy in (param_copies, ema_copies) if copy)
    return elements(sizes) * ((8 if ema else 6) * FLOAT + grad.itemsize + copies)


def bias_gelu(rows: int, width: int, dtype=BF16, **_: Any) -> int:
    """Forward: x, y. Backward: x, the gradients of y and x."""
    return 5 * rows * width * dtype.itemsize


def layer_norm_gelu(rows: int, width: int, dtype=BF16, **_: Any) -> int:
    """As :func:`bias_gelu`; mean and reciprocal deviation of each row are written and read."""
    return 5 * rows * width * dtype.itemsize + 4 * rows * FLOAT


def residual_dropout_layer_norm(
    shape: Shape, dtype=BF16, residual=BF16, return_residual=False, column_scale=False, grad=True, **_: Any
) -> int:
    """Forward: x, residual, y, h. Backward: the gradients of y (and h), h, the gradients of x and residual.

    A column scale's gradient needs x again. Without a backward, h is written where it is returned, the statistics of
    the rows with it.
    """
    if not grad:
        kept = prod(shape) * residual.itemsize + 2 * prod(shape[:2]) * FLOAT
        return prod(shape) * (2 * dtype.itemsize + residual.itemsize) + (kept if return_residual else 0)
    x = (4 + column_scale) * dtype.itemsize
    h = (4 + return_residual) * residual.itemsize
    return prod(shape) * (x + h) + 4 * prod(shape[:2]) * FLOAT


def bias_attention(B: int, T: int, H: int, D: int, dtype=BF16, bias=None, slopes=False, grad=True, **_: Any) -> int:
    """Forward: q, k, v, bias, y and a number per query.

    Backward: three kernels read q, k, v, the gradient of y, two numbers per query and the bias; one reads y as well.
    Rows of the bias are padded to 16 entries.
    """
    heads, rows = B * T * H * D * dtype.itemsize, B * T * H * FLOAT
    table = 0 if bias is None else H * T * -(-T // 16) * 16 * bias.itemsize
    alibi = H * FLOAT + B * T * FLOAT if slopes else 0
    total = 4 * heads + rows + table + alibi
    if grad:
        total += (6 * heads + 2 * rows + table + alibi) + (6 * heads + 2 * rows + table + alibi)  # dq and dkv
        total += 0 if bias is None else 4 * heads + 2 * rows + table
    return total


def conv_encoder(B: int, S: int, C: int, first: int, last: int, norm="layer", dtype=BF16, **_: Any) -> int:
    """Norm and GELU, or GELU, of all layers but the first, which the extension computes; no bias."""
    after = steps(B * steps(S, 0, first - 1)[-1], first, last)[1:]
    epilogue = layer_norm_gelu if norm == "layer" else bias_gelu
    return sum(epilogue(rows, C, dtype) for rows in (after if first > 0 else after[1:]))


def pos_conv(B: int, T: int, C: int, depth: int, dtype=BF16, **_: Any) -> int:
    """Norm and GELU of the last layer; those of the others are part of the extension's kernels."""
    return layer_norm_gelu(B * T, C, dtype) if depth > 1 else 0

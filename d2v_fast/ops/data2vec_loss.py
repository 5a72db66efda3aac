"""The whole loss of data2vec in one op: targets, regression, gradient of the prediction, spread of both.

Paper sections 3.3 and 3.4; fairseq: ``Data2VecAudioModel.forward`` from ``instance_norm_target_layer`` to its end,
``compute_var`` included. With ``y`` the rows of :func:`d2v_fast.ops.layer_targets` at ``positions``:

    loss = sum of :func:`d2v_fast.ops.masked_smooth_l1` between pred and y

The targets are never written to memory. The forward already computes the gradient for an upstream gradient of 1, since
everything it needs is in registers there; the backward multiplies it by the real one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from d2v_fast.ops._dispatch import accumulation_dtype, check_device, check_float, check_index, cpu_runs_triton
from d2v_fast.ops._rows import check_tensor
from d2v_fast.ops.layer_targets import check_layers, check_range, layer_targets_ref
from d2v_fast.ops.masked_smooth_l1 import check_beta_and_scale, masked_smooth_l1_grad_ref, masked_smooth_l1_ref


class LossOutput(NamedTuple):
    """A loss with what is logged beside it; everything but ``num_masked`` stays on the device."""

    loss: Tensor  # [] fp32, summed over the masked positions; divide by the number of masked positions of the update
    target_var: Tensor  # [] fp32, mean over channels of the targets' standard deviation (fairseq's name and formula)
    pred_var: Tensor  # [] fp32, the same of the predictions
    num_masked: int  # N of this batch, with the rows that are ignored
    feature_var: Tensor | None = None  # [] fp32, of what the teacher's encoder reads there; from a model only


def data2vec_loss_ref(
    pred: Tensor,  # [N, C]
    layers: Sequence[Tensor],  # K x [B, T, C]
    positions: Tensor,  # [N] int, flat b * T + t; negative ones are ignored
    lengths: Tensor | None = None,  # [B] int
    batch_index: Tensor | None = None,  # [student sequences] int
    norm: str = "instance",
    post_norm: str = "none",
    beta: float = 0.0,
    scale: float = 1.0,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """(loss [], targets [N, C], of the rows that count). The definition of the op in plain PyTorch.

    The loss is differentiable in ``pred``.
    """
    counted = positions >= 0
    if not counted.all():
        pred, positions = pred[counted], positions[counted]
    if batch_index is not None:
        frames = layers[0].shape[1]
        positions = batch_index[positions // frames] * frames + positions % frames
    target = layer_targets_ref(layers, positions, lengths, norm, post_norm, eps)
    return masked_smooth_l1_ref(pred, target, None, beta, scale).sum(), target


def moments_ref(y: Tensor) -> Tensor:
    """Mean and sum of squared deviations from it of every channel of y [N, C]: [2, C], 0 for N = 0."""
    mean = y.sum(0) / max(y.shape[0], 1)
    return torch.stack((mean, (y - mean).square().sum(0)))


def spread_ref(m2: Tensor, num_rows: int) -> Tensor:
    """Mean over channels of the standard deviation, from squared deviations [..., C]; 0 for fewer than two rows.

    fairseq's ``compute_var``, whose 1e-6 inside the root it keeps.
    """
    if num_rows < 2 or m2.shape[-1] == 0:
        return m2.new_zeros(m2.shape[:-1])
    return (m2 / (num_rows - 1) + 1e-6).sqrt().mean(-1)


@torch.library.custom_op("d2v_fast::data2vec_loss_fwd", mutates_args=(), device_types="cpu")
def _fwd(
    pred: Tensor,
    layers: list[Tensor],
    positions: Tensor,
    lengths: Tensor | None,
    batch_index: Tensor | None,
    norm: str,
    post_norm: str,
    beta: float,
    scale: float,
    eps: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_ranges(layers[0], positions, lengths, batch_index)
    args = (pred, layers, positions, lengths, batch_index, norm, post_norm, beta, scale, eps)
    acc = accumulation_dtype(pred, *layers)
    if cpu_runs_triton(acc):
        return _fwd_triton(*args, needs_grad)
    loss, target = data2vec_loss_ref(*args)
    counted = positions >= 0
    rows = pred if counted.all() else pred[counted]
    moments = torch.stack((moments_ref(target.to(acc)), moments_ref(rows.to(acc))))
    grad = pred.new_empty((0, pred.shape[1]))
    if needs_grad:
        grad = masked_smooth_l1_grad_ref(loss.new_ones(rows.shape[0]), rows, target, None, beta, scale)
        if rows is not pred:
            grad = pred.new_zeros(pred.shape).index_put_((counted,), grad)
    return loss, grad, moments, spread_ref(moments[:, 1], rows.shape[0])


@_fwd.register_kernel("cuda")
def _fwd_triton(
    pred: Tensor,
    layers: list[Tensor],
    positions: Tensor,
    lengths: Tensor | None,
    batch_index: Tensor | None,
    norm: str,
    post_norm: str,
    beta: float,
    scale: float,
    eps: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from d2v_fast.kernels import data2vec_loss as kernels

    return kernels.data2vec_loss_fwd(
        pred, layers, positions, lengths, batch_index, norm, post_norm, beta, scale, eps, needs_grad
    )


@torch.library.custom_op("d2v_fast::data2vec_loss_bwd", mutates_args=(), device_types="cpu")
def _bwd(grad_loss: Tensor, grad_pred: Tensor) -> Tensor:
    if cpu_runs_triton(accumulation_dtype(grad_loss, grad_pred)):
        return _bwd_triton(grad_loss, grad_pred)
    return (grad_pred.to(accumulation_dtype(grad_pred)) * grad_loss).to(grad_pred.dtype)


@_bwd.register_kernel("cuda")
def _bwd_triton(grad_loss: Tensor, grad_pred: Tensor) -> Tensor:
    from d2v_fast.kernels import data2vec_loss as kernels

    return kernels.data2vec_loss_bwd(grad_loss, grad_pred)


@_fwd.register_fake
def _(pred, layers, positions, lengths, batch_index, norm, post_norm, beta, scale, eps, needs_grad):
    num_rows, width = pred.shape
    acc = accumulation_dtype(pred, *layers)
    return (
        pred.new_empty((), dtype=acc),
        pred.new_empty((num_rows if needs_grad else 0, width)),
        pred.new_empty((2, 2, width), dtype=acc),
        pred.new_empty(2, dtype=acc),
    )


@_bwd.register_fake
def _(grad_loss, grad_pred):
    return torch.empty_like(grad_pred)


def _setup_context(ctx, inputs, output):
    ctx.num_layers, ctx.num_others = len(inputs[1]), len(inputs) - 2
    ctx.set_materialize_grads(False)  # the other outputs have none, and zeros of [N, C] would be written for them
    ctx.save_for_backward(output[1])


def _backward(ctx, grad_loss, *_):
    (grad_pred,) = ctx.saved_tensors
    grad = None if grad_loss is None else _bwd(grad_loss, grad_pred)
    return grad, [None] * ctx.num_layers, *(None,) * ctx.num_others


_fwd.register_autograd(_backward, setup_context=_setup_context)


def data2vec_loss(
    pred: Tensor,  # [N, C]
    layer_results: Sequence[Tensor],  # K x [B, T, C] or [T, B, C]
    positions: Tensor,  # [N] int, flat b * T + t
    *,
    norm: str = "instance",
    post_norm: str = "none",
    layout: str = "BTC",
    beta: float = 0.0,
    scale: float | None = None,
    lengths: Tensor | None = None,  # [B] int
    target_batch_index: Tensor | None = None,  # [B_student] int
    eps: float = 1e-5,
    all_reduce_variance: bool = False,
    check: bool = False,
) -> LossOutput:
    """Loss of predictions at masked positions against the normalised average of K layer results of the teacher.

    Args:
        pred: [N, C] float32, bfloat16 or float16 (float64 on CPU), one row per masked position. The only input that
            gets a gradient: in its own dtype, rounded once for an upstream gradient of 1 and once more when that is
            multiplied in.
        layer_results, norm, post_norm, layout, lengths, eps: as in :func:`d2v_fast.ops.layer_targets`; the dtype of
            the layer results may differ from pred's.
        positions: [N] int32 or int64 flat indices ``b * T + t`` of the rows that pred predicts, in any order; sorted
            ones are read fastest. Rows of pred at negative positions are ignored: they add nothing to the loss and its
            metrics, whatever they hold, and get the gradient 0. So a fixed N serves batches with fewer masked
            positions. On a GPU a position from B * T on makes the loss NaN, see ``check``.
        beta, scale: as in :func:`d2v_fast.ops.masked_smooth_l1`.
        target_batch_index: [B_student] int32 or int64. When given, ``positions`` index the student's batch of
            B_student sequences (``b_student * T + t``), whose target is sequence ``target_batch_index[b_student]`` of
            the layer results: several masked copies of a sequence share one teacher pass without repeating it.
        all_reduce_variance: take ``target_var`` and ``pred_var`` over the rows of all ranks, with one all-reduce of
            4 C + 1 float64 numbers, when ``torch.distributed`` is initialised. All ranks must agree on it.
        check: also check the ranges of ``positions``, ``lengths`` and ``target_batch_index`` on a GPU, which waits
            for the device. On the CPU they are always checked.

    Returns:
        :class:`LossOutput`: the loss summed over all N * C elements, float32 (float64 when an input is float64), and
        the spread of targets and predictions, without gradient and 0 for fewer than two rows. N = 0 gives 0, as do
        positions that are all ignored.
        Accumulates in float32; deterministic; does not wait for the device. Needs, beside the gradient of pred, partial
        sums of at most 1/64 of the layer results (where those are small, of up to 16 C bytes per multiprocessor: 1.6 MB
        at C = 768 on an H100) and, for "instance" and "batch", 8 K B C bytes of statistics; ``post_norm="instance"``
        also the average [B, T, C] in float32, because its statistics need every frame.

    Raises:
        ValueError: as :func:`d2v_fast.ops.layer_targets` and :func:`d2v_fast.ops.masked_smooth_l1`; ``pred`` is not
            [N, C] for N positions, or an index is out of range where that is checked.
        TypeError: as those two.
    """
    check_tensor("positions", positions)
    layers = check_layers(layer_results, norm, post_norm, layout, positions, lengths, eps)
    _check(pred, layers[0], positions, target_batch_index)
    check_beta_and_scale(beta, scale)
    if check:
        _check_ranges(layers[0], positions, lengths, target_batch_index)
    loss, _, moments, spread = _fwd(
        pred if pred.stride(-1) == 1 else pred.contiguous(),
        layers,
        positions,
        lengths,
        target_batch_index,
        norm,
        post_norm,
        float(beta),
        1.0 if scale is None else float(scale),
        float(eps),
        torch.is_grad_enabled() and pred.requires_grad,
    )
    if all_reduce_variance and dist.is_available() and dist.is_initialized():
        spread = _spread_over_ranks(moments.detach(), (positions >= 0).sum())
    target_var, pred_var = spread.detach().unbind()
    return LossOutput(loss, target_var, pred_var, pred.shape[0])


def _spread_over_ranks(moments: Tensor, num_rows: Tensor) -> Tensor:
    """:func:`spread_ref` [2] of the rows of all ranks, from the moments [2, 2, C] of this rank's ``num_rows`` [].

    Sums about a rank's own mean do not add up; those about 0 do, and float64 keeps what they cancel.
    """
    mean, m2 = moments.double().unbind(1)  # [2, C]
    sums = torch.stack((num_rows * mean, m2 + num_rows * mean.square()))  # [2, 2, C]
    packed = torch.cat((sums.flatten(), num_rows.to(sums.dtype).view(1)))
    dist.all_reduce(packed)
    total = packed[-1]
    mean, squares = packed[:-1].view_as(sums) / total.clamp(min=1)
    m2 = (squares - mean.square()).clamp(min=0) * total
    spread = (m2 / (total - 1).clamp(min=1) + 1e-6).sqrt().mean(-1)
    return torch.where(total > 1, spread, 0).to(moments.dtype)


def _check(pred: Tensor, layer: Tensor, positions: Tensor, target_batch_index: Tensor | None) -> None:
    check_tensor("pred", pred)
    check_float("pred", pred)
    check_device("pred", pred, layer.device)
    expected = (positions.shape[0], layer.shape[2])
    if tuple(pred.shape) != expected:
        raise ValueError(f"pred must have shape {expected}, a row per position, got {tuple(pred.shape)}")
    if target_batch_index is not None:
        check_tensor("target_batch_index", target_batch_index)
        check_index("target_batch_index", target_batch_index, layer.device)
        if target_batch_index.dim() != 1:
            raise ValueError(f"target_batch_index must have shape [B_student], got {tuple(target_batch_index.shape)}")
        if target_batch_index.numel() == 0 and positions.numel() > 0:
            raise ValueError("target_batch_index must not be empty where there are positions, got shape (0,)")


def _check_ranges(layer: Tensor, positions: Tensor, lengths: Tensor | None, target_batch_index: Tensor | None) -> None:
    batch, frames, _ = layer.shape
    students = batch if target_batch_index is None else target_batch_index.shape[0]
    check_range("positions", positions[positions >= 0], students * frames - 1)
    check_range("lengths", lengths, frames)
    check_range("target_batch_index", target_batch_index, batch - 1)

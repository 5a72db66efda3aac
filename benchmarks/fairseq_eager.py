"""The ops as fairseq computes them: float32 upcasts, transposed layouts, boolean indexing, one tensor at a time.

Own code from the formulas (docs/numerics.md names what differs from ours). float64 inputs stay float64, which makes
these functions the exact answer as well. All return a dict of results.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _targets(
    layers: list[Tensor], mask: Tensor, norm: str, post_norm: str, batch_index: Tensor | None = None
) -> Tensor:
    results = [x.transpose(0, 1) for x in layers]  # [T, B, C], as its transformer leaves them
    over_time = norm in ("instance", "batch")
    if over_time:
        results = [x.permute(1, 2, 0) for x in results]  # [B, C, T]
    if norm == "batch":
        results = [F.batch_norm(_fp32(x), None, None, training=True) for x in results]
    if norm == "instance":
        results = [F.instance_norm(_fp32(x)) for x in results]
    if over_time:
        results = [x.transpose(1, 2) for x in results]  # [B, T, C]
    if norm == "layer":
        results = [F.layer_norm(_fp32(x), x.shape[-1:]) for x in results]
    y = sum(results) / len(results)
    if post_norm == "layer":
        y = F.layer_norm(_fp32(y), y.shape[-1:])
    if not over_time:
        y = y.transpose(0, 1)
    if batch_index is not None:
        y = y.index_select(0, batch_index)  # data2vec 2.0 repeats the targets for every masked clone
    return y[mask]  # waits for the device


@torch.no_grad()
def layer_targets(layers: list[Tensor], positions: Tensor, mask: Tensor, *, norm: str, post_norm: str) -> dict:
    """``Data2VecAudioModel.forward``: targets at the masked positions of ``mask`` [B, T]."""
    return {"targets": _targets(layers, mask, norm, post_norm)}


def _loss(pred: Tensor, target: Tensor, beta: float, scale: float) -> Tensor:
    x, y = _fp32(pred), _fp32(target)
    loss = F.mse_loss(x, y, reduction="none") if beta == 0 else F.smooth_l1_loss(x, y, reduction="none", beta=beta)
    return loss.sum(dim=-1).sum() * scale


def _mean_std(y: Tensor) -> Tensor:
    return torch.sqrt(y.var(dim=0) + 1e-6).mean()


def data2vec_loss(
    pred: Tensor, layers: list[Tensor], positions: Tensor, mask: Tensor, batch_index: Tensor | None,
    *, norm: str, post_norm: str, beta: float, scale: float,
) -> dict:  # fmt: skip
    """``Data2VecAudioModel.forward`` from the layer results on; pred [N, C] at the True positions of ``mask``."""
    with torch.no_grad():
        y = _targets(layers, mask, norm, post_norm, batch_index)
    loss = _loss(pred, y, beta, scale)
    with torch.no_grad():
        return {"loss": loss, "target_var": _mean_std(y), "pred_var": _mean_std(_fp32(pred.detach()))}


def masked_smooth_l1(pred: Tensor, target: Tensor, mask: Tensor | None, *, beta: float, scale: float) -> dict:
    """The loss over the positions that ``mask`` keeps, or over all rows."""
    if mask is not None:
        pred, target = pred[mask], target[mask]
    return {"loss": _loss(pred, target, beta, scale)}


@torch.no_grad()
def ema_update(teacher: list[Tensor], student: list[Tensor], copies: list[Tensor], *, decay: float) -> dict:
    """``EMAModule._step_internal``: two kernels a tensor, then every tensor is copied into the teacher module."""
    for e, p in zip(teacher, student, strict=True):
        e.mul_(1 - (1 - decay))
        e.add_(p.to(e.dtype), alpha=1 - decay)
    for copy, e in zip(copies, teacher, strict=True):
        copy.copy_(e)
    return {"teacher": teacher, "copies": copies}


@torch.no_grad()
def l2_norm(tensors: list[Tensor]) -> dict:
    """``fairseq.utils.clip_grad_norm_`` without apex: a norm a tensor, then the norm of the norms."""
    return {"norm": torch.stack([_fp32(x).norm(2) for x in tensors]).norm(2)}


@torch.no_grad()
def adamw_ema(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], ema: list[Tensor],
    ema_copies: list[Tensor], steps: list[Tensor], grad_scale: Tensor,
    *, step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, decay: float,
) -> dict:  # fmt: skip
    """``fairseq.optim.adam.Adam.step`` tensor by tensor on scaled gradients, then :func:`ema_update`."""
    beta1, beta2 = betas
    step_size = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        g = g.to(p.dtype) * grad_scale.to(p.dtype)  # fairseq scales in place; the next round needs the same gradients
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denom = v.sqrt().add_(eps)
        p.add_(p, alpha=-weight_decay * lr)
        p.addcdiv_(m, denom, value=-step_size)
    ema_update(ema, params, ema_copies, decay=decay)
    return {"params": params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "ema": ema, "ema_copies": ema_copies}


def layer_norm_gelu(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> dict:
    """``ConvFeatureExtractionModel``: transpose, float32 layer norm, transpose, GELU on [B, C, T] in memory."""
    y = x.transpose(1, 2)  # [B, C, T], as a convolution leaves it
    y = y.transpose(-2, -1)
    weight, bias = (None if w is None else _fp32(w) for w in (weight, bias))
    y = F.layer_norm(_fp32(y), y.shape[-1:], weight, bias, eps).type_as(x)
    y = F.gelu(y.transpose(-2, -1).contiguous())
    return {"y": y.transpose(1, 2)}


def bias_gelu(x: Tensor, bias: Tensor | None) -> dict:
    """``fairseq.modules.gelu``: GELU in float32, cast back."""
    x = x if bias is None else x + bias
    return {"y": F.gelu(_fp32(x)).type_as(x)}


def residual_dropout_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, column_scale: Tensor | None, row_scale: Tensor | None,
    *, p: float, eps: float, return_residual: bool,
) -> dict:  # fmt: skip
    """A residual branch one op at a time: dropout, LayerScale, DropPath, sum, layer norm."""
    branch = F.dropout(x, p)
    if column_scale is not None:
        branch = column_scale * branch
    if row_scale is not None:
        branch = branch * row_scale.to(branch.dtype)[:, None, None]
    h = residual + branch
    y = F.layer_norm(h, h.shape[-1:], weight, bias, eps).type_as(x)
    return {"y": y, "h": h} if return_residual else {"y": y}


def conv_encoder(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], norm_weights: list[Tensor | None],
    norm_biases: list[Tensor | None], *, strides: list[int], norm: str, eps: float,
) -> dict:  # fmt: skip
    """``ConvFeatureExtractionModel``: waveforms [B, S], or x [B, S, C] in its middle, to y [B, T, C].

    Float32 layer norm between two transposes, or float32 group norm after the first layer; GELU.
    """
    x = x.to(weights[0].dtype)[:, None] if x.dim() == 2 else x.transpose(1, 2)  # [B, C, S]
    for weight, bias, gamma, beta, stride in zip(weights, biases, norm_weights, norm_biases, strides, strict=True):
        x = F.conv1d(x, weight, bias, stride)
        if gamma is not None and norm == "layer":
            y = x.transpose(-2, -1)
            y = F.layer_norm(_fp32(y), y.shape[-1:], _fp32(gamma), _fp32(beta), eps).type_as(x)
            x = y.transpose(-2, -1)
        elif gamma is not None:
            x = F.group_norm(_fp32(x), x.shape[1], _fp32(gamma), _fp32(beta), eps).type_as(x)
        x = F.gelu(x)
    return {"y": x.transpose(1, 2)}


def pos_conv(x: Tensor, weights: list[Tensor], biases: list[Tensor], *, groups: int, norm: bool, eps: float) -> dict:
    """``make_conv_block`` and ``make_conv_pos`` (without its weight norm) of ``wav2vec2.TransformerEncoder``."""
    x = x.transpose(1, 2)
    for weight, bias in zip(weights, biases, strict=True):
        kernel = weight.shape[2]
        x = F.conv1d(x, weight, bias, padding=kernel // 2, groups=groups)
        x = x[:, :, :-1] if kernel % 2 == 0 else x
        x = F.layer_norm(x.transpose(-2, -1), x.shape[1:2], eps=eps).transpose(-2, -1) if norm else x
        x = F.gelu(x)
    return {"y": x.transpose(1, 2)}


def bias_attention(
    qkv: Tensor, bias: Tensor | None, slopes: Tensor | None, positions: Tensor | None, *, p: float
) -> dict:
    """BEiT's ``Attention`` on [B, T, 3, H, D], and ALiBi as data2vec 2.0 adds it: all logits and weights in memory."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    logits = q * q.shape[-1] ** -0.5 @ k.mT
    if bias is not None:
        logits = logits + bias
    if slopes is not None:
        distances = (positions[:, None, :, None] - positions[:, None, None, :]).abs()
        logits = logits - slopes[:, None, None] * distances
    weights = F.dropout(logits.softmax(-1), p)
    return {"y": (weights.to(v.dtype) @ v).transpose(1, 2)}

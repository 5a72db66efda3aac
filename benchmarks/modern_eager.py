"""The ops as a reader of PyTorch's manual would write them today: no needless copies, index_select, foreach, fused.

Same signatures and results as ``fairseq_eager``; no function here waits for the device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_DIMS = {"instance": (1,), "batch": (0, 1)}


def _targets(layers: list[Tensor], positions: Tensor, norm: str, post_norm: str, eps: float = 1e-5) -> Tensor:
    y = 0.0
    for x in layers:
        if norm == "layer":  # rows are independent: only those that are needed
            x = F.layer_norm(x.flatten(0, 1).index_select(0, positions).float(), x.shape[-1:], eps=eps)
        else:
            x = x.float()
            var, mean = torch.var_mean(x, _DIMS[norm], correction=0, keepdim=True)
            x = (x - mean) * (var + eps).rsqrt()
        y = y + x
    y = y / len(layers)
    y = y if norm == "layer" else y.flatten(0, 1).index_select(0, positions)
    return F.layer_norm(y, y.shape[-1:], eps=eps) if post_norm == "layer" else y


@torch.no_grad()
def layer_targets(layers: list[Tensor], positions: Tensor, mask: Tensor, *, norm: str, post_norm: str) -> dict:
    """Targets at flat ``positions``, whose number the host knows."""
    return {"targets": _targets(layers, positions, norm, post_norm)}


def _loss(pred: Tensor, target: Tensor, beta: float, scale: float) -> Tensor:
    if beta == 0:
        return F.mse_loss(pred.float(), target.float(), reduction="sum") * scale
    return F.smooth_l1_loss(pred.float(), target.float(), reduction="sum", beta=beta) * scale


def data2vec_loss(
    pred: Tensor, layers: list[Tensor], positions: Tensor, mask: Tensor, batch_index: Tensor | None,
    *, norm: str, post_norm: str, beta: float, scale: float,
) -> dict:  # fmt: skip
    """Targets, loss and the two collapse metrics."""
    with torch.no_grad():
        if batch_index is not None:
            frames = layers[0].shape[1]
            positions = batch_index[positions // frames] * frames + positions % frames
        y = _targets(layers, positions, norm, post_norm)
        target_var = (y.var(0) + 1e-6).sqrt().mean()
        pred_var = (pred.detach().float().var(0) + 1e-6).sqrt().mean()
    return {"loss": _loss(pred, y, beta, scale), "target_var": target_var, "pred_var": pred_var}


def masked_smooth_l1(pred: Tensor, target: Tensor, mask: Tensor | None, *, beta: float, scale: float) -> dict:
    """Without a mask PyTorch's own loss; with one a dense loss, weighted, so that nothing waits for the device."""
    if mask is None:
        return {"loss": _loss(pred, target, beta, scale)}
    d = torch.where(mask[..., None], pred.float() - target.float(), 0.0)
    if beta == 0:
        return {"loss": d.square().sum() * scale}
    return {"loss": F.smooth_l1_loss(d, torch.zeros_like(d), reduction="sum", beta=beta) * scale}


def _like(tensors: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    # foreach and fused ops want lists of one dtype
    return [y.to(x.dtype) for x, y in zip(tensors, others, strict=True)]


@torch.no_grad()
def ema_update(teacher: list[Tensor], student: list[Tensor], copies: list[Tensor], *, decay: float) -> dict:
    """``_foreach_lerp_`` and a copy."""
    torch._foreach_lerp_(teacher, _like(teacher, student), 1 - decay)
    torch._foreach_copy_(copies, teacher)
    return {"teacher": teacher, "copies": copies}


@torch.no_grad()
def ema_update_mul_add(teacher: list[Tensor], student: list[Tensor], copies: list[Tensor], *, decay: float) -> dict:
    """``_foreach_mul_`` and ``_foreach_add_``, the form most training code has."""
    torch._foreach_mul_(teacher, decay)
    torch._foreach_add_(teacher, _like(teacher, student), alpha=1 - decay)
    torch._foreach_copy_(copies, teacher)
    return {"teacher": teacher, "copies": copies}


@torch.no_grad()
def l2_norm(tensors: list[Tensor]) -> dict:
    """``torch.nn.utils.get_total_norm`` on the foreach path, with norms in float32."""
    return {"norm": torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)).norm(2)}


@torch.no_grad()
def adamw_ema(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], ema: list[Tensor],
    ema_copies: list[Tensor], steps: list[Tensor], grad_scale: Tensor,
    *, step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, decay: float,
) -> dict:  # fmt: skip
    """PyTorch's fused AdamW, which divides by its scale in the same kernel, and :func:`ema_update`."""
    grads = _like(params, grads)
    torch._foreach_add_(steps, 1.0)
    torch._fused_adamw_(
        params, grads, exp_avgs, exp_avg_sqs, [], steps, lr=lr, beta1=betas[0], beta2=betas[1],
        weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
        grad_scale=grad_scale.reciprocal().float(), found_inf=None,
    )  # fmt: skip
    ema_update(ema, params, ema_copies, decay=decay)
    return {"params": params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "ema": ema, "ema_copies": ema_copies}


@torch.no_grad()
def adamw_ema_foreach(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], ema: list[Tensor],
    ema_copies: list[Tensor], steps: list[Tensor], grad_scale: Tensor,
    *, step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, decay: float,
) -> dict:  # fmt: skip
    """AdamW of foreach ops, which ``torch.compile`` fuses: it can do nothing with the fused op."""
    beta1, beta2 = betas
    grads = torch._foreach_mul(_like(params, grads), grad_scale)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, (1 - beta2**step) ** 0.5)
    torch._foreach_add_(denominators, eps)
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_addcdiv_(params, exp_avgs, denominators, -lr / (1 - beta1**step))
    ema_update(ema, params, ema_copies, decay=decay)
    return {"params": params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "ema": ema, "ema_copies": ema_copies}


def layer_norm_gelu(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> dict:
    """Channels last, in the dtype of ``x``."""
    return {"y": F.gelu(F.layer_norm(x, x.shape[-1:], weight, bias, eps))}


def bias_gelu(x: Tensor, bias: Tensor | None) -> dict:
    """In the dtype of ``x``."""
    return {"y": F.gelu(x if bias is None else x + bias)}


def residual_dropout_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, column_scale: Tensor | None, row_scale: Tensor | None,
    *, p: float, eps: float, return_residual: bool,
) -> dict:  # fmt: skip
    """LayerScale and DropPath in one ``addcmul`` where both are there."""
    branch = F.dropout(x, p)
    if column_scale is not None and row_scale is not None:
        h = torch.addcmul(residual, branch.to(residual.dtype), column_scale * row_scale[:, None, None])
    else:
        branch = branch if column_scale is None else branch * column_scale
        branch = branch if row_scale is None else branch * row_scale[:, None, None].to(branch.dtype)
        h = residual + branch
    y = F.layer_norm(h, h.shape[-1:], weight, bias, eps).to(x.dtype)
    return {"y": y, "h": h} if return_residual else {"y": y}


def conv_encoder(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], norm_weights: list[Tensor | None],
    norm_biases: list[Tensor | None], *, strides: list[int], norm: str, eps: float,
) -> dict:  # fmt: skip
    """``conv1d`` on [B, C, S], layer norm on a transposed view, everything in the dtype of the weights."""
    x = x.to(weights[0].dtype)[:, None] if x.dim() == 2 else x.mT
    for weight, bias, gamma, beta, stride in zip(weights, biases, norm_weights, norm_biases, strides, strict=True):
        x = F.conv1d(x, weight, bias, stride)
        if gamma is not None and norm == "layer":
            x = F.layer_norm(x.mT, x.shape[1:2], gamma, beta, eps).mT
        elif gamma is not None:
            x = F.group_norm(x, x.shape[1], gamma, beta, eps)
        x = F.gelu(x)
    return {"y": x.mT}


def conv_encoder_nhwc(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], norm_weights: list[Tensor | None],
    norm_biases: list[Tensor | None], *, strides: list[int], norm: str, eps: float,
) -> dict:  # fmt: skip
    """``conv2d`` on images of height 1 in channels-last memory, so that norms and convolutions share one layout."""
    x = x.to(weights[0].dtype)[..., None] if x.dim() == 2 else x  # [B, S, C]
    for weight, bias, gamma, beta, stride in zip(weights, biases, norm_weights, norm_biases, strides, strict=True):
        images = x.transpose(1, 2)[:, :, None]  # [B, C, 1, S]
        kernel = weight[:, :, None].contiguous(memory_format=torch.channels_last)
        x = F.conv2d(images, kernel, bias, (1, stride))[:, :, 0].transpose(1, 2)
        if gamma is not None and norm == "layer":
            x = F.layer_norm(x, x.shape[-1:], gamma, beta, eps)
        elif gamma is not None:
            x = F.group_norm(x.mT, x.shape[-1], gamma, beta, eps).mT
        x = F.gelu(x)
    return {"y": x}


def pos_conv(x: Tensor, weights: list[Tensor], biases: list[Tensor], *, groups: int, norm: bool, eps: float) -> dict:
    """Grouped ``conv1d`` on [B, C, T], layer norm on a transposed view."""
    x = x.mT
    for weight, bias in zip(weights, biases, strict=True):
        kernel = weight.shape[2]
        x = F.conv1d(x, weight, bias, padding=kernel // 2, groups=groups)[..., : x.shape[-1]]
        x = F.gelu(F.layer_norm(x.mT, x.shape[1:2], eps=eps).mT if norm else x)
    return {"y": x.mT}


def bias_attention(
    qkv: Tensor, bias: Tensor | None, slopes: Tensor | None, positions: Tensor | None, *, p: float
) -> dict:
    """scaled_dot_product_attention with the bias as its mask, which is expanded to all samples inside."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    mask = None if bias is None else bias[None].to(q.dtype)
    if slopes is not None:
        distances = (positions[:, None, :, None] - positions[:, None, None, :]).abs()
        mask = (-slopes[:, None, None] * distances).to(q.dtype)
    return {"y": F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p).transpose(1, 2)}

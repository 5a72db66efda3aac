"""Other libraries' kernels, where they are installed; every loader raises :class:`NotInstalled` where they are not."""

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from driver import NotInstalled
from torch import Tensor

APEX_CHUNK = 2048 * 32


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotInstalled(name.split(".")[0]) from error


def apex_ema() -> Callable:
    """``amp_C.multi_tensor_axpby`` with the teacher as its own output."""
    apply = _module("apex.multi_tensor_apply").multi_tensor_applier
    axpby = _module("amp_C").multi_tensor_axpby

    @torch.no_grad()
    def run(teacher: list[Tensor], student: list[Tensor], copies: list[Tensor], *, decay: float) -> dict:
        overflow = torch.zeros(1, dtype=torch.int, device=teacher[0].device)
        apply(axpby, overflow, [teacher, student, teacher], decay, 1 - decay, -1)
        torch._foreach_copy_(copies, teacher)
        return {"teacher": teacher, "copies": copies}

    return run


def apex_l2_norm() -> Callable:
    """``amp_C.multi_tensor_l2norm``."""
    apply = _module("apex.multi_tensor_apply").multi_tensor_applier
    l2norm = _module("amp_C").multi_tensor_l2norm

    @torch.no_grad()
    def run(tensors: list[Tensor]) -> dict:
        overflow = torch.zeros(1, dtype=torch.int, device=tensors[0].device)
        return {"norm": apply(l2norm, overflow, [tensors], False)[0].squeeze()}

    return run


def apex_adamw_ema() -> Callable:
    """``amp_C.multi_tensor_adam``, the kernel of ``FusedAdam``, and the axpby form of the teacher update."""
    apply = _module("apex.multi_tensor_apply").multi_tensor_applier
    adam = _module("amp_C").multi_tensor_adam
    average = apex_ema()

    @torch.no_grad()
    def run(
        params, grads, exp_avgs, exp_avg_sqs, ema, ema_copies, steps, grad_scale,
        *, step, lr, betas, eps, weight_decay, decay,
    ) -> dict:  # fmt: skip
        overflow = torch.zeros(1, dtype=torch.int, device=params[0].device)
        torch._foreach_mul_(grads, grad_scale)  # the clip factor
        grads = [g.to(p.dtype) for g, p in zip(grads, params, strict=True)]
        lists = [grads, params, exp_avgs, exp_avg_sqs]
        apply(adam, overflow, lists, lr, *betas, eps, step, 1, 1, weight_decay)
        average(ema, params, ema_copies, decay=decay)
        return {
            "params": params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "ema": ema, "ema_copies": ema_copies
        }  # fmt: skip

    return run


def apex_layer_norm_gelu() -> Callable:
    """apex's fused layer norm, then GELU."""
    layer_norm = _module("apex.normalization.fused_layer_norm").fused_layer_norm_affine
    _module("fused_layer_norm_cuda")

    def run(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> dict:
        return {"y": F.gelu(layer_norm(x, weight, bias, x.shape[-1:], eps))}

    return run


def liger_layer_norm_gelu() -> Callable:
    """Liger's Triton layer norm, then GELU."""
    function = _module("liger_kernel.ops.layer_norm").LigerLayerNormFunction

    def run(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> dict:
        return {"y": F.gelu(function.apply(x, weight, bias, eps))}

    return run


def flash_attn_residual() -> Callable:
    """flash-attn's Triton ``layer_norm_fn``: dropout, sum and layer norm in one pass."""
    layer_norm = _module("flash_attn.ops.triton.layer_norm").layer_norm_fn

    def run(x, residual, weight, bias, column_scale, row_scale, *, p, eps, return_residual) -> dict:
        x = x if column_scale is None else x * column_scale.to(x.dtype)  # it has no LayerScale
        scale = None if row_scale is None else row_scale.to(x.dtype)[:, None].expand(x.shape[:-1]).contiguous()
        fp32 = residual.dtype == torch.float32
        out = layer_norm(
            x, weight, bias, residual=residual, eps=eps, dropout_p=p, rowscale=scale,
            prenorm=return_residual, residual_in_fp32=fp32,
        )  # fmt: skip
        return {"y": out[0], "h": out[1]} if return_residual else {"y": out}

    return run


def xformers_residual() -> Callable:
    """xformers' Triton layer norm (older releases), after an eager residual sum."""
    layer_norm = _module("xformers.triton").layer_norm

    def run(x, residual, weight, bias, column_scale, row_scale, *, p, eps, return_residual) -> dict:
        branch = F.dropout(x, p)
        branch = branch if column_scale is None else branch * column_scale
        branch = branch if row_scale is None else branch * row_scale[:, None, None].to(branch.dtype)
        h = residual + branch
        y = layer_norm(h, weight, bias, eps).to(x.dtype)
        return {"y": y, "h": h} if return_residual else {"y": y}

    return run


def flash_attn_2() -> Callable:
    """``flash_attn_func`` of flash-attn 2, as an own training loop would call it."""
    attention = _module("flash_attn").flash_attn_func

    def run(qkv: Tensor, *, p: float) -> dict:
        return {"y": attention(*qkv.unbind(2), dropout_p=p)}

    return run


def flash_attn_3() -> Callable:
    """``flash_attn_func`` of FlashAttention 3, which has no dropout."""
    attention = _module("flash_attn_interface").flash_attn_func

    def run(qkv: Tensor, *, p: float) -> dict:
        if p > 0:
            raise NotInstalled("dropout in FlashAttention 3")
        y = attention(*qkv.unbind(2))
        return {"y": y[0] if isinstance(y, tuple) else y}

    return run

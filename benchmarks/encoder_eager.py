"""Transformer layers as fairseq, BEiT and a reader of PyTorch's manual write them, on the weights of ours.

Parameters come under the names of ``d2v_fast.nn.TransformerEncoder``. float64 inputs stay float64, which makes
:func:`modern` the exact answer as well. All return the encoder's output [B, T, C].
"""

from contextlib import AbstractContextManager

import checkout  # noqa: F401
import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_fast.nn.config import EncoderConfig

Parameters = dict[str, Tensor]


def mixed_precision(x: Tensor) -> AbstractContextManager:
    """Autocast for bfloat16 inputs, nothing otherwise."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16)


def position_bias(p: Parameters, index: Tensor | None) -> Tensor | None:
    """[H, T, T] of the table, gathered by indexing."""
    return None if index is None else p["relative_bias.table"][index].permute(2, 0, 1)


def _of_layer(p: Parameters, i: int) -> Parameters:
    start = f"layers.{i}."
    return {name.removeprefix(start): v for name, v in p.items() if name.startswith(start)}


def _norm(x: Tensor, p: Parameters, name: str, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)


def _drop_path(x: Tensor, rate: float) -> Tensor:
    """Whole samples, ``timm.layers.drop_path``."""
    if rate == 0:
        return x
    return x * (x.new_empty(len(x), 1, 1).bernoulli_(1 - rate) / (1 - rate))


def fairseq(x: Tensor, p: Parameters, config: EncoderConfig, padding: Tensor | None, index: Tensor | None) -> Tensor:
    """``TransformerSentenceEncoderLayer`` (post-norm): [T, B, C], three projections, GELU in float32."""
    nothing = x.new_empty(0)
    x = x.transpose(0, 1)
    for i in range(config.layers):
        q = _of_layer(p, i)
        weights, bias = q["attention.qkv.weight"].chunk(3), q["attention.qkv.bias"]
        y, _ = F.multi_head_attention_forward(
            x, x, x, config.dim, config.heads, nothing, bias, None, None, False, config.attention_dropout,
            q["attention.out.weight"], q["attention.out.bias"], key_padding_mask=padding, need_weights=False,
            use_separate_proj_weight=True, q_proj_weight=weights[0], k_proj_weight=weights[1], v_proj_weight=weights[2],
        )  # fmt: skip
        x = _norm(x + F.dropout(y, config.dropout), q, "norm1", config.norm_eps)
        hidden = F.linear(x, q["fc1.weight"], q["fc1.bias"])
        hidden = F.gelu(hidden.to(torch.promote_types(hidden.dtype, torch.float32))).type_as(hidden)
        y = F.linear(hidden, q["fc2.weight"], q["fc2.bias"])
        x = _norm(x + F.dropout(y, config.dropout), q, "norm2", config.norm_eps)
    return x.transpose(0, 1)


def beit(x: Tensor, p: Parameters, config: EncoderConfig, padding: Tensor | None, index: Tensor | None) -> Tensor:
    """BEiT's ``Block``: logits, bias, softmax and dropout one by one; LayerScale, DropPath and sum likewise."""
    bias, last = position_bias(p, index), config.layers - 1
    with mixed_precision(x):
        x = x.to(p["norm.weight"].dtype)
        for i in range(config.layers):
            w, rate = _of_layer(p, i), config.drop_path * i / max(last, 1)
            qkv_bias = torch.cat(
                [w["attention.q_bias"], torch.zeros_like(w["attention.v_bias"]), w["attention.v_bias"]]
            )
            qkv = F.linear(_norm(x, w, "norm1", config.norm_eps), w["attention.qkv.weight"], qkv_bias)
            q, k, v = qkv.unflatten(-1, (3, config.heads, -1)).permute(2, 0, 3, 1, 4)
            logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
            y = F.dropout(logits.softmax(-1), config.attention_dropout) @ v
            y = F.linear(y.transpose(1, 2).flatten(2), w["attention.out.weight"], w["attention.out.bias"])
            x = x + _drop_path(w["scale1"] * F.dropout(y, config.dropout), rate)
            y = F.gelu(F.linear(_norm(x, w, "norm2", config.norm_eps), w["fc1.weight"], w["fc1.bias"]))
            y = F.linear(y, w["fc2.weight"], w["fc2.bias"])
            x = x + _drop_path(w["scale2"] * F.dropout(y, config.dropout), rate)
        return _norm(x, p, "norm", config.norm_eps)


def modern(x: Tensor, p: Parameters, config: EncoderConfig, padding: Tensor | None, index: Tensor | None) -> Tensor:
    """One projection, ``scaled_dot_product_attention``, autocast; no other fusion."""
    bias, last, pre = position_bias(p, index), config.layers - 1, config.norm == "pre"
    mask = None if padding is None else ~padding[:, None, None, :]
    with mixed_precision(x):
        mask = mask if bias is None else bias[None].to(x.dtype)
        x = x.to(p["norm.weight"].dtype) if pre else x
        for i in range(config.layers):
            w, rate = _of_layer(p, i), config.drop_path * i / max(last, 1)
            qkv_bias = w.get("attention.qkv.bias")
            if qkv_bias is None:
                qkv_bias = torch.cat([w["attention.q_bias"], 0 * w["attention.v_bias"], w["attention.v_bias"]])
            y = _norm(x, w, "norm1", config.norm_eps) if pre else x
            qkv = F.linear(y, w["attention.qkv.weight"], qkv_bias)
            q, k, v = qkv.unflatten(-1, (3, config.heads, -1)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=config.attention_dropout)
            y = F.linear(y.transpose(1, 2).flatten(2), w["attention.out.weight"], w["attention.out.bias"])
            y = F.dropout(y, config.dropout)
            x = x + (_drop_path(w["scale1"] * y, rate) if pre else y)
            x = x if pre else _norm(x, w, "norm1", config.norm_eps)
            y = _norm(x, w, "norm2", config.norm_eps) if pre else x
            y = F.linear(F.gelu(F.linear(y, w["fc1.weight"], w["fc1.bias"])), w["fc2.weight"], w["fc2.bias"])
            y = F.dropout(y, config.dropout)
            x = x + (_drop_path(w["scale2"] * y, rate) if pre else y)
            x = x if pre else _norm(x, w, "norm2", config.norm_eps)
        return _norm(x, p, "norm", config.norm_eps) if pre else x

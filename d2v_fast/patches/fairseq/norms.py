"""Norms and GELU in fairseq: those of a speech layer (seam S3), and the ones that go through float32 (S7).

Dims: B batch, T frames, C channels.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.ops import bias_gelu, residual_dropout_layer_norm
from d2v_fast.ops._rows import runs_reference
from d2v_fast.patches._core import Options, Seam, fall_back
from d2v_fast.patches._sharing import is_known, too_precise, watched

BYPASSED = ("dropout1", "dropout3", "self_attn_layer_norm", "final_layer_norm", "fc1")
NORMS, OTHERS = ("LayerNorm", "FusedLayerNorm"), ("Dropout", "Linear")


def is_gelu(function: Callable) -> bool:
    """Whether an activation is the exact GELU, through float32 as fairseq has it or as it is."""
    if function is F.gelu:
        return True
    return getattr(function, "__name__", "") == "gelu" and getattr(function, "__module__", "") == "fairseq.modules.gelu"


def _unfit(layer: nn.Module) -> str | None:
    """Why the small modules of a layer have to be called, or None."""
    for name in BYPASSED:
        module = layer._modules[name]
        if not is_known(type(module), NORMS if name.endswith("norm") else OTHERS):
            return f"{name} is a {type(module).__name__}"
        if (reason := watched(module)) is not None:
            return f"{name} {reason}"
    return None


def _rate(dropout: nn.Module) -> float:
    return dropout.p if dropout.training else 0.0


def _ffn(layer: nn.Module, x: Tensor) -> Tensor:
    """What leaves the FFN, before dropout."""
    if not is_gelu(layer.activation_fn):
        x = layer.activation_fn(layer.fc1(x))
    elif runs_reference(x, x.dtype):
        x = bias_gelu(layer.fc1(x))  # PyTorch's products on the CPU have the bias free
    else:
        x = bias_gelu(F.linear(x, layer.fc1.weight), layer.fc1.bias)
    return layer.fc2(layer.dropout2(x))


def _make_layer(original: Callable, options: Options) -> Callable:
    def forward(
        self: Any,
        x: Tensor,  # [T, B, C]
        self_attn_mask: Tensor | None = None,
        self_attn_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        att_args: Any = None,
    ) -> tuple[Tensor, tuple[Tensor | None, Tensor]]:
        """x [T, B, C], and attention's weights (None) with the FFN's result [T, B, C]."""
        if (reason := too_precise(x) or _unfit(self)) is not None:
            fall_back(self, "forward", reason, options)
            return original(self, x, self_attn_mask, self_attn_padding_mask, need_weights, att_args)
        first, last, pre = self.self_attn_layer_norm, self.final_layer_norm, self.layer_norm_first
        y, middle = (first(x), last) if pre else (x, first)
        masks = {"key_padding_mask": self_attn_padding_mask, **({"attn_mask": self_attn_mask} if pre else {})}
        y, weights = self.self_attn(query=y, key=y, value=y, need_weights=False, **masks)
        norm = {"weight": middle.weight, "bias": middle.bias, "eps": middle.eps, "p": _rate(self.dropout1)}
        if pre:
            y, h = residual_dropout_layer_norm(y, x, return_residual=True, **norm)
            result = _ffn(self, y)
            out = h + self.dropout3(result)
        else:
            y = residual_dropout_layer_norm(y, x, **norm)
            result = _ffn(self, y)
            norm = {"weight": last.weight, "bias": last.bias, "eps": last.eps, "p": _rate(self.dropout3)}
            out = residual_dropout_layer_norm(result, y, **norm)
        # under autocast a norm's result is in the precision of what it is given
        return out.to(x.dtype), (weights, result)

    return forward


LAYER_NORM = Seam(
    "norms",
    "forward",
    _make_layer,
    "dropout, residual and norm in one op, bias and GELU in one, for calls that the encoder leaves",
    known=frozenset({"1a712918bbabfead"}),
    op="residual_dropout_layer_norm",
)


def _low(module: nn.Module, x: Tensor) -> bool:
    """Whether PyTorch's own norm computes in float32 what it is given in low precision."""
    same = module.weight is None or module.weight.dtype == x.dtype
    return x.is_cuda and same and x.dtype in (torch.bfloat16, torch.float16) and not torch.is_autocast_enabled("cuda")


def _make_layer_norm(original: Callable, options: Options) -> Callable:
    def forward(self: Any, input: Tensor) -> Tensor:
        """In low precision without the copies in float32; otherwise there is nothing to gain."""
        if not _low(self, input):
            return original(self, input)
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)

    return forward


def _make_group_norm(original: Callable, options: Options) -> Callable:
    def forward(self: Any, input: Tensor) -> Tensor:
        """In low precision without the copies in float32; otherwise there is nothing to gain."""
        if not _low(self, input):
            return original(self, input)
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)

    return forward


FP32_LAYER_NORM = Seam(
    "norms",
    "forward",
    _make_layer_norm,
    "low precision without copies in float32",
    known=frozenset({"604229dce5ed7ffa"}),
)
FP32_GROUP_NORM = Seam(
    "norms",
    "forward",
    _make_group_norm,
    "low precision without copies in float32",
    known=frozenset({"0628265cfb6dc509"}),
)

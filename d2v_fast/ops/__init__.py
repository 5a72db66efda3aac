"""Fused operations. Importing this package loads torch only; Triton is imported by the first call that needs it."""

from d2v_fast.ops.adamw_ema import adamw_ema_
from d2v_fast.ops.bias_attention import bias_attention
from d2v_fast.ops.bias_gelu import bias_gelu
from d2v_fast.ops.conv0 import conv0_norm_gelu
from d2v_fast.ops.data2vec_loss import LossOutput, data2vec_loss
from d2v_fast.ops.ema import ema_update_
from d2v_fast.ops.l2_norm import clip_factor, l2_norm
from d2v_fast.ops.layer_norm_gelu import layer_norm_gelu
from d2v_fast.ops.layer_targets import layer_targets
from d2v_fast.ops.masked_smooth_l1 import masked_smooth_l1
from d2v_fast.ops.pos_conv import pos_conv
from d2v_fast.ops.residual_dropout_layer_norm import residual_dropout_layer_norm
from d2v_fast.ops.strided_conv import strided_conv

__all__ = [
    "LossOutput",
    "adamw_ema_",
    "bias_attention",
    "bias_gelu",
    "clip_factor",
    "conv0_norm_gelu",
    "data2vec_loss",
    "ema_update_",
    "l2_norm",
    "layer_norm_gelu",
    "layer_targets",
    "masked_smooth_l1",
    "pos_conv",
    "residual_dropout_layer_norm",
    "strided_conv",
]

"""What static_cost.py compares: each op at a real and a small shape, the same in eager PyTorch, and predictions."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import cost_formulas
import fairseq_eager
import modern_eager
import recorded_cases
import recorded_convs
import torch
import torch.nn.functional as F
from recorded_cases import BASE, BF16, FP32, LAYER_SCALE, SPEECH, TEXT, VISION, VIT_BASE, Call, backward
from torch import Tensor

SCALES = {"beta": 0.0, "scale": 1.0}
OPTIMIZER = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "decay": 0.999}


@dataclass(frozen=True)
class Cost:
    """``build`` names the builder, the formula and (in both eager modules) the function.

    ``predicted`` are the numbers of the performance model: launches and GB, of eager code and of ours.
    """

    op: str
    workload: str
    build: str
    arguments: dict[str, Any]
    small: dict[str, Any]
    predicted: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op} | {self.workload}"

    def ours(self, small: bool = False) -> Call:
        return OURS[self.build](**self.arguments | (self.small if small else {}))

    def formula(self, small: bool = False) -> int:
        return getattr(cost_formulas, self.build)(**self.arguments | (self.small if small else {}))

    def eager(self, module: ModuleType) -> Call:
        """The same on meta tensors in plain PyTorch."""
        with torch.device("meta"):
            return EAGER[self.build](module, **self.arguments)

    @property
    def num_masked(self) -> int | None:
        if "kept" in self.arguments:
            return round(self.arguments["rows"] * self.arguments["kept"])
        if "fraction" not in self.arguments:
            return None
        batch, frames, _ = self.arguments["shape"]
        return round(batch * frames * self.arguments["fraction"])


def _results(shape: tuple[int, int, int], layers: int, dtype: torch.dtype, module: ModuleType) -> list[Tensor]:
    if module is not fairseq_eager:
        return [torch.empty(shape, dtype=dtype) for _ in range(layers)]
    batch, frames, width = shape  # its transformers leave [T, B, C] in memory
    return [torch.empty(frames, batch, width, dtype=dtype).transpose(0, 1) for _ in range(layers)]


def _masked(module, rows, width, pred=BF16, target=FP32, kept=1.0):
    p = torch.empty(rows, width, dtype=pred, requires_grad=True)
    y = torch.empty(rows, width, dtype=target)
    mask = torch.empty(rows, dtype=torch.bool) if kept < 1 else None
    return backward(lambda: module.masked_smooth_l1(p, y, mask, **SCALES)["loss"], p)


def _rows(shape, fraction):
    positions = torch.empty(round(shape[0] * shape[1] * fraction), dtype=torch.long)
    return positions, torch.empty(shape[:2], dtype=torch.bool)


def _targets(module, shape, num_layers, fraction, dtype=BF16, norm="instance", post_norm="none"):
    layers = _results(shape, num_layers, dtype, module)
    positions, mask = _rows(shape, fraction)
    return lambda: module.layer_targets(layers, positions, mask, norm=norm, post_norm=post_norm)


def _loss(module, shape, num_layers, fraction, dtype=BF16, pred=BF16, norm="instance", post_norm="none"):
    layers = _results(shape, num_layers, dtype, module)
    positions, mask = _rows(shape, fraction)
    p = torch.empty(len(positions), shape[2], dtype=pred, requires_grad=True)
    norms = {"norm": norm, "post_norm": post_norm}
    return backward(lambda: module.data2vec_loss(p, layers, positions, mask, None, **norms, **SCALES)["loss"], p)


def _model(sizes, dtype=FP32):
    return [torch.empty(size, dtype=dtype) for size in sizes]


def _ema(module, sizes, student=FP32, copies=None):
    lists = _model(sizes), _model(sizes, student), _model(sizes, copies) if copies else []
    return lambda: module.ema_update(*lists, decay=0.999)


def _norm(module, sizes, dtype=FP32):
    tensors = _model(sizes, dtype)
    return lambda: module.l2_norm(tensors)


def _adamw(module, sizes, grad=FP32, ema_copies=None):
    params, first, second, teacher = (_model(sizes) for _ in range(4))
    grads, copies = _model(sizes, grad), _model(sizes, ema_copies) if ema_copies else []
    steps = [torch.empty(()) for _ in sizes]
    lists = (params, grads, first, second, teacher, copies, steps)
    return lambda: module.adamw_ema(*lists, torch.empty(()), step=1, **OPTIMIZER)


def _leaf(*shape, dtype=FP32):
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def _bias_gelu(module, rows, width, dtype=BF16):
    x, bias = _leaf(rows, width, dtype=dtype), _leaf(width, dtype=dtype)  # in the dtype of x, as under autocast
    return backward(lambda: module.bias_gelu(x, bias)["y"], x, bias)


def _layer_norm_gelu(module, rows, width, dtype=BF16):
    x, weight, bias = (_leaf(*shape, dtype=dtype) for shape in ((1, rows, width), (width,), (width,)))
    return backward(lambda: module.layer_norm_gelu(x, weight, bias, eps=1e-5)["y"], x, weight, bias)


def _residual(
    module, shape, dtype=BF16, residual=BF16, p=0.1, column_scale=False, row_scale=False, grad=True, **options
):
    width = shape[2]
    x, r = _leaf(*shape, dtype=dtype), _leaf(*shape, dtype=residual)
    weight, bias = (_leaf(width, dtype=residual) for _ in range(2))
    scale = _leaf(width, dtype=residual) if column_scale else None
    rows = torch.empty(shape[0]) if row_scale else None
    options = {"p": p, "eps": 1e-5, "return_residual": False} | options
    inputs = (x, r, weight, bias, *((scale,) if column_scale else ()))

    def call():
        return tuple(module.residual_dropout_layer_norm(x, r, weight, bias, scale, rows, **options).values())

    return backward(call, *inputs) if grad else torch.no_grad()(call)


def _memory_efficient(qkv, bias, p):
    """What scaled_dot_product_attention does with a mask on a GPU; tensors without data would take another path."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    B, H, T, _ = q.shape
    mask = F.pad(bias.to(q.dtype), (0, -T % 16))[..., :T].expand(B, H, T, T)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, p)[0].transpose(1, 2)


def _bias_attention(module, B, T, H, D, dtype=BF16, bias=None, p=0.0):
    qkv, table = _leaf(B, T, 3, H, D, dtype=dtype), _leaf(H, T, T, dtype=bias)
    if module is modern_eager:
        return backward(lambda: _memory_efficient(qkv, table, p), qkv, table)
    return backward(lambda: module.bias_attention(qkv, table, None, None, p=p)["y"], qkv, table)


OURS: dict[str, Callable[..., Call]] = {**vars(recorded_cases), **vars(recorded_convs)}
EAGER: dict[str, Callable[..., Call]] = {
    "masked_smooth_l1": _masked,
    "layer_targets": _targets,
    "data2vec_loss": _loss,
    "ema_update": _ema,
    "l2_norm": _norm,
    "adamw_ema": _adamw,
    "bias_gelu": _bias_gelu,
    "layer_norm_gelu": _layer_norm_gelu,
    "residual_dropout_layer_norm": _residual,
    "bias_attention": _bias_attention,
    "conv_encoder": recorded_convs.eager_conv_encoder,
    "pos_conv": recorded_convs.eager_pos_conv,
}
MODULES = {"fairseq": fairseq_eager, "eager": modern_eager}

FRAMES = {"shape": (2, 128, 128), "fraction": 0.5}
SIZES = {"sizes": [(96, 1024), (1024,)]}
ROWS = {"rows": 128, "width": 256}
CLIPS = {"B": 15, "S": 249_600, "C": 512}  # of speech base, 15.6 s each
FEW_CLIPS = {"B": 1, "S": 4005, "C": 64, "device": "cpu"}
TABLE = ("eager launches", "eager GB", "ours launches", "ours GB")


def _predicted(*values: float) -> dict[str, float]:
    return dict(zip(TABLE, values, strict=True))


COSTS = [
    Cost("masked_smooth_l1", "speech base", "masked_smooth_l1", {"rows": 5230, "width": 768}, {"rows": 64}),
    Cost(
        "masked_smooth_l1", "speech base, mask", "masked_smooth_l1",
        {"rows": 11700, "width": 768, "kept": 0.447}, {"rows": 64},
    ),
    Cost("layer_targets", "speech base, instance K=8", "layer_targets", SPEECH, FRAMES),
    Cost("layer_targets", "text, layer K=10", "layer_targets", TEXT, FRAMES),
    Cost("data2vec_loss", "speech base, instance K=8", "data2vec_loss", SPEECH, FRAMES, _predicted(83, 3.17, 4, 0.22)),
    Cost("data2vec_loss", "text, layer K=10", "data2vec_loss", TEXT, FRAMES, _predicted(35, 1.68, 2, 0.05)),
    Cost(
        "data2vec_loss", "vision, layer K=6, post-LN", "data2vec_loss",
        VISION | {"dtype": FP32}, FRAMES, _predicted(24, 3.56, 2, 0.33),
    ),
    Cost(
        "ema_update_", "94 M, bf16 student and copy", "ema_update",
        {"sizes": BASE, "student": BF16, "copies": BF16}, SIZES, _predicted(816, 2.8, 1, 1.24),
    ),
    Cost("ema_update_", "94 M, bf16 copy", "ema_update", {"sizes": BASE, "copies": BF16}, SIZES),
    Cost(
        "adamw_ema_", "94 M, bf16 copy", "adamw_ema",
        {"sizes": BASE, "ema_copies": BF16}, SIZES, _predicted(1293, 12.92, 1, 3.57),
    ),
    Cost("l2_norm", "94 M, bf16", "l2_norm", {"sizes": BASE, "dtype": BF16}, SIZES),
    Cost("bias_gelu", "speech base", "bias_gelu", {"rows": 11700, "width": 3072}, ROWS, _predicted(6, 1.58, 2, 0.36)),
    Cost("layer_norm_gelu", "speech conv 1", "layer_norm_gelu", {"rows": 374400, "width": 512}, ROWS),
    Cost(
        "residual_dropout_layer_norm", "speech base", "residual_dropout_layer_norm",
        {"shape": (15, 780, 768)}, {"shape": (2, 64, 256)}, _predicted(8, 0.306, 3, 0.144),
    ),
    Cost(
        "residual_dropout_layer_norm", "speech base teacher", "residual_dropout_layer_norm",
        {"shape": (15, 780, 768), "p": 0.0, "grad": False}, {"shape": (2, 64, 256)},
    ),
    Cost(
        "residual_dropout_layer_norm", "vision, LayerScale, DropPath", "residual_dropout_layer_norm",
        {"shape": (128, 197, 768), **LAYER_SCALE}, {"shape": (2, 64, 256)}, _predicted(18, 2.44, 3, 0.58),
    ),
    Cost("bias_attention", "vision base", "bias_attention", VIT_BASE | {"p": 0.05}, {"B": 2, "T": 70, "H": 2}),
    Cost(
        "conv0_norm_gelu", "speech base, layer norm", "conv_encoder",
        CLIPS | {"first": 0, "last": 0}, FEW_CLIPS, _predicted(22, 33.03, 2, 1.56),
    ),
    Cost(
        "conv0_norm_gelu", "speech base, group norm", "conv_encoder",
        CLIPS | {"first": 0, "last": 0, "norm": "group"}, FEW_CLIPS,
    ),
    Cost("strided_conv", "speech conv 1, norm and GELU", "conv_encoder", CLIPS | {"first": 1, "last": 1}, FEW_CLIPS),
    Cost(
        "strided_conv", "speech conv 1-6, norm and GELU", "conv_encoder",
        CLIPS | {"first": 1, "last": 6}, FEW_CLIPS, _predicted(156, 57.42, 44, 12.07),
    ),
    Cost("conv_encoder", "speech base, layer norm", "conv_encoder", CLIPS | {"first": 0, "last": 6}, FEW_CLIPS),
    Cost(
        "conv_encoder", "speech base, group norm", "conv_encoder",
        CLIPS | {"first": 0, "last": 6, "norm": "group"}, FEW_CLIPS,
    ),
    Cost(
        "pos_conv", "speech base, 5 x k19", "pos_conv",
        {"B": 15, "T": 780, "C": 768, "kernel": 19, "depth": 5}, {"B": 2, "T": 70, "C": 512, "device": "cpu"},
    ),
    Cost(
        "pos_conv", "speech base, k128", "pos_conv",
        {"B": 15, "T": 780, "C": 768, "kernel": 128, "depth": 1}, {"B": 2, "T": 70, "C": 512, "device": "cpu"},
    ),
]  # fmt: skip

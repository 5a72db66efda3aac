"""The public ops at the shapes of real recipes, as plain functions that can be recorded or counted.

Every builder allocates its inputs (undefined memory, so nothing is touched) and returns the call; the call includes
the backward where there is one. Shapes are those of one GPU: speech base 15 clips x 780 frames, large 4 x 938,
text 16 x 512 tokens, vision 128 (64) images x 196 patches.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import checkout  # noqa: F401
import torch
from torch import Tensor

from d2v_fast import ops
from d2v_fast.kernels import chunks

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """``vector`` is False where rows do not start on a 16-byte boundary, so that no wide access is possible."""

    op: str
    name: str
    build: Callable[..., Call]
    arguments: dict[str, Any] = field(default_factory=dict)
    vector: bool = True

    def call(self) -> Call:
        return self.build(**self.arguments)


def masked_rows(batch: int, frames: int, fraction: float) -> Tensor:
    """Sorted flat positions of the masked frames, spread evenly over the batch."""
    return torch.linspace(0, batch * frames - 1, round(batch * frames * fraction)).long()


def backward(function: Callable[[], Tensor], *inputs: Tensor) -> Call:
    """Forward and backward with an upstream gradient that is there already."""
    grads: list[Tensor] = []

    def call() -> None:
        out = function()
        outs = out if isinstance(out, tuple) else (out,)
        if not grads:
            grads.extend(torch.empty_like(x) for x in outs)
        torch.autograd.grad(outs, inputs, grads)

    return call


def masked_smooth_l1(rows: int, width: int, pred=BF16, target=FP32, beta=0.0, kept=1.0) -> Call:
    p = torch.empty(rows, width, dtype=pred, requires_grad=True)
    y = torch.empty(rows, width, dtype=target)
    mask = torch.arange(rows) < round(kept * rows) if kept < 1 else None
    return backward(lambda: ops.masked_smooth_l1(p, y, mask, beta=beta), p)


def layer_targets(
    shape: tuple[int, int, int],
    num_layers: int,
    fraction: float | None,
    dtype=BF16,
    lengths=False,
    layout="BTC",
    index=torch.int64,
    **options: Any,
) -> Call:
    batch, frames, _ = shape
    stored = (frames, batch, shape[2]) if layout == "TBC" else shape
    layers = [torch.empty(stored, dtype=dtype) for _ in range(num_layers)]
    options |= {"layout": layout, "lengths": torch.full((batch,), frames) if lengths else None}
    positions = None if fraction is None else masked_rows(batch, frames, fraction).to(index)
    return lambda: ops.layer_targets(layers, positions=positions, **options)


def data2vec_loss(
    shape: tuple[int, int, int],
    num_layers: int,
    fraction: float,
    dtype=BF16,
    pred=BF16,
    clones=1,
    lengths=False,
    grad=True,
    index=torch.int64,
    **options: Any,
) -> Call:
    batch, frames, width = shape
    layers = [torch.empty(shape, dtype=dtype) for _ in range(num_layers)]
    positions = masked_rows(batch * clones, frames, fraction).to(index)
    p = torch.empty(len(positions), width, dtype=pred, requires_grad=grad)
    if clones > 1:
        options["target_batch_index"] = torch.arange(batch, dtype=index).repeat_interleave(clones)
    options["lengths"] = torch.full((batch,), frames, dtype=index) if lengths else None

    def loss() -> Tensor:
        return ops.data2vec_loss(p, layers, positions, **options).loss

    return backward(loss, p) if grad else loss


def model_sizes(params: int, num_tensors: int) -> list[tuple[int, ...]]:
    """``num_tensors`` shapes with ``params`` elements in all: matrices, and as many biases of 768."""
    matrices = num_tensors // 2
    rows = (params - 768 * (num_tensors - matrices)) // (matrices * 768)
    return [(rows, 768)] * matrices + [(768,)] * (num_tensors - matrices)


def _model(sizes: list[tuple[int, ...]], dtype: torch.dtype = FP32) -> list[Tensor]:
    return [torch.empty(size, dtype=dtype) for size in sizes]


def ema_update(sizes: list[tuple[int, ...]], student=FP32, copies=None, unaligned=False) -> Call:
    teacher, source = _model(sizes), _model(sizes, student)
    if unaligned:
        teacher = [torch.empty(x.numel() + 1)[1:].view(x.shape) for x in teacher]
    low = None if copies is None else _model(sizes, copies)
    decay = torch.tensor(0.999, dtype=torch.float64)
    return lambda: ops.ema_update_(teacher, source, decay, copies=low)


def int_tensor() -> Call:
    """The writer of small tables: on a CPU its launcher makes them without it."""
    first = torch.empty(chunks._VALUES_PER_LAUNCH, dtype=torch.int64)
    values = (chunks._ODD_LARGE,) * len(first)
    return lambda: chunks._write_kernel[(1,)](first, values, 0, BLOCK=chunks._VALUES_BLOCK, num_warps=1)


def l2_norm(sizes: list[tuple[int, ...]], dtype=FP32) -> Call:
    tensors = _model(sizes, dtype)
    return lambda: ops.l2_norm(tensors)


def adamw_ema(
    sizes: list[tuple[int, ...]], grad=FP32, ema=True, param_copies=None, ema_copies=None, **options: Any
) -> Call:
    params, first, second = (_model(sizes) for _ in range(3))
    grads = _model(sizes, grad)
    options |= {"grad_scale": torch.ones(()), "skip": torch.zeros(())}
    if param_copies is not None:
        options["param_copies"] = _model(sizes, param_copies)
    if ema:
        options |= {"ema": _model(sizes), "ema_decay": torch.tensor(0.999, dtype=torch.float64)}
        options["ema_copies"] = None if ema_copies is None else _model(sizes, ema_copies)
    decays = [0.01 if len(size) > 1 else 0.0 for size in sizes]
    step, lr = torch.zeros(()), torch.tensor(1e-3, dtype=torch.float64)
    return lambda: ops.adamw_ema_(params, grads, first, second, step, lr=lr, weight_decay=decays, **options)


def _leaf(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def bias_gelu(rows: int, width: int, dtype=BF16, bias=True) -> Call:
    x = _leaf(rows, width, dtype=dtype)
    b = _leaf(width) if bias else None
    return backward(lambda: ops.bias_gelu(x, b), *((x, b) if bias else (x,)))


def layer_norm_gelu(rows: int, width: int, dtype=BF16, weight=True, bias=True) -> Call:
    x = _leaf(rows, width, dtype=dtype)
    w, b = (_leaf(width) if there else None for there in (weight, bias))
    return backward(lambda: ops.layer_norm_gelu(x, w, b), *(v for v in (x, w, b) if v is not None))


def residual_dropout_layer_norm(
    shape: tuple[int, int, int],
    dtype=BF16,
    residual=BF16,
    p=0.1,
    column_scale=False,
    row_scale=False,
    return_residual=False,
    bias=True,
    grad=True,
) -> Call:
    x, r = _leaf(*shape, dtype=dtype), _leaf(*shape, dtype=residual)
    weight, b, scale = (_leaf(shape[2]) if there else None for there in (True, bias, column_scale))
    options = {"p": p, "column_scale": scale, "return_residual": return_residual}
    options["row_scale"] = torch.ones(shape[0]) if row_scale else None

    def call():
        return ops.residual_dropout_layer_norm(x, r, weight, b, **options)

    if not grad:
        return torch.no_grad()(call)
    return backward(call, *(v for v in (x, r, weight, b, scale) if v is not None))


def bias_attention(
    B: int, T: int, H: int, D: int, dtype=BF16, bias=None, slopes=False, lengths=False, p=0.0, grad=True
) -> Call:
    """``bias``: its dtype; queries, keys and values are slices of one tensor, the bias one of padded rows."""
    q, k, v = (x.requires_grad_() for x in torch.empty(B, T, 3, H, D, dtype=dtype).unbind(2))
    table = None if bias is None else torch.empty(H, T, T + -T % 16, dtype=bias)[..., :T].requires_grad_()
    options: dict[str, Any] = {"p": p, "lengths": torch.full((B,), T, dtype=torch.int32) if lengths else None}
    if slopes:
        options |= {"slopes": _leaf(H), "positions": torch.zeros(B, T, dtype=torch.int32)}

    def call() -> Tensor:
        return ops.bias_attention(q, k, v, table, **options)

    if not grad:
        return torch.no_grad()(call)
    return backward(call, *(x for x in (q, k, v, table, options.get("slopes")) if x is not None))


def _case(op: str, name: str, build: Callable[..., Call], vector: bool = True, **arguments: Any) -> Case:
    return Case(op, name, build, arguments, vector)


SPEECH = {"shape": (15, 780, 768), "num_layers": 8, "fraction": 0.447}
EVERYWHERE = SPEECH | {"fraction": None}
SPEECH_LARGE = {"shape": (4, 938, 1024), "num_layers": 8, "fraction": 0.447}
TEXT = {"shape": (16, 512, 768), "num_layers": 10, "fraction": 0.15, "norm": "layer"}
VISION = {"shape": (128, 196, 768), "num_layers": 6, "fraction": 120 / 196, "norm": "layer", "post_norm": "layer"}
VISION_LARGE = VISION | {"shape": (64, 196, 1024)}
BASE = model_sizes(94_000_000, 204)

LAYER_SCALE = {"residual": FP32, "p": 0.0, "column_scale": True, "row_scale": True, "return_residual": True}

VIT_BASE = {"B": 128, "T": 197, "H": 12, "D": 64, "bias": BF16}
VIT_LENGTHS = VIT_BASE | {"bias": FP16}

CASES = [
    _case("masked_smooth_l1", "bf16 768", masked_smooth_l1, rows=5230, width=768),
    _case("masked_smooth_l1", "bf16 768 mask", masked_smooth_l1, rows=11700, width=768, kept=0.447),
    _case("masked_smooth_l1", "fp32 1024 beta", masked_smooth_l1, rows=1680, width=1024, pred=FP32, beta=0.5),
    _case("masked_smooth_l1", "fp16 1024 mask", masked_smooth_l1, rows=3752, width=1024, pred=FP16, kept=0.447),
    _case("masked_smooth_l1", "bf16 1536", masked_smooth_l1, rows=3752, width=1536),
    _case("layer_targets", "speech bf16", layer_targets, **SPEECH),
    _case("layer_targets", "speech bf16, everywhere, no norm", layer_targets, **EVERYWHERE, norm="none"),
    _case("layer_targets", "speech bf16, everywhere, layer norm", layer_targets, **EVERYWHERE, norm="layer"),
    _case("layer_targets", "speech fp16, int32 positions", layer_targets, **SPEECH, dtype=FP16, index=torch.int32),
    _case("layer_targets", "speech fp32 batch norm", layer_targets, **SPEECH, dtype=FP32, norm="batch"),
    _case("layer_targets", "speech bf16 post instance", layer_targets, **SPEECH, post_norm="instance"),
    _case("layer_targets", "speech bf16 post layer", layer_targets, **SPEECH, post_norm="layer"),
    _case(
        "layer_targets", "large fp16 TBC lengths", layer_targets, **SPEECH_LARGE, dtype=FP16, layout="TBC", lengths=True
    ),
    _case("layer_targets", "text bf16", layer_targets, **TEXT),
    _case("layer_targets", "vision fp32", layer_targets, **VISION, dtype=FP32),
    _case("layer_targets", "vision large fp32", layer_targets, **VISION_LARGE, dtype=FP32),
    _case("layer_targets", "text bf16 1536", layer_targets, **TEXT | {"shape": (16, 512, 1536)}),
    _case("layer_targets", "text fp32 2048", layer_targets, **TEXT | {"shape": (16, 512, 2048)}, dtype=FP32),
    _case("layer_targets", "width 100", layer_targets, False, shape=(15, 780, 100), num_layers=8, fraction=0.447),
    _case("data2vec_loss", "speech bf16", data2vec_loss, **SPEECH),
    _case("data2vec_loss", "speech fp16 beta, pred fp32", data2vec_loss, **SPEECH, dtype=FP16, pred=FP32, beta=0.5),
    _case("data2vec_loss", "speech fp32 lengths", data2vec_loss, **SPEECH, dtype=FP32, lengths=True),
    _case("data2vec_loss", "speech bf16 post layer", data2vec_loss, **SPEECH, post_norm="layer"),
    _case("data2vec_loss", "speech bf16 post instance", data2vec_loss, **SPEECH, post_norm="instance"),
    _case("data2vec_loss", "large bf16", data2vec_loss, **SPEECH_LARGE),
    _case("data2vec_loss", "large fp32 batch norm", data2vec_loss, **SPEECH_LARGE, dtype=FP32, norm="batch"),
    _case("data2vec_loss", "text bf16, 8 clones", data2vec_loss, **TEXT, clones=8),
    _case("data2vec_loss", "vision fp32, pred bf16", data2vec_loss, **VISION, dtype=FP32),
    _case("data2vec_loss", "vision large bf16", data2vec_loss, **VISION_LARGE),
    _case("data2vec_loss", "speech bf16, no norm", data2vec_loss, **SPEECH, norm="none"),
    _case(
        "data2vec_loss",
        "large fp16, int32",
        data2vec_loss,
        **SPEECH_LARGE,
        dtype=FP16,
        pred=FP16,
        index=torch.int32,
        clones=8,
        lengths=True,
    ),
    _case("data2vec_loss", "text bf16, no gradient", data2vec_loss, **TEXT, grad=False),
    _case("data2vec_loss", "text bf16 1536", data2vec_loss, **TEXT | {"shape": (16, 512, 1536)}),
    _case("data2vec_loss", "text fp32 2048", data2vec_loss, **TEXT | {"shape": (16, 512, 2048)}, dtype=FP32),
    _case(
        "data2vec_loss",
        "speech bf16 2048 post layer",
        data2vec_loss,
        **SPEECH | {"shape": (4, 938, 2048)},
        post_norm="layer",
    ),
    _case("data2vec_loss", "width 100", data2vec_loss, False, shape=(15, 780, 100), num_layers=8, fraction=0.447),
    _case("ema_update_", "table of tensors", int_tensor),
    _case("ema_update_", "fp32", ema_update, sizes=BASE),
    _case("ema_update_", "fp32, bf16 copy", ema_update, sizes=BASE, copies=BF16),
    _case("ema_update_", "bf16, bf16 copy", ema_update, sizes=BASE, student=BF16, copies=BF16),
    _case("ema_update_", "fp16, fp16 copy", ema_update, sizes=BASE, student=FP16, copies=FP16),
    _case("ema_update_", "fp32 unaligned", ema_update, False, sizes=BASE, unaligned=True),
    _case("adamw_ema_", "fp32", adamw_ema, sizes=BASE, ema=False),
    _case("adamw_ema_", "fp32, ema, bf16 copy", adamw_ema, sizes=BASE, ema_copies=BF16),
    _case(
        "adamw_ema_", "bf16, ema, two bf16 copies", adamw_ema, sizes=BASE, grad=BF16, param_copies=BF16, ema_copies=BF16
    ),
    _case(
        "adamw_ema_",
        "fp16, ema, fp16 copy, fairseq",
        adamw_ema,
        sizes=BASE,
        grad=FP16,
        param_copies=FP16,
        eps_mode="fairseq",
    ),
    _case("l2_norm", "fp32", l2_norm, sizes=BASE),
    _case("l2_norm", "bf16", l2_norm, sizes=BASE, dtype=BF16),
    _case("bias_gelu", "bf16 3072", bias_gelu, rows=11700, width=3072),
    _case("bias_gelu", "fp32 4096", bias_gelu, rows=3752, width=4096, dtype=FP32),
    _case("bias_gelu", "fp16 3072, no bias", bias_gelu, rows=8192, width=3072, dtype=FP16, bias=False),
    _case("bias_gelu", "bf16 1536", bias_gelu, rows=11700, width=1536),
    _case("bias_gelu", "bf16 2048", bias_gelu, rows=11700, width=2048),
    _case("layer_norm_gelu", "bf16 512", layer_norm_gelu, rows=374400, width=512),
    _case("layer_norm_gelu", "bf16 768, no affine", layer_norm_gelu, rows=11700, width=768, weight=False, bias=False),
    _case("layer_norm_gelu", "fp32 1024", layer_norm_gelu, rows=3752, width=1024, dtype=FP32),
    _case("layer_norm_gelu", "bf16 768, no bias", layer_norm_gelu, rows=11700, width=768, bias=False),
    _case("layer_norm_gelu", "bf16 1536", layer_norm_gelu, rows=3752, width=1536),
    _case("layer_norm_gelu", "fp32 2048", layer_norm_gelu, rows=3752, width=2048, dtype=FP32),
    _case("residual_dropout_layer_norm", "bf16 768", residual_dropout_layer_norm, shape=(15, 780, 768)),
    _case(
        "residual_dropout_layer_norm",
        "bf16 768, teacher",
        residual_dropout_layer_norm,
        shape=(15, 780, 768),
        p=0.0,
        grad=False,
    ),
    _case(
        "residual_dropout_layer_norm",
        "bf16 768, no bias",
        residual_dropout_layer_norm,
        shape=(15, 780, 768),
        bias=False,
    ),
    _case("residual_dropout_layer_norm", "bf16 1536", residual_dropout_layer_norm, shape=(4, 938, 1536)),
    _case("residual_dropout_layer_norm", "bf16 2048", residual_dropout_layer_norm, shape=(4, 938, 2048)),
    _case(
        "residual_dropout_layer_norm",
        "bf16 768, vision, dropout",
        residual_dropout_layer_norm,
        shape=(128, 197, 768),
        **LAYER_SCALE | {"p": 0.1},
    ),
    _case(
        "residual_dropout_layer_norm",
        "bf16 2048, vision, dropout",
        residual_dropout_layer_norm,
        shape=(64, 197, 2048),
        **LAYER_SCALE | {"p": 0.1},
    ),
    _case(
        "residual_dropout_layer_norm",
        "fp16 1024",
        residual_dropout_layer_norm,
        shape=(4, 938, 1024),
        dtype=FP16,
        residual=FP16,
    ),
    _case(
        "residual_dropout_layer_norm",
        "fp32 768, pre-LN, no dropout",
        residual_dropout_layer_norm,
        shape=(16, 512, 768),
        dtype=FP32,
        residual=FP32,
        p=0.0,
        return_residual=True,
    ),
    _case(
        "residual_dropout_layer_norm",
        "bf16 768, vision",
        residual_dropout_layer_norm,
        shape=(128, 197, 768),
        **LAYER_SCALE,
    ),
    _case(
        "residual_dropout_layer_norm",
        "bf16 1024, vision",
        residual_dropout_layer_norm,
        shape=(64, 197, 1024),
        **LAYER_SCALE,
    ),
    _case("bias_attention", "bf16 64, vision base", bias_attention, **VIT_BASE, p=0.05),
    _case("bias_attention", "bf16 64, no dropout", bias_attention, **VIT_BASE),
    _case("bias_attention", "bf16 64, fp32 bias", bias_attention, **VIT_BASE | {"bias": FP32}, p=0.05),
    _case("bias_attention", "bf16 64, ALiBi", bias_attention, B=64, T=512, H=12, D=64, slopes=True, p=0.1),
    _case("bias_attention", "bf16 80, vision huge", bias_attention, **VIT_BASE | {"D": 80}, p=0.05),
    _case("bias_attention", "fp16 64, lengths", bias_attention, **VIT_LENGTHS, dtype=FP16, lengths=True),
    _case("bias_attention", "fp32 64", bias_attention, **VIT_BASE | {"bias": FP32}, dtype=FP32, p=0.05),
]

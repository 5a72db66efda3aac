"""The public ops at the shapes of real recipes, as plain functions that can be recorded or counted.

Every builder allocates its inputs (undefined memory, so nothing is touched) and returns the call; the call includes
the backward where there is one. Shapes are those of one GPU: speech base 15 clips x 780 frames, large 4 x 938,
text 16 x 512 tokens, vision 128 (64) images x 197 tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from d2v_fast import ops

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


def masked_smooth_l1(rows: int, width: int, pred=BF16, target=FP32, beta=0.0, masked=False, function=None) -> Call:
    function = function or ops.masked_smooth_l1
    p = torch.empty(rows, width, dtype=pred, requires_grad=True)
    y = torch.empty(rows, width, dtype=target)
    mask = torch.ones(rows, dtype=torch.bool) if masked else None
    return backward(lambda: function(p, y, mask, beta=beta), p)


def layer_targets(
    shape: tuple[int, int, int],
    num_layers: int,
    fraction: float,
    dtype=BF16,
    lengths=False,
    layout="BTC",
    **options: Any,
) -> Call:
    batch, frames, _ = shape
    stored = (frames, batch, shape[2]) if layout == "TBC" else shape
    layers = [torch.empty(stored, dtype=dtype) for _ in range(num_layers)]
    options |= {"layout": layout, "lengths": torch.full((batch,), frames) if lengths else None}
    positions = masked_rows(batch, frames, fraction)
    return lambda: ops.layer_targets(layers, positions=positions, **options)


def data2vec_loss(
    shape: tuple[int, int, int],
    num_layers: int,
    fraction: float,
    dtype=BF16,
    pred=BF16,
    clones=1,
    lengths=False,
    **options: Any,
) -> Call:
    batch, frames, width = shape
    layers = [torch.empty(shape, dtype=dtype) for _ in range(num_layers)]
    positions = masked_rows(batch * clones, frames, fraction)
    p = torch.empty(len(positions), width, dtype=pred, requires_grad=True)
    if clones > 1:
        options["target_batch_index"] = torch.arange(batch).repeat_interleave(clones)
    options["lengths"] = torch.full((batch,), frames) if lengths else None
    return backward(lambda: ops.data2vec_loss(p, layers, positions, **options).loss, p)


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


def _case(op: str, name: str, build: Callable[..., Call], vector: bool = True, **arguments: Any) -> Case:
    return Case(op, name, build, arguments, vector)


SPEECH = {"shape": (15, 780, 768), "num_layers": 8, "fraction": 0.447}
SPEECH_LARGE = {"shape": (4, 938, 1024), "num_layers": 8, "fraction": 0.447}
TEXT = {"shape": (16, 512, 768), "num_layers": 10, "fraction": 0.15, "norm": "layer"}
VISION = {"shape": (128, 197, 768), "num_layers": 6, "fraction": 0.61, "norm": "layer", "post_norm": "layer"}
VISION_LARGE = VISION | {"shape": (64, 197, 1024)}
BASE = model_sizes(94_000_000, 204)

CASES = [
    _case("masked_smooth_l1", "bf16 768", masked_smooth_l1, rows=5230, width=768),
    _case("masked_smooth_l1", "bf16 768 mask", masked_smooth_l1, rows=11700, width=768, masked=True),
    _case("masked_smooth_l1", "fp32 1024 beta", masked_smooth_l1, rows=1680, width=1024, pred=FP32, beta=0.5),
    _case("masked_smooth_l1", "fp16 1024 mask", masked_smooth_l1, rows=3752, width=1024, pred=FP16, masked=True),
    _case("layer_targets", "speech bf16", layer_targets, **SPEECH),
    _case("layer_targets", "speech fp32 batch norm", layer_targets, **SPEECH, dtype=FP32, norm="batch"),
    _case("layer_targets", "speech bf16 post instance", layer_targets, **SPEECH, post_norm="instance"),
    _case("layer_targets", "speech bf16 post layer", layer_targets, **SPEECH, post_norm="layer"),
    _case(
        "layer_targets", "large fp16 TBC lengths", layer_targets, **SPEECH_LARGE, dtype=FP16, layout="TBC", lengths=True
    ),
    _case("layer_targets", "text bf16", layer_targets, **TEXT),
    _case("layer_targets", "vision fp32", layer_targets, **VISION, dtype=FP32),
    _case("layer_targets", "vision large fp32", layer_targets, **VISION_LARGE, dtype=FP32),
    _case("layer_targets", "width 100", layer_targets, False, shape=(15, 780, 100), num_layers=8, fraction=0.447),
    _case("ema_update_", "fp32", ema_update, sizes=BASE),
    _case("ema_update_", "fp32, bf16 copy", ema_update, sizes=BASE, copies=BF16),
    _case("ema_update_", "bf16, bf16 copy", ema_update, sizes=BASE, student=BF16, copies=BF16),
    _case("ema_update_", "fp32 unaligned", ema_update, False, sizes=BASE, unaligned=True),
]

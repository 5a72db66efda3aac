"""A training step as a reader of PyTorch's manual would write it today, on our parameters.

Our modules with every op of ours replaced by plain PyTorch (``modern_eager.py``), PyTorch's attention, nothing left
out, fused AdamW, and the teacher's average by ``_foreach_lerp_``. ``torch.compile`` takes it as it is.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import patch

import modern_eager
import torch
from common import DEVICE
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from d2v_fast.nn import Batch, Data2Vec, Data2VecConfig, SpeechFrontEnd, block, data2vec, positions
from d2v_fast.nn.config import PruneConfig
from d2v_fast.ops import LossOutput
from d2v_fast.train.optim import OptimConfig, build_optimizer


def plain_config(config: Data2VecConfig) -> Data2VecConfig:
    """The same model with PyTorch's choice of attention and nothing left out."""
    off = PruneConfig(**dict.fromkeys(vars(PruneConfig()), False))
    return replace(config, encoder=replace(config.encoder, attention_backend="sdpa"), prune=off)


def _bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return modern_eager.bias_gelu(x, bias)["y"]


def _residual_dropout_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, p: float = 0.0, eps: float,
    column_scale: Tensor | None = None, row_scale: Tensor | None = None, return_residual: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    out = modern_eager.residual_dropout_layer_norm(
        x, residual, weight, bias, column_scale, row_scale, p=p, eps=eps, return_residual=return_residual
    )
    return (out["y"], out["h"]) if return_residual else out["y"]


def _pos_conv(x: Tensor, weights: list[Tensor], biases: list[Tensor], *, groups: int, norm: bool, segments: None):
    return modern_eager.pos_conv(x, weights, biases, groups=groups, norm=norm, eps=1e-5)["y"]


def _features(frontend: SpeechFrontEnd, waveforms: Tensor) -> Tensor:
    convs = [layer.conv for layer in frontend.convs]
    norms = [layer.norm for layer in frontend.convs]
    y = modern_eager.conv_encoder(
        waveforms, [c.weight for c in convs], [c.bias for c in convs], [n.weight for n in norms],
        [n.bias for n in norms], strides=[stride for *_, stride in frontend.config.conv_layers], norm="layer", eps=1e-5,
    )["y"]  # fmt: skip
    return frontend.proj(frontend.norm(y))


def _data2vec_loss(pred: Tensor, layers: list[Tensor], positions: Tensor, *, lengths: None, **options) -> LossOutput:
    return LossOutput(
        **modern_eager.data2vec_loss(pred, layers, positions, None, None, **options), num_masked=len(pred)
    )


@contextmanager
def plain_ops() -> Iterator[None]:
    """Inside, our modules compute with PyTorch's ops alone."""
    with ExitStack() as stack:
        for owner, name, function in (
            (block, "bias_gelu", _bias_gelu),
            (block, "residual_dropout_layer_norm", _residual_dropout_layer_norm),
            (positions, "pos_conv", _pos_conv),
            (SpeechFrontEnd, "features", _features),
            (data2vec, "data2vec_loss", _data2vec_loss),
        ):
            stack.enter_context(patch.object(owner, name, function))
        yield


def plain_step(model: Data2Vec, optim: OptimConfig, compiled: bool = False) -> Callable[[Batch], None]:
    """One update of ``model``, which :func:`plain_config` made."""
    forward = torch.compile(model) if compiled else model
    students, averages = zip(*model.teacher.averages().items(), strict=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(model, replace(optim, one_pass=False))  # torch.optim.AdamW, fused

    def step(batch: Batch) -> None:
        with plain_ops(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            loss = forward(batch).loss / batch.num_masked
        loss.backward()
        clip_grad_norm_(parameters, optim.clip_norm or math.inf, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(averages, students, 1 - model.config.ema.decay)

    return step

"""Computing activations again in backward instead of keeping them.

``EncoderConfig.checkpointing`` "selective" leaves out what is cheap to compute again, the outputs of norms and of GELU
that a linear layer would keep: :func:`linear` keeps what they are computed from, which their own backward keeps anyway.
No random number is drawn again. "full" keeps a layer's input, and its random numbers or the state they came from.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


class Again(NamedTuple):
    """How to compute a tensor once more, bit by bit the same: ``function(*sources)``."""

    function: Callable[..., Tensor]
    sources: tuple[Tensor | None, ...]


class _Linear(torch.autograd.Function):
    """``x @ weight.T + bias`` that computes x again in backward."""

    @staticmethod
    def forward(ctx, function, x, weight, bias, *sources):
        ctx.save_for_backward(weight, *sources)
        ctx.function, ctx.dtype = function, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        weight, *sources = ctx.saved_tensors
        x = ctx.function(*sources).to(grad.dtype).flatten(0, -2)
        grad_rows = grad.flatten(0, -2)
        grad_x = (grad_rows @ weight.to(grad.dtype)).view(*grad.shape[:-1], -1).to(ctx.dtype)
        grad_weight = (grad_rows.t() @ x).to(weight.dtype)
        grad_bias = None if ctx.bias_dtype is None else grad_rows.sum(0).to(ctx.bias_dtype)
        return None, grad_x, grad_weight, grad_bias, *(None,) * len(sources)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, again: Again | None = None) -> Tensor:
    """``F.linear(x, weight, bias)``; with ``again`` backward computes x from its sources, which are kept instead."""
    if again is None or not torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    return _Linear.apply(again.function, x, weight, bias, *again.sources)


def checkpointed(function: Callable[..., Any], *tensors: Tensor, random: bool) -> Any:
    """``function(*tensors)``, computed again in backward; ``random``: it draws random numbers.

    While a CUDA graph is captured, generators can be neither read nor set: what they draw is kept there, with the
    output of attention, whose dropout is drawn inside of it.
    """
    if capturing(tensors[0]) and random:
        contexts = partial(create_selective_checkpoint_contexts, _keep_what_is_drawn)
        options = {"preserve_rng_state": False, "context_fn": contexts}
    else:
        options = {"preserve_rng_state": random}
    return checkpoint(function, *tensors, use_reentrant=False, **options)


def capturing(x: Tensor) -> bool:
    """Whether what is computed from ``x`` goes into a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _keep_what_is_drawn(context: Any, op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    drawn = torch.Tag.nondeterministic_seeded in op.tags or "attention" in op.name() or "attn" in op.name()
    return CheckpointPolicy.MUST_SAVE if drawn else CheckpointPolicy.PREFER_RECOMPUTE

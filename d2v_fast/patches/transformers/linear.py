"""A linear layer with GELU behind it, and layers that may be checkpointed."""

import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.ops import bias_gelu
from d2v_fast.ops._rows import runs_reference


def linear_gelu(x: Tensor, linear: nn.Linear) -> Tensor:
    """GELU of ``linear(x)``; on the CPU, PyTorch's product has the bias for nothing."""
    if linear.bias is None or runs_reference(x, x.dtype):
        return bias_gelu(F.linear(x, linear.weight, linear.bias))
    return bias_gelu(F.linear(x, linear.weight), linear.bias)


def checkpointing(layer: nn.Module) -> bool:
    """Whether ``layer`` is to be computed again in backward; upstream's wrapper asks by the class's own method."""
    return layer.gradient_checkpointing and layer.training

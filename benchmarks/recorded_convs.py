"""The speech convolutions at the shapes of real recipes, ours and eager, as calls that can be recorded or counted.

As in the front-end, ours reads all clips from one row. Shapes are those of recorded_cases.py; ``device`` "meta" because
PyTorch's own products would otherwise be computed.
"""

from types import ModuleType

import conv_providers
from conv_shapes import channel_major, conv_inputs, conv_options, position_inputs, steps
from recorded_cases import BF16, Call, backward
from torch import Tensor


def _leaves(inputs: dict[str, Tensor | list], with_x: bool) -> list[Tensor]:
    lists = [value for name, value in inputs.items() if name != "x"]
    found = [x for values in lists for x in values if x is not None] + ([inputs["x"]] if with_x else [])
    return [x.requires_grad_() for x in found]


def conv_encoder(B: int, S: int, C: int, first: int, last: int, norm="layer", dtype=BF16, device="meta") -> Call:
    """Layers ``first`` to ``last`` on B clips of S samples."""
    inputs = conv_inputs(dtype, 1, B * steps(S, 0, first - 1)[-1], C, first, last, norm, device=device)
    leaves, options = _leaves(inputs, first > 0), conv_options(first, last, norm)
    return backward(lambda: conv_providers.conv_encoder(**inputs, **options)["y"], *leaves)


def eager_conv_encoder(module: ModuleType, B, S, C, first, last, norm="layer", dtype=BF16, device="meta") -> Call:
    """The same by ``module``, which keeps clips apart and channels in front."""
    inputs = conv_inputs(dtype, B, steps(S, 0, first - 1)[-1], C, first, last, norm, device=device)
    inputs = channel_major(inputs)
    leaves, options = _leaves(inputs, first > 0), conv_options(first, last, norm)
    return backward(lambda: module.conv_encoder(**inputs, **options)["y"], *leaves)


def pos_conv(B: int, T: int, C: int, kernel: int, depth: int, G=16, dtype=BF16, device="meta") -> Call:
    """``depth`` layers of ``kernel`` taps, with norm where there are several."""
    inputs = position_inputs(dtype, B, T, C, G, kernel, depth, device)
    leaves = _leaves(inputs, True)
    return backward(lambda: conv_providers.positions(**inputs, groups=G, norm=depth > 1, eps=1e-5)["y"], *leaves)


def eager_pos_conv(module: ModuleType, B, T, C, kernel, depth, G=16, dtype=BF16, device="meta") -> Call:
    """The same by ``module``."""
    inputs = position_inputs(dtype, B, T, C, G, kernel, depth, device)
    leaves = _leaves(inputs, True)
    return backward(lambda: module.pos_conv(**inputs, groups=G, norm=depth > 1, eps=1e-5)["y"], *leaves)

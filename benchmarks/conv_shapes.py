"""Inputs of the speech convolutions at the sizes of the published recipes, and the work that they cannot avoid."""

from itertools import pairwise
from math import sqrt

import shapes
import torch
from common import DEVICE
from driver import DTYPES, Case
from torch import Tensor

LAYERS = ((10, 5), *[(3, 2)] * 4, *[(2, 2)] * 2)  # kernel, stride of each layer
SAMPLES = 249_600  # 15.6 s at 16 kHz: 779 frames
Pass = tuple[int, int]  # FLOP, bytes


def steps(S: int, first: int, last: int) -> list[int]:
    """Steps before layer ``first`` (S of them) and after each layer up to ``last``."""
    counts = [S]
    for kernel, stride in LAYERS[first : last + 1]:
        counts.append((counts[-1] - kernel) // stride + 1)
    return counts


def conv_inputs(
    dtype: torch.dtype, B: int, S: int, C: int, first: int, last: int, norm: str = "layer", bias: bool = False,
    device: torch.device = DEVICE,
) -> dict[str, Tensor | list]:  # fmt: skip
    """Layers ``first`` to ``last`` on x: waveforms [B, S] in float32 for layer 0, else activations [B, S, C].

    Waveforms hold numbers that ``dtype`` can represent, so that all providers see the same ones. Lists have an entry
    a layer, None where there is no bias or, in the group-norm model after its first layer, no norm.
    """
    x = torch.randn(B, S, device=device) if first == 0 else torch.randn(B, S, C, device=device)
    x = x.to(dtype).float() if first == 0 else x.to(dtype)
    result: dict[str, Tensor | list] = {"x": x, "weights": [], "biases": [], "norm_weights": [], "norm_biases": []}
    for index in range(first, last + 1):
        kernel, _ = LAYERS[index]
        width = 1 if index == 0 else C
        normed = norm == "layer" or index == 0
        scale = sqrt(2 / (width * kernel))  # Kaiming's
        result["weights"].append((scale * torch.randn(C, width, kernel, device=device)).to(dtype))
        result["biases"].append((0.1 * torch.randn(C, device=device)).to(dtype) if bias else None)
        result["norm_weights"].append((1 + 0.1 * torch.randn(C, device=device)).to(dtype) if normed else None)
        result["norm_biases"].append((0.1 * torch.randn(C, device=device)).to(dtype) if normed else None)
    return result


def channel_major(inputs: dict) -> dict:
    """Activations as convolutions of [B, C, S] leave them; waveforms stay."""
    x = inputs["x"]
    return inputs if x.dim() == 2 else {**inputs, "x": shapes.channel_major(x)}


def conv_options(first: int, last: int, norm: str) -> dict:
    """What goes to every provider of such a case."""
    return {"strides": [stride for _, stride in LAYERS[first : last + 1]], "norm": norm, "eps": 1e-5}


def conv_case(
    name: str, B: int = 15, S: int = SAMPLES, C: int = 512, first: int = 0, last: int = 6, norm: str = "layer",
    dtype: str = "bfloat16", bias: bool = False, main: bool = True,
) -> Case:  # fmt: skip
    """A case of layers ``first`` to ``last``."""
    sizes = {"B": B, "S": S, "C": C, "first": first, "last": last, "norm": norm, "bias": bias}
    return Case(f"{name}, {B} x {S}", dtype, sizes, conv_options(first, last, norm), main)


def conv_passes(case: Case, mode: str) -> list[Pass]:
    """Layer 0 is one pass each way. The others are a product, and norm and GELU; backward two products and the latter.

    A norm needs whole rows, which come out of a product only when it is done, so its input is written and read again.
    """
    s, item = case.sizes, DTYPES[case.dtype].itemsize
    result: list[Pass] = []
    counts = steps(s["S"], s["first"], s["last"])
    for index, (before, after) in enumerate(pairwise(counts), start=s["first"]):
        kernel, _ = LAYERS[index]
        y = s["B"] * after * s["C"] * item
        if index == 0:
            wave = 4 * s["B"] * before
            flop = 2 * s["B"] * after * s["C"] * kernel
            result += [(flop, wave + y)] + [(2 * flop, wave + y)] * (mode != "fwd")
            continue
        x = s["B"] * before * s["C"] * item
        flop = 2 * s["B"] * after * s["C"] * s["C"] * kernel
        result += [(flop, x + y), (0, 2 * y)]
        if mode != "fwd":
            dgrad = (flop, y + x) if index > s["first"] or s["first"] > 0 else (0, 0)
            result += [(0, 3 * y), dgrad, (flop, x + y)]
    return result


def minimal_bytes(passes):
    """``Bench.minimal_bytes`` of a ``Bench.passes``: their sum. Weights, a thousandth of the activations, left out."""
    return lambda case, mode: sum(size for _, size in passes(case, mode))


def position_inputs(
    dtype: torch.dtype, B: int, T: int, C: int, G: int, kernel: int, depth: int, device: torch.device = DEVICE
) -> dict:  # fmt: skip
    """x [B, T, C], and ``depth`` grouped convolutions with bias."""
    scale = sqrt(1 / (C // G * kernel))
    weights = [(scale * torch.randn(C, C // G, kernel, device=device)).to(dtype) for _ in range(depth)]
    biases = [(0.1 * torch.randn(C, device=device)).to(dtype) for _ in range(depth)]
    return {"x": torch.randn(B, T, C, device=device).to(dtype), "weights": weights, "biases": biases}


def position_passes(case: Case, mode: str) -> list[Pass]:
    """One product a layer forward, two backward; norm and GELU can be fused into them, reading what they wrote."""
    s = case.sizes
    x = s["B"] * s["T"] * s["C"] * DTYPES[case.dtype].itemsize
    flop = 2 * s["B"] * s["T"] * s["C"] * (s["C"] // s["G"]) * s["kernel"]
    layer = [(flop, 2 * x)] + [(flop, 3 * x), (flop, 2 * x)] * (mode != "fwd")
    return layer * s["depth"]

"""The speech front-end, forward and backward in float32 on a CPU: fairseq's modules and ours, taking turns.

python benchmarks/cpu_frontend.py --threads 2      # 4 clips of 5 s; prints time of fairseq / time of ours

Convolutions, layer norm and projection. fairseq's convolutions are the real ``ConvFeatureExtractionModel`` where
ve-fairseq is installed (requirements/peers.txt), elsewhere its operators in their order (fairseq_eager.py). Both sides
get the same weights, and nothing is timed before results and gradients agree. Ratios are those of the fastest rounds;
on a machine that does other work, that of the processor time says more.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import zip_longest

import checkout  # noqa: F401
import fairseq_eager
import torch
from torch import Tensor, nn

from d2v_fast.nn import Data2VecConfig, SpeechFrontEnd

RATE = 16_000
TOLERANCE = 1e-4  # relative norm, float32
Stack = Callable[[Tensor], Tensor]


class FairseqOperators(nn.Module):
    """``ConvFeatureExtractionModel``, operator by operator."""

    def __init__(self, layers: list[tuple[int, int, int]], norm: str) -> None:
        super().__init__()
        normed = layers if norm == "layer" else layers[:1]
        inputs = [1, *(dim for dim, *_ in layers[:-1])]
        self.weights = nn.ParameterList(torch.empty(dim, n, k) for n, (dim, k, _) in zip(inputs, layers, strict=True))
        self.norm_weights = nn.ParameterList(torch.ones(dim) for dim, *_ in normed)
        self.norm_biases = nn.ParameterList(torch.zeros(dim) for dim, *_ in normed)
        self.options = {"strides": [stride for *_, stride in layers], "norm": norm, "eps": 1e-5}

    def forward(self, waveforms: Tensor) -> Tensor:
        """waveforms [B, S] -> [B, C, T]."""
        missing = [None] * (len(self.weights) - len(self.norm_weights))
        vectors = [*self.norm_weights, *missing], [*self.norm_biases, *missing]
        biases = [None] * len(self.weights)
        return fairseq_eager.conv_encoder(waveforms, list(self.weights), biases, *vectors, **self.options)["y"].mT

    def order(self) -> list[nn.Parameter]:
        """Weight, norm weight and norm bias of each layer, those that are there."""
        lists = zip_longest(self.weights, self.norm_weights, self.norm_biases)
        return [parameter for layer in lists for parameter in layer if parameter is not None]


def fairseq_module(layers: list[tuple[int, int, int]], norm: str) -> tuple[str, nn.Module, list[nn.Parameter]]:
    """Its name, the module, and its parameters layer by layer."""
    try:
        from fairseq.models.wav2vec.wav2vec2 import ConvFeatureExtractionModel
    except ImportError:
        module = FairseqOperators(layers, norm)
        return "fairseq's operators", module, module.order()
    module = ConvFeatureExtractionModel(layers, mode={"layer": "layer_norm", "group": "default"}[norm])
    return "fairseq's module", module, list(module.parameters())


class FairseqFrontEnd(nn.Module):
    """``feature_extractor``, ``layer_norm`` and ``post_extract_proj`` of ``Data2VecAudioModel``."""

    def __init__(self, layers: list[tuple[int, int, int]], dim: int, norm: str) -> None:
        super().__init__()
        self.name, self.convs, self.order = fairseq_module(layers, norm)
        self.norm = nn.LayerNorm(layers[-1][0])
        self.proj = nn.Linear(layers[-1][0], dim)

    def forward(self, waveforms: Tensor) -> Tensor:
        """waveforms [B, S] -> [B, T, dim]."""
        return self.proj(self.norm(self.convs(waveforms).transpose(1, 2)))


def build(width: int, norm: str = "layer") -> tuple[str, dict[str, tuple[Stack, list[nn.Parameter]]]]:
    """Both sides with the same weights: waveforms [B, S] to [B, T, C], and the parameters in the same order."""
    config = Data2VecConfig.speech()
    layers = [(width, kernel, stride) for _, kernel, stride in config.frontend.conv_layers]
    ours = SpeechFrontEnd(replace(config.frontend, conv_layers=tuple(layers), conv_norm=norm), config.encoder)
    theirs = FairseqFrontEnd(layers, config.encoder.dim, norm)
    parts = [ours.convs.parameters(), ours.norm.parameters(), ours.proj.parameters()]
    parameters = [parameter for part in parts for parameter in part]
    their_parameters = [*theirs.order, *theirs.norm.parameters(), *theirs.proj.parameters()]
    with torch.no_grad():
        for a, b in zip(their_parameters, parameters, strict=True):
            a.copy_(b)
    return theirs.name, {"fairseq": (theirs, their_parameters), "d2v_fast": (ours.features, parameters)}


def both_ways(stack: Stack, parameters: list[nn.Parameter], waveforms: Tensor) -> Callable[[], list[Tensor]]:
    """A call that returns the result and the gradients of all parameters, for a given upstream gradient."""
    upstream = torch.randn(stack(waveforms[:, :800]).shape[-1])

    def call() -> list[Tensor]:
        y = stack(waveforms)
        return [y.detach(), *torch.autograd.grad(y, parameters, upstream.expand(y.shape))]

    return call


def check(sides: dict[str, tuple[Stack, list[nn.Parameter]]], waveforms: Tensor) -> None:
    """Raise ValueError unless both sides compute the same."""
    results = []
    for stack, parameters in sides.values():
        torch.manual_seed(1)  # the same upstream gradient
        results.append(both_ways(stack, parameters, waveforms)())
    for index, (a, b) in enumerate(zip(*results, strict=True)):
        error = ((a - b).norm() / a.norm()).item()
        if not error <= TOLERANCE:
            raise ValueError(f"result {index} differs by {error:.1e}: nothing was timed")


@dataclass
class Taken:
    """Seconds of the fastest round: by the clock, and of processor time, which other programs do not lengthen."""

    wall: float = math.inf
    processor: float = math.inf


def measure(
    clips: int, seconds: float, budget: float, width: int = 512, norm: str = "layer"
) -> tuple[str, dict[str, Taken]]:
    """What fairseq is here, and the fastest round of each side; rounds are begun within ``budget`` seconds."""
    torch.manual_seed(0)
    name, sides = build(width, norm)
    waveforms = torch.randn(clips, round(seconds * RATE))
    check(sides, waveforms[:1, : RATE // 4])
    calls = {side: both_ways(stack, parameters, waveforms) for side, (stack, parameters) in sides.items()}
    best = {side: Taken() for side in calls}
    start = time.perf_counter()
    while True:
        for side, call in calls.items():
            wall, processor = time.perf_counter(), time.process_time()
            call()
            best[side].wall = min(best[side].wall, time.perf_counter() - wall)
            best[side].processor = min(best[side].processor, time.process_time() - processor)
        if time.perf_counter() - start > budget:
            return name, best


def ratios(best: dict[str, Taken]) -> tuple[float, float]:
    """fairseq's time over ours: by the clock, and of processor time."""
    theirs, ours = best["fairseq"], best["d2v_fast"]
    return theirs.wall / ours.wall, theirs.processor / ours.processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a clip")
    parser.add_argument("--norm", choices=("layer", "group"), default="layer", help="data2vec's, or wav2vec 2.0 base's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=60.0, help="seconds within which rounds are begun")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    name, best = measure(args.clips, args.seconds, args.budget, norm=args.norm)
    wall, processor = ratios(best)
    sizes = f"{args.clips} x {args.seconds:g} s, {args.norm} norm, {args.threads} threads"
    print(f"{sizes}: {name} / d2v_fast = {wall:.2f} (processor time {processor:.2f})")


if __name__ == "__main__":
    sys.exit(main())

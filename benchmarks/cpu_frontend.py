"""The speech convolutions, forward and backward in float32 on a CPU: fairseq's module and ours, taking turns.

python benchmarks/cpu_frontend.py --threads 2      # 4 clips of 5 s; prints time of fairseq / time of ours

fairseq's is the real ``ConvFeatureExtractionModel`` where ve-fairseq is installed (requirements/peers.txt), elsewhere
its operators in their order (fairseq_eager.py). Both get the same weights, and nothing is timed before results and
gradients agree. The ratio is that of the fastest rounds: on a busy machine single rounds say little.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import fairseq_eager
import torch
from common import interleaved
from torch import Tensor, nn

from d2v_fast.nn import Data2VecConfig, SpeechFrontEnd

RATE = 16_000
TOLERANCE = 1e-4  # relative norm, float32
Stack = Callable[[Tensor], Tensor]


class FairseqOperators(nn.Module):
    """``ConvFeatureExtractionModel`` in mode "layer_norm", operator by operator."""

    def __init__(self, layers: list[tuple[int, int, int]]) -> None:
        super().__init__()
        inputs = [1, *(dim for dim, *_ in layers[:-1])]
        self.weights = nn.ParameterList(torch.empty(dim, n, k) for n, (dim, k, _) in zip(inputs, layers, strict=True))
        self.norm_weights = nn.ParameterList(torch.ones(dim) for dim, *_ in layers)
        self.norm_biases = nn.ParameterList(torch.zeros(dim) for dim, *_ in layers)
        self.options = {"strides": [stride for *_, stride in layers], "norm": "layer", "eps": 1e-5}

    def forward(self, waveforms: Tensor) -> Tensor:
        """waveforms [B, S] -> [B, C, T]."""
        vectors = list(self.norm_weights), list(self.norm_biases)
        biases = [None] * len(self.weights)
        return fairseq_eager.conv_encoder(waveforms, list(self.weights), biases, *vectors, **self.options)["y"].mT

    def order(self) -> list[nn.Parameter]:
        """Weight, norm weight and norm bias of each layer."""
        lists = zip(self.weights, self.norm_weights, self.norm_biases, strict=True)
        return [parameter for layer in lists for parameter in layer]


def fairseq_module(layers: list[tuple[int, int, int]]) -> tuple[str, nn.Module, list[nn.Parameter]]:
    """Its name, the module, and its parameters layer by layer."""
    try:
        from fairseq.models.wav2vec.wav2vec2 import ConvFeatureExtractionModel
    except ImportError:
        module = FairseqOperators(layers)
        return "fairseq's operators", module, module.order()
    module = ConvFeatureExtractionModel(layers, mode="layer_norm")
    return "fairseq's module", module, list(module.parameters())


def build(width: int) -> tuple[str, dict[str, tuple[Stack, list[nn.Parameter]]]]:
    """Both sides with the same weights: waveforms [B, S] to [B, T, C], and the parameters in the same order."""
    config = Data2VecConfig.speech()
    layers = [(width, kernel, stride) for _, kernel, stride in config.frontend.conv_layers]
    frontend = SpeechFrontEnd(replace(config.frontend, conv_layers=tuple(layers)), config.encoder)
    parameters = list(frontend.convs.parameters())
    name, theirs, their_parameters = fairseq_module(layers)
    with torch.no_grad():
        for a, b in zip(their_parameters, parameters, strict=True):
            a.copy_(b)
    sides = {
        "fairseq": (lambda x: theirs(x).mT, their_parameters),
        "d2v_fast": (lambda x: frontend.convs(x[:, :, None]), parameters),
    }
    return name, sides


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


def measure(clips: int, seconds: float, budget: float, width: int = 512) -> tuple[str, dict[str, float]]:
    """What fairseq is here, and seconds of the fastest round of each side; rounds are begun within ``budget``."""
    torch.manual_seed(0)
    name, sides = build(width)
    waveforms = torch.randn(clips, round(seconds * RATE))
    check(sides, waveforms[:1, : RATE // 4])
    calls = {side: both_ways(stack, parameters, waveforms) for side, (stack, parameters) in sides.items()}
    best = dict.fromkeys(calls, float("inf"))
    start = time.perf_counter()
    while True:
        for side, (taken,) in interleaved(calls, rounds=1, warmup=0).items():
            best[side] = min(best[side], taken)
        if time.perf_counter() - start > budget:
            return name, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a clip")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=60.0, help="seconds within which rounds are begun")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    name, best = measure(args.clips, args.seconds, args.budget)
    ratio = best["fairseq"] / best["d2v_fast"]
    print(f"{args.clips} x {args.seconds:g} s, {args.threads} threads: {name} / d2v_fast = {ratio:.2f}")


if __name__ == "__main__":
    sys.exit(main())

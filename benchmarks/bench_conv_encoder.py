"""The speech front-end, whole and in parts: waveforms to features.

python benchmarks/bench_conv_encoder.py                       # on a GPU; --smoke elsewhere
python benchmarks/bench_conv_encoder.py --parts whole lengths

Parts: "conv0", "convs" (1 to 6), "positions" (the files bench_conv0.py, bench_strided_conv.py, bench_pos_conv.py);
"whole": all convolutions, layer norm and projection of a batch of equal clips; "lengths": the same for clips of
different lengths, valid frames only, padded to the longest or packed into one row. Their lengths are the quantiles
1/38, 3/38 .. 37/38 of a lognormal distribution with a median of 12 s and sigma 0.25 (7.4 to 19.5 s, 234 s in all): an
assumption about the spread of LibriSpeech, nothing was measured on it.
"""

from collections.abc import Callable
from dataclasses import replace
from math import exp
from statistics import NormalDist
from types import ModuleType

import bench_conv0
import bench_pos_conv
import bench_strided_conv
import fairseq_eager
import modern_eager
import torch
import torch.nn.functional as F
from cli import main_parts
from common import DEVICE, without_extension
from conv_shapes import LAYERS, SAMPLES, conv_inputs, conv_options, conv_passes, minimal_bytes
from driver import DTYPES, Bench, Case, Results, compiled, eager, ours
from torch import Tensor, nn

from d2v_fast.nn import Data2VecConfig, SpeechFrontEnd
from d2v_fast.nn.frontends.lattice import pack_waveforms

RATE = 16_000
CLIPS = 19


def spread_lengths(clips: int, median: float, sigma: float) -> list[int]:
    """Samples of clips whose lengths in seconds are even quantiles of a lognormal distribution."""
    normal = NormalDist()
    return [round(RATE * median * exp(sigma * normal.inv_cdf((i + 0.5) / clips))) for i in range(clips)]


def case(name: str, norm: str = "layer", B: int = 15, S: int = SAMPLES, dtype="bfloat16", main=True, **sizes) -> Case:
    """A batch of equal clips."""
    sizes = {"B": B, "S": S, "C": 512, "D": 768, "norm": norm, "lengths": None, **sizes}
    return Case(f"{name}, {B} x {S}", dtype, sizes, conv_options(0, len(LAYERS) - 1, norm), main)


def lengths_case(name: str, lengths: list[int], dtype: str = "bfloat16", **sizes) -> Case:
    """Clips of different lengths."""
    made = case(name, B=len(lengths), S=max(lengths), dtype=dtype, **sizes)
    return replace(made, sizes={**made.sizes, "lengths": lengths}, name=name)


def config_of(C: int, norm: str):
    """The front-end's configuration with another width and norm."""
    config = Data2VecConfig.speech().frontend
    layers = tuple((C, kernel, stride) for _, kernel, stride in config.conv_layers)
    return replace(config, conv_layers=layers, conv_norm=norm)


def inputs(dtype: torch.dtype, B: int, S: int, C: int, D: int, norm: str, lengths: list[int] | None) -> dict:
    made = conv_inputs(dtype, B, S, C, 0, len(LAYERS) - 1, norm)
    made.pop("biases")
    x, config = made.pop("x").to(dtype), config_of(C, norm)
    frames = None
    if lengths is not None:
        x = torch.where(torch.arange(S, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None], x, 0)
        T = config.num_frames(S)
        frames = torch.cat([b * T + torch.arange(config.num_frames(n), device=DEVICE) for b, n in enumerate(lengths)])
    vectors = [1 + 0.1 * torch.randn(C, device=DEVICE), 0.1 * torch.randn(C, device=DEVICE)]
    linear = [torch.randn(D, C, device=DEVICE) / C**0.5, 0.1 * torch.randn(D, device=DEVICE)]
    projection = [v.to(dtype) for v in vectors + linear]
    return {"x": x, "lengths": lengths, "frames": frames, **made, "projection": projection}


def eager_frontend(module: ModuleType) -> Callable[..., Results]:
    """Convolutions as ``module`` has them, layer norm, projection, valid frames."""

    def run(
        x: Tensor, lengths: list[int] | None, frames: Tensor | None, weights: list, norm_weights: list,
        norm_biases: list, projection: list[Tensor], **options,
    ) -> Results:  # fmt: skip
        biases = [None] * len(weights)
        y = module.conv_encoder(x, weights, biases, norm_weights, norm_biases, **options)["y"]
        gamma, beta, weight, bias = projection
        y = F.linear(F.layer_norm(y, y.shape[-1:], gamma, beta), weight, bias)
        return {"y": y if frames is None else y.flatten(0, 1).index_select(0, frames)}

    return run


def exact(x: Tensor, lengths: list[int] | None, frames: Tensor | None, **arguments) -> Results:
    """Every clip alone."""
    run = eager_frontend(fairseq_eager)
    if lengths is None:
        return run(x, None, None, **arguments)
    clips = [run(clip[None, :n], None, None, **arguments)["y"][0] for clip, n in zip(x, lengths, strict=True)]
    return {"y": torch.cat(clips)}


def as_module(inputs: dict) -> dict:
    """With a ``SpeechFrontEnd`` whose parameters are the inputs."""
    weights, norm_weights = inputs["weights"], inputs["norm_weights"]
    config = config_of(weights[0].shape[0], "layer" if norm_weights[1] is not None else "group")
    encoder = replace(Data2VecConfig.speech().encoder, dim=inputs["projection"][2].shape[0])
    with torch.device("meta"):
        frontend = SpeechFrontEnd(config, encoder)
    taken: dict[str, list] = {"weights": [], "norm_weights": [], "norm_biases": []}
    for layer, weight, gamma, beta in zip(frontend.convs, weights, norm_weights, inputs["norm_biases"], strict=True):
        layer.conv.weight = nn.Parameter(weight)
        taken["weights"].append(layer.conv.weight)
        if gamma is not None:
            layer.norm.weight, layer.norm.bias = nn.Parameter(gamma), nn.Parameter(beta)
        taken["norm_weights"].append(layer.norm.weight if gamma is not None else None)
        taken["norm_biases"].append(layer.norm.bias if gamma is not None else None)
    frontend.norm.weight, frontend.norm.bias, frontend.proj.weight, frontend.proj.bias = parameters = [
        nn.Parameter(v) for v in inputs["projection"]
    ]
    return {**inputs, **taken, "projection": parameters, "frontend": frontend}


def packed_module(inputs: dict) -> dict:
    """As :func:`as_module`, the clips in one row, as a data loader would hand them over."""
    made = as_module(inputs)
    return {**made, "x": pack_waveforms(made["x"], made["frontend"].config, made["lengths"])}


def packed_row(inputs: dict) -> dict:
    """The same row for plain PyTorch."""
    config = config_of(inputs["weights"][0].shape[0], "layer")
    packed = pack_waveforms(inputs["x"], config, inputs["lengths"])
    return {**inputs, "x": packed.samples, "frames": packed.rows}


def padded(x: Tensor, frames: Tensor | None, frontend: SpeechFrontEnd, **_) -> Results:
    """``SpeechFrontEnd.features`` of all of x."""
    y = frontend.features(x)
    return {"y": y if frames is None else y.flatten(0, 1).index_select(0, frames)}


def packed(x, frontend: SpeechFrontEnd, **_) -> Results:
    """``SpeechFrontEnd.packed_features``, valid frames."""
    return {"y": x.valid(frontend.packed_features(x))}


def passes(case: Case, mode: str) -> list[tuple[int, int]]:
    """The convolutions' on valid frames, then layer norm and projection."""
    s, item = case.sizes, DTYPES[case.dtype].itemsize
    config, result = config_of(s["C"], s["norm"]), []
    for S in s["lengths"] or [s["S"]]:
        B = 1 if s["lengths"] else s["B"]
        clip = replace(case, sizes={"B": B, "S": S, "C": s["C"], "first": 0, "last": len(LAYERS) - 1, "bias": False})
        result.append(conv_passes(clip, mode))
        frames = B * config.num_frames(S)
        x, y, flop = frames * s["C"] * item, frames * s["D"] * item, 2 * frames * s["C"] * s["D"]
        norm_backward = [(0, 3 * x), (flop, y + x), (flop, y + x)] if mode != "fwd" else []
        result.append([(0, 2 * x), (flop, x + y), *norm_backward])
    return [one for several in result for one in several]


BENCH = Bench(
    op="conv_encoder",
    cases=[
        case("layer norm"),
        case("group norm", "group"),
        case("large", B=4, S=300_000, D=1024, main=False),
        case("layer norm fp32", dtype="float32", main=False),
    ],
    smoke=[
        case("smoke", B=2, S=2003, C=64, D=48, dtype="float32"),
        case("smoke group", "group", B=2, S=2003, C=64, D=48, dtype="float32"),
    ],
    inputs=inputs,
    exact=exact,
    providers={
        "d2v_fast": ours(padded, prepare=as_module),
        "no extension": ours(padded, prepare=as_module, around=without_extension),
        "fairseq": eager(eager_frontend(fairseq_eager)),
        "eager": eager(eager_frontend(modern_eager)),
        "eager+compile": compiled(eager_frontend(modern_eager)),
        "fairseq+compile": compiled(eager_frontend(fairseq_eager)),
    },
    minimal_bytes=minimal_bytes(passes),
    passes=passes,
    differentiable=["weights", "norm_weights", "norm_biases", "projection"],
    low_tolerance=5.0,  # seven layers round one after the other
    checked_with={"B": 2, "S": 80_000},  # float64 of a whole batch would not fit
)

LENGTHS = replace(
    BENCH,
    op="conv_encoder_lengths",
    cases=[lengths_case("packed and padded", spread_lengths(CLIPS, 12.0, 0.25))],
    smoke=[lengths_case("smoke lengths", [3001, 400, 1603, 720], "float32", C=64, D=48)],
    providers={
        "d2v_fast": ours(packed, prepare=packed_module),
        "d2v_fast padded": ours(padded, prepare=as_module),
        "fairseq": eager(eager_frontend(fairseq_eager)),
        "eager": eager(eager_frontend(modern_eager)),
        "eager packed": eager(eager_frontend(modern_eager), prepare=packed_row),
        "eager+compile": compiled(eager_frontend(modern_eager)),
    },
    checked_with={"B": 4, "S": 81_700, "lengths": [80_000, 400, 33_333, 81_700]},
)

PARTS = {
    "whole": BENCH,
    "lengths": LENGTHS,
    "conv0": bench_conv0.BENCH,
    "convs": bench_strided_conv.BENCH,
    "positions": bench_pos_conv.BENCH,
}


def test_speed(timed):
    timed()


if __name__ == "__main__":
    main_parts(PARTS)

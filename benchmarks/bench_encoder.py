"""The layers of an encoder, 12 x 768: post-norm (speech, text) and pre-norm with bias, LayerScale, DropPath (images).

python benchmarks/bench_encoder.py     # on a GPU; --smoke elsewhere

Dropout and DropPath are those of the recipes; they are off where results are compared. Convolutional positions are in
bench_pos_conv.py. "matmul" is the share of the rate of a large product that the layers' own products reach (MFU, by
formula), "held MiB" the activations kept for backward. "fill": lengths as in bench_attention_packed.py fill 55 % of the
batch; "d2v_fast" has the rows that count, packed, "d2v_fast padded" and all others the padded batch. Parameters are
float32 under autocast, as in training; fairseq's are bfloat16, as with its --bf16. For images "fairseq" is BEiT.
"""

from collections.abc import Callable
from dataclasses import replace

import encoder_eager
import numpy as np
import torch
from bench_attention_packed import FILL, spread
from cli import main
from common import DEVICE
from conv_shapes import minimal_bytes
from driver import DTYPES, Bench, Case, Results, compiled, eager, ours
from torch import Tensor, nn

from d2v_fast.nn import Data2VecConfig, TransformerEncoder
from d2v_fast.nn.config import EncoderConfig
from d2v_fast.nn.sequences import Sequences

SMALL = {"layers": 2, "dim": 32, "ffn_dim": 128, "heads": 2}


def case(name: str, kind: str, B: int, T: int, fill: bool = False, dtype: str = "bfloat16", main=True, **size) -> Case:
    """``kind``: whose encoder, of speech (here without positions), text or images."""
    layers = size.pop("layers", 12)
    sizes = {"kind": kind, "B": B, "T": T, "fill": fill, "dropout": True, "layers": layers, "size": size}
    return Case(f"{name}, {B} x {T}{' fill' if fill else ''}", dtype, sizes, {}, main)


def config_of(kind: str, dropout: bool, layers: int, size: dict) -> EncoderConfig:
    config = replace(getattr(Data2VecConfig, kind)().encoder, layers=layers, layerdrop=0.0, pos_conv_depth=0, **size)
    off = {"dropout": 0.0, "attention_dropout": 0.0, "drop_path": 0.0}
    return config if dropout else replace(config, **off)


def inputs(
    dtype: torch.dtype, kind: str, B: int, T: int, fill: bool, dropout: bool, layers: int, size: dict
) -> Results:  # fmt: skip
    config = config_of(kind, dropout, layers, size)
    encoder = TransformerEncoder(replace(config, layer_scale=0.5 if kind == "image" else 0.0), round((T - 1) ** 0.5))
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(0.02 * torch.randn_like(p))
    valid = np.arange(T) < np.array(spread(B, T, FILL) if fill else [T] * B)[:, None]
    return {
        "x": torch.randn(B, T, config.dim, device=DEVICE).to(dtype),
        "parameters": [p.detach().to(DEVICE) for p in encoder.parameters()],
        "names": [name for name, _ in encoder.named_parameters()],
        "config": config,
        "padding": torch.from_numpy(~valid).to(DEVICE) if fill else None,
        "rows": Sequences.from_mask(valid).map(lambda v: v.to(DEVICE)),
        "index": None if encoder.relative_bias is None else encoder.relative_bias.index.to(DEVICE),
    }


def as_module(inputs: Results) -> Results:
    """With a ``TransformerEncoder`` whose parameters are the inputs."""
    config, index = inputs["config"], inputs["index"]
    grid = 0 if index is None else round((len(index) - 1) ** 0.5)
    encoder = TransformerEncoder(config, grid).to(DEVICE)
    parameters = [nn.Parameter(p) for p in inputs["parameters"]]
    for name, p in zip(inputs["names"], parameters, strict=True):
        parent, _, last = name.rpartition(".")
        setattr(encoder.get_submodule(parent), last, p)
    return {**inputs, "parameters": parameters, "encoder": encoder}


def packed_module(inputs: Results) -> Results:
    """Rows that count, as a model keeps them from layer to layer; equal lengths stay a batch."""
    made = as_module(inputs)
    if made["padding"] is None:
        return made
    return {**made, "x": made["rows"].take(made["x"].flatten(0, 1)), "padding": None}


def in_low_precision(inputs: Results) -> Results:
    """Parameters in the dtype of x."""
    return {**inputs, "parameters": [p.to(inputs["x"].dtype) for p in inputs["parameters"]]}


def of_module(x: Tensor, encoder: TransformerEncoder, padding: Tensor | None, rows: Sequences, **_) -> Results:
    """Ours: a batch or packed rows."""
    with encoder_eager.mixed_precision(x):
        if x.dim() == 2:
            return {"y": encoder(x, sequences=rows).x}
        return {"y": rows.take(encoder(x, padding_mask=padding).x.flatten(0, 1))}


def written(layers: Callable[..., Tensor]) -> Callable[..., Results]:
    """The rows that count of what ``layers`` makes of the batch."""

    def run(x: Tensor, parameters: list, names: list, config, padding, rows: Sequences, index, **_) -> Results:
        y = layers(x, dict(zip(names, parameters, strict=True)), config, padding, index)
        return {"y": rows.take(y.flatten(0, 1))}

    return run


def as_released(x: Tensor, parameters: list, names: list, config, padding, rows: Sequences, index, **_) -> Results:
    """fairseq's layers for speech and text, BEiT's for images."""
    layers = encoder_eager.beit if config.norm == "pre" else encoder_eager.fairseq
    return written(layers)(x, parameters, names, config, padding, rows, index)


def as_stored(inputs: Results) -> Results:
    """fairseq keeps parameters in bfloat16, BEiT in float32 under autocast."""
    return inputs if inputs["config"].norm == "pre" else in_low_precision(inputs)


def passes(case: Case, mode: str) -> list[tuple[int, int]]:
    """Products of the rows that count: FLOP, and bytes of their inputs and results."""
    s, item = case.sizes, DTYPES[case.dtype].itemsize
    config = config_of(s["kind"], True, s["layers"], s["size"])
    lengths = spread(s["B"], s["T"], FILL) if s["fill"] else [s["T"]] * s["B"]
    N, C, hidden = sum(lengths), config.dim, config.ffn_dim
    pairs = sum(n * n for n in lengths)
    linear = [(C, 3 * C), (C, C), (C, hidden), (hidden, C)]
    layer = [(2 * N * a * b, item * (N * (a + b) + a * b)) for a, b in linear]
    layer.append((4 * pairs * C, item * 4 * N * C))
    return layer * s["layers"] * (1 if mode == "fwd" else 3)


BENCH = Bench(
    op="encoder",
    cases=[
        case("speech", "speech", 15, 780),
        case("images", "image", 128, 197),
        case("text", "text", 16, 512),
        case("speech", "speech", 15, 780, fill=True),
        case("text", "text", 16, 512, fill=True),
    ],
    smoke=[
        case("smoke", "text", 3, 19, dtype="float32", **SMALL),
        case("smoke images", "image", 2, 17, dtype="float32", **SMALL),
        case("smoke", "text", 6, 200, fill=True, dtype="float32", **{**SMALL, "dim": 128, "ffn_dim": 512}),
    ],
    inputs=inputs,
    exact=written(encoder_eager.modern),
    providers={
        "d2v_fast": ours(of_module, prepare=packed_module),
        "d2v_fast padded": ours(of_module, prepare=as_module),
        "d2v_fast+compile": compiled(of_module, prepare=packed_module),
        "fairseq": eager(as_released, prepare=as_stored),
        "eager": eager(written(encoder_eager.modern)),
        "eager+compile": compiled(written(encoder_eager.modern)),
        "fairseq+compile": compiled(as_released, prepare=as_stored),
    },
    minimal_bytes=minimal_bytes(passes),
    passes=passes,
    differentiable=["parameters"],
    low_tolerance=8.0,  # layers round one after the other, there and back
    checked_with={"B": 3, "dropout": False, "layers": 2},  # float64 of a whole batch would not fit
)


def test_speed(timed):
    timed()


if __name__ == "__main__":
    main(BENCH)

"""GELU of a feed-forward block's inner activations, with the linear layer's bias or after it.

python benchmarks/bench_bias_gelu.py            # on a GPU; --smoke elsewhere
"""

import fairseq_eager
import modern_eager
import torch
from cli import main
from common import DEVICE
from driver import DTYPES, Bench, Case, compiled, eager, ours

from d2v_fast.ops import bias_gelu


def case(name: str, rows: int, width: int, has_bias: bool = True, dtype: str = "bfloat16", main: bool = True) -> Case:
    name = name if has_bias else f"{name}, no bias"
    return Case(f"{name}, {rows} x {width}", dtype, {"rows": rows, "width": width, "has_bias": has_bias}, {}, main)


def inputs(dtype: torch.dtype, rows: int, width: int, has_bias: bool) -> dict:
    x, bias = 2 * torch.randn(rows, width, device=DEVICE), torch.randn(width, device=DEVICE)
    return {"x": x.to(dtype), "bias": bias.to(dtype) if has_bias else None}


def fused(x, bias) -> dict:
    return {"y": bias_gelu(x, bias)}


def minimal_bytes(case: Case, mode: str) -> int:
    """An element: read and written forward; backward reads it and its gradient and writes one. Vectors left out."""
    elements = case.sizes["rows"] * case.sizes["width"]
    return elements * DTYPES[case.dtype].itemsize * (2 if mode == "fwd" else 5)


BENCH = Bench(
    op="bias_gelu",
    cases=[
        case("speech base", 11700, 3072),
        case("speech base", 11700, 3072, has_bias=False),  # eager's linear layer adds the bias for nothing
        case("vision base", 128 * 197, 3072),
        case("speech large", 3752, 4096, main=False),
        case("text base", 8192, 3072, main=False),
        case("vision base fp32", 128 * 197, 3072, dtype="float32", main=False),
    ],
    smoke=[case("smoke", 500, 512), case("smoke", 500, 512, has_bias=False, dtype="float32")],
    inputs=inputs,
    exact=fairseq_eager.bias_gelu,
    providers={
        "d2v_fast": ours(fused),
        "fairseq": eager(fairseq_eager.bias_gelu),
        "eager": eager(modern_eager.bias_gelu),
        "eager+compile": compiled(modern_eager.bias_gelu),
        "fairseq+compile": compiled(fairseq_eager.bias_gelu),
    },
    minimal_bytes=minimal_bytes,
    differentiable=["x", "bias"],
)


def test_speed(timed):
    timed()


if __name__ == "__main__":
    main(BENCH)

"""The norm of all gradients of a model, which the clip factor is made of.

python benchmarks/bench_l2_norm.py            # on a GPU; --smoke elsewhere
"""

import fairseq_eager
import modern_eager
import peers
import shapes
import torch
from cli import main
from driver import DTYPES, Bench, Case, Provider, compiled, eager, ours

from d2v_fast.ops import l2_norm


def case(model: str, dtype: str = "float32", main: bool = True) -> Case:
    return Case(f"{model}, {shapes.count(model) / 1e6:.3g} M {dtype}", dtype, {"model": model}, {}, main)


def inputs(dtype: torch.dtype, model: str) -> dict:
    return {"tensors": shapes.parameters(model, dtype, std=0.01)}


def fused(tensors) -> dict:
    return {"norm": l2_norm(tensors)}


def minimal_bytes(case: Case, mode: str) -> int:
    """Every gradient is read once."""
    return shapes.count(case.sizes["model"]) * DTYPES[case.dtype].itemsize


BENCH = Bench(
    op="l2_norm",
    cases=[
        case("speech base"),
        case("speech large"),
        case("speech base", "bfloat16", main=False),
        case("text base", main=False),
        case("vision huge", main=False),
    ],
    smoke=[case("smoke"), case("smoke", "bfloat16")],
    inputs=inputs,
    exact=fairseq_eager.l2_norm,
    providers={
        "d2v_fast": ours(fused),
        "fairseq": eager(fairseq_eager.l2_norm),
        "eager": eager(modern_eager.l2_norm),
        "apex": Provider(peers.apex_l2_norm, peer=True),
        "eager+compile": compiled(modern_eager.l2_norm),
    },
    minimal_bytes=minimal_bytes,
    tolerance=1e-5,
)


def test_speed(timed):
    timed()


if __name__ == "__main__":
    main(BENCH)

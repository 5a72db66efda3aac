"""Training targets from the top K layer results, at the masked positions.

python benchmarks/bench_layer_targets.py            # on a GPU; --smoke elsewhere
"""

import fairseq_eager
import modern_eager
import shapes
import torch
from cli import main
from driver import Bench, Case, compiled, eager, ours

from d2v_fast.ops import layer_targets

SMOKE = {"B": 3, "T": 100, "C": 256, "K": 3, "N": 120}


def case(
    name: str, sizes: dict, norm: str, post_norm: str = "none", dtype: str = "bfloat16", main: bool = True
) -> Case:
    post = ", post-LN" if post_norm == "layer" else ""
    return Case(f"{name}, {norm} K={sizes['K']}{post}", dtype, sizes, {"norm": norm, "post_norm": post_norm}, main)


def inputs(dtype: torch.dtype, B: int, T: int, C: int, K: int, N: int) -> dict:
    positions, mask = shapes.masked(B, T, N)
    return {"layers": shapes.layer_results(B, T, C, K, dtype), "positions": positions, "mask": mask}


def time_major(inputs: dict) -> dict:
    return {**inputs, "layers": [shapes.time_major(x) for x in inputs["layers"]]}


def fused(layers, positions, mask, *, norm, post_norm) -> dict:
    return {"targets": layer_targets(layers, norm=norm, post_norm=post_norm, positions=positions)}


def minimal_bytes(case: Case, mode: str) -> int:
    """Layer results as ``shapes.layer_bytes`` says, positions, and the targets in float32."""
    N = case.sizes["N"]
    return shapes.layer_bytes(case.dtype, case.options["norm"], **case.sizes) + 8 * N + 4 * N * case.sizes["C"]


BENCH = Bench(
    op="layer_targets",
    cases=[
        case("speech base", shapes.SPEECH_BASE, "instance"),
        case("text base", shapes.TEXT_BASE, "layer"),
        case("vision base", shapes.VISION_BASE, "layer", "layer", dtype="float32"),
        case("speech large", shapes.SPEECH_LARGE, "instance", main=False),
        case("vision large", shapes.VISION_LARGE, "layer", "layer", dtype="float32", main=False),
        case("AudioSet", {**shapes.SPEECH_BASE, "K": 12}, "instance", "layer", main=False),
        case("speech base, batch norm", shapes.SPEECH_BASE, "batch", main=False),
        *(case("speech base", {**shapes.SPEECH_BASE, "K": k}, "instance", main=False) for k in (1, 16)),
        *(
            case(f"T={t}", {**shapes.SPEECH_BASE, "B": 11700 // t, "T": t, "N": 5000}, "instance", main=False)
            for t in (250, 999, 1500)
        ),
        case("width 1280", {**shapes.VISION_LARGE, "C": 1280}, "layer", "layer", dtype="float32", main=False),
    ],
    smoke=[case("smoke", SMOKE, "instance"), case("smoke", SMOKE, "layer", "layer", dtype="float32")],
    inputs=inputs,
    exact=fairseq_eager.layer_targets,
    providers={
        "d2v_fast": ours(fused),
        "fairseq": eager(fairseq_eager.layer_targets, prepare=time_major, capturable=False),
        "eager": eager(modern_eager.layer_targets),
        "eager+compile": compiled(modern_eager.layer_targets),
        "fairseq+compile": compiled(fairseq_eager.layer_targets, prepare=time_major, capturable=False),
    },
    minimal_bytes=minimal_bytes,
)


def test_speed(timed):
    timed()


if __name__ == "__main__":
    main(BENCH)

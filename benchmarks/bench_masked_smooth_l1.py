"""Masked regression loss: forward, and forward with the gradient of the prediction.

python benchmarks/bench_masked_smooth_l1.py            # on a GPU; --smoke elsewhere
"""

import fairseq_eager
import modern_eager
import shapes
import torch
from cli import main
from common import DEVICE
from driver import DTYPES, Bench, Case, compiled, eager, ours

from d2v_fast.ops import masked_smooth_l1

SMOKE = {"B": 4, "T": 250, "C": 256, "N": 450}


def case(name: str, sizes: dict, beta: float, gathered: bool, dtype: str = "bfloat16", main: bool = True) -> Case:
    sizes = {k: v for k, v in sizes.items() if k != "K"}
    options = {"beta": beta, "scale": sizes["C"] ** -0.5}
    return Case(f"{name}, {'gathered' if gathered else 'dense'}", dtype, {**sizes, "gathered": gathered}, options, main)


def inputs(dtype: torch.dtype, B: int, T: int, C: int, N: int, gathered: bool) -> dict:
    shape = (N, C) if gathered else (B, T, C)
    mask = None if gathered else shapes.masked(B, T, N)[1]
    pred = torch.randn(shape, device=DEVICE).to(dtype)
    return {"pred": pred, "target": torch.randn(shape, device=DEVICE), "mask": mask}  # targets are fp32


def fused(pred, target, mask, *, beta, scale) -> dict:
    return {"loss": masked_smooth_l1(pred, target, mask, beta=beta, scale=scale)}


def minimal_bytes(case: Case, mode: str) -> int:
    """Kept rows of both inputs and the mask are read once; the gradient has every row of ``pred``."""
    B, T, C, N, gathered = (case.sizes[k] for k in ("B", "T", "C", "N", "gathered"))
    item = DTYPES[case.dtype].itemsize
    read = N * C * (item + 4) + (0 if gathered else B * T)
    return read if mode == "fwd" else read + (N if gathered else B * T) * C * item


BENCH = Bench(
    op="masked_smooth_l1",
    cases=[
        case("speech base", shapes.SPEECH_BASE, 0.0, gathered=True),
        case("speech base", shapes.SPEECH_BASE, 0.0, gathered=False),
        case("vision base", shapes.VISION_BASE, 2.0, gathered=True),
        case("vision base", shapes.VISION_BASE, 2.0, gathered=False),
        case("text base", shapes.TEXT_BASE, 4.0, gathered=True, main=False),
        case("speech large", shapes.SPEECH_LARGE, 0.0, gathered=True, main=False),
        case("vision base fp32", shapes.VISION_BASE, 2.0, gathered=False, dtype="float32", main=False),
    ],
    smoke=[case("smoke", SMOKE, 0.0, gathered=True), case("smoke", SMOKE, 2.0, gathered=False, dtype="float32")],
    inputs=inputs,
    exact=fairseq_eager.masked_smooth_l1,
    providers={
        "d2v_fast": ours(fused),
        "fairseq": eager(fairseq_eager.masked_smooth_l1, capturable=False),
        "eager": eager(modern_eager.masked_smooth_l1),
        "eager+compile": compiled(modern_eager.masked_smooth_l1),
        "fairseq+compile": compiled(fairseq_eager.masked_smooth_l1, capturable=False),
    },
    minimal_bytes=minimal_bytes,
    differentiable=["pred"],
)


def test_speed(timed):
    timed()


if __name__ == "__main__":
    main(BENCH)

"""The teacher update of a whole model, with a bfloat16 copy written beside the float32 teacher.

python benchmarks/bench_ema.py            # on a GPU; --smoke elsewhere
"""

import fairseq_eager
import modern_eager
import peers
import shapes
import torch
from cli import main
from driver import DTYPES, Bench, Case, Provider, compiled, eager, ours

from d2v_fast.ops import ema_update_


def case(model: str, dtype: str = "bfloat16", main: bool = True) -> Case:
    """``dtype`` is the student's."""
    size = f"{shapes.count(model) / 1e6:.3g} M, student {dtype}"
    return Case(f"{model}, {size}", dtype, {"model": model}, {"decay": 0.999}, main)


def inputs(dtype: torch.dtype, model: str) -> dict:
    return {
        "teacher": shapes.parameters(model),
        "student": shapes.parameters(model, dtype),
        "copies": shapes.parameters(model, torch.bfloat16),
    }


def fused(teacher, student, copies, *, decay) -> dict:
    ema_update_(teacher, student, decay, copies=copies)
    return {"teacher": teacher, "copies": copies}


def minimal_bytes(case: Case, mode: str) -> int:
    """A parameter: teacher read and written (8), student read, copy written (2)."""
    return shapes.count(case.sizes["model"]) * (8 + DTYPES[case.dtype].itemsize + 2)


BENCH = Bench(
    op="ema",
    cases=[
        case("speech base"),
        case("speech base", "float32"),
        case("speech large"),
        case("vision huge", main=False),
        case("text base", main=False),
    ],
    smoke=[case("smoke"), case("smoke", "float32")],
    inputs=inputs,
    exact=fairseq_eager.ema_update,
    providers={
        "d2v_fast": ours(fused),
        "fairseq": eager(fairseq_eager.ema_update),
        "eager": eager(modern_eager.ema_update),
        "eager-mul-add": eager(modern_eager.ema_update_mul_add),
        "apex": Provider(peers.apex_ema, peer=True),
        "eager+compile": compiled(modern_eager.ema_update),
    },
    minimal_bytes=minimal_bytes,
    tolerance=1e-6,  # a step of 1 - decay = 1e-3 must be right to 1e-3
)


def test_speed(timed):
    timed()


if __name__ == "__main__":
    main(BENCH)

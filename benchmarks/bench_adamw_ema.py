"""Optimizer step of a whole model and its teacher: clip factor, AdamW, EMA and the teacher's bfloat16 copy.

python benchmarks/bench_adamw_ema.py            # on a GPU; --smoke elsewhere
"""

import fairseq_eager
import modern_eager
import peers
import shapes
import torch
from cli import main
from common import DEVICE
from driver import DTYPES, Bench, Case, Provider, compiled, eager, ours

from d2v_fast.ops import adamw_ema_

STEP = 1000
OPTIONS = {"step": STEP, "lr": 5e-4, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01, "decay": 0.999}


def case(model: str, dtype: str = "float32", main: bool = True) -> Case:
    """``dtype`` is the gradients'."""
    name = f"{model}, {shapes.count(model) / 1e6:.3g} M, {dtype} gradients"
    # A scale of 1 while timing: the fused optimizer writes the scaled gradients back, round after round.
    return Case(name, dtype, {"model": model, "scale": 1.0}, OPTIONS, main)


def inputs(dtype: torch.dtype, model: str, scale: float) -> dict:
    params = shapes.parameters(model, std=0.02)
    return {
        "params": params,
        "grads": shapes.parameters(model, dtype, std=0.01),
        "exp_avgs": shapes.parameters(model, std=0.01),
        "exp_avg_sqs": [x.square_() for x in shapes.parameters(model, std=0.01)],
        "ema": [p + 0.001 * torch.randn_like(p) for p in params],
        "ema_copies": [torch.empty_like(p, dtype=torch.bfloat16) for p in params],
        "steps": [torch.full((), STEP - 1.0, device=DEVICE) for _ in params],
        "grad_scale": torch.tensor(scale, device=DEVICE),
    }


def fused(
    params, grads, exp_avgs, exp_avg_sqs, ema, ema_copies, steps, grad_scale,
    *, step, lr, betas, eps, weight_decay, decay,
) -> dict:  # fmt: skip
    adamw_ema_(
        params, grads, exp_avgs, exp_avg_sqs, steps[0], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
        ema=ema, ema_decay=decay, ema_copies=ema_copies, grad_scale=grad_scale,
    )  # fmt: skip
    return {"params": params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "ema": ema, "ema_copies": ema_copies}


def minimal_bytes(case: Case, mode: str) -> int:
    """A parameter: it, two moments and its average read and written (32), gradient read, copy written (2)."""
    return shapes.count(case.sizes["model"]) * (32 + DTYPES[case.dtype].itemsize + 2)


BENCH = Bench(
    op="adamw_ema",
    cases=[
        case("speech base"),
        case("speech large"),
        case("speech base", "bfloat16", main=False),
        case("text base", main=False),
        case("vision huge", main=False),
    ],
    smoke=[case("smoke"), case("smoke", "bfloat16")],
    inputs=inputs,
    exact=fairseq_eager.adamw_ema,
    providers={
        "d2v_fast": ours(fused),
        "fairseq": eager(fairseq_eager.adamw_ema),
        "eager": eager(modern_eager.adamw_ema),
        "foreach": eager(modern_eager.adamw_ema_foreach),
        "apex": Provider(peers.apex_adamw_ema, peer=True),
        "eager+compile": compiled(modern_eager.adamw_ema_foreach),
    },
    minimal_bytes=minimal_bytes,
    tolerance=2e-6,
    checked_with={"scale": 0.5},
)


def test_speed(timed):
    timed()


if __name__ == "__main__":
    main(BENCH)

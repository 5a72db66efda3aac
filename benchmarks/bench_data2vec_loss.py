"""Targets, loss, gradient of the prediction and the collapse metrics in one op.

python benchmarks/bench_data2vec_loss.py            # on a GPU; --smoke elsewhere
"""

import bench_layer_targets
import fairseq_eager
import modern_eager
import shapes
import torch
from cli import main
from common import DEVICE
from driver import DTYPES, Bench, Case, compiled, eager, ours

from d2v_fast.ops import data2vec_loss

SMOKE = bench_layer_targets.SMOKE
CLONES = {**shapes.SPEECH_BASE, "B": 4, "clones": 8, "N": 8 * 1560}  # data2vec 2.0: half of every clone is masked


def case(
    name: str, sizes: dict, norm: str, post_norm: str = "none", beta: float = 0.0, dtype="bfloat16", main: bool = True
) -> Case:
    options = {"norm": norm, "post_norm": post_norm, "beta": beta, "scale": 1.0 if beta else sizes["C"] ** -0.5}
    post = ", post-LN" if post_norm == "layer" else ""
    sizes = {"pred_dtype": "bfloat16", "clones": 1, **sizes}
    return Case(f"{name}, {norm} K={sizes['K']}{post}", dtype, sizes, options, main)


def inputs(dtype: torch.dtype, pred_dtype: str, clones: int, **sizes: int) -> dict:
    B, T, N = sizes["B"], sizes["T"], sizes["N"]
    layers = shapes.layer_results(B, T, sizes["C"], sizes["K"], dtype)
    positions, mask = shapes.masked(B * clones, T, N)
    batch_index = None if clones == 1 else torch.arange(B, device=DEVICE).repeat_interleave(clones)
    pred = torch.randn(N, sizes["C"], device=DEVICE).to(DTYPES[pred_dtype])
    return {"pred": pred, "layers": layers, "positions": positions, "mask": mask, "batch_index": batch_index}


def fused(pred, layers, positions, mask, batch_index, *, norm, post_norm, beta, scale) -> dict:
    out = data2vec_loss(
        pred, layers, positions, norm=norm, post_norm=post_norm, beta=beta, scale=scale, target_batch_index=batch_index
    )
    return {"loss": out.loss, "target_var": out.target_var, "pred_var": out.pred_var}


def minimal_bytes(case: Case, mode: str) -> int:
    """Layer results as ``shapes.layer_bytes`` says, positions, ``pred`` and, with backward, its gradient."""
    sizes = {k: v for k, v in case.sizes.items() if k not in ("pred_dtype", "clones")}
    rows = sizes["N"]
    # clones share the rows of one teacher, which need to be read once
    sizes["N"] = min(rows, sizes["B"] * sizes["T"])
    pred = rows * sizes["C"] * DTYPES[case.sizes["pred_dtype"]].itemsize
    read = shapes.layer_bytes(case.dtype, case.options["norm"], **sizes) + 8 * rows + pred
    return read if mode == "fwd" else read + pred


BENCH = Bench(
    op="data2vec_loss",
    cases=[
        case("speech base", shapes.SPEECH_BASE, "instance"),
        case("text base", shapes.TEXT_BASE, "layer", beta=4.0),
        case("vision base", shapes.VISION_BASE, "layer", "layer", beta=2.0, dtype="float32"),
        case("speech large", shapes.SPEECH_LARGE, "instance", main=False),
        case("vision large", shapes.VISION_LARGE, "layer", "layer", beta=2.0, dtype="float32", main=False),
        case("8 clones", CLONES, "instance", main=False),
        case("AudioSet", {**shapes.SPEECH_BASE, "K": 12}, "instance", "layer", main=False),
        *(case("speech base", {**shapes.SPEECH_BASE, "K": k}, "instance", main=False) for k in (1, 16)),
        *(
            case(f"{share:.0%} masked", {**shapes.SPEECH_BASE, "N": int(11700 * share)}, "instance", main=False)
            for share in (0.15, 0.8)
        ),
    ],
    smoke=[
        case("smoke", {**SMOKE, "clones": 2}, "instance"),
        case("smoke", SMOKE, "layer", "layer", beta=2.0, dtype="float32"),
    ],
    inputs=inputs,
    exact=fairseq_eager.data2vec_loss,
    providers={
        "d2v_fast": ours(fused),
        "fairseq": eager(fairseq_eager.data2vec_loss, prepare=bench_layer_targets.time_major, capturable=False),
        "eager": eager(modern_eager.data2vec_loss),
        "eager+compile": compiled(modern_eager.data2vec_loss),
        "fairseq+compile": compiled(
            fairseq_eager.data2vec_loss, prepare=bench_layer_targets.time_major, capturable=False
        ),
    },
    minimal_bytes=minimal_bytes,
    differentiable=["pred"],
)


def test_speed(timed):
    timed()


if __name__ == "__main__":
    main(BENCH)

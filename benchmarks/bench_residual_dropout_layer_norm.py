"""The sum, dropout and layer norm around a residual branch: post-LN with dropout, pre-LN with LayerScale and DropPath.

python benchmarks/bench_residual_dropout_layer_norm.py            # on a GPU; --smoke elsewhere
"""

from collections.abc import Callable

import fairseq_eager
import modern_eager
import peers
import torch
from cli import main
from common import DEVICE
from driver import DTYPES, Bench, Case, Provider, WrongResult, compiled, eager, ours

from d2v_fast.ops import residual_dropout_layer_norm

DROP_PATH = 0.2


def post_norm(name: str, B: int, T: int, C: int, p: float = 0.1, dtype: str = "bfloat16", main: bool = True) -> Case:
    """Speech and text: everything in one dtype."""
    sizes = {"B": B, "T": T, "C": C, "scaled": False}
    options = {"p": p, "eps": 1e-5, "return_residual": False}
    return Case(f"{name}, {B} x {T} x {C}, p={p}", dtype, sizes, options, main)


def pre_norm(name: str, B: int, T: int, C: int, dtype: str = "bfloat16", main: bool = True) -> Case:
    """Images: float32 residual stream, LayerScale, DropPath, both results."""
    sizes = {"B": B, "T": T, "C": C, "scaled": True}
    options = {"p": 0.0, "eps": 1e-6, "return_residual": True}
    return Case(f"{name} scaled, {B} x {T} x {C}", dtype, sizes, options, main)


def inputs(dtype: torch.dtype, B: int, T: int, C: int, scaled: bool) -> dict:
    wide = torch.float32 if scaled else dtype
    x, residual = torch.randn(B, T, C, device=DEVICE), 1 + 2 * torch.randn(B, T, C, device=DEVICE)
    column = row = None
    if scaled:
        column = 0.1 * torch.randn(C, device=DEVICE)
        row = (torch.rand(B, device=DEVICE) >= DROP_PATH).float() / (1 - DROP_PATH)
    return {
        "x": x.to(dtype),
        "residual": residual.to(wide),
        "weight": (1 + 0.1 * torch.randn(C, device=DEVICE)).to(wide),
        "bias": (0.1 * torch.randn(C, device=DEVICE)).to(wide),
        "column_scale": column,
        "row_scale": row,
    }


def fused(x, residual, weight, bias, column_scale, row_scale, *, p, eps, return_residual) -> dict:
    out = residual_dropout_layer_norm(
        x, residual, weight, bias, p=p, eps=eps, column_scale=column_scale, row_scale=row_scale,
        return_residual=return_residual,
    )  # fmt: skip
    return {"y": out[0], "h": out[1]} if return_residual else {"y": out}


def check_keep_rate(function: Callable, case: Case) -> None:
    """Values cannot be compared under dropout; the share of elements that it keeps can."""
    p = case.options["p"]
    if p == 0:
        return
    x = torch.ones(64, 64, 64, device=DEVICE)
    x[..., -1] = 0  # what a dropped element becomes
    weights = {"weight": torch.ones(64, device=DEVICE), "bias": torch.zeros(64, device=DEVICE)}
    inputs = {"x": x, "residual": torch.zeros_like(x), **weights, "column_scale": None, "row_scale": None}
    y = function(**inputs, **case.options)["y"]
    kept = (y > y[..., -1:] + 1e-3)[..., :-1].double().mean().item()
    if abs(kept - (1 - p)) > 0.01:
        raise WrongResult(f"dropout kept {kept:.3f} of the elements, expected {1 - p}")


def minimal_bytes(case: Case, mode: str) -> int:
    """Forward: x and the residual are read, y is written, and h where it is returned or kept for the backward.

    Backward: the gradients of y, and of h where it is returned, and h are read, those of x and the residual are
    written; a LayerScale's gradient reads x as well. Vectors left out.
    """
    B, T, C, scaled = (case.sizes[name] for name in ("B", "T", "C", "scaled"))
    low = DTYPES[case.dtype].itemsize
    wide = 4 if scaled else low
    both = case.options["return_residual"]
    if mode == "fwd":
        return B * T * C * (2 * low + wide * (2 if both else 1))
    backward = 2 * low + wide * (3 if both else 2) + (low if scaled else 0)
    return B * T * C * (2 * low + 2 * wide + backward)


BENCH = Bench(
    op="residual_dropout_layer_norm",
    cases=[
        post_norm("speech base", 15, 780, 768),
        post_norm("speech base teacher", 15, 780, 768, p=0.0),
        pre_norm("vision base", 128, 197, 768),
        post_norm("text base", 16, 512, 768, main=False),
        post_norm("speech large", 4, 938, 1024, main=False),
        pre_norm("vision large", 64, 197, 1024, main=False),
        pre_norm("vision huge", 32, 197, 1280, main=False),
        post_norm("speech base fp32", 15, 780, 768, dtype="float32", main=False),
    ],
    # float32 where the weights follow: PyTorch's CPU kernel adds up their gradients in bfloat16
    smoke=[post_norm("smoke", 2, 200, 256, dtype="float32"), pre_norm("smoke", 4, 100, 192)],
    inputs=inputs,
    exact=fairseq_eager.residual_dropout_layer_norm,
    providers={
        "d2v_fast": ours(fused),
        "fairseq": eager(fairseq_eager.residual_dropout_layer_norm),
        "eager": eager(modern_eager.residual_dropout_layer_norm),
        "flash-attn": Provider(peers.flash_attn_residual, peer=True),
        "xformers": Provider(peers.xformers_residual, peer=True),
        "eager+compile": compiled(modern_eager.residual_dropout_layer_norm),
        "fairseq+compile": compiled(fairseq_eager.residual_dropout_layer_norm),
    },
    minimal_bytes=minimal_bytes,
    differentiable=["x", "residual", "weight", "bias", "column_scale"],
    checked_with={"p": 0.0},
    also_check=check_keep_rate,
)


def test_speed(timed):
    timed()


if __name__ == "__main__":
    main(BENCH)

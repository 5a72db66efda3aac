"""Layer norm and GELU after a convolution of the speech front-end (512 channels) or a position convolution.

python benchmarks/bench_layer_norm_gelu.py            # on a GPU; --smoke elsewhere
"""

import fairseq_eager
import modern_eager
import peers
import shapes
import torch
from cli import main
from common import DEVICE
from driver import DTYPES, Bench, Case, Provider, compiled, eager, ours

from d2v_fast.ops import layer_norm_gelu


def case(
    name: str, B: int, T: int, C: int, affine: bool = True, dtype: str = "bfloat16", main: bool = True
) -> Case:  # fmt: skip
    sizes = {"B": B, "T": T, "C": C, "affine": affine}
    return Case(f"{name}, {B} x {T} x {C}", dtype, sizes, {"eps": 1e-5}, main)


def inputs(dtype: torch.dtype, B: int, T: int, C: int, affine: bool) -> dict:
    x = 0.5 + 2 * torch.randn(B, T, C, device=DEVICE)
    weight, bias = 1 + 0.1 * torch.randn(C, device=DEVICE), 0.1 * torch.randn(C, device=DEVICE)
    vectors = {"weight": weight.to(dtype), "bias": bias.to(dtype)} if affine else {"weight": None, "bias": None}
    return {"x": x.to(dtype), **vectors}


def channel_major(inputs: dict) -> dict:
    return {**inputs, "x": shapes.channel_major(inputs["x"])}


def fused(x, weight, bias, *, eps) -> dict:
    return {"y": layer_norm_gelu(x, weight, bias, eps=eps)}


def minimal_bytes(case: Case, mode: str) -> int:
    """An element: read and written forward; backward reads it and its gradient and writes one. Vectors left out."""
    elements = case.sizes["B"] * case.sizes["T"] * case.sizes["C"]
    return elements * DTYPES[case.dtype].itemsize * (2 if mode == "fwd" else 5)


BENCH = Bench(
    op="layer_norm_gelu",
    cases=[
        # 250 000 samples a clip: 49 999 frames after the first convolution, 24 999 after the second
        case("conv 1", 15, 24999, 512),
        case("conv 4", 15, 3124, 512),
        case("positions", 15, 780, 768, affine=False),
        case("conv 0", 15, 49999, 512, main=False),
        case("positions large", 4, 938, 1024, affine=False, main=False),
        case("conv 4 fp32", 15, 3124, 512, dtype="float32", main=False),
    ],
    # float32 where there are weights: PyTorch's CPU kernel adds up their gradients in bfloat16
    smoke=[case("smoke", 2, 300, 256, dtype="float32"), case("smoke no affine", 2, 300, 192, affine=False)],
    inputs=inputs,
    exact=fairseq_eager.layer_norm_gelu,
    providers={
        "d2v_fast": ours(fused),
        "fairseq": eager(fairseq_eager.layer_norm_gelu, prepare=channel_major),
        "eager": eager(modern_eager.layer_norm_gelu),
        "apex": Provider(peers.apex_layer_norm_gelu, peer=True),
        "liger": Provider(peers.liger_layer_norm_gelu, peer=True),
        "eager+compile": compiled(modern_eager.layer_norm_gelu),
        "fairseq+compile": compiled(fairseq_eager.layer_norm_gelu, prepare=channel_major),
    },
    minimal_bytes=minimal_bytes,
    differentiable=["x", "weight", "bias"],
)


def test_speed(timed):
    timed()


if __name__ == "__main__":
    main(BENCH)

"""Self-attention with a bias that all samples share (images), or with ALiBi (data2vec 2.0), and dropout of its weights.

python benchmarks/bench_bias_attention.py            # on a GPU; --smoke elsewhere

The cases without a bias are the yardstick: there FlashAttention computes the same, and its time is what a bias should
cost little more than. PyTorch's memory-efficient kernel takes a bias, and makes its gradient for every sample.
"""

from collections.abc import Callable

import fairseq_eager
import modern_eager
import peers
import torch
from cli import main
from common import DEVICE
from driver import DTYPES, Bench, Case, NotInstalled, Provider, Results, WrongResult, compiled, eager, ours
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from d2v_fast.ops import bias_attention


def case(
    name: str, B: int, T: int, H: int, kind: str, p: float, D: int = 64, dtype: str = "bfloat16", main: bool = True
) -> Case:
    sizes = {"B": B, "T": T, "H": H, "D": D, "kind": kind}
    return Case(f"{name}, {B} x {T} x {H}, {kind}, p={p}", dtype, sizes, {"p": p}, main)


def inputs(dtype: torch.dtype, B: int, T: int, H: int, D: int, kind: str) -> Results:
    bias = slopes = positions = None
    if kind == "bias":  # of the parameters' dtype, as under autocast
        bias = torch.randn(H, T, T, device=DEVICE)
    if kind == "ALiBi":  # of every other token
        slopes = 2.0 ** -torch.arange(1, H + 1, device=DEVICE, dtype=torch.float32)
        positions = 2 * torch.arange(T, device=DEVICE, dtype=torch.int32).expand(B, T).contiguous()
    qkv = torch.randn(B, T, 3, H, D, device=DEVICE).to(dtype)
    return {"qkv": qkv, "bias": bias, "slopes": slopes, "positions": positions}


def fused(qkv: Tensor, bias: Tensor | None, slopes: Tensor | None, positions: Tensor | None, *, p: float) -> Results:
    return {"y": bias_attention(*qkv.unbind(2), bias, slopes=slopes, positions=positions, p=p)}


def memory_efficient(
    qkv: Tensor, bias: Tensor | None, slopes: Tensor | None, positions: Tensor | None, *, p
) -> Results:
    """PyTorch's scaled_dot_product_attention, held to its memory-efficient kernel."""
    if not qkv.is_cuda:
        raise NotInstalled("the memory-efficient kernel, which is for GPUs")
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return modern_eager.bias_attention(qkv, bias, slopes, positions, p=p)


def without_bias(load: Callable[[], Callable[..., Results]]) -> Callable[[], Callable[..., Results]]:
    """A peer that takes no bias."""

    def loaded() -> Callable[..., Results]:
        function = load()

        def run(qkv: Tensor, bias: Tensor | None, slopes: Tensor | None, positions: Tensor | None, *, p: float):
            if bias is not None or slopes is not None:
                raise NotInstalled("a bias")
            return function(qkv, p=p)

        return run

    return loaded


def flex() -> Callable[..., Results]:
    """PyTorch's FlexAttention, compiled; it has no dropout."""
    if not torch.cuda.is_available():
        raise NotInstalled("FlexAttention, which is for GPUs")
    from torch.nn.attention.flex_attention import flex_attention

    attention = torch.compile(flex_attention, dynamic=False)

    def run(qkv: Tensor, bias: Tensor | None, slopes: Tensor | None, positions: Tensor | None, *, p: float) -> Results:
        if p > 0:
            raise NotInstalled("dropout in FlexAttention")

        def add(score, b, h, i, j):
            if bias is not None:
                score = score + bias[h, i, j]
            if slopes is not None:
                score = score - slopes[h] * (positions[b, i] - positions[b, j]).abs()
            return score

        return {"y": attention(*qkv.permute(2, 0, 3, 1, 4).unbind(), score_mod=add).transpose(1, 2)}

    return run


def check_keep_rate(function: Callable[..., Results], case: Case) -> None:
    """Values cannot be compared under dropout; the share of weights that it keeps can."""
    p, T = case.options["p"], 64
    if p == 0:
        return
    qkv = torch.zeros(4, T, 3, 4, T, device=DEVICE, dtype=DTYPES[case.dtype])
    qkv[:, :, 2] = torch.eye(T, device=DEVICE)[:, None]  # the result is the weights
    bias = torch.zeros(4, T, T, device=DEVICE)
    kept = (function(qkv, bias, None, None, p=p)["y"] != 0).double().mean().item()
    if abs(kept - (1 - p)) > 0.01:
        raise WrongResult(f"dropout kept {kept:.3f} of the weights, expected {1 - p}")


def passes(case: Case, mode: str) -> list[tuple[int, int]]:
    """Products and least traffic: two products forward, five backward; everything is read and written once."""
    B, T, H, D = (case.sizes[name] for name in ("B", "T", "H", "D"))
    product, size = 2 * B * H * T * T * D, B * T * H * D * DTYPES[case.dtype].itemsize
    bias = 4 * H * T * T if case.sizes["kind"] == "bias" else 0
    forward = (2 * product, 4 * size + bias)
    return [forward] if mode == "fwd" else [forward, (5 * product, 8 * size + 2 * bias)]


def minimal_bytes(case: Case, mode: str) -> int:
    """q, k, v, bias and the result; backward reads these and the result's gradient, and writes four."""
    return sum(size for _, size in passes(case, mode))


BENCH = Bench(
    op="bias_attention",
    cases=[
        case("vision base", 128, 197, 12, "bias", p=0.05),
        case("vision base", 128, 197, 12, "bias", p=0.0),
        case("vision base", 128, 197, 12, "nothing", p=0.0),
        case("data2vec 2.0 speech", 64, 400, 12, "ALiBi", p=0.0),
        case("vision base", 128, 197, 12, "nothing", p=0.05, main=False),
        case("vision large", 64, 197, 16, "bias", p=0.15, main=False),
        case("vision huge", 32, 257, 16, "bias", p=0.0, D=80, main=False),
        case("vision base, 384 pixels", 32, 577, 12, "bias", p=0.0, main=False),
        case("data2vec 2.0 speech", 64, 400, 12, "ALiBi", p=0.1, main=False),
        case("vision base fp32", 128, 197, 12, "bias", p=0.0, dtype="float32", main=False),
    ],
    smoke=[
        case("smoke", 2, 60, 2, "bias", p=0.1, D=16, dtype="float32"),
        case("smoke", 3, 40, 2, "ALiBi", p=0.0, D=20, dtype="float32"),
        case("smoke", 2, 40, 2, "nothing", p=0.0, D=16, dtype="float32"),
    ],
    inputs=inputs,
    exact=fairseq_eager.bias_attention,
    providers={
        "d2v_fast": ours(fused),
        "fairseq": eager(fairseq_eager.bias_attention),
        "eager": eager(modern_eager.bias_attention),
        "sdpa_efficient": Provider(lambda: memory_efficient, peer=True),
        "flex": Provider(flex, compiled=True, peer=True),
        "flash-attn 2": Provider(without_bias(peers.flash_attn_2), peer=True),
        "flash-attn 3": Provider(without_bias(peers.flash_attn_3), peer=True),
        "eager+compile": compiled(modern_eager.bias_attention),
        "fairseq+compile": compiled(fairseq_eager.bias_attention),
    },
    minimal_bytes=minimal_bytes,
    passes=passes,
    differentiable=["qkv", "bias", "slopes"],
    checked_with={"p": 0.0},
    also_check=check_keep_rate,
)


def test_speed(timed):
    timed()


if __name__ == "__main__":
    main(BENCH)

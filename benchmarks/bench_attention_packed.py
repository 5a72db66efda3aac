"""Self-attention of sequences of different lengths, and of fewer queries than keys, from its projection on.

python benchmarks/bench_attention_packed.py     # on a GPU; --smoke elsewhere

x [B, T, C] goes through one product to queries, keys and values and through attention; the results are those of the
rows that count. "d2v_fast" has only these rows, packed; "d2v_fast padded" and the others have the padded batch and a
mask. "fill": lengths are even quantiles of a lognormal distribution, scaled so that they fill 55 % of the batch.
"pruned": keys and values of all rows, queries of 49 % of them (the last layer of a speech student).
"""

from math import exp
from statistics import NormalDist

import numpy as np
import torch
import torch.nn.functional as F
from cli import main
from common import DEVICE
from driver import DTYPES, Bench, Case, Results, compiled, eager, ours
from torch import Tensor

from d2v_fast.nn.attention import attention
from d2v_fast.nn.sequences import Sequences

FILL = 0.55
PRUNED = 0.49


def spread(B: int, T: int, fill: float) -> list[int]:
    """Lengths up to T: even quantiles of a lognormal distribution, whose sigma makes them fill so much of [B, T]."""
    normal = [NormalDist().inv_cdf((i + 0.5) / B) for i in range(B)]

    def lengths(sigma: float) -> list[int]:
        return [max(1, round(T * exp(sigma * (z - normal[-1])))) for z in normal]

    low, high = 0.0, 10.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(lengths(middle)) > fill * B * T else (low, middle)
    return lengths(high)


def case(name: str, B: int, T: int, H: int, kind: str, p: float, D: int = 64, main: bool = True, **more) -> Case:
    sizes = {"B": B, "T": T, "H": H, "D": D, "kind": kind}
    return Case(f"{name} {kind}, {B} x {T}, p={p}", more.get("dtype", "bfloat16"), sizes, {"p": p}, main)


def inputs(dtype: torch.dtype, B: int, T: int, H: int, D: int, kind: str) -> Results:
    valid = np.ones((B, T), bool)
    if kind == "fill":
        valid = np.arange(T) < np.array(spread(B, T, FILL))[:, None]
    asked = np.random.default_rng(0).random((B, T)) < PRUNED if kind == "pruned" else valid
    return {
        "x": torch.randn(B, T, H * D, device=DEVICE).to(dtype),
        "weight": (torch.randn(3 * H * D, H * D, device=DEVICE) / (H * D) ** 0.5).to(dtype),
        "head_dim": D,
        "padding": torch.from_numpy(~valid).to(DEVICE),
        "rows": Sequences.from_mask(valid).map(lambda x: x.to(DEVICE)),
        "asked": Sequences.from_mask(asked).map(lambda x: x.to(DEVICE)),
    }


def packed_rows(inputs: Results) -> Results:
    """x as the rows that are there, as a model keeps it from layer to layer."""
    return {**inputs, "x": inputs["rows"].take(inputs["x"].flatten(0, 1)), "padding": None}


def packed(x: Tensor, weight: Tensor, head_dim: int, padding: None, rows: Sequences, asked: Sequences, *, p) -> Results:
    """Ours: x [N, C] packed rows; queries for the rows that are asked for."""
    if asked.num_rows == rows.num_rows:
        q, k, v = F.linear(x, weight).unflatten(-1, (3, -1, head_dim)).unbind(1)
        return {"y": attention(q, k, v, sequences=rows, dropout_p=p)}
    C = x.shape[-1]
    q = F.linear(asked.take(x), weight[:C]).unflatten(-1, (-1, head_dim))
    k, v = F.linear(x, weight[C:]).unflatten(-1, (2, -1, head_dim)).unbind(1)
    return {"y": attention(q, k, v, sequences=rows, queries=asked, dropout_p=p)}


def padded(
    x: Tensor, weight: Tensor, head_dim: int, padding: Tensor, rows: Sequences, asked: Sequences, *, p
) -> Results:
    """Ours, with a padding mask."""
    q, k, v = F.linear(x, weight).unflatten(-1, (3, -1, head_dim)).unbind(2)
    mask = None if rows.num_rows == padding.numel() else padding
    return {"y": asked.take(attention(q, k, v, padding_mask=mask, dropout_p=p).flatten(0, 1))}


def eager_math(x, weight, head_dim: int, padding: Tensor, rows: Sequences, asked: Sequences, *, p) -> Results:
    """fairseq's ``MultiheadAttention``: all weights in memory, softmax in float32."""
    q, k, v = F.linear(x, weight).unflatten(-1, (3, -1, head_dim)).permute(2, 0, 3, 1, 4).unbind()
    logits = (q * head_dim**-0.5) @ k.mT
    if rows.num_rows != padding.numel():
        logits = logits.masked_fill(padding[:, None, None, :], float("-inf"))
    weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(q.dtype)
    y = F.dropout(weights, p) @ v
    return {"y": asked.take(y.transpose(1, 2).flatten(0, 1))}


def eager_sdpa(x, weight, head_dim: int, padding: Tensor, rows: Sequences, asked: Sequences, *, p) -> Results:
    """PyTorch's scaled_dot_product_attention, which chooses for itself."""
    q, k, v = F.linear(x, weight).unflatten(-1, (3, -1, head_dim)).permute(2, 0, 3, 1, 4).unbind()
    mask = None if rows.num_rows == padding.numel() else ~padding[:, None, None, :]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    return {"y": asked.take(y.transpose(1, 2).flatten(0, 1))}


def passes(case: Case, mode: str) -> list[tuple[int, int]]:
    """Projection and attention of the rows that count: FLOP, and bytes that are read and written once."""
    B, T, H, D = (case.sizes[name] for name in ("B", "T", "H", "D"))
    C, item = H * D, DTYPES[case.dtype].itemsize
    lengths = spread(B, T, FILL) if case.sizes["kind"] == "fill" else [T] * B
    share = PRUNED if case.sizes["kind"] == "pruned" else 1.0
    N = sum(lengths)
    M = round(share * N)
    project = 2 * C * C * (M + 2 * N), item * (C * N + 3 * C * C + C * (M + 2 * N))
    product = 2 * C * sum(round(share * n) * n for n in lengths)
    attend = 2 * product, item * C * (2 * M + 2 * N)
    if mode == "fwd":
        return [project, attend]
    return [project, attend, (5 * product // 2, item * C * (4 * M + 4 * N)), project]


def minimal_bytes(case: Case, mode: str) -> int:
    """What the passes read and write; the backward makes the gradient of the weight alone."""
    return sum(size for _, size in passes(case, mode))


BENCH = Bench(
    op="attention_packed",
    cases=[
        case("speech base", 15, 780, 12, "fill", p=0.1),
        case("speech base teacher", 15, 780, 12, "fill", p=0.0),
        case("text base", 16, 512, 12, "fill", p=0.1),
        case("speech base", 15, 780, 12, "pruned", p=0.1),
        case("speech large", 4, 938, 16, "fill", p=0.1, main=False),
        case("speech large", 4, 938, 16, "pruned", p=0.1, main=False),
        case("speech base fp32", 15, 780, 12, "fill", p=0.1, main=False, dtype="float32"),
    ],
    smoke=[
        case("smoke", 4, 60, 2, "fill", p=0.0, D=16, dtype="float32"),
        case("smoke", 3, 50, 2, "pruned", p=0.1, D=16, dtype="float32"),
    ],
    inputs=inputs,
    exact=eager_math,
    providers={
        "d2v_fast": ours(packed, prepare=packed_rows),
        "d2v_fast padded": ours(padded),
        "fairseq": eager(eager_math),
        "eager": eager(eager_sdpa),
        "eager+compile": compiled(eager_sdpa),
        "fairseq+compile": compiled(eager_math),
    },
    minimal_bytes=minimal_bytes,
    passes=passes,
    differentiable=["weight"],
    checked_with={"p": 0.0},
)


def test_speed(timed):
    timed()


if __name__ == "__main__":
    main(BENCH)

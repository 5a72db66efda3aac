"""Self-attention without a bias, equal lengths: what the table chooses, each backend by name, FlashAttention directly.

python benchmarks/bench_attention.py            # on a GPU; --smoke elsewhere

Queries, keys and values are slices of one tensor [B, T, 3, H, D], as a fused projection leaves them. A backend that is
not there, or that cannot do a case (dropout, say), is listed as not installed. bench_attention_packed.py has sequences
of different lengths and fewer queries than keys, bench_bias_attention.py has biases.
"""

from collections.abc import Callable
from functools import wraps
from inspect import signature

import peers
import torch
import torch.nn.functional as F
from cli import main
from common import DEVICE
from driver import DTYPES, Bench, Case, NotInstalled, Provider, Results, WrongResult, compiled, eager, ours
from torch import Tensor

from d2v_fast.nn.attention import attention
from d2v_fast.nn.sequences import Sequences

DENSE = ("fa2", "fa3", "fa4", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "xformers")
PACKED = ("aten_flash", "torch_varlen", "aten_efficient")


def case(name: str, B: int, T: int, H: int, p: float, D: int = 64, dtype: str = "bfloat16", main: bool = True) -> Case:
    return Case(f"{name}, {B} x {T} x {H}, p={p}", dtype, {"B": B, "T": T, "H": H, "D": D}, {"p": p}, main)


def inputs(dtype: torch.dtype, B: int, T: int, H: int, D: int) -> Results:
    return {"qkv": torch.randn(B, T, 3, H, D, device=DEVICE).to(dtype)}


def eager_math(qkv: Tensor, *, p: float) -> Results:
    """fairseq's ``MultiheadAttention``: all weights in memory, softmax in float32."""
    B, T, _, H, D = qkv.shape
    q, k, v = qkv.permute(2, 0, 3, 1, 4).reshape(3, B * H, T, D).unbind()
    logits = torch.bmm(q * D**-0.5, k.mT)
    weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(q.dtype)
    y = torch.bmm(F.dropout(weights, p), v)
    return {"y": y.view(B, H, T, D).transpose(1, 2)}


def eager_sdpa(qkv: Tensor, *, p: float) -> Results:
    """PyTorch's scaled_dot_product_attention, which chooses for itself."""
    y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(), dropout_p=p)
    return {"y": y.transpose(1, 2)}


def dense(qkv: Tensor, *, p: float, backend: str = "auto") -> Results:
    """Ours."""
    return {"y": attention(*qkv.unbind(2), dropout_p=p, backend=backend)}


def with_sequences(inputs: Results) -> Results:
    """The same rows as a pack of equal sequences."""
    return {**inputs, "sequences": Sequences.even(*inputs["qkv"].shape[:2], DEVICE)}


def packed(qkv: Tensor, sequences: Sequences, *, p: float, backend: str = "auto") -> Results:
    """Ours, the batch as packed rows."""
    y = attention(*qkv.flatten(0, 1).unbind(1), sequences=sequences, dropout_p=p, backend=backend)
    return {"y": y.unflatten(0, qkv.shape[:2])}


def by_name(backend: str) -> Provider:
    """A backend of the table, whether it is the best for a case or not."""
    function = packed if backend in PACKED else dense

    @wraps(function)
    def run(**arguments) -> Results:
        try:
            return function(**arguments, backend=backend)
        except ValueError as error:  # it cannot, and says why
            raise NotInstalled(str(error)) from error

    return Provider(lambda: run, prepare=with_sequences if backend in PACKED else None, peer=True)


def check_keep_rate(function: Callable[..., Results], case: Case) -> None:
    """Values cannot be compared under dropout; the share of weights that it keeps can."""
    p, T = case.options["p"], 64
    if p == 0:
        return
    qkv = torch.zeros(4, T, 3, 4, T, device=DEVICE, dtype=DTYPES[case.dtype])
    qkv[:, :, 2] = torch.eye(T, device=DEVICE)[:, None]  # the result is the weights
    inputs = {"qkv": qkv}
    inputs = with_sequences(inputs) if "sequences" in signature(function).parameters else inputs
    kept = (function(**inputs, p=p)["y"] != 0).double().mean().item()
    if abs(kept - (1 - p)) > 0.01:
        raise WrongResult(f"dropout kept {kept:.3f} of the weights, expected {1 - p}")


def passes(case: Case, mode: str) -> list[tuple[int, int]]:
    """Products and least traffic: two products forward, five backward; everything is read and written once."""
    B, T, H, D = (case.sizes[name] for name in ("B", "T", "H", "D"))
    product, size = 2 * B * H * T * T * D, B * T * H * D * DTYPES[case.dtype].itemsize
    forward = (2 * product, 4 * size)
    return [forward] if mode == "fwd" else [forward, (5 * product, 8 * size)]


def minimal_bytes(case: Case, mode: str) -> int:
    """q, k, v and the result; backward reads these and the result's gradient, and writes three."""
    return sum(size for _, size in passes(case, mode))


BENCH = Bench(
    op="attention",
    cases=[
        case("speech base", 15, 780, 12, p=0.1),
        case("speech base teacher", 15, 780, 12, p=0.0),
        case("text base", 16, 512, 12, p=0.1),
        case("text base teacher", 16, 512, 12, p=0.0, main=False),
        case("speech large", 4, 938, 16, p=0.1, main=False),
        case("speech large teacher", 4, 938, 16, p=0.0, main=False),
        case("vision huge", 32, 257, 16, p=0.0, D=80, main=False),
        case("speech base fp32", 15, 780, 12, p=0.0, dtype="float32", main=False),
    ],
    smoke=[
        case("smoke", 2, 100, 2, p=0.1, D=16, dtype="float32"),
        case("smoke teacher", 3, 60, 2, p=0.0, D=20, dtype="float32"),
    ],
    inputs=inputs,
    exact=eager_math,
    providers={
        "d2v_fast": ours(dense),
        "d2v_fast packed": ours(packed, prepare=with_sequences),
        "fairseq": eager(eager_math),
        "eager": eager(eager_sdpa),
        "flash-attn 2": Provider(peers.flash_attn_2, peer=True),
        "flash-attn 3": Provider(peers.flash_attn_3, peer=True),
        **{name: by_name(name) for name in (*DENSE, *PACKED)},
        "eager+compile": compiled(eager_sdpa),
        "fairseq+compile": compiled(eager_math),
    },
    minimal_bytes=minimal_bytes,
    passes=passes,
    differentiable=["qkv"],
    checked_with={"p": 0.0},
    also_check=check_keep_rate,
)


def test_speed(timed):
    timed()


if __name__ == "__main__":
    main(BENCH)

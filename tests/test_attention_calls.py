"""How each library and operator is called for attention, with stand-ins for what is missing."""

import math
import sys
from types import ModuleType

import pytest
import torch
from attention_stand_ins import Seen, attend, attend_rows, fake_fa2, fake_fa3, fake_fa4, fake_xformers, stand_in
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from d2v_fast.nn import attention_calls as calls
from d2v_fast.nn.sequences import Sequences

LENGTHS, ASKED = [4, 1, 7, 3], [2, 1, 0, 3]


def packed_inputs(D=16, dropout_p=0.0, device="cpu", dtype=torch.float32):
    keys, queries = (
        Sequences(torch.tensor([0, *n], device=device).cumsum(0).to(torch.int32), max(n), sum(n))
        for n in (LENGTHS, ASKED)
    )
    kv = torch.randn(15, 2, 3, D, device=device, dtype=dtype)
    q = torch.randn(6, 3, D, device=device, dtype=dtype)
    return calls.Inputs(q, *kv.unbind(1), keys, queries, dropout_p=dropout_p)


@pytest.mark.parametrize(
    ("call", "fake"),
    [(calls.fa2, fake_fa2), (calls.fa3, fake_fa3), (calls.fa4, fake_fa4), (calls.xformers, fake_xformers)],
)
def test_calls_of_packages(call, fake, monkeypatch):
    """Arguments where the packages expect them, dense and packed."""
    seen = Seen()
    name, functions = fake(seen)
    stand_in(monkeypatch, name, **functions)
    if call is calls.xformers:
        stand_in(monkeypatch, "xformers.ops.fmha.attn_bias", BlockDiagonalMask=functions["attn_bias"].BlockDiagonalMask)
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name]).update(functions)
    has_dropout = call in (calls.fa2, calls.xformers)
    for inputs in (packed_inputs(), calls.Inputs(*torch.randn(2, 5, 3, 2, 8).unbind(2))):
        inputs = inputs._replace(dropout_p=0.25 if has_dropout else 0.0)
        want = calls.each(inputs._replace(dropout_p=0.0)) if inputs.sequences else attend(*inputs[:3])
        torch.testing.assert_close(call(inputs), want)
        assert seen == ({"dropout_p": 0.25} if has_dropout else {}) | (
            {} if call is calls.xformers else {"deterministic": False}
        )


def test_deterministic_algorithms_reach_flash_attention(monkeypatch):
    seen = Seen()
    name, functions = fake_fa2(seen)
    stand_in(monkeypatch, name, **functions)
    torch.use_deterministic_algorithms(True)
    try:
        calls.fa2(packed_inputs())
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen["deterministic"]


class PyTorchOps(TorchDispatchMode):
    """Computes PyTorch's CUDA-only attention operators for CPU tensors, and keeps their arguments by name."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace not in ("aten", "torch_attn") or not func._schema.name.endswith(
            ("::_flash_attention_forward", "::_efficient_attention_forward", "::_varlen_attn")
        ):
            return func(*args, **(kwargs or {}))
        names = [argument.name for argument in func._schema.arguments]
        self.seen = dict(zip(names, args, strict=False)) | (kwargs or {})
        ends = [self.seen[f"{stem}_{way}"] for stem in self.stems(names) for way in "qk"]
        q, k, v = (self.seen[name] for name in ("query", "key", "value"))
        batched = q.dim() == 4
        y = attend_rows(*(x[0] if batched else x for x in (q, k, v)), *ends, scale=self.seen["scale"])
        others = (torch.empty(0) if str(x.type) == "Tensor" else 0 for x in func._schema.returns[1:])
        return (y[None] if batched else y, *others)

    @staticmethod
    def stems(names):
        ends = next(stem for stem in ("cum_seq", "cu_seqlens", "cu_seq") if f"{stem}_q" in names)
        return ends, "max_seqlen" if "max_seqlen_q" in names else "max"


@pytest.mark.parametrize("D", [16, 12])
@pytest.mark.parametrize("call", [calls.aten_flash, calls.aten_efficient, calls.torch_varlen])
def test_calls_of_pytorch(call, D):
    """Arguments where the operators' schemas have them; heads of 12 channels are padded to 16."""
    inputs = packed_inputs(D, dropout_p=0.0 if call is calls.torch_varlen else 0.25)
    with torch.no_grad(), PyTorchOps() as mode:
        y = call(inputs)
    torch.testing.assert_close(y, calls.each(inputs._replace(dropout_p=0.0)))
    assert mode.seen["query"].shape[-1] == 16 and mode.seen["scale"] == pytest.approx(1 / math.sqrt(D))
    assert mode.seen.get("dropout_p", 0.0) == inputs.dropout_p
    assert not mode.seen.get("is_causal", False) and mode.seen.get("custom_mask_type", 0) == 0
    assert list(mode.seen.get("window_size") or (-1, -1)) == [-1, -1]
    assert not mode.seen.get("return_debug_mask", False) and mode.seen.get("bias") is None


def test_lengths_are_never_0():
    """A kernel cannot be launched for none; sequences may all be empty."""
    inputs = packed_inputs()
    nothing = Sequences(torch.zeros(5, dtype=torch.int32), 0, 0)
    assert calls._lengths(inputs._replace(queries=nothing))[2:] == (1, 7)
    assert calls._lengths(inputs._replace(sequences=nothing))[2:] == (3, 1)


@pytest.mark.parametrize("call", [calls.aten_flash, calls.aten_efficient, calls.torch_varlen, calls.padded])
def test_no_value_is_asked_for(call):
    """Fake tensors have shapes and no values, so that a wait for the device would be an error."""
    with FakeTensorMode(), torch.no_grad():
        inputs = packed_inputs(12, device="cuda" if torch.version.cuda else "cpu", dtype=torch.bfloat16)
        y = call(inputs)
        assert y.shape == (6, 3, 12) and y.dtype == torch.bfloat16 and y.device == inputs.q.device


@pytest.mark.parametrize("kind", ["none", "dense", "alibi"])
def test_flex(kind):
    """Forward alone: it has no backward on the CPU."""
    q, k, v = torch.randn(2, 7, 3, 4, 16).unbind(2)
    positions = torch.randint(0, 50, (2, 7), dtype=torch.int32)
    bias = torch.randn(4, 7, 7) if kind == "dense" else None
    alibi = (torch.rand(4), positions) if kind == "alibi" else None
    inputs = calls.Inputs(q, k, v, bias=bias, alibi=alibi)
    torch.testing.assert_close(calls.flex(inputs), calls.sdpa_math(inputs), rtol=1e-5, atol=1e-5)

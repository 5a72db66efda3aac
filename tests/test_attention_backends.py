"""Which backend a case gets on made-up machines, and how each library is called, with stand-ins for what is missing."""

import math
import re
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from d2v_fast.nn import attention_backends as backends
from d2v_fast.nn import attention_calls as calls
from d2v_fast.nn.attention import attention
from d2v_fast.nn.attention_backends import BACKENDS, RECIPES, Case, describe, named, select
from d2v_fast.nn.sequences import Sequences

H100, A100, T4 = (9, 0), (8, 0), (7, 5)
PYTORCH = ("", "triton", "flash", "cudnn")  # what PyTorch brings


def nothing_missing(need):
    return ""


def only(*there):
    """A machine with PyTorch and these packages."""
    return lambda need: "" if need in (*PYTORCH, *there) else f"{need} is not installed"


STUDENT, TEACHER = Case(dropout=True), Case(grad=False)


@pytest.mark.parametrize(
    ("case", "capability", "lacks", "name"),
    [
        (STUDENT, H100, nothing_missing, "fa2"),
        (STUDENT, H100, only(), "sdpa_flash"),
        (replace(STUDENT, packed=True), A100, nothing_missing, "fa2"),
        (replace(STUDENT, packed=True), H100, only("flash_attn_interface"), "aten_flash"),
        (replace(STUDENT, packed=True, other_queries=True), A100, only(), "aten_flash"),
        (replace(STUDENT, packed=True, other_queries=True), T4, only(), "padded"),
        (TEACHER, H100, nothing_missing, "fa3"),
        (TEACHER, H100, only(), "sdpa_flash"),
        (TEACHER, A100, only("flash_attn_interface"), "sdpa_flash"),
        (replace(TEACHER, packed=True), H100, only("flash_attn_interface"), "fa3"),
        (replace(TEACHER, packed=True), H100, only("flash_attn.cute"), "fa4"),
        (replace(TEACHER, packed=True), H100, only(), "aten_flash"),
        (replace(TEACHER, packed=True, compiling=True), H100, nothing_missing, "fa2"),
        (Case(grad=False), A100, only("flash_attn.cute"), "fa4"),  # has a forward there
        (Case(grad=True), A100, only("flash_attn.cute"), "sdpa_flash"),  # and no backward
        (Case(head_dim=256), H100, only(), "sdpa_flash"),
        (Case(head_dim=20, packed=True), H100, only("flash_attn_interface"), "aten_flash"),
        (Case(head_dim=20, padding=True), H100, only(), "sdpa"),
        (Case(bias="dense"), H100, nothing_missing, "bias_attention"),
        (Case(bias="dense", dropout=True), A100, only(), "bias_attention"),
        (Case(bias="alibi", dropout=True), A100, only(), "bias_attention"),
        (Case(bias="dense", head_dim=160), A100, only(), "sdpa_efficient"),
        (Case(bias="dense", padding=True), A100, nothing_missing, "sdpa_efficient"),
        (Case(padding=True, dropout=True), H100, nothing_missing, "sdpa_efficient"),
        (Case(dtype=torch.float32), H100, nothing_missing, "sdpa_efficient"),
        (Case(dtype=torch.float32, packed=True), H100, nothing_missing, "aten_efficient"),
        (Case(dtype=torch.float16, packed=True), T4, nothing_missing, "aten_efficient"),
        (Case(packed=True), T4, nothing_missing, "padded"),  # bfloat16
        # xformers would wait for the device
        (Case(dtype=torch.float32, packed=True, other_queries=True), H100, nothing_missing, "padded"),
        (Case(dtype=torch.float64), H100, nothing_missing, "sdpa"),
        (Case(device="cpu", dtype=torch.float32), (0, 0), nothing_missing, "sdpa"),
        (Case(device="cpu", bias="dense", dropout=True), (0, 0), nothing_missing, "sdpa"),  # bfloat16
        (Case(device="cpu", dtype=torch.float32, bias="dense", dropout=True), (0, 0), nothing_missing, "by_sample"),
        (Case(device="cpu", dtype=torch.float32, dropout=True, compiling=True), (0, 0), nothing_missing, "sdpa"),
        (Case(device="cpu", packed=True), (0, 0), nothing_missing, "each"),
        (Case(device="cpu", packed=True, compiling=True), (0, 0), nothing_missing, "padded"),
        (Case(device="mps", packed=True), (0, 0), nothing_missing, "padded"),
    ],
)
def test_selection(case, capability, lacks, name):
    choice = select(case, capability, lacks)
    assert choice.backend.name == name
    assert all(passed.reason for passed in choice.passed_over)


@pytest.mark.parametrize("capability", [H100, A100, T4])
@pytest.mark.parametrize("device", ["cuda", "cpu", "xpu"])
def test_every_case_has_a_backend(device, capability):
    """With nothing but PyTorch, and without Triton."""
    for packed in (False, True):
        extras = [{}] if packed else [{}, {"padding": True}, {"bias": "dense"}, {"bias": "alibi", "padding": True}]
        for extra in extras:
            for dtype in backends.ALL:
                case = Case(device=device, dtype=dtype, head_dim=80, packed=packed, dropout=True, **extra)
                for compiling in (False, True):
                    select(replace(case, compiling=compiling), capability, lambda need: need)


def test_reasons():
    choice = select(replace(STUDENT, packed=True), H100, only())
    assert choice.passed_over == (
        ("fa3", "has no dropout", False),
        ("fa4", "has no dropout", False),
        ("fa2", "flash_attn is not installed", True),
    )
    assert [passed.name for passed in choice.missing] == ["fa2"]
    reasons = {backend.name: backend.misfit(Case(), A100) for backend in BACKENDS}
    assert reasons["fa3"] == "needs compute capability 9.0, this GPU has 8.0"
    assert reasons["fa4"] == "has no backward where this GPU has 8.0"
    assert reasons["torch_varlen"] == "takes packed tensors, not dense"
    assert BACKENDS[1].misfit(Case(), (10, 0)) == "needs a compute capability below 10.0, this GPU has 10.0"
    assert describe(TEACHER, A100, only()) == (
        "sdpa_flash (fa3: needs compute capability 9.0, this GPU has 8.0; fa4: flash_attn.cute is not installed; "
        "fa2: flash_attn is not installed)"
    )
    exact = Case(deterministic=True)
    assert {b.name for b in BACKENDS if b.misfit(exact, H100) == "has no deterministic backward"} == {
        "sdpa_cudnn",
        "flex",
    }


def test_named():
    assert named("sdpa_cudnn", STUDENT, H100, only()).name == "sdpa_cudnn"
    assert named("bias_attention", Case(device="cpu"), (0, 0), only()).devices == ("cpu",)  # the second of that name
    with pytest.raises(ValueError, match=re.escape("'fa3' cannot compute this attention (has no dropout)")) as error:
        named("fa3", STUDENT, H100, nothing_missing)
    assert str(error.value).endswith(
        "these can: fa2, sdpa_flash, sdpa_cudnn, sdpa_efficient, xformers, sdpa, sdpa_math"
    )
    with pytest.raises(
        ValueError, match=re.escape("'fa2' cannot compute this attention (flash_attn is not installed)")
    ):
        named("fa2", STUDENT, H100, only())


def test_strict(monkeypatch):
    backends._index.cache_clear()
    monkeypatch.setattr(backends, "_capability", lambda index: H100)
    monkeypatch.setattr(backends, "select", lambda case, capability: select(case, capability, only("flash_attn")))
    arguments = ("cuda", torch.bfloat16, 64)
    index = backends.backend_index("auto", True, 0, *arguments, False, False, True)
    assert BACKENDS[index].name == "fa2"
    message = (
        "strict attention: fa2 would be used in place of a better backend; "
        "fa3: flash_attn_interface is not installed; fa4: flash_attn.cute is not installed"
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        backends.backend_index("auto", True, 0, *arguments)
    assert BACKENDS[backends.backend_index("auto", False, 0, *arguments)].name == "fa2"
    backends._index.cache_clear()


def test_strict_on_the_cpu():
    x = torch.randn(1, 3, 2, 8)
    assert attention(x, x, x, strict=True).shape == x.shape  # nothing better could be installed


def test_report_names_every_recipe():
    lines = backends.report()
    assert len(lines) == len(RECIPES)
    for line, name in zip(lines, RECIPES, strict=True):
        assert line.startswith(name)
    if not torch.cuda.is_available():
        assert [line.split()[-1] for line in lines[:4]] == ["by_sample", "each", "each", "sdpa"]


def stand_in(monkeypatch, name, **attributes):
    """A package of this name."""
    module = ModuleType(name)
    vars(module).update(attributes)
    for parent in (name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)):
        monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent, ModuleType(parent)))
    monkeypatch.setitem(sys.modules, name, module)


def test_what_is_missing_says_why(monkeypatch):
    def probe(need):
        return backends.PROBES[need]()

    for need in ("flash_attn", "flash_attn_interface", "flash_attn.cute", "xformers"):
        for name in [name for name in sys.modules if name.split(".")[0] == need.split(".")[0]]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, need.split(".")[0], None)  # import says that it is not there
    assert probe("flash_attn") == "flash_attn is not installed"
    assert probe("flash_attn.cute") == "flash_attn.cute is not installed"
    assert probe("xformers") == "xformers.ops.fmha is not installed"
    stand_in(monkeypatch, "flash_attn", flash_attn_varlen_func=print, __version__="2.6.3")
    assert probe("flash_attn") == "flash_attn 2.6.3 is older than 2.7"
    stand_in(monkeypatch, "flash_attn", flash_attn_varlen_func=print, __version__="2.8.3.post2")
    assert probe("flash_attn") == ""
    assert probe("flash_attn.cute") == "flash_attn.cute is not installed"  # flash_attn is, without it
    stand_in(monkeypatch, "flash_attn_interface")
    assert probe("flash_attn_interface") == "this flash_attn_interface has no flash_attn_varlen_func"
    broken = ImportError("undefined symbol: _ZN3c10\nmore")
    monkeypatch.setattr(backends.importlib, "import_module", lambda name: (_ for _ in ()).throw(broken))
    assert probe("flash_attn") == "flash_attn does not load: undefined symbol: _ZN3c10"


# Stand-ins: the arguments of the real functions, by their names, and what they compute.


def attend(q, k, v, scale=None):
    """[B, T, H, D]."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2)


def attend_rows(q, k, v, ends_q, ends_k, max_q, max_k, scale=None):
    assert ends_q.dtype == ends_k.dtype == torch.int32
    lengths_q, lengths_k = ends_q.diff().tolist(), ends_k.diff().tolist()
    assert max(lengths_q) <= max_q and max(lengths_k) <= max_k
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    return torch.cat([attend(*(x[None] for x in part), scale)[0] for part in parts])


class Seen(dict):
    """The options of the last call."""


def fake_fa2(seen):
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        seen.update(dropout_p=dropout_p, deterministic=deterministic)
        return attend(q, k, v)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        seen.update(dropout_p=dropout_p, deterministic=deterministic)
        return attend_rows(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)

    return "flash_attn", {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}


def fake_fa3(seen):
    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        seen.update(deterministic=deterministic)
        return attend(q, k, v)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        seen.update(deterministic=deterministic)
        y = attend_rows(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return y, torch.empty(0)  # as the first releases did

    functions = {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}
    return "flash_attn_interface", functions


def fake_fa4(seen):
    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    ):  # fmt: skip
        seen.update(deterministic=deterministic)
        return attend(q, k, v), None

    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
        softmax_scale=None, causal=False, deterministic=False,
    ):  # fmt: skip
        seen.update(deterministic=deterministic)
        return attend_rows(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), None

    return "flash_attn.cute", {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}


def fake_xformers(seen):
    class BlockDiagonalMask:
        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
            mask = cls()
            mask.lengths = q_seqlen, kv_seqlen
            return mask

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        seen.update(dropout_p=p)
        if attn_bias is None:
            return attend(query, key, value)
        ends = [torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in attn_bias.lengths]
        return attend_rows(query[0], key[0], value[0], *ends, *map(max, attn_bias.lengths))[None]

    bias = ModuleType("attn_bias")
    bias.BlockDiagonalMask = BlockDiagonalMask
    functions = {"memory_efficient_attention": memory_efficient_attention, "attn_bias": bias}
    return "xformers.ops.fmha", functions


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

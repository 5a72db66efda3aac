"""Which backend a case gets, on made-up machines."""

import re
import sys
from dataclasses import replace

import pytest
import torch
from attention_stand_ins import stand_in

from d2v_fast.nn import attention_backends as backends
from d2v_fast.nn.attention import attention
from d2v_fast.nn.attention_backends import BACKENDS, RECIPES, Case, describe, named, select

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

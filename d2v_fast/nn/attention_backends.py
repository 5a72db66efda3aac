"""The table of attention backends, best first, and which one a case gets on a machine.

What each can do is what its project documents; which is best follows the recipes: speech and text students have
dropout, which FlashAttention 3 and 4 and PyTorch's ``varlen_attn`` lack, teachers have none, images have a bias.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from d2v_fast.nn import attention_calls as calls

LOW = (torch.float16, torch.bfloat16)
FLOAT = (*LOW, torch.float32)
ALL = (*FLOAT, torch.float64)


@dataclass(frozen=True)
class Case:
    """What is asked for, as far as a backend may care."""

    device: str = "cuda"  # type of the device
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 64
    packed: bool = False
    other_queries: bool = False  # packed rows: queries are not the rows of the keys
    dropout: bool = False
    bias: Literal["none", "dense", "alibi"] = "none"
    padding: bool = False  # a padding mask
    grad: bool = True  # a backward may follow
    compiling: bool = False  # inside of torch.compile
    deterministic: bool = False  # torch.use_deterministic_algorithms


@dataclass(frozen=True)
class Backend:
    """One way to compute attention, and the cases that it takes."""

    name: str
    call: Callable[[calls.Inputs], Tensor]
    needs: str = ""  # key of PROBES: what has to be installed
    devices: tuple[str, ...] | None = ("cuda",)  # None: any
    capabilities: tuple[tuple[int, int], tuple[int, int]] = ((8, 0), (99, 0))  # of the GPU: from, below
    forward_only: tuple[tuple[int, int], tuple[int, int]] | None = None  # capabilities without a backward
    dtypes: tuple[torch.dtype, ...] = LOW
    max_head_dim: int = 256
    head_dim_multiple: int = 1
    layouts: tuple[str, ...] = ("dense", "packed")
    other_queries: bool = True
    dropout: bool = True
    without_dropout: bool = True
    biases: tuple[str, ...] = ("none",)
    padding: bool = False
    compiles: bool = True
    deterministic: bool = True  # its backward, when PyTorch is told to be

    def other_kind(self, case: Case) -> str:
        """Why this backend is for something else: other devices, tensors of another layout; empty if it is not."""
        layout = "packed" if case.packed else "dense"
        if self.devices is not None and case.device not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {case.device}"
        if layout not in self.layouts:
            return f"takes {' and '.join(self.layouts)} tensors, not {layout}"
        if not case.dropout and not self.without_dropout:
            return "is for dropout only"
        return "is for a bias only" if case.bias == "none" and case.bias not in self.biases else ""

    def misfit(self, case: Case, capability: tuple[int, int]) -> str:
        """Why this backend does not take ``case`` on a GPU of ``capability``, whatever is installed; empty if it does.

        On other devices than GPUs the capability does not matter.
        """
        reason = self.other_kind(case) or (self._misfit_gpu(case, capability) if case.device == "cuda" else "")
        bias = {"none": "", "dense": "takes no bias", "alibi": "takes no ALiBi with a gradient"}[case.bias]
        size = case.head_dim
        checks = (
            (bool(reason), reason),
            (case.dtype not in self.dtypes, f"does not take {str(case.dtype).removeprefix('torch.')}"),
            (size > self.max_head_dim, f"takes a head dim of at most {self.max_head_dim}, not {size}"),
            (size % self.head_dim_multiple != 0, f"takes a head dim of a multiple of {self.head_dim_multiple}"),
            (case.other_queries and not self.other_queries, "takes no other queries than keys"),
            (case.dropout and not self.dropout, "has no dropout"),
            (case.bias not in self.biases, bias),
            (case.padding and not self.padding, "takes no padding mask"),
            (case.compiling and not self.compiles, "cannot be traced by torch.compile"),
            (case.deterministic and case.grad and not self.deterministic, "has no deterministic backward"),
        )
        return next((reason for applies, reason in checks if applies), "")

    def _misfit_gpu(self, case: Case, capability: tuple[int, int]) -> str:
        low, high = self.capabilities
        this = "this GPU has {}.{}".format(*capability)
        if capability < low:
            return "needs compute capability {}.{}, ".format(*low) + this
        if capability >= high:
            return "needs a compute capability below {}.{}, ".format(*high) + this
        if case.dtype == torch.bfloat16 and capability < (8, 0) and self.devices is not None:
            return f"has no bfloat16 where {this}"
        if case.grad and self.forward_only is not None and self.forward_only[0] <= capability < self.forward_only[1]:
            return f"has no backward where {this}"
        return ""


# Best first. A name may occur twice: the first entry that takes a case counts.
BACKENDS = (
    Backend(
        "bias_attention", calls.bias_attention, "triton", dtypes=FLOAT, max_head_dim=128,
        layouts=("dense",), biases=("dense", "alibi"),
    ),
    Backend(
        "fa3", calls.fa3, "flash_attn_interface", capabilities=((9, 0), (10, 0)), head_dim_multiple=8,
        dropout=False, compiles=False,
    ),
    Backend(
        "fa4", calls.fa4, "flash_attn.cute", forward_only=((8, 0), (9, 0)), max_head_dim=128, head_dim_multiple=8,
        other_queries=False, dropout=False, compiles=False,
    ),
    Backend("fa2", calls.fa2, "flash_attn"),
    Backend("sdpa_flash", calls.sdpa_flash, "flash", layouts=("dense",)),
    Backend("aten_flash", calls.aten_flash, "flash", layouts=("packed",)),
    # the same kernel with one launch more
    Backend("torch_varlen", calls.torch_varlen, "flash", layouts=("packed",), dropout=False),
    # behind the others: it builds a plan for every new length of a batch
    Backend(
        "sdpa_cudnn", calls.sdpa_cudnn, "cudnn", max_head_dim=128, head_dim_multiple=8, layouts=("dense",),
        deterministic=False,
    ),
    Backend(
        "sdpa_efficient", calls.sdpa_efficient, capabilities=((5, 0), (99, 0)), dtypes=FLOAT, max_head_dim=1024,
        head_dim_multiple=8, layouts=("dense",), biases=("none", "dense", "alibi"), padding=True,
    ),
    Backend(
        "aten_efficient", calls.aten_efficient, capabilities=((5, 0), (99, 0)), dtypes=FLOAT, max_head_dim=1024,
        layouts=("packed",), other_queries=False,
    ),
    Backend(
        "xformers", calls.xformers, "xformers", dtypes=FLOAT, head_dim_multiple=8, layouts=("dense",), compiles=False
    ),
    Backend(
        "flex", calls.flex, "triton", dtypes=FLOAT, layouts=("dense",), dropout=False,
        biases=("none", "dense", "alibi"), deterministic=False,
    ),
    # On the CPU, and the last resort elsewhere
    Backend(
        "by_sample", calls.by_sample, devices=("cpu",), dtypes=ALL[2:], max_head_dim=2**16, layouts=("dense",),
        without_dropout=False, biases=("none", "dense", "alibi"), padding=True, compiles=False,
    ),
    Backend("each", calls.each, devices=("cpu",), dtypes=ALL, max_head_dim=2**16, layouts=("packed",), compiles=False),
    Backend(
        "padded", calls.padded, devices=None, capabilities=((0, 0), (99, 0)), dtypes=ALL, max_head_dim=2**16,
        layouts=("packed",),
    ),
    # by name only: it makes its mask of packed rows on the host, which waits for the device
    Backend(
        "xformers", calls.xformers, "xformers", dtypes=FLOAT, head_dim_multiple=8, layouts=("packed",), compiles=False
    ),
    *(
        Backend(
            name, call, devices=None, capabilities=((0, 0), (99, 0)), dtypes=ALL, max_head_dim=2**16,
            layouts=("dense",), biases=("none", "dense", "alibi"), padding=True,
        )
        for name, call in (("sdpa", calls.sdpa), ("sdpa_math", calls.sdpa_math))
    ),
    # its reference, by name only: as a whole tensor of weights it is no better than the others
    Backend(
        "bias_attention", calls.bias_attention, devices=("cpu",), dtypes=ALL, max_head_dim=128, layouts=("dense",),
        biases=("none", "dense", "alibi"),
    ),
)  # fmt: skip
NAMES = tuple(dict.fromkeys(backend.name for backend in BACKENDS))


def _module(name: str, attribute: str) -> str:
    """Why ``name.attribute`` cannot be imported; empty if it can."""
    top = name.split(".")[0]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        installed = error.name is not None and not name.startswith(error.name)
        return f"{name} does not load: {error}" if installed else f"{name} is not installed"
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # made for another torch or CUDA
        return f"{name} does not load: {str(error).splitlines()[0]}"
    return "" if hasattr(module, attribute) else f"this {top} has no {attribute}"


def _flash_attn() -> str:
    reason = _module("flash_attn", "flash_attn_varlen_func")
    if reason:
        return reason
    version = importlib.import_module("flash_attn").__version__
    # the first whose kernels are registered ops, which torch.compile and CUDA graphs need
    return "" if tuple(map(int, version.split(".")[:2])) >= (2, 7) else f"flash_attn {version} is older than 2.7"


def _triton() -> str:
    return _module("triton", "jit")


def _flash() -> str:
    built = torch.backends.cuda.is_flash_attention_available()
    return "" if built else "this torch is built without flash attention"


def _cudnn() -> str:
    return "" if torch.backends.cudnn.is_available() else "torch finds no cuDNN"


# what a backend may need: why it is missing, empty if it is there
PROBES: dict[str, Callable[[], str]] = {
    "flash_attn": _flash_attn,
    "flash_attn_interface": lambda: _module("flash_attn_interface", "flash_attn_varlen_func"),
    "flash_attn.cute": lambda: _module("flash_attn.cute", "flash_attn_varlen_func"),
    "xformers": lambda: _module("xformers.ops.fmha", "memory_efficient_attention"),
    "triton": _triton,
    "flash": _flash,
    "cudnn": _cudnn,
}


@cache
def lacks(need: str) -> str:
    """Why ``need``, a key of ``PROBES``, is missing on this machine; empty if it is there."""
    return PROBES[need]() if need else ""


class PassedOver(NamedTuple):
    """A better backend that was not taken."""

    name: str
    reason: str
    missing: bool  # it takes the case, and is not installed


class Choice(NamedTuple):
    """The backend for a case, and what was passed over for it."""

    backend: Backend
    passed_over: tuple[PassedOver, ...]

    @property
    def missing(self) -> tuple[PassedOver, ...]:
        """Those that would have been taken had they been installed."""
        return tuple(passed for passed in self.passed_over if passed.missing)


def select(case: Case, capability: tuple[int, int] = (0, 0), lacks: Callable[[str], str] = lacks) -> Choice:
    """The first backend that takes ``case`` and is installed; there always is one.

    Backends for other devices or layouts, or for a bias or dropout that is not there, do not count as passed over.

    Args:
        case: what is asked for.
        capability: of the GPU, if it is one.
        lacks: tells why a key of ``PROBES`` is missing; this machine's by default.
    """
    passed = []
    for backend in (backend for backend in BACKENDS if not backend.other_kind(case)):
        reason = backend.misfit(case, capability)
        missing = "" if reason else lacks(backend.needs)
        if not reason and not missing:
            return Choice(backend, tuple(passed))
        passed.append(PassedOver(backend.name, reason or missing, not reason))
    raise ValueError(f"no attention backend takes {case}: {_list(passed)}")


def named(name: str, case: Case, capability: tuple[int, int] = (0, 0), lacks: Callable[[str], str] = lacks) -> Backend:
    """The backend ``name`` for ``case``; ValueError, with the reason and with those that can, if it is not able to."""
    if name not in NAMES:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, NAMES))}, got {name!r}")
    reason = ""
    for backend in BACKENDS:
        if backend.name == name:
            reason = backend.misfit(case, capability) or lacks(backend.needs)
            if not reason:
                return backend
    able = dict.fromkeys(b.name for b in BACKENDS if not b.misfit(case, capability) and not lacks(b.needs))
    raise ValueError(f"backend {name!r} cannot compute this attention ({reason}); these can: {', '.join(able)}")


def _list(passed: tuple[PassedOver, ...] | list[PassedOver]) -> str:
    return "; ".join(f"{one.name}: {one.reason}" for one in passed)


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def _index(name: str, strict: bool, index: int, case: Case) -> int:
    capability = _capability(index) if case.device == "cuda" else (0, 0)
    if name != "auto":
        return BACKENDS.index(named(name, case, capability))
    choice = select(case, capability)
    if strict and choice.missing:
        raise RuntimeError(
            f"strict attention: {choice.backend.name} would be used in place of a better backend; "
            f"{_list(choice.missing)}"
        )
    return BACKENDS.index(choice.backend)


def backend_index(name: str, strict: bool, index: int, *case: str | bool | int | torch.dtype) -> int:
    """Index in ``BACKENDS`` of the backend for a case, its fields in order, on the device ``index``.

    torch.compile runs it while tracing.
    """
    return _index(name, strict, index, Case(*case))


backend_index._dynamo_marked_constant = True  # as for attention_calls.load


# what the recipes ask for, by the names that a report shows
RECIPES = {
    "speech and text student": Case(dropout=True),
    "speech and text student, packed": Case(dropout=True, packed=True),
    "last student layer, packed": Case(dropout=True, packed=True, other_queries=True),
    "speech and text teacher": Case(grad=False),
    "speech and text teacher, packed": Case(grad=False, packed=True),
    "padded text student": Case(dropout=True, padding=True),
    "image student": Case(bias="dense"),
    "image student, dropout": Case(bias="dense", dropout=True),
    "image teacher": Case(bias="dense", grad=False),
    "ALiBi student": Case(bias="alibi", dropout=True),
    "float32 student": Case(dtype=torch.float32, dropout=True),
    "float32 student, packed": Case(dtype=torch.float32, dropout=True, packed=True),
}


def describe(case: Case, capability: tuple[int, int] = (0, 0), lacks: Callable[[str], str] = lacks) -> str:
    """The backend for ``case`` and, in brackets, the better ones that are not used, each with the reason."""
    choice = select(case, capability, lacks)
    return f"{choice.backend.name} ({_list(choice.passed_over)})" if choice.passed_over else choice.backend.name


def report() -> list[str]:
    """One line for each of ``RECIPES``: what computes it here, on the first GPU or in float32 on the CPU."""
    width = max(map(len, RECIPES))
    if torch.cuda.is_available():
        used = {name: describe(case, _capability(0)) for name, case in RECIPES.items()}
    else:
        used = {name: describe(replace(case, device="cpu", dtype=torch.float32)) for name, case in RECIPES.items()}
    return [f"{name:<{width}}  {text}" for name, text in used.items()]

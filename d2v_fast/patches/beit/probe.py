"""Trying ours beside what it replaces, for code that is known by its structure and not by its source.

A model that nobody has trained yet hides much: tables of zeros, LayerScale of 1e-4. What is tried is therefore a copy
in float32 on the CPU, every parameter drawn anew; the model itself is not touched, and no random number is taken.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from d2v_fast.patches._sharing import HOOKS
from d2v_fast.patches._state import copies_as_upstream

TOLERANCE = 1e-4  # relative, of float32 through all layers; another formula is far from it
PERIOD = 65537  # numbers drawn for all parameters together; a prime, so that rows of a weight differ
Results = tuple[Any, Any]  # of ours and of theirs: tensors, or lists of results
_trying = False


def trying() -> bool:
    """Whether a trial is on: methods of ours in classes are to be the originals then."""
    return _trying


@contextmanager
def trial(module: nn.Module) -> Iterator[tuple[nn.Module, torch.Generator]]:
    """A copy of ``module`` to evaluate, and a generator; inside are no dropout, gradient, autocast or other device."""
    global _trying
    generator = torch.Generator("cpu").manual_seed(0)
    before, _trying = _trying, True
    mkldnn = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # where matmul precision is "medium" it multiplies in bfloat16
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
        ):
            yield stand_in(module, generator).eval(), generator
    finally:
        _trying, torch.backends.mkldnn.enabled = before, mkldnn


def stand_in(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy of ``module`` in float32 on the CPU, without hooks, as its authors wrote it, and with new parameters.

    All are of size 1 in what they do: weights of layers N(0, 1 / inputs), everything else N(0, 1).
    """
    numbers, memo = torch.randn(PERIOD, generator=generator), {}
    for part in module.modules():
        inside = part.__dict__
        memo |= {id(inside[name]): type(inside[name])() for name in HOOKS if name in inside}
        for x in (*part._buffers.values(), *inside.values()):
            if isinstance(x, Tensor):
                memo[id(x)] = x.detach().to("cpu", torch.float32 if x.is_floating_point() else x.dtype, copy=True)
        for name, x in part._parameters.items():
            if x is None or id(x) in memo:
                continue
            inputs = x[0].numel() if name == "weight" and x.ndim > 1 else 1
            start = int(torch.randint(PERIOD, (), generator=generator))
            drawn = numbers.roll(start).repeat(-(-x.numel() // PERIOD))[: x.numel()]
            memo[id(x)] = nn.Parameter(drawn.div_(inputs**0.5).view(x.shape), requires_grad=False)
    with copies_as_upstream():
        return copy.deepcopy(module, memo)


def random_like(x: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Normal numbers of ``shape`` in the dtype and on the device of ``x``."""
    return torch.randn(tuple(shape), generator=generator).to(x)


def difference(got: Any, want: Any) -> str | None:
    """Where results, tensors or lists of them, differ by more than rounding; None where they do not."""
    if isinstance(want, (list, tuple)):
        if not isinstance(got, (list, tuple)) or len(got) != len(want):
            return "it returns another number of results"
        found = (difference(mine, theirs) for mine, theirs in zip(got, want, strict=True))
        return next((reason for reason in found if reason is not None), None)
    if not isinstance(want, Tensor) or got.shape != want.shape:
        return f"it returns {tuple(want.shape) if isinstance(want, Tensor) else type(want).__name__}"
    error = ((got - want).double().norm() / want.double().norm().clamp(min=1e-12)).item()
    return None if error <= TOLERANCE else f"its result differs from ours by {error:.2g} of its size"


def compare(module: nn.Module, run: Callable[[nn.Module, torch.Generator], Results]) -> str | None:
    """Why ours is not what ``module`` computes, by ``run``, which gets a copy and gives results of ours and theirs."""
    try:
        with trial(module) as (copied, generator):
            reason = difference(*run(copied, generator))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        return f"it could not be tried: {error}"
    return None if reason is None else f"tried on random numbers, {reason}"


@contextmanager
def dropouts_shown(module: nn.Module) -> Iterator[None]:
    """Let the dropouts of a copy mix channels, so that another place or number of them gives other results.

    That of attention may be in an operator, and not be called; it raises ValueError if it is called twice.
    """
    found = [(name, each) for name, each in module.named_modules() if isinstance(each, nn.Dropout) and each.p > 0]
    hooks = [_once(name) if name.endswith("attn_drop") else _mix for name, _ in found]
    handles = [each.register_forward_hook(hook) for (_, each), hook in zip(found, hooks, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mix(module: nn.Module, args: tuple, x: Tensor) -> Tensor:
    return x + 0.5 * x.roll(1, -1)


def _once(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
    calls = []

    def count(module: nn.Module, args: tuple, x: Tensor) -> None:
        calls.append(name)
        if len(calls) > 1:
            raise ValueError(f"it calls {name} twice")

    return count

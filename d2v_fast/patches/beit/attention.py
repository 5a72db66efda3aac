"""``Attention`` and ``Mlp`` of BEiT's blocks: relative positions in the attention's kernel, bias and GELU in one.

Dims: B images, N positions, C channels, H heads.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.nn.attention import attention
from d2v_fast.ops import bias_gelu
from d2v_fast.ops._rows import runs_reference
from d2v_fast.patches._core import Options, Seam, fall_back
from d2v_fast.patches._sharing import Bypassed, plan_of
from d2v_fast.patches.beit.probe import Results, compare, dropouts_shown, random_like, trying

BIASES = ("rel_pos_bias", "shared_rel_pos_bias")  # what the argument is called
PARTS = {"qkv", "attn_drop", "proj", "proj_drop"}
TENSORS = {"q_bias", "v_bias", "relative_position_bias_table"}


Run = Callable[[nn.Module, torch.Generator], Results]  # of a copy


class Plan:
    """Whether ours computes what a module of this structure does; ``run`` is tried where it is given."""

    def __init__(self, owner: nn.Module, kinds: tuple[str, ...], reason: str | None, run: Run | None) -> None:
        self._bypassed = Bypassed(owner, kinds, settings=("p",))
        self._reason = reason or self._bypassed.misfit()
        if self._reason is None and run is not None:
            self._reason = compare(owner, run)

    def valid(self) -> bool:
        """Whether the parts are still the same."""
        return self._bypassed.valid()

    def reason(self) -> str | None:
        """Why this call has to be the original's."""
        if self._reason is not None or torch.compiler.is_compiling():
            return self._reason
        return self._bypassed.watched()


def argument_names(function: Callable) -> tuple[str, ...]:
    """Names of the arguments behind ``self`` and the first one."""
    return tuple(inspect.signature(function).parameters)[2:]


def split_bias(names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor | None, str | None]:
    """The bias among the arguments of a call, and why ours cannot take the others."""
    given = dict(zip(names, args, strict=False)) | kwargs
    bias = next((given.pop(name) for name in BIASES if name in given), None)
    for name, value in given.items():
        if value is not None and value is not False:
            return bias, f"ours does not know the argument {name}"
    if bias is not None and bias.dim() == 4 and bias.shape[0] == 1:
        bias = bias[0]
    if bias is not None and bias.dim() != 3:
        return bias, f"the bias is {list(bias.shape)}, not one for all images"
    return bias, None


def attend(self: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [B, N, C] and a bias [H, N, N] to [B, N, C]."""
    if self.q_bias is None:
        qkv_bias = self.qkv.bias
    else:  # keys have none
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
    qkv = F.linear(x, self.qkv.weight, qkv_bias)
    q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)  # 3 x [B, N, H, D]
    table = getattr(self, "relative_position_bias_table", None)
    if table is not None:
        own = F.embedding(self.relative_position_index, table).permute(2, 0, 1)
        bias = own if bias is None else own + bias
    p = self.attn_drop.p if self.attn_drop.training else 0.0
    y = attention(q, k, v, bias=bias, dropout_p=p)
    return self.proj_drop(self.proj(y.flatten(-2)))


def _attention_misfit(self: nn.Module) -> str | None:
    children, tensors = set(self._modules), {name for name, x in self._parameters.items() if x is not None}
    if children != PARTS or not tensors <= TENSORS:
        return f"it has other parts than BEiT's: {', '.join(sorted(children ^ PARTS | tensors - TENSORS))}"
    if (self.q_bias is None) != (self.v_bias is None) or (self.q_bias is not None and self.qkv.bias is not None):
        return "its biases of queries and values are not BEiT's"
    width = self.qkv.out_features // (3 * self.num_heads)
    scale = getattr(self, "scale", width**-0.5)
    if not isinstance(scale, float) or abs(scale - width**-0.5) > 1e-6 * scale:
        return f"it scales logits by {scale!r}, not by {width**-0.5:.4g}"
    return None


def attention_plan(self: nn.Module, original: Callable | None = None) -> Plan:
    """For an attention, tried beside ``original``."""
    run = None if original is None else partial(try_attention, original=original)
    return Plan(self, ("Linear", "Dropout", "Identity"), _attention_misfit(self), run)


def try_attention(self: nn.Module, generator: torch.Generator, *, original: Callable) -> tuple[Tensor, Tensor]:
    """Results of ours and of ``original``."""
    index = getattr(self, "relative_position_index", None)
    count = 5 if index is None or getattr(self, "relative_position_bias_table", None) is None else len(index)
    x = random_like(self.qkv.weight, (1, count, self.qkv.in_features), generator)
    names = argument_names(original)
    with dropouts_shown(self):
        if not names or names[0] not in BIASES:
            return attend(self, x, None), original(self, x)
        bias = random_like(self.qkv.weight, (self.num_heads, count, count), generator)
        return attend(self, x, bias), original(self, x, bias)


def make_attention(original: Callable, options: Options) -> Callable:
    """``forward`` of an attention: x [B, N, C], a bias [H, N, N] or [1, H, N, N] -> [B, N, C]."""
    names, make_plan = argument_names(original), partial(attention_plan, original=original)

    def forward(self, x, *args, **kwargs):
        if trying():
            return original(self, x, *args, **kwargs)
        bias, reason = split_bias(names, args, kwargs)
        reason = reason or plan_of(self, "attention", make_plan).reason()
        if reason is not None:
            fall_back(self, "forward", reason, options)
            return original(self, x, *args, **kwargs)
        return attend(self, x, bias)

    return forward


def _mlp_misfit(self: nn.Module) -> str | None:
    known = {"fc1", "act", "fc2", "drop", "drop1", "drop2", "norm"}
    if not {"fc1", "act", "fc2"} <= set(self._modules) <= known or self._parameters:
        return f"it has other parts than BEiT's: {', '.join(self._modules)}"
    if type(self.act) is not nn.GELU or self.act.approximate != "none":
        return "its activation is not the exact GELU"
    if type(self._modules.get("norm", nn.Identity())) is not nn.Identity:
        return "it has a norm"
    if self.fc1.bias is None:
        return "fc1 has no bias"
    return None


def mlp_plan(self: nn.Module, original: Callable | None = None) -> Plan:
    """For an MLP, tried beside ``original``."""
    run = None if original is None else partial(try_mlp, original=original)
    return Plan(self, ("Linear", "Dropout", "Identity", "GELU"), _mlp_misfit(self), run)


def try_mlp(self: nn.Module, generator: torch.Generator, *, original: Callable) -> tuple[Tensor, Tensor]:
    """Results of ours and of ``original``."""
    x = random_like(self.fc1.weight, (2, 3, self.fc1.in_features), generator)
    with dropouts_shown(self):
        return mlp(self, x), original(self, x)


def mlp(self: nn.Module, x: Tensor) -> Tensor:
    """x [B, N, C] -> [B, N, C]: two linear layers, bias and GELU between them in one pass."""
    if runs_reference(x, x.dtype):  # on the CPU the bias is free in the product
        hidden = bias_gelu(self.fc1(x), None)
    else:
        hidden = bias_gelu(F.linear(x, self.fc1.weight), self.fc1.bias)
    if "drop1" in self._modules:
        hidden = self.drop1(hidden)
    x = self.fc2(hidden)
    last = self._modules.get("drop2", self._modules.get("drop"))
    return x if last is None else last(x)


def make_mlp(original: Callable, options: Options) -> Callable:
    """``forward`` of an MLP."""
    make_plan = partial(mlp_plan, original=original)

    def forward(self, x, *args, **kwargs):
        if trying():
            return original(self, x, *args, **kwargs)
        reason = "ours knows one argument" if args or kwargs else plan_of(self, "mlp", make_plan).reason()
        if reason is not None:
            fall_back(self, "forward", reason, options)
            return original(self, x, *args, **kwargs)
        return mlp(self, x)

    return forward


def _refuses_attention(owner: Any) -> str | None:
    return attention_plan(owner, type(owner).forward).reason()


def _refuses_mlp(owner: Any) -> str | None:
    return mlp_plan(owner, type(owner).forward).reason()


def _prepare_attention(owner: nn.Module) -> None:
    plan_of(owner, "attention", attention_plan)  # it was tried before


def _prepare_mlp(owner: nn.Module) -> None:
    plan_of(owner, "mlp", mlp_plan)


ATTENTION = Seam(
    "attention",
    "forward",
    make_attention,
    "relative positions in the attention kernel, one bias for all images, no copies of q, k and v",
    refuses=_refuses_attention,
    prepare=_prepare_attention,
    op="bias_attention",
)
MLP = Seam(
    "norms",
    "forward",
    make_mlp,
    "bias and GELU in one pass",
    refuses=_refuses_mlp,
    prepare=_prepare_mlp,
    op="bias_gelu",
)

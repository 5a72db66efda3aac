"""Attention and blocks of fairseq's data2vec 2.0 (``AltAttention``, ``AltBlock``), with ALiBi inside of the kernel.

Dims: B samples (with their clones), T tokens that are left, H heads, D head dim, C channels.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from d2v_fast.nn.attention import attention
from d2v_fast.nn.block import drop_path_scale
from d2v_fast.ops import bias_gelu, residual_dropout_layer_norm
from d2v_fast.ops._rows import runs_reference
from d2v_fast.patches._core import Options, Seam, fall_back, is_ours, logger
from d2v_fast.patches._sharing import HOOKS


class Alibi:
    """Upstream's bias ``-slope[h] |position_i - position_j|`` [B, H, T, T] as what it is made of.

    It stands for the tensor on its way to attention, and takes the factors that upstream multiplies it by for each
    layer. Whatever else is done with it gets the tensor, which is made then.
    """

    def __init__(self, slopes: Tensor, positions: Tensor) -> None:
        self.slopes = slopes  # [H] float32, learned scales among them
        self.positions = positions  # [B, T] integers
        self._dense: Tensor | None = None

    def dense(self) -> Tensor:
        """The tensor [B, H, T, T], float32."""
        if self._dense is None:
            if not torch.compiler.is_compiling():
                _say_dense()
            distance = (self.positions[:, :, None] - self.positions[:, None, :]).abs()  # [B, T, T]
            self._dense = -self.slopes[:, None, None] * distance[:, None]
        return self._dense

    def __mul__(self, other: Any) -> "Alibi | Tensor":
        if isinstance(other, Tensor) and other.dim() == 4 and other.numel() == other.shape[1]:  # [1, H or 1, 1, 1]
            return Alibi(self.slopes * other.reshape(-1), self.positions)
        return self.dense() * other

    __rmul__ = __mul__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.__name__ == "type_as" and isinstance(args[0], Tensor):
            return args[0].to(args[1].slopes.dtype)
        if func.__name__ in ("mul", "__mul__", "__rmul__") and not kwargs:
            bias, factor = args if isinstance(args[0], Alibi) else reversed(args)
            return Alibi.__mul__(bias, factor)
        args, kwargs = tree_map_only(Alibi, Alibi.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


@cache
def _say_dense() -> None:
    """Log it once."""
    logger.warning("ALiBi was made a tensor [B, H, T, T], for code that d2v_fast does not know")


def plain(module: nn.Module, *kinds: str) -> bool:
    """Whether ``module`` is exactly of one of these classes, and nothing watches or changes its calls."""
    inside = module.__dict__
    if type(module).__name__ not in kinds or any(inside.get(hooks) for hooks in HOOKS):
        return False
    return "forward" not in inside or is_ours(inside["forward"])


def rate(dropout: nn.Dropout) -> float:
    """Probability of dropping an element at the moment."""
    return dropout.p if dropout.training else 0.0


def _unfit_attention(self: nn.Module, alibi_bias: Any = None) -> str | None:
    if self.cosine_attention:
        return "cosine attention"
    width = getattr(self.qkv, "in_features", 0)
    if width == 0 or self.scale != (width // self.num_heads) ** -0.5:
        return f"qk_scale {self.scale} is not known to be that of the head dim"
    if not plain(self.attn_drop, "Dropout") or self.attn_drop.p >= 1:
        return "the dropout of the weights is not an ordinary one"
    if isinstance(alibi_bias, Tensor):
        return "the bias is a tensor of samples x heads x tokens x tokens"
    return None


def _attend(self: nn.Module, x: Tensor, padding_mask: Tensor | None, alibi: Alibi | None) -> Tensor:
    """Projected result [B, T, C], before the dropout behind it."""
    q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # [B, T, H, D]
    if padding_mask is not None:
        padding_mask = padding_mask.to(torch.bool)
    pair = None
    if alibi is not None:  # further heads have none
        pair = F.pad(alibi.slopes, (0, self.num_heads - alibi.slopes.shape[0])), alibi.positions
    y = attention(q, k, v, alibi=pair, padding_mask=padding_mask, dropout_p=rate(self.attn_drop))
    return self.proj(y.flatten(2))


def _make_attention(original: Callable, options: Options) -> Callable:
    def forward(self, x, padding_mask=None, alibi_bias=None):
        """x [B, T, C] -> [B, T, C]; padding_mask [B, T], True = padding, or None; alibi_bias an Alibi or None."""
        reason = _unfit_attention(self, alibi_bias)
        if reason is not None:
            fall_back(self, "forward", reason, options)
            return original(self, x, padding_mask, alibi_bias)
        return self.proj_drop(_attend(self, x, padding_mask, alibi_bias))

    return forward


ATTENTION = Seam(
    "attention",
    "forward",
    _make_attention,
    "best attention there is; ALiBi, where there is one, in its kernel; does not wait to see whether there is padding",
    known=frozenset({"d282e108966f6045"}),
    refuses=_unfit_attention,
)


def _unfit_block(self: nn.Module) -> str | None:
    norms = (self.norm1, self.norm2)
    if not all(plain(norm, "LayerNorm") for norm in norms):
        return "a norm is not an ordinary layer norm, or is watched"
    if not plain(self.post_mlp_dropout, "Dropout") or self.post_mlp_dropout.p >= 1:
        return "the dropout behind the MLP is not an ordinary one, or is watched"
    path = self.drop_path
    if not plain(path, "Identity", "DropPath"):
        return "drop_path is not timm's, or is watched"
    if type(path).__name__ == "DropPath" and not (path.scale_by_keep and path.drop_prob < 1):
        return "drop_path does not divide by the share that is kept"
    return None


def _path(self: nn.Module, x: Tensor) -> Tensor | None:
    """DropPath's factor [B], or None."""
    path = self.drop_path
    return drop_path_scale(x, float(path.drop_prob or 0.0), path.training) if hasattr(path, "drop_prob") else None


def _branch(attn: nn.Module, x: Tensor, padding_mask: Tensor | None, alibi_bias: Any) -> tuple[Tensor, float]:
    """Result of attention, and the rate of the dropout that is still to come."""
    whole = plain(attn, "AltAttention") and plain(attn.proj_drop, "Dropout") and attn.proj_drop.p < 1
    if whole and is_ours(attn.forward) and _unfit_attention(attn, alibi_bias) is None:
        return _attend(attn, x, padding_mask, alibi_bias), rate(attn.proj_drop)
    return attn(x, padding_mask, alibi_bias), 0.0


def _mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    """timm's MLP, its bias and GELU in one pass where that is all there is between its products."""
    children = mlp._modules
    drops = [children[name] for name in ("drop", "drop1", "drop2") if name in children]
    norm = children.get("norm")
    known = (
        plain(mlp, "Mlp")
        and plain(mlp.fc1, "Linear")
        and mlp.fc1.bias is not None
        and plain(mlp.act, "GELU")
        and mlp.act.approximate == "none"
        and (norm is None or plain(norm, "Identity"))
        and all(plain(m, "Dropout") and rate(m) == 0 for m in drops)
    )
    if not known or runs_reference(x, x.dtype):  # PyTorch's operators on the CPU have the bias free in the product
        return mlp(x)
    return mlp.fc2(bias_gelu(F.linear(x, mlp.fc1.weight), mlp.fc1.bias))


def _add_norm(x: Tensor, residual: Tensor, norm: nn.LayerNorm, p: float, scale: Tensor | None) -> Tensor:
    return residual_dropout_layer_norm(x, residual, norm.weight, norm.bias, p=p, eps=norm.eps, row_scale=scale)


def _make_block(original: Callable, options: Options) -> Callable:
    def forward(self, x, padding_mask=None, alibi_bias=None):
        """x [B, T, C] -> the block's output and its target, [B, T, C] each."""
        reason = _unfit_block(self)
        if reason is not None:
            fall_back(self, "forward", reason, options)
            return original(self, x, padding_mask, alibi_bias)
        post = not self.layer_norm_first
        branch, p = _branch(self.attn, x if post else self.norm1(x), padding_mask, alibi_bias)
        y = _add_norm(branch, x, self.norm1 if post else self.norm2, p, _path(self, x))
        target = _mlp(self.mlp, y)
        p = rate(self.post_mlp_dropout)
        if post:
            out = _add_norm(target, y, self.norm2, p, _path(self, x))
        else:  # upstream's residual is the MLP's output here, not its input
            out = target + self.drop_path(self.post_mlp_dropout(target))
        out = out.to(x.dtype)  # under autocast upstream's stream is float32, and the teacher takes its dtype from it
        return out, target if self.ffn_targets else out

    return forward


BLOCK = Seam(
    "norms",
    "forward",
    _make_block,
    "dropout, DropPath, residual and norm in one pass; bias and GELU in one",
    known=frozenset({"fc4663c756a32a08"}),
    refuses=_unfit_block,
    op="residual_dropout_layer_norm",
)

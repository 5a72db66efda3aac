"""One layer of the encoder.

Dims: B batch, T positions, N packed rows, U sequences, M selected rows, C channels, F hidden channels.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from d2v_fast.nn.checkpointing import Again, linear
from d2v_fast.nn.config import EncoderConfig
from d2v_fast.nn.self_attention import Scope, SelfAttention
from d2v_fast.nn.sequences import Sequences
from d2v_fast.ops import bias_gelu, residual_dropout_layer_norm
from d2v_fast.ops._dropout import dropout
from d2v_fast.ops._rows import runs_reference


class Stream(NamedTuple):
    """What goes from layer to layer, [B, T, C] or [N, C]."""

    y: Tensor  # input of the next sublayer
    h: Tensor  # residual stream; y itself in post-norm encoders
    again: Again | None = None  # how to compute y in backward, where that is cheaper than keeping it


def drop_path_scale(x: Tensor, p: float, training: bool, sequences: Sequences | None = None) -> Tensor | None:
    """Factor [B] on a residual branch x [B, T, C]: 0 for whole samples with probability ``p``, else 1 / (1 - p).

    With ``sequences`` [N] on the rows x [N, C], the same for all rows of a sequence.
    """
    if p == 0 or not training:
        return None
    dtype = torch.promote_types(x.dtype, torch.float32)
    count = x.shape[0] if sequences is None else sequences.count
    scale = (torch.rand(count, device=x.device) >= p).to(dtype) / (1 - p)
    if sequences is None:
        return scale
    return scale.repeat_interleave(sequences.cu_seqlens.diff(), output_size=sequences.num_rows)


def scale_branch(x: Tensor, p: float, column_scale: Tensor | None, row_scale: Tensor | None) -> Tensor:
    """Dropout, LayerScale [C] and DropPath [B] of a residual branch x [B, ..., C], without the residual."""
    x = dropout(x, p)
    x = x if column_scale is None else x * column_scale
    return x if row_scale is None else x * row_scale.to(x.dtype).view(-1, *(1,) * (x.dim() - 1))


def of_kept(branch: Callable[[Tensor], Tensor], y: Tensor, row_scale: Tensor | None) -> Tensor:
    """``branch(y)``; only for the samples, along the first dim, that DropPath keeps (anything for the others).

    On the CPU alone, where reading the draw costs nothing; elsewhere for all samples.
    """
    if row_scale is None or len(y) == 0 or y.device.type != "cpu" or torch.compiler.is_compiling():
        return branch(y)
    kept = row_scale.nonzero()[:, 0]
    if len(kept) == len(y):
        return branch(y)
    if len(kept) == 0:
        kept = kept.new_zeros(1)  # attention wants a batch; the factor of 0 follows
    x = branch(y.index_select(0, kept))
    return x.new_zeros(y.shape).index_copy(0, kept, x)


def _norm_again(h: Tensor, weight: Tensor, bias: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    """The layer norm of ``h`` as the fused op computes it, for a sublayer that adds nothing."""
    nothing = h.new_zeros(h.shape[-1:], dtype=dtype).expand(h.shape)
    return residual_dropout_layer_norm(nothing, h, weight, bias, eps=eps)


class Block(nn.Module):
    """One Transformer layer, post-norm (speech, text) or pre-norm with LayerScale and DropPath (images).

    Each sublayer's output goes into one fused op: dropout, scales, residual and the norm in front of the next sublayer.
    In pre-norm encoders the last of these norms is the next layer's first, unless the layer stands ``alone``: it then
    reads no parameter of another layer, in forward or backward, as layers that are sharded one by one (FSDP2) have to.
    """

    alone = False

    def __init__(self, config: EncoderConfig, drop_path: float) -> None:
        super().__init__()
        self.pre_norm, self.ffn_result = config.norm == "pre", config.layer_result == "ffn"
        self.selective = config.checkpointing == "selective"
        self.dropout, self.activation_dropout, self.drop_path = config.dropout, config.activation_dropout, drop_path
        self.attention = SelfAttention(config)
        self.norm1 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.fc1 = nn.Linear(config.dim, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.dim)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        scale = torch.full((config.dim,), config.layer_scale)
        self.scale1 = nn.Parameter(scale.clone()) if config.layer_scale > 0 else None
        self.scale2 = nn.Parameter(scale.clone()) if config.layer_scale > 0 else None

    @property
    def random(self) -> bool:
        """Whether the layer draws random numbers."""
        rates = (self.dropout, self.activation_dropout, self.drop_path, self.attention.dropout)
        return self.training and any(rates)

    def _attend(self, stream: Stream, scope: Scope, select: Sequences | None, row_scale: Tensor | None) -> Tensor:
        if select is None and scope.sequences is None and scope.padding_mask is None:
            y, again = stream.y, stream.again
            return of_kept(lambda x: self.attention(x, scope, again=again if x is y else None), y, row_scale)
        return self.attention(stream.y, scope, select, stream.again)

    def _ffn(self, y: Tensor, again: Again | None) -> Tensor:
        # the bias goes into GELU, where it is free; PyTorch's operators on the CPU have it free in the product
        in_product = runs_reference(y, y.dtype)
        x = linear(y, self.fc1.weight, self.fc1.bias if in_product else None, again)  # [.., F]
        bias = None if in_product else self.fc1.bias
        hidden = bias_gelu(x, bias)
        if self.training and self.activation_dropout > 0:
            hidden = dropout(hidden, self.activation_dropout)
        elif self.selective:
            return linear(hidden, self.fc2.weight, self.fc2.bias, Again(bias_gelu, (x, bias)))
        return self.fc2(hidden)

    def _factors(self, scale: Tensor | None, row_scale: Tensor | None) -> dict[str, float | Tensor | None]:
        """What happens to a sublayer's output on its way into the residual stream."""
        return {"p": self.dropout if self.training else 0.0, "column_scale": scale, "row_scale": row_scale}

    def _add_norm(self, x: Tensor, h: Tensor, norm: nn.LayerNorm | None, **factors) -> Stream:
        """Add x to the residual stream h and normalise, if there is a norm."""
        selective = self.selective and torch.is_grad_enabled()
        if norm is None:
            h = (h + scale_branch(x, **factors)).to(h.dtype)
            return Stream(h, h)
        out = residual_dropout_layer_norm(
            x, h, norm.weight, norm.bias, eps=norm.eps, return_residual=self.pre_norm or selective, **factors
        )
        y, h = out if self.pre_norm or selective else (out, out)
        again = None
        if selective:
            again = Again(partial(_norm_again, eps=norm.eps, dtype=x.dtype), (h, norm.weight, norm.bias))
        return Stream(y, h if self.pre_norm else y, again)

    def _normalised(self, h: Tensor) -> Stream:
        """The residual stream h with what the attention of a pre-norm layer reads."""
        device_type = h.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else h.dtype
        again = Again(partial(_norm_again, eps=self.norm1.eps, dtype=dtype), (h, self.norm1.weight, self.norm1.bias))
        return Stream(again.function(*again.sources), h, again if self.selective else None)

    def forward(
        self,
        stream: Stream,
        next_norm: nn.LayerNorm | None,  # of whatever follows; pre-norm layers apply it
        scope: Scope,
        select: Sequences | None = None,
        result_only: bool = False,
    ) -> tuple[Stream | None, Tensor]:
        """The next stream, whose h is the layer's output, and the layer's result.

        The result is the layer's output or, with ``layer_result`` "ffn", that of the FFN before the residual: in
        post-norm layers as it leaves the FFN, in pre-norm layers as it is added, so after LayerScale and DropPath.
        ``select`` gives all of these for those rows only, [M, C]; ``result_only`` ends with the result, and may leave
        the stream out. A pre-norm layer that stands alone normalises ``stream.h`` itself, and leaves it as it is for a
        ``next_norm`` of None.
        """
        if self.alone and self.pre_norm:
            stream = self._normalised(stream.h)
        middle, last = (self.norm2, next_norm) if self.pre_norm else (self.norm1, self.norm2)
        sequences = scope.sequences if select is None else select
        row_scale = drop_path_scale(stream.y, self.drop_path, self.training, sequences)
        x = self._attend(stream, scope, select, row_scale)
        h = stream.h if select is None else select.take(stream.h.flatten(0, -2))
        y, h, again = self._add_norm(x, h, middle, **self._factors(self.scale1, row_scale))
        row_scale = drop_path_scale(y, self.drop_path, self.training, sequences)
        whole = self.ffn_result and not self.pre_norm  # the result is what leaves the FFN, for all samples
        ffn = of_kept(lambda x: self._ffn(x, again if x is y else None), y, None if whole else row_scale)
        if whole and result_only:
            return None, ffn
        factors = self._factors(self.scale2, row_scale)
        if self.ffn_result and self.pre_norm:  # it has to exist on its own
            ffn, factors = scale_branch(ffn, **factors), {}
            if result_only:
                return None, ffn
        stream = self._add_norm(ffn, h, last, **factors)
        if self.alone:
            stream = Stream(stream.y, stream.h)  # again would read this layer's norm in the next layer's backward
        return stream, ffn if self.ffn_result else stream.h

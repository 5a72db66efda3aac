"""Self-attention with its projections, for all rows or, in the last layer, for the queries that are asked for."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.nn.attention import attention
from d2v_fast.nn.checkpointing import Again, linear
from d2v_fast.nn.config import EncoderConfig
from d2v_fast.nn.sequences import Sequences


@dataclass(frozen=True, eq=False)
class Scope:
    """Who sees whom, the same in every layer: a padded batch [B, T, C], or rows [N, C] of ``sequences``."""

    sequences: Sequences | None = None
    padding_mask: Tensor | None = None  # [B, T] bool, True = padding
    bias: Tensor | None = None  # [H, T, T], added to the logits


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused query-key-value weight [3C, C] (rows in that order)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads, self.dropout, self.key_bias = config.heads, config.attention_dropout, config.key_bias
        self.backend, self.strict = config.attention_backend, config.attention_strict
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.key_bias)
        if not config.key_bias:  # BEiT: queries and values have a bias, keys have none
            self.q_bias = nn.Parameter(self.qkv.weight.new_zeros(config.dim))
            self.v_bias = nn.Parameter(self.qkv.weight.new_zeros(config.dim))
        self.out = nn.Linear(config.dim, config.dim)

    def _qkv_bias(self) -> Tensor:
        if self.key_bias:
            return self.qkv.bias
        # one [3C] vector: a missing key bias is a zero one (adding a constant to all logits of a query changes nothing)
        return F.pad(self.q_bias, (0, 2 * self.q_bias.numel())) + F.pad(self.v_bias, (2 * self.v_bias.numel(), 0))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **rows: Sequences | Tensor | None) -> Tensor:
        p = self.dropout if self.training else 0.0
        return attention(q, k, v, dropout_p=p, backend=self.backend, strict=self.strict, **rows)

    def forward(
        self,
        x: Tensor,  # [B, T, C]; packed [N, C]
        scope: Scope,
        select: Sequences | None = None,
        again: Again | None = None,
    ) -> Tensor:
        """Shaped like x; with ``select`` [M, C], the rows of that result which it names.

        ``select`` has a sequence of distinct rows of the flattened x for each row of the batch or sequence of x;
        ``again`` is how x can be computed once more in backward.
        """
        if select is not None:
            return self._selected(x, scope, select, again)
        qkv = linear(x, self.qkv.weight, self._qkv_bias(), again)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(-3)  # 3 x [B, T, H, D] or [N, H, D]
        y = self._attend(q, k, v, sequences=scope.sequences, bias=scope.bias, padding_mask=scope.padding_mask)
        return self.out(y.flatten(-2))

    def _selected(self, x: Tensor, scope: Scope, select: Sequences, again: Again | None) -> Tensor:
        C = x.shape[-1]
        (q_weight, kv_weight), (q_bias, kv_bias) = (v.split((C, 2 * C)) for v in (self.qkv.weight, self._qkv_bias()))
        q = F.linear(select.take(x.flatten(0, -2)), q_weight, q_bias).unflatten(-1, (self.heads, -1))  # [M, H, D]
        kv = linear(x, kv_weight, kv_bias, again)
        k, v = kv.unflatten(-1, (2, self.heads, -1)).unbind(-3)  # 2 x [B, T, H, D] or [N, H, D]
        if scope.bias is None and scope.padding_mask is None:
            sequences = scope.sequences or Sequences.even(*x.shape[:2], x.device)
            k, v = (v.flatten(0, -3) for v in (k, v))
            y = self._attend(q, k, v, sequences=sequences, queries=select)
        else:  # keys that do not lie side by side, or a bias: all queries, those that nobody asked for are 0
            queries = select.put(q, k.new_zeros(k.shape).flatten(0, 1)).view(k.shape)
            y = self._attend(queries, k, v, bias=scope.bias, padding_mask=scope.padding_mask)
            y = select.take(y.flatten(0, 1))
        return self.out(y.flatten(-2))

"""Self-attention. ``attention`` is the one place that decides how it is computed."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.nn import attention_calls as calls
from d2v_fast.nn.config import EncoderConfig
from d2v_fast.nn.sequences import Sequences


def attention(
    q: Tensor,  # [B, Tq, H, D]; packed [M, H, D]
    k: Tensor,  # [B, T, H, D]; packed [N, H, D]
    v: Tensor,  # like k
    *,
    sequences: Sequences | None = None,  # of k and v, and of q unless there are queries: packed rows
    queries: Sequences | None = None,  # of q, one for each of keys
    bias: Tensor | None = None,  # [H, Tq, T], added to the logits
    alibi: tuple[Tensor, Tensor] | None = None,  # slopes [H], positions [B, T]
    padding_mask: Tensor | None = None,  # [B, T] bool, True = padding, never attended to
    dropout_p: float = 0.0,
    backend: str = "auto",
    strict: bool = False,
) -> Tensor:  # like q
    """Softmax attention with scale 1 / sqrt(D)."""
    if sequences is not None:
        if q.device.type == "cpu" and not torch.compiler.is_compiling():
            return calls.each(q, k, v, sequences, queries or sequences, dropout_p)
        return calls.padded(q, k, v, sequences, queries or sequences, dropout_p)
    mask = calls.logit_mask(q, bias, alibi, padding_mask)
    return calls.sdpa(q, k, v, mask, dropout_p)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused query-key-value weight [3C, C] (rows in that order)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads, self.dropout, self.key_bias = config.heads, config.attention_dropout, config.key_bias
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

    def forward(self, x: Tensor, bias: Tensor | None = None, padding_mask: Tensor | None = None) -> Tensor:
        """x [B, T, C] -> [B, T, C]; ``bias`` [H, T, T] and ``padding_mask`` [B, T] as in :func:`attention`."""
        B, T, C = x.shape
        qkv = F.linear(x, self.qkv.weight, self._qkv_bias())
        q, k, v = qkv.view(B, T, 3, self.heads, C // self.heads).unbind(2)  # 3 x [B, T, H, D]
        y = attention(q, k, v, bias=bias, padding_mask=padding_mask, dropout_p=self.dropout if self.training else 0.0)
        return self.out(y.reshape(B, T, C))

"""Self-attention. ``attention`` is the one place that decides how it is computed."""

import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.nn.config import EncoderConfig


def attention(
    q: Tensor,  # [B, H, T, D]
    k: Tensor,  # [B, H, T, D]
    v: Tensor,  # [B, H, T, D]
    *,
    bias: Tensor | None = None,  # [H, T, T], added to the logits
    padding_mask: Tensor | None = None,  # [B, T] bool, True = padding, never attended to
    dropout_p: float = 0.0,
) -> Tensor:  # [B, H, T, D]
    """Softmax attention with scale 1 / sqrt(D) through PyTorch's scaled_dot_product_attention."""
    mask = bias[None].to(q.dtype) if bias is not None else None  # [1, H, T, T]
    if padding_mask is not None:
        keep = ~padding_mask[:, None, None, :]  # [B, 1, 1, T]
        mask = keep if mask is None else mask.masked_fill(~keep, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


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
        q, k, v = qkv.view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # 3 x [B, H, T, D]
        y = attention(q, k, v, bias=bias, padding_mask=padding_mask, dropout_p=self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(B, T, C))

"""Self-attention of fairseq's ``MultiheadAttention`` through the table of backends (seam S4).

Dims: B batch, T positions, C channels, H heads, D head dim.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from d2v_fast.nn.attention import attention
from d2v_fast.patches._core import Options, Seam, fall_back
from d2v_fast.patches._sharing import too_precise


def unfit_attention(module: nn.Module) -> str | None:
    """Why ours does not follow the settings of this ``MultiheadAttention``, or None."""
    if not module.self_attention or not module.qkv_same_dim:
        return "it is no self-attention"
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        return "it has keys of its own (add_bias_kv, add_zero_attn)"
    if getattr(module, "use_xformers", False):
        return "it is xFormers' (xformers_att_config)"
    if module.scaling != module.head_dim**-0.5:
        return f"its scaling is {module.scaling}"
    return None


def _make(original: Callable, options: Options) -> Callable:
    def forward(
        self: Any,
        query: Tensor,  # [T, B, C]
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,  # [B, T], True = padding
        incremental_state: dict | None = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Tensor | None = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """[T, B, C] and None. Calls for weights, with masks or states, and other keys are upstream's: another use."""
        other = need_weights or need_head_weights or before_softmax or static_kv or self.onnx_trace
        own = incremental_state is None and attn_mask is None and unfit_attention(self) is None
        takes = own and not other and key is query and value is query
        if takes and (reason := too_precise(query)) is not None:
            fall_back(self, "forward", reason, options)
            takes = False
        if not takes:
            states = (incremental_state, need_weights, static_kv, attn_mask, before_softmax, need_head_weights)
            return original(self, query, key, value, key_padding_mask, *states)
        q, k, v = (
            proj(query).unflatten(-1, (self.num_heads, -1)).transpose(0, 1)  # [B, T, H, D]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if key_padding_mask is not None:
            key_padding_mask = None if key_padding_mask.dim() == 0 else key_padding_mask.bool()
        drops = self.training or self.dropout_module.apply_during_inference
        p = self.dropout_module.p if drops else 0.0
        y = attention(q, k, v, padding_mask=key_padding_mask, dropout_p=p)
        if key_padding_mask is not None:  # rows of padding alone get nothing upstream, of ours all
            y = y.masked_fill(key_padding_mask.all(1)[:, None, None, None], 0)
        return self.out_proj(y.flatten(-2).transpose(0, 1)), None

    return forward


ATTENTION = Seam(
    "attention",
    "forward",
    _make,
    "the best backend there is, for calls that the encoder leaves",
    known=frozenset({"eadb6eb07b09a35a", "214c4df384df602d", "c241212ae8c3d90e", "6b71952d827c3fde"})
    | {"6bc70f10ea72ce95", "3d9f8930753eb50b", "a66dde0967f64265"},
    refuses=unfit_attention,
    op="attention",
)

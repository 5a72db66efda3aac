"""Token ids to vectors, RoBERTa-style: tokens + learned positions, layer norm, dropout."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.nn.config import EncoderConfig, TextFrontEndConfig


class TextEmbedding(nn.Module):
    """Token ids [B, T] to [B, T, C]. Positions count from ``pad_index + 1`` and skip padding (fairseq)."""

    def __init__(self, config: TextFrontEndConfig, encoder: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, encoder.dim, padding_idx=config.pad_index)
        self.positions = nn.Embedding(config.max_positions + config.pad_index + 1, encoder.dim, config.pad_index)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=config.position_init_std)
        with torch.no_grad():
            self.tokens.weight[config.pad_index].zero_()
        self.norm = nn.LayerNorm(encoder.dim, eps=encoder.norm_eps)

    def num_positions(self, tokens: Tensor) -> int:
        """Tokens in a row of ids [B, T]."""
        return tokens.shape[-1]

    def _position_ids(self, tokens: Tensor, padding_mask: Tensor | None) -> Tensor:
        first = self.config.pad_index + 1
        if padding_mask is None:
            return torch.arange(first, first + tokens.shape[1], device=tokens.device)  # [T]
        kept = (~padding_mask).long()
        return kept.cumsum(1) * kept + self.config.pad_index  # [B, T]; padding gets pad_index

    def forward(self, tokens: Tensor, mask: Tensor | None = None, padding_mask: Tensor | None = None) -> Tensor:
        """Token ids to encoder input; tokens with ``mask`` [B, T] True become ``<mask>``, padding becomes zeros.

        Raises:
            TypeError: the ids are not int64 or int32.
            ValueError: not [B, T], longer than the position table, or ids outside of the vocabulary. The last is only
                looked for on the CPU: elsewhere it would wait for the device.
        """
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens must be int64 or int32 ids, got {tokens.dtype}")
        if tokens.ndim != 2 or tokens.shape[1] > self.config.max_positions:
            raise ValueError(f"tokens must be [B, T <= {self.config.max_positions}], got {tuple(tokens.shape)}")
        if tokens.device.type == "cpu" and tokens.numel() > 0 and not torch.compiler.is_compiling():
            low, high = (bound.item() for bound in tokens.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(f"tokens must be ids in 0..{self.config.vocab_size - 1}, got {low}..{high}")
        if mask is not None:
            tokens = torch.where(mask, self.config.mask_index, tokens)
        x = self.tokens(tokens) + self.positions(self._position_ids(tokens, padding_mask))
        x = F.dropout(self.norm(x), self.config.dropout, self.training)
        return x if padding_mask is None else x.masked_fill(padding_mask[..., None], 0.0)

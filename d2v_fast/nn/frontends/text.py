"""Token ids to vectors, RoBERTa-style: tokens + learned positions, layer norm, dropout."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.nn.config import EncoderConfig, TextFrontEndConfig
from d2v_fast.nn.sequences import Sequences


class TextEmbedding(nn.Module):
    """Token ids [B, T] to [B, T, C], or packed ones [N] to [N, C].

    Positions count from ``pad_index + 1`` in every row or sequence and skip padding (fairseq).
    """

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

    def forward(
        self,
        tokens: Tensor,  # [B, T]; packed [N]
        mask: Tensor | None = None,  # bool, of tokens' shape
        padding_mask: Tensor | None = None,  # [B, T] bool
        *,
        sequences: Sequences | None = None,  # of the rows [N]
    ) -> Tensor:
        """Token ids to encoder input; tokens with ``mask`` True become ``<mask>``, padding becomes zeros.

        Raises:
            TypeError: the ids are not int64 or int32.
            ValueError: not [B, T] with T above 0, or with ``sequences`` not their rows [N]; a row or sequence longer
                than the position table; ids outside of the vocabulary, or ``cu_seqlens`` that are none. The last two
                are only looked for on the CPU: elsewhere that would wait for the device.
        """
        self._check(tokens, sequences)
        if mask is not None:
            tokens = torch.where(mask, self.config.mask_index, tokens)
        x = self._embed(tokens, self._position_ids(tokens, padding_mask, sequences))
        return self._finish(x, padding_mask)

    def masked_and_clean(
        self,
        tokens: Tensor,  # [B, T]; packed [N]
        masked: Sequences,  # its rows are those of the flattened tokens
        padding_mask: Tensor | None = None,
        *,
        sequences: Sequences | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What ``forward`` gives with the mask of these rows, and without any mask, dropout and gradient.

        The tokens are embedded once, and ``<mask>`` at the masked rows only. Raises as ``forward``.
        """
        self._check(tokens, sequences)
        ids = self._position_ids(tokens, padding_mask, sequences).expand(tokens.shape).flatten()
        rows = masked.take(tokens.flatten())
        mask_index = torch.full_like(rows, self.config.mask_index)
        rows = mask_index if masked.real is None else torch.where(masked.real, mask_index, rows)
        clean = self._embed(tokens.flatten(), ids)
        x = masked.put(self._embed(rows, masked.take(ids)), clean)
        shape = (*tokens.shape, -1)
        clean = clean.detach().view(shape)
        if padding_mask is not None:
            clean = clean.masked_fill(padding_mask[..., None], 0.0)
        return self._finish(x.view(shape), padding_mask), clean

    def _embed(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """Ids [..] and positions that broadcast to them, to [.., C]."""
        return self.norm(self.tokens(tokens) + self.positions(position_ids))

    def _finish(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        x = F.dropout(x, self.config.dropout, self.training)
        return x if padding_mask is None else x.masked_fill(padding_mask[..., None], 0.0)

    def _position_ids(self, tokens: Tensor, padding_mask: Tensor | None, sequences: Sequences | None = None) -> Tensor:
        first = self.config.pad_index + 1
        if sequences is not None:
            row, ends = torch.arange(tokens.shape[0], device=tokens.device), sequences.cu_seqlens.long()
            start = ends[torch.searchsorted(ends[1:], row, right=True)]  # of the row's sequence; none is empty
            return row - start + first  # [N]
        if padding_mask is None:
            return torch.arange(first, first + tokens.shape[1], device=tokens.device)  # [T]
        kept = (~padding_mask).long()
        return kept.cumsum(1) * kept + self.config.pad_index  # [B, T]; padding gets pad_index

    def _check(self, tokens: Tensor, sequences: Sequences | None) -> None:
        c, looks = self.config, tokens.device.type == "cpu" and not torch.compiler.is_compiling()
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens must be int64 or int32 ids, got {tokens.dtype}")
        if sequences is not None:
            self._check_packed(tokens, sequences, looks)
        elif tokens.ndim != 2 or not 1 <= tokens.shape[1] <= c.max_positions:
            raise ValueError(f"tokens must be [B, 1 <= T <= {c.max_positions}], got {tuple(tokens.shape)}")
        if looks and tokens.numel() > 0:
            low, high = (bound.item() for bound in tokens.aminmax())
            if low < 0 or high >= c.vocab_size:
                raise ValueError(f"tokens must be ids in 0..{c.vocab_size - 1}, got {low}..{high}")

    def _check_packed(self, tokens: Tensor, sequences: Sequences, looks: bool) -> None:
        most, ends = self.config.max_positions, sequences.cu_seqlens
        if tokens.shape != (sequences.num_rows,):
            raise ValueError(f"tokens must be [{sequences.num_rows}], as packed, got {tuple(tokens.shape)}")
        if sequences.max_length > most:
            raise ValueError(
                f"sequences must have at most {most} tokens each, got one of max_length {sequences.max_length}"
            )
        if not looks:
            return
        lengths = ends.diff()
        if ends[0] != 0 or ends[-1] != sequences.num_rows or lengths.min() < 0 or lengths.max() > most:
            raise ValueError(
                f"sequences.cu_seqlens must rise from 0 to {sequences.num_rows} by at most {most}, got {ends.tolist()}"
            )

"""One Transformer for speech, images and text.

Dims: B batch, T positions (frames, patches with the class token, tokens), C channels, H heads, F hidden channels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from d2v_fast.nn.attention import SelfAttention
from d2v_fast.nn.config import EncoderConfig
from d2v_fast.ops import bias_gelu, pos_conv, residual_dropout_layer_norm


class EncoderOutput(NamedTuple):
    """What :class:`TransformerEncoder` returns."""

    x: Tensor  # [B, T, C]; after the final norm in pre-norm encoders
    layer_results: list[Tensor]  # of the last ``top_k`` executed layers, each [B, T, C]
    hidden_states: list[Tensor]  # input of the first layer and output of every layer, if asked for


class ConvPositions(nn.Module):
    """Convolutional relative positions, several layers of conv, layer norm without affine, GELU (data2vec speech).

    Depth 1 is the single convolution of wav2vec 2.0 and HuBERT: weight norm per tap, then GELU without a layer norm.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        depth, width = config.pos_conv_depth, config.pos_conv_width
        kernel = width if depth == 1 else max(3, width // depth)
        self.groups, self.norm = config.pos_conv_groups, depth > 1
        self.convs = nn.ModuleList(
            nn.Conv1d(config.dim, config.dim, kernel, padding=kernel // 2, groups=self.groups) for _ in range(depth)
        )
        if depth == 1:
            nn.init.normal_(self.convs[0].weight, std=(4 / (kernel * config.dim)) ** 0.5)
            nn.init.zeros_(self.convs[0].bias)
            weight_norm(self.convs[0], dim=2)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, C] -> [B, T, C]."""
        weights, biases = [conv.weight for conv in self.convs], [conv.bias for conv in self.convs]
        return pos_conv(x, weights, biases, groups=self.groups, norm=self.norm)


class RelativePositionBias(nn.Module):
    """Learned bias per head and patch offset, shared by all layers; three more entries for the class token (BEiT)."""

    def __init__(self, heads: int, grid: int) -> None:
        super().__init__()
        distances = (2 * grid - 1) ** 2
        self.table = nn.Parameter(torch.zeros(distances + 3, heads))
        y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
        dy = y.reshape(-1, 1) - y.reshape(1, -1) + grid - 1  # [P, P], query minus key
        dx = x.reshape(-1, 1) - x.reshape(1, -1) + grid - 1
        index = torch.full((grid * grid + 1, grid * grid + 1), distances + 2)  # class token with itself
        index[0, 1:] = distances
        index[1:, 0] = distances + 1
        index[1:, 1:] = dy * (2 * grid - 1) + dx
        # not persistent: it follows from the grid, and a copy read from a file or averaged could only be wrong
        self.register_buffer("index", index, persistent=False)

    def forward(self) -> Tensor:
        """Bias [H, 1 + P, 1 + P] for P patches."""
        return F.embedding(self.index, self.table).permute(2, 0, 1)


def drop_path_scale(x: Tensor, p: float, training: bool) -> Tensor | None:
    """Factor [B] on a residual branch x [B, T, C]: 0 for whole samples with probability ``p``, else 1 / (1 - p)."""
    if p == 0 or not training:
        return None
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty(x.shape[0], dtype=dtype, device=x.device).bernoulli_(1 - p).div_(1 - p)


def scale_branch(x: Tensor, p: float, column_scale: Tensor | None, row_scale: Tensor | None) -> Tensor:
    """Dropout, LayerScale [C] and DropPath [B] of a residual branch x [B, T, C], without the residual."""
    x = F.dropout(x, p)
    x = x if column_scale is None else x * column_scale
    return x if row_scale is None else x * row_scale[:, None, None].to(x.dtype)


class Block(nn.Module):
    """One Transformer layer, post-norm (speech, text) or pre-norm with LayerScale and DropPath (images).

    Each sublayer's output goes into one fused op: dropout, scales, residual and the norm in front of the next sublayer.
    In pre-norm encoders the last of these norms is the next layer's first.
    """

    def __init__(self, config: EncoderConfig, drop_path: float) -> None:
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.scaled_result = self.pre_norm and config.layer_result == "ffn"
        self.dropout, self.activation_dropout, self.drop_path = config.dropout, config.activation_dropout, drop_path
        self.attention = SelfAttention(config)
        self.norm1 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.fc1 = nn.Linear(config.dim, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.dim)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        scale = torch.full((config.dim,), config.layer_scale)
        self.scale1 = nn.Parameter(scale.clone()) if config.layer_scale > 0 else None
        self.scale2 = nn.Parameter(scale.clone()) if config.layer_scale > 0 else None

    def _ffn(self, y: Tensor) -> Tensor:
        hidden = bias_gelu(F.linear(y, self.fc1.weight), self.fc1.bias)  # [B, T, F]
        return self.fc2(F.dropout(hidden, self.activation_dropout, self.training))

    def _factors(self, x: Tensor, scale: Tensor | None) -> dict[str, float | Tensor | None]:
        """What happens to a sublayer's output x [B, T, C] on its way into the residual stream."""
        row_scale = drop_path_scale(x, self.drop_path, self.training)
        return {"p": self.dropout if self.training else 0.0, "column_scale": scale, "row_scale": row_scale}

    def _add_norm(self, x: Tensor, h: Tensor, norm: nn.LayerNorm, **factors) -> tuple[Tensor, Tensor]:
        """Add x to the residual stream h and normalise: the next sublayer's input, and the next residual."""
        out = residual_dropout_layer_norm(
            x, h, norm.weight, norm.bias, eps=norm.eps, return_residual=self.pre_norm, **factors
        )
        return out if self.pre_norm else (out, out)

    def forward(
        self,
        y: Tensor,  # [B, T, C] input of the attention
        h: Tensor,  # [B, T, C] residual stream; y itself in post-norm layers
        next_norm: nn.LayerNorm,  # of whatever follows; pre-norm layers apply it
        bias: Tensor | None,  # [H, T, T]
        padding_mask: Tensor | None,  # [B, T]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next y, the next h (which is the layer's output), and the layer's FFN result, all [B, T, C].

        The FFN result is taken before the residual: in post-norm layers as it leaves the FFN, in pre-norm layers as it
        is added, so after LayerScale and DropPath.
        """
        middle, last = (self.norm2, next_norm) if self.pre_norm else (self.norm1, self.norm2)
        x = self.attention(y, bias, padding_mask)
        y, h = self._add_norm(x, h, middle, **self._factors(x, self.scale1))
        ffn = self._ffn(y)
        factors = self._factors(ffn, self.scale2)
        if self.scaled_result:  # it has to exist on its own
            ffn, factors = scale_branch(ffn, **factors), {}
        y, h = self._add_norm(ffn, h, last, **factors)
        return y, h, ffn


class TransformerEncoder(nn.Module):
    """Positions, layers and norms between front-end and head (fairseq ``TransformerEncoder``, BEiT blocks).

    ``grid`` is the number of patches along an image's side; only a relative-position bias needs it.
    """

    def __init__(self, config: EncoderConfig, grid: int = 0) -> None:
        super().__init__()
        self.config = config
        self.pos_conv = ConvPositions(config) if config.pos_conv_depth else None
        self.relative_bias = RelativePositionBias(config.heads, grid) if config.relative_bias else None
        # speech normalises after adding positions, pre-norm encoders at the end; text has its norm in the embedding
        has_norm = config.norm == "pre" or config.pos_conv_depth > 0
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps) if has_norm else None
        last = max(1, config.layers - 1)
        self.layers = nn.ModuleList(Block(config, config.drop_path * i / last) for i in range(config.layers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise linear layers: N(0, init_std) ("bert"), or truncated at one sigma and depth-scaled ("beit")."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module, self.config)
        if self.config.init == "beit":
            for depth, layer in enumerate(self.layers, start=1):
                layer.attention.out.weight.data.div_((2 * depth) ** 0.5)
                layer.fc2.weight.data.div_((2 * depth) ** 0.5)

    def _kept_layers(self) -> list[int]:
        """Indices of the layers to run: all of them, less those that LayerDrop skips while training."""
        count = len(self.layers)
        if not self.training or self.config.layerdrop == 0:
            return list(range(count))
        keep = torch.rand(count) > self.config.layerdrop  # drawn on the CPU: the host needs the answer
        return [i for i in range(count) if keep[i]]

    def forward(
        self,
        x: Tensor,  # [B, T, C]
        *,
        padding_mask: Tensor | None = None,  # [B, T] bool, True = padding
        top_k: int = 0,
        hidden_states: bool = False,
    ) -> EncoderOutput:
        """Run the encoder, keeping the results of the last ``top_k`` layers (what targets are built from)."""
        if padding_mask is not None:
            x = x.masked_fill(padding_mask[..., None], 0.0)
        if self.pos_conv is not None:
            x = x + self.pos_conv(x)
        pre_norm = self.config.norm == "pre"
        if self.norm is not None and not pre_norm:
            x = self.norm(x)
        if self.pos_conv is not None:
            x = F.dropout(x, self.config.dropout, self.training)
        bias = self.relative_bias() if self.relative_bias is not None else None  # [H, T, T]
        results, states = [], [x] if hidden_states else []
        kept = self._kept_layers()
        # the norm in front of each layer, and the final one: pre-norm layers end with that of their successor
        norms = [*(self.layers[index].norm1 for index in kept), self.norm]
        y, h = x, x  # input of the next sublayer, residual stream
        if pre_norm:
            # LayerScale makes increments of 1e-4: the stream stays in the weights' precision under autocast
            h = x.to(torch.promote_types(x.dtype, self.norm.weight.dtype))
            y = norms[0](h)
        for index, next_norm in zip(kept, norms[1:], strict=True):
            y, h, ffn = self.layers[index](y, h, next_norm, bias, padding_mask)
            if index >= len(self.layers) - top_k:
                results.append(ffn if self.config.layer_result == "ffn" else h)
            if hidden_states:
                states.append(h)
        return EncoderOutput(y, results, states)


def init_linear(module: nn.Linear, config: EncoderConfig) -> None:
    """Initialise one linear layer; see :meth:`TransformerEncoder.reset_parameters`."""
    std = config.init_std
    if config.init == "beit":
        nn.init.trunc_normal_(module.weight, std=std, a=-std, b=std)
    else:
        nn.init.normal_(module.weight, std=std)
    if module.bias is not None:
        nn.init.zeros_(module.bias)

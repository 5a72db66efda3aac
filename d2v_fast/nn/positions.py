"""How the encoder knows where a position is: convolutions (speech), or a bias on the attention's logits (images)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from d2v_fast.nn.config import EncoderConfig
from d2v_fast.ops import pos_conv


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

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """x [B, T, C] -> [B, T, C]; ``segments`` [U, 2] as in :func:`d2v_fast.ops.pos_conv`."""
        weights, biases = [conv.weight for conv in self.convs], [conv.bias for conv in self.convs]
        return pos_conv(x, weights, biases, groups=self.groups, norm=self.norm, segments=segments)


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
        size = self.index.shape[0]
        index = F.pad(self.index, (0, -size % 16))  # attention reads rows of a multiple of 16 entries where they are
        return F.embedding(index, self.table).permute(2, 0, 1).contiguous()[..., :size]

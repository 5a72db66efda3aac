"""A vision transformer under BEiT's names and signatures, and timm's teacher, in plain PyTorch, to be patched.

Written from the description of data2vec's image code, for want of released code to run.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0 or not self.training:
            return x
        kept = torch.rand(len(x), device=x.device) >= self.drop_prob
        return x * (kept / (1 - self.drop_prob))[:, None, None]


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.act(self.fc1(x))))


def offsets(grid: int) -> Tensor:
    """Entry of the table for each pair of the class token and ``grid``\\ ² patches."""
    side = 2 * grid - 1
    y, x = torch.arange(grid**2) // grid, torch.arange(grid**2) % grid
    index = torch.zeros(grid**2 + 1, grid**2 + 1, dtype=torch.long)
    index[1:, 1:] = (y[:, None] - y + grid - 1) * side + x[:, None] - x + grid - 1
    index[0, :], index[:, 0], index[0, 0] = side**2, side**2 + 1, side**2 + 2
    return index


class RelativePositionBias(nn.Module):
    def __init__(self, grid: int, heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * grid - 1) ** 2 + 3, heads))
        self.register_buffer("relative_position_index", offsets(grid))

    def forward(self) -> Tensor:
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float, grid: int | None) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.relative_position_bias_table = None
        if grid is not None:
            self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * grid - 1) ** 2 + 3, heads))
            self.register_buffer("relative_position_index", offsets(grid))
        self.attn_drop = nn.Dropout(dropout)
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x: Tensor, rel_pos_bias: Tensor | None = None) -> Tensor:
        B, N, C = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        logits = (qkv[0] * self.scale) @ qkv[1].transpose(-2, -1)
        if self.relative_position_bias_table is not None:
            logits = logits + self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if rel_pos_bias is not None:
            logits = logits + rel_pos_bias
        x = self.attn_drop(logits.softmax(-1)) @ qkv[2]
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, C)))


class Block(nn.Module):
    def __init__(
        self, dim: int, heads: int, *, ratio: float, scale: float, drop_path: float, dropout: float, grid: int | None
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads, dropout, grid), Mlp(dim, int(ratio * dim))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.gamma_1 = nn.Parameter(torch.full((dim,), scale)) if scale > 0 else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), scale)) if scale > 0 else None

    def forward(self, x: Tensor, rel_pos_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, z = self.attn(self.norm1(x), rel_pos_bias), 1.0
        x = x + self.drop_path(y if self.gamma_1 is None else self.gamma_1 * y)
        z = self.mlp(self.norm2(x))
        z = self.drop_path(z if self.gamma_2 is None else self.gamma_2 * z)
        return x + z, z


class PatchEmbed(nn.Module):
    def __init__(self, size: int, patch: int, dim: int) -> None:
        super().__init__()
        self.img_size = (size, size)
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformerForCyclicalTraining(nn.Module):
    def __init__(
        self,
        size: int = 24,
        patch: int = 4,
        dim: int = 32,
        heads: int = 2,
        depth: int = 3,
        *,
        ratio: float = 2.0,  # hidden channels of the MLPs for each channel
        scale: float = 0.1,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        shared: bool = True,  # one table for all blocks, otherwise one a block
    ) -> None:
        super().__init__()
        grid = size // patch
        self.patch_embed = PatchEmbed(size, patch, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed, self.pos_drop = None, nn.Dropout(0.0)
        self.rel_pos_bias = RelativePositionBias(grid, heads) if shared else None
        options = {"ratio": ratio, "scale": scale, "dropout": dropout, "grid": None if shared else grid}
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, heads, drop_path=rate, **options) for rate in rates)
        self.norm, self.lm_head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, dim)
        for name, parameter in self.named_parameters():
            if "bias" in name or "gamma" in name:
                nn.init.normal_(parameter, std=scale or 0.1)

    def forward(self, x, bool_masked_pos=None, return_all_tokens=False, layer_results=None):
        x = self.patch_embed(x)
        if bool_masked_pos is not None:
            w = bool_masked_pos.flatten(1)[..., None].to(x.dtype)
            x = x * (1 - w) + self.mask_token * w
        x = self.pos_drop(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1))
        bias, ends, increments = None if self.rel_pos_bias is None else self.rel_pos_bias(), [], []
        for block in self.blocks:
            x, z = block(x, rel_pos_bias=bias)
            ends.append(x[:, 1:])
            increments.append(z[:, 1:])
        if layer_results is not None:
            return ends if layer_results == "end" else increments
        x = self.norm(x)[:, 1:]
        return self.lm_head(x if return_all_tokens else x[bool_masked_pos.flatten(1)])


class ModelEmaV2(nn.Module):
    """timm's, by its description."""

    def __init__(self, model: nn.Module, decay: float = 0.9999, device=None) -> None:
        super().__init__()
        self.module, self.decay, self.device = copy.deepcopy(model).eval(), decay, device

    def _update(self, model: nn.Module, update_fn) -> None:
        with torch.no_grad():
            for e, m in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
                e.copy_(update_fn(e, m if self.device is None else m.to(device=self.device)))

    def update(self, model: nn.Module) -> None:
        self._update(model, update_fn=lambda e, m: self.decay * e + (1.0 - self.decay) * m)

    def set(self, model: nn.Module) -> None:
        self._update(model, update_fn=lambda e, m: m)

"""data2vec vision once more, straight from its description: BEiT's Transformer in plain PyTorch and one training step.

Written down without our modules, under the names of the released checkpoints, for want of released code to run: patches
by a convolution, class and mask tokens, one table of relative positions for all blocks, blocks with the norm in front,
LayerScale and DropPath, end-of-block outputs of a moving average as targets.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, position_bias: Tensor) -> Tensor:
        B, N, C = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = (self.qkv(x) + bias).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        logits = (q * (C // self.heads) ** -0.5) @ k.transpose(-2, -1) + position_bias  # [B, H, N, N]
        shares = F.dropout(logits.softmax(-1), self.dropout, self.training)
        return self.proj((shares @ v).transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    def __init__(self, sizes: dict, scale: float, drop_path: float, attention_dropout: float) -> None:
        super().__init__()
        dim, ffn = sizes["dim"], sizes["ffn_dim"]
        self.drop_path = drop_path
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, sizes["heads"], attention_dropout)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, ffn), "fc2": nn.Linear(ffn, dim)})
        self.gamma_1 = nn.Parameter(torch.full((dim,), scale))
        self.gamma_2 = nn.Parameter(torch.full((dim,), scale))

    def dropped(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        kept = torch.rand(len(branch)) >= self.drop_path
        return branch * (kept / (1 - self.drop_path))[:, None, None]

    def forward(self, x: Tensor, position_bias: Tensor) -> Tensor:
        x = x + self.dropped(self.gamma_1 * self.attn(self.norm1(x), position_bias))
        hidden = F.gelu(self.mlp["fc1"](self.norm2(x)))
        return x + self.dropped(self.gamma_2 * self.mlp["fc2"](hidden))


class Vision(nn.Module):
    """Images [B, 3, S, S] and a mask [B, P] to normed outputs, and the outputs of every block, [B, 1 + P, C]."""

    def __init__(
        self,
        size: int,
        patch: int,
        sizes: dict,  # layers, dim, heads, ffn_dim
        *,
        scale: float,  # initial LayerScale
        drop_path: float = 0.0,  # of the last block; grows linearly from 0
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.grid = size // patch
        layers, dim = sizes["layers"], sizes["dim"]
        self.patch_embed = nn.Conv2d(3, dim, patch, patch)
        self.cls_token, self.mask_token = nn.Parameter(torch.zeros(1, 1, dim)), nn.Parameter(torch.zeros(1, 1, dim))
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * self.grid - 1) ** 2 + 3, sizes["heads"]))
        rates = [drop_path * i / max(layers - 1, 1) for i in range(layers)]
        self.blocks = nn.ModuleList(Block(sizes, scale, rate, attention_dropout) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.lm_head = nn.Linear(dim, dim)

    def position_bias(self) -> Tensor:
        """[H, 1 + P, 1 + P]: one entry for each offset of two patches, three for pairs with the class token."""
        side, last = 2 * self.grid - 1, len(self.relative_position_bias_table)
        patch = torch.arange(self.grid**2)
        rows, columns = patch // self.grid, patch % self.grid
        dy, dx = rows[:, None] - rows + self.grid - 1, columns[:, None] - columns + self.grid - 1
        index = torch.empty(self.grid**2 + 1, self.grid**2 + 1, dtype=torch.long)
        index[1:, 1:] = dy * side + dx
        index[0, :], index[:, 0], index[0, 0] = last - 3, last - 2, last - 1
        return self.relative_position_bias_table[index].permute(2, 0, 1)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        if mask is not None:
            weight = mask[..., None].to(x.dtype)
            x = x * (1 - weight) + self.mask_token * weight
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        bias, ends = self.position_bias(), []
        for block in self.blocks:
            x = block(x, bias)
            ends.append(x)
        return self.norm(x), ends


def targets(ends: list[Tensor], top_k: int) -> Tensor:
    """Layer norm of each of the last block outputs without the class token, their mean, layer norm: [B, P, C]."""
    normed = [F.layer_norm(x[:, 1:], x.shape[-1:]) for x in ends[-top_k:]]
    return F.layer_norm(sum(normed) / top_k, normed[0].shape[-1:])


def loss(student: Vision, teacher: Vision, images: Tensor, mask: Tensor, top_k: int, beta: float) -> Tensor:
    """Smooth L1 between head and target, the mean over masked patches and channels."""
    with torch.no_grad():
        target = targets(teacher(images)[1], top_k)[mask]
    x, _ = student(images, mask)
    return F.smooth_l1_loss(student.lm_head(x[:, 1:][mask]), target, beta=beta)


def parameter_groups(model: Vision, weight_decay: float) -> list[dict]:
    """No weight decay for vectors, biases and the class token; the mask token and the table do decay."""
    free = [p for name, p in model.named_parameters() if p.ndim == 1 or name == "cls_token"]
    kept = {id(p) for p in free}
    decayed = [p for p in model.parameters() if id(p) not in kept]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


@torch.no_grad()
def follow(teacher: Vision, student: Vision, decay: float) -> None:
    """The teacher moves towards the student as it is after the optimizer's step."""
    for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        mine.copy_(decay * mine + (1 - decay) * theirs)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of every parameter, such as weights or gradients, under the names of our model."""
    copied = {
        "frontend.class_token": state["cls_token"].flatten(),
        "frontend.mask_embedding": state["mask_token"].flatten(),
        "encoder.relative_bias.table": state["relative_position_bias_table"],
    }
    parts = {"attn.qkv": "attention.qkv", "attn.q_bias": "attention.q_bias", "attn.v_bias": "attention.v_bias"}
    parts |= {"attn.proj": "attention.out", "mlp.fc1": "fc1", "mlp.fc2": "fc2", "norm1": "norm1", "norm2": "norm2"}
    parts |= {"gamma_1": "scale1", "gamma_2": "scale2"}
    roots = {"patch_embed.": "frontend.proj.", "norm.": "encoder.norm.", "lm_head.": "head.0."}
    for name, x in state.items():
        for old, new in roots.items():
            if name.startswith(old):
                copied[new + name.removeprefix(old)] = x
        for old, new in parts.items():
            pieces = name.split(".", 2)  # blocks, index, rest
            if pieces[0] == "blocks" and (pieces[2] == old or pieces[2].startswith(f"{old}.")):
                copied[f"encoder.layers.{pieces[1]}.{new}{pieces[2].removeprefix(old)}"] = x
    assert len(copied) == len(state)
    return copied

"""Image to patch vectors with a class token in front (BEiT: no absolute positions)."""

import torch
from torch import Tensor, nn

from d2v_fast.nn.config import EncoderConfig, ImageFrontEndConfig
from d2v_fast.nn.frontends.checks import check_dtype


class PatchEmbed(nn.Module):
    """Images [B, channels, H, W] to [B, 1 + P, C]: class token, then P patches in row-major order."""

    def __init__(self, config: ImageFrontEndConfig, encoder: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.proj = nn.Conv2d(config.channels, encoder.dim, config.patch_size, config.patch_size)
        self.class_token = nn.Parameter(torch.empty(encoder.dim))
        self.mask_embedding = nn.Parameter(torch.empty(encoder.dim))
        for weight in (self.proj.weight, self.class_token, self.mask_embedding):
            nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)
        nn.init.zeros_(self.proj.bias)

    def num_positions(self, images: Tensor) -> int:
        """Patches of an image, the class token not counted."""
        return self.config.num_patches

    def forward(self, images: Tensor, mask: Tensor | None = None, padding_mask: Tensor | None = None) -> Tensor:
        """Images to encoder input [B, 1 + P, C]; patches with ``mask`` [B, P] True become the mask embedding.

        Raises:
            TypeError: images not of the weights' dtype (with autocast: not float32, bfloat16 or float16).
            ValueError: images not of the configured channels and size.
        """
        check_dtype("images", images, self.proj.weight)
        c = self.config
        expected = (c.channels, c.image_size, c.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"images must be [B, {', '.join(map(str, expected))}], got {tuple(images.shape)}")
        x = self.proj(images).flatten(2).transpose(1, 2)  # [B, P, C]
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_embedding.to(x.dtype), x)
        return torch.cat([self.class_token.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)

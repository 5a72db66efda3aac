"""Image to patch vectors with a class token in front (BEiT: no absolute positions)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.nn.config import EncoderConfig, ImageFrontEndConfig
from d2v_fast.nn.frontends.checks import check_dtype


class PatchEmbed(nn.Module):
    """Images [B, channels, H, W] to [B, 1 + P, C]: class token, then P patches in row-major order."""

    def __init__(self, config: ImageFrontEndConfig, encoder: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        # holds the parameters; a convolution whose windows do not overlap is one matrix product
        self.proj = nn.Conv2d(config.channels, encoder.dim, config.patch_size, config.patch_size)
        self.class_token = nn.Parameter(torch.empty(encoder.dim))
        self.mask_embedding = nn.Parameter(torch.empty(encoder.dim))
        for weight in (self.proj.weight, self.class_token, self.mask_embedding):
            nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)
        nn.init.zeros_(self.proj.bias)

    def num_positions(self, images: Tensor) -> int:
        """Patches of an image, the class token not counted."""
        return self.config.num_patches

    def features(self, images: Tensor) -> Tensor:
        """Images to [B, 1 + P, C]: in front of the patches, room for the class token.

        Raises:
            TypeError: images not of the weights' dtype (with autocast: not float32, bfloat16 or float16).
            ValueError: images not of the configured channels and size, of which the patches are whole parts.
        """
        check_dtype("images", images, self.proj.weight)
        c = self.config
        expected = (c.channels, c.image_size, c.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images must be [B, {', '.join(map(str, expected))}], a grid of {c.grid} x {c.grid} patches of "
                f"{c.patch_size} pixels, got {tuple(images.shape)}"
            )
        B, p = images.shape[0], c.patch_size
        windows = images.reshape(B, c.channels, c.grid, p, c.grid, p).permute(0, 2, 4, 1, 3, 5)
        patches = images.new_empty(B, 1 + c.num_patches, c.channels * p * p, dtype=_product_dtype(images))
        patches[:, 0] = 0
        patches[:, 1:].unflatten(1, (c.grid, c.grid)).unflatten(3, windows.shape[3:]).copy_(windows)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)

    def finish(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features [B, 1 + P, C] with the class token, and the mask embedding where ``mask`` [B, P] is True."""
        class_token, mask_embedding = (v.to(features.dtype) for v in (self.class_token, self.mask_embedding))
        if mask is None:
            inside = torch.arange(features.shape[1], device=features.device)[:, None] > 0  # [1 + P, 1]
            return torch.where(inside, features, class_token)
        others = torch.cat([class_token[None], mask_embedding.expand(features.shape[1] - 1, -1)])  # [1 + P, C]
        return torch.where(F.pad(mask, (1, 0), value=True)[..., None], others, features)

    def masked_and_clean(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What ``forward`` gives with the mask, and without any mask and gradient; the patches are embedded once."""
        features = self.features(images)
        return self.finish(features, mask), self.finish(features.detach()).detach()

    def forward(self, images: Tensor, mask: Tensor | None = None, padding_mask: Tensor | None = None) -> Tensor:
        """Images to encoder input [B, 1 + P, C]; patches with ``mask`` [B, P] True become the mask embedding.

        Raises as :meth:`features`.
        """
        return self.finish(self.features(images), mask)


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product reads x: autocast would cast x in a pass of its own, float64 excepted."""
    device_type = x.device.type
    casts = torch.is_autocast_enabled(device_type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device_type) if casts else x.dtype

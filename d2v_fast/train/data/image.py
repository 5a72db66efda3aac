"""Images: files, archives or tables to batches of squares, augmented on the device (data2vec section 5.1, as BEiT).

Workers decode, resize and centre-crop; colour jitter, flip, random resized crop and normalisation run on the whole
batch where it is used. BEiT crops the original image instead of its central square.
"""

import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from d2v_fast.nn.batch import Batch, make_batch
from d2v_fast.nn.config import Data2VecConfig
from d2v_fast.train.data.bad_items import nothing_left
from d2v_fast.train.data.base import NO_MEMORY, PretrainData, UnreadableFile, fixed_batches, require
from d2v_fast.train.data.formats import SHARDS, LocationConfig, find, open_source

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# what Pillow raises on broken files, depending on the format
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True, kw_only=True)
class ImageDataConfig(LocationConfig):
    """Where the images are and how they are augmented; the defaults are those of the released base recipe."""

    # a folder of images, searched recursively (sub-folders are classes, which do not matter); webdataset tars;
    # parquet or arrow
    path: str
    batch_size: int = 128
    decode_size: int | None = None  # side in pixels of the decoded square; None: 8/7 of the model's image size
    crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the area; (1, 1) = no random crop
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop
    hflip: float = 0.5  # probability
    color_jitter: float = 0.4  # brightness, contrast and saturation factors in 1 +- this; 0 = none
    mean: tuple[float, ...] | None = None  # per channel, of values in [0, 1]; None: ImageNet's, or 0.5 for grey images
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("crop_scale", "crop_ratio", "mean", "std"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        require(self.batch_size >= 1, "data.batch_size", "at least 1", self.batch_size)
        require(self.decode_size is None or self.decode_size >= 1, "data.decode_size", "at least 1", self.decode_size)
        low, high = self.crop_scale
        require(0 < low <= high <= 1, "data.crop_scale", "(low, high) with 0 < low <= high <= 1", self.crop_scale)
        low, high = self.crop_ratio
        require(0 < low <= high, "data.crop_ratio", "(low, high) with 0 < low <= high", self.crop_ratio)
        require(0 <= self.hflip <= 1, "data.hflip", "in [0, 1]", self.hflip)
        require(0 <= self.color_jitter <= 1, "data.color_jitter", "in [0, 1]", self.color_jitter)
        require(self.std is None or min(self.std) > 0, "data.std", "positive", self.std)


def read_image(path: str | Path | BinaryIO, size: int, channels: int = 3) -> np.ndarray:
    """Decode a file to uint8 [size, size, channels]: shorter side resized to ``size`` (bicubic), central square.

    Transparency is laid over white; ``channels`` is 3 (RGB) or 1 (grey). 16-bit grey images keep their upper byte.

    Raises:
        ConfigError: ``size`` or ``channels`` out of range.
        UnreadableFile: missing, broken, or of a kind that Pillow does not read.
    """
    require(size >= 1, "size", "at least 1", size)
    require(channels in (1, 3), "channels", "1 or 3", channels)
    mode = "RGB" if channels == 3 else "L"
    try:
        with Image.open(path) as image:
            image.draft(mode, (2 * size, 2 * size))  # big JPEGs: decode at a lower resolution
            return _square(_opaque(image, mode), size).reshape(size, size, channels)
    except MemoryError as error:
        raise UnreadableFile(path, NO_MEMORY) from error
    except DECODE_ERRORS as error:
        raise UnreadableFile(path, str(error)) from error


def _opaque(image: Image.Image, mode: str) -> Image.Image:
    """Convert to ``mode``, without transparency."""
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    if image.mode.startswith("I"):  # Pillow's own conversion would clip 16 bits at 255
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert(mode)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _square(image: Image.Image, size: int) -> np.ndarray:
    """Shorter side to ``size``, central square, in one resampling; uint8 [size, size] or [size, size, 3]."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


class ImageData(PretrainData):
    """Batches of images [B, C, D, D] uint8 with block masks [B, T]; :meth:`augment` gives [B, C, H, H] float32.

    D is ``config.decode_size``, H ``model.frontend.image_size``, T ``model.frontend.num_patches``.

    Raises:
        ConfigError: a model for another modality, or ``mean``/``std`` of the wrong length.
        DataError: no images under ``config.path``.
    """

    def __init__(self, config: ImageDataConfig, model: Data2VecConfig, seed: int) -> None:
        super().__init__(seed)
        require(model.modality == "image", "model.modality", "'image' for image data", model.modality)
        self.config, self.model, self.max_bad_fraction = config, model, config.max_bad_fraction
        channels = model.frontend.channels
        require(channels in (1, 3), "model.frontend.channels", "1 or 3 for image files", channels)
        self.mean = config.mean or (IMAGENET_MEAN if channels == 3 else (0.5,))
        self.std = config.std or (IMAGENET_STD if channels == 3 else (0.5,))
        require(len(self.mean) == channels, "data.mean", f"{channels} numbers", self.mean)
        require(len(self.std) == channels, "data.std", f"{channels} numbers", self.std)
        self.decode_size = config.decode_size or -(-model.frontend.image_size * 8 // 7)
        kinds = {"files": IMAGE_EXTENSIONS, **SHARDS}
        found = find(config.path, kinds, config.format, config.split, "images, uncompressed tars or tables")
        self.source = open_source(found, config, IMAGE_EXTENSIONS)
        self.names, self.skipped = self.source.names, self.source.skipped
        if not len(self.names):
            raise nothing_left(config.path, self.skipped, "images")
        self._transform: _Augment | None = None

    def describe(self) -> str:
        """Files and batch size. Files are opened only when they are needed, so broken ones are not known yet."""
        return f"images {self.config.path}: {len(self.names)} files, {len(self.skipped)} skipped"

    def contents(self) -> list[bytes]:
        """Names; see :meth:`PretrainData.fingerprint`."""
        return [name.encode() for name in self.names]

    def plan(self, epoch: int) -> list[tuple[int, ...]]:
        """Shuffled files in batches of ``batch_size``; a smaller last batch only if there is no other."""
        return fixed_batches(self.rng(self.ORDER, epoch), len(self.names), self.config.batch_size)

    def load(self, epoch: int, index: int, items: tuple[int, ...]) -> Batch | None:
        """Decode, square and mask; see :meth:`PretrainData.load`."""
        images, skipped = self.read_each(items, self._read)
        if not images:
            return None
        inputs = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()  # [B, C, D, D]
        patches = self.model.frontend.num_patches
        mask = self.model.mask.draw(self.rng(self.MASK, epoch, index), np.full(len(images), patches), patches)
        return make_batch(inputs, mask, skipped=skipped, num_masked=self.num_masked(mask))

    def _read(self, item: int) -> np.ndarray:
        return self.source.read(item, lambda file: read_image(file, self.decode_size, self.model.frontend.channels))

    def augment(self, batch: Batch) -> Batch:
        """uint8 [B, C, D, D] to normalised float32 [B, C, H, H]: colour jitter, flip, resized crop, mean and std."""
        device = batch.inputs.device
        if self._transform is None or self._transform.device != device:
            self._transform = _Augment(self.config, self.model.frontend.image_size, self.mean, self.std, device)
        return replace(batch, inputs=self._transform(batch.inputs))


class _Augment:
    def __init__(
        self,
        config: ImageDataConfig,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
    ) -> None:
        import kornia.augmentation as K  # slow to import, and the workers do not need it

        self.size, self.device = size, device
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=device).view(-1, 1, 1)
        # The steps are not moved to the device: their random numbers are then drawn on the host, the same for every
        # device, and looking at them does not wait for it.
        self.steps: list[nn.Module] = []
        if config.color_jitter:
            saturation = config.color_jitter if len(mean) == 3 else 0.0
            self.steps.append(K.ColorJitter(config.color_jitter, config.color_jitter, saturation, 0.0, p=1.0))
        if config.hflip:
            self.steps.append(K.RandomHorizontalFlip(p=config.hflip))
        if config.crop_scale != (1, 1):
            crop = {"scale": config.crop_scale, "ratio": config.crop_ratio, "resample": "BICUBIC"}
            self.steps.append(K.RandomResizedCrop((size, size), **crop, align_corners=False))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:  # uint8 [B, C, D, D] -> float32 [B, C, H, H]
        x = images.float() / 255
        for step in self.steps:
            x = step(x)
        if x.shape[-1] != self.size:  # no random crop
            x = nn.functional.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True)
        return (x.clamp(0, 1) - self.mean) / self.std  # bicubic overshoots

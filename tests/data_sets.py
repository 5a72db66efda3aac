"""Small sets of audio and images, in files and in the formats of other libraries."""

import io
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

RATE = 16_000


def wave(item: int, seconds: float) -> np.ndarray:
    """Noise, other for every item; float32 [S], of values that 16 bits hold."""
    samples = np.random.default_rng(item).integers(-3000, 3000, round(seconds * RATE))
    return (samples / 2**15).astype(np.float32)


def audio(item: int, seconds: float, kind: str = "FLAC") -> bytes:
    """An encoded clip."""
    file = io.BytesIO()
    soundfile.write(file, wave(item, seconds), RATE, format=kind)
    return file.getvalue()


def pixels(item: int) -> np.ndarray:
    """A random image, uint8 [30 + item, 40, 3]."""
    return np.random.default_rng(item).integers(0, 256, (30 + item, 40, 3), dtype=np.uint8)


def image(item: int, kind: str = "PNG") -> bytes:
    """An encoded image."""
    file = io.BytesIO()
    Image.fromarray(pixels(item)).save(file, kind)
    return file.getvalue()


def clips(count: int) -> dict[str, bytes]:
    """Encoded clips of 0.5 s and longer by name."""
    return {f"clip{i:02d}": audio(i, 0.5 + 0.05 * i) for i in range(count)}


def write_files(folder: Path, items: dict[str, bytes], suffix: str) -> Path:
    """One file an item, in two sub-folders."""
    for number, (name, content) in enumerate(items.items()):
        path = folder / f"part{number % 2}" / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder

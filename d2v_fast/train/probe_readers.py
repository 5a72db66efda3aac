"""What the probe reads: labelled files to model inputs and to features that need no model.

Dims: B batch, T positions, S samples, D features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from d2v_fast.nn.config import ImageFrontEndConfig, SpeechFrontEndConfig, TextFrontEndConfig
from d2v_fast.train.data.base import DataError, UnreadableFile

Features = np.ndarray | sparse.csr_matrix  # [B, D]
MEL_BANDS = 80


@dataclass(frozen=True)
class Reader:
    """The steps that differ between modalities."""

    plain_name: str  # of the features that need no model
    examples: Callable[[Path], list[tuple[Any, str]]]  # path -> items and their labels; raises DataError
    read: Callable[[Any], Any]  # item -> one decoded example with a length; raises UnreadableFile
    collate: Callable[[list[Any]], tuple[Tensor, Tensor | None]]  # -> inputs, padding mask bool [B, T] or None
    plain: Callable[[list[Any]], Features]  # decoded examples -> features [B, D]
    batch_size: int
    equal_lengths: bool = False  # put only examples of one length into a batch


def folder_examples(path: Path) -> list[tuple[Path, str]]:
    """Files of ``path/<class>/...`` with their class; hidden files are left out."""
    if not path.is_dir():
        raise DataError(f"{path}: expected a folder with one sub-folder per class, found no folder")
    classes = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise DataError(f"{path}: expected one sub-folder per class, found none")
    examples = []
    for folder in classes:
        files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
        if not files:
            raise DataError(f"{folder}: no files for this class")
        examples += [(file, folder.name) for file in files]
    return examples


# ---- speech ----------------------------------------------------------------------------------------------------------
def log_mel_statistics(waveform: np.ndarray, sample_rate: int = 16_000) -> np.ndarray:
    """Mean and standard deviation over time of a log-mel spectrogram of waveform [S]: features [2 * 80] fp32.

    25 ms Hann windows every 10 ms, 80 triangular bands up to half the sampling rate (HTK mel scale).
    """
    size, hop = int(0.025 * sample_rate), int(0.010 * sample_rate)
    x = torch.from_numpy(np.pad(waveform, (0, max(0, size - len(waveform)))))
    frames = x.unfold(0, size, hop) * torch.hann_window(size)  # [T, size]
    power = torch.fft.rfft(frames, n=512).abs().square()  # [T, 257]
    log_mel = (power @ _mel_filters(sample_rate, 512, MEL_BANDS) + 1e-6).log()  # [T, 80]
    return torch.cat([log_mel.mean(dim=0), log_mel.std(dim=0, unbiased=False)]).numpy()


def _mel_filters(sample_rate: int, fft_size: int, bands: int) -> Tensor:  # [fft_size // 2 + 1, bands]
    top = 2595 * np.log10(1 + sample_rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1)  # Hz
    frequencies = np.linspace(0, sample_rate / 2, fft_size // 2 + 1)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return torch.from_numpy(np.clip(np.minimum(rising, falling), 0, None)).float()


def speech_reader(
    frontend: SpeechFrontEndConfig, max_seconds: float, batch_size: int, normalize: bool = True
) -> Reader:
    """Clips normalised as a whole (or, as in pretraining, not), then cut to the ``max_seconds`` in their middle.

    Only clips of one length share a batch: in a padded one the positional convolutions (and a group norm) would see
    the padding, and a clip's features would depend on its neighbours.
    """
    from d2v_fast.train.data.audio import normalize_waveform, read_waveform

    limit = int(max_seconds * frontend.sample_rate)

    def read(path: Path) -> np.ndarray:  # [S]
        waveform = read_waveform(path)
        if frontend.num_frames(len(waveform)) < 1:
            raise UnreadableFile(path, f"{len(waveform)} samples are too short for a single frame")
        start = max(0, (len(waveform) - limit) // 2)  # the middle: ends are often silence
        return (normalize_waveform(waveform) if normalize else waveform)[start : start + limit]

    def collate(waveforms: list[np.ndarray]) -> tuple[Tensor, None]:  # float [B, S]
        return torch.from_numpy(np.stack(waveforms)), None

    def plain(waveforms: list[np.ndarray]) -> np.ndarray:  # [B, 160]
        return np.stack([log_mel_statistics(waveform, frontend.sample_rate) for waveform in waveforms])

    return Reader("log-mel mean and std", folder_examples, read, collate, plain, batch_size, equal_lengths=True)


# ---- images ----------------------------------------------------------------------------------------------------------
def image_reader(
    frontend: ImageFrontEndConfig,
    mean: tuple[float, ...] | None,  # of pixel values in 0..1, per channel; None: as in pretraining
    std: tuple[float, ...] | None,
    batch_size: int,
) -> Reader:
    """Images resized and centre-cropped to the model's size, normalised with ``mean`` and ``std``."""
    from d2v_fast.train.data.image import IMAGENET_MEAN, IMAGENET_STD, read_image

    colour = frontend.channels == 3
    mean = mean or (IMAGENET_MEAN if colour else (0.5,))
    std = std or (IMAGENET_STD if colour else (0.5,))
    if not len(mean) == len(std) == frontend.channels:
        raise ValueError(f"mean and std must have {frontend.channels} values, one per channel, got {mean} and {std}")
    centre, spread = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))

    def read(path: Path) -> np.ndarray:  # uint8 [size, size, channels]
        return read_image(path, frontend.image_size, frontend.channels)

    def collate(images: list[np.ndarray]) -> tuple[Tensor, None]:  # float [B, channels, size, size]
        x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        return ((x - centre) / spread).contiguous(), None

    def plain(images: list[np.ndarray]) -> np.ndarray:
        return np.stack(images).reshape(len(images), -1).astype(np.float32) / 255

    return Reader("raw pixels", folder_examples, read, collate, plain, batch_size)


# ---- text ------------------------------------------------------------------------------------------------------------
def text_examples(path: Path) -> list[tuple[str, str]]:
    """Texts of a ``label<TAB>text`` file with their labels; lines without a tab or a text are an error."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a UTF-8 file of label<TAB>text lines: {error}") from error
    examples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        label, _, text = line.partition("\t")
        if not label.strip() or not text.strip():
            raise DataError(f"{path}:{number}: expected label<TAB>text, got {line[:60]!r}")
        examples.append((text.strip(), label.strip()))
    if not examples:
        raise DataError(f"{path}: no label<TAB>text lines")
    return examples


def text_reader(frontend: TextFrontEndConfig, tokenizer: str | Path, batch_size: int) -> Reader:
    """``<s> tokens </s>``, cut to the model's positions, padded at the end; tokens as in pretraining."""
    from sklearn.feature_extraction.text import HashingVectorizer

    from d2v_fast.train.data.tokenizer import load_tokenizer

    encoder = load_tokenizer(tokenizer, frontend.vocab_size)
    # Bytes written as Latin-1 characters, so that its character n-grams are byte n-grams. It has no state to fit.
    counts = HashingVectorizer(
        analyzer="char", ngram_range=(1, 2), lowercase=False, n_features=2**16, alternate_sign=False
    )
    bos, pad, eos = frontend.bos_index, frontend.pad_index, frontend.eos_index

    def collate(texts: list[str]) -> tuple[Tensor, Tensor | None]:  # int64 [B, T]
        rows = [encoder.encode(text, add_special_tokens=False).ids for text in texts]
        rows = [[bos, *ids[: frontend.max_positions - 2], eos] for ids in rows]
        sizes = np.array([len(row) for row in rows])
        padded = np.full((len(rows), sizes.max()), pad, dtype=np.int64)
        for target, row in zip(padded, rows, strict=True):
            target[: len(row)] = row
        padding_mask = torch.from_numpy(np.arange(sizes.max())[None] >= sizes[:, None])
        return torch.from_numpy(padded), padding_mask if padding_mask.any() else None

    def plain(texts: list[str]) -> sparse.csr_matrix:  # [B, 2**16]
        return counts.transform(text.encode("utf-8").decode("latin-1") for text in texts)

    return Reader("bytes and byte pairs", text_examples, lambda text: text, collate, plain, batch_size)

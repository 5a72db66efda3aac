"""Speech: files, archives or tables to batches of equally long waveforms (``FileAudioDataset`` without padding).

Every item is decoded, mixed to mono, resampled to 16 kHz and normalised as a whole (data2vec section 5.2, fairseq
``normalize``); then the items of a batch are cropped at random to the shortest of them, so there is no padding.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr
import torch

from d2v_fast.nn.batch import Batch, make_batch
from d2v_fast.nn.config import Data2VecConfig
from d2v_fast.train.data.bad_items import check_items, log_skipped, nothing_left
from d2v_fast.train.data.base import PretrainData, UnreadableFile, require
from d2v_fast.train.data.formats import SHARDS, Found, LocationConfig, find, open_source
from d2v_fast.train.data.manifest import read_manifest
from d2v_fast.train.data.packing import packed_batches
from d2v_fast.train.data.sources import Source, measured
from d2v_fast.train.errors import DataError

SAMPLE_RATE = 16_000  # Hz
READ_AT_ONCE = 2**24  # values; what is decoded counts, not what a header promises
FRAMES_PER_BYTE = 8192  # no codec gets there: FLAC has at most 65 535 frames in a block of ten bytes and more
RATES = (1000, 1_000_000)  # Hz; others come from damage, and resampling would multiply them
AUDIO_EXTENSIONS = (".wav", ".flac", ".ogg", ".opus", ".mp3")


@dataclass(frozen=True, kw_only=True)
class SpeechDataConfig(LocationConfig):
    """Where the speech is and how it is batched; the defaults are those of the released base recipe."""

    # audio files or a folder of them, searched recursively; a fairseq .tsv manifest; webdataset tars; parquet or arrow
    path: str
    max_tokens: int = 3_800_000  # samples in a batch: items times the longest of them; also caps a crop
    min_seconds: float = 2.0  # shorter files are skipped
    max_seconds: float = 20.0  # longer ones are cropped
    crop_multiple: int = 1  # crops are a multiple of so many samples; 1 = exactly the shortest clip, as fairseq
    normalize: bool = True  # zero mean and unit variance per file
    extensions: tuple[str, ...] = AUDIO_EXTENSIONS

    def __post_init__(self) -> None:
        object.__setattr__(self, "extensions", tuple(self.extensions))
        super().__post_init__()
        require(self.min_seconds > 0, "data.min_seconds", "positive", self.min_seconds)
        require(
            self.max_seconds >= self.min_seconds,
            "data.max_seconds",
            f"at least min_seconds ({self.min_seconds})",
            self.max_seconds,
        )
        shortest = round(self.min_seconds * SAMPLE_RATE)
        require(
            self.max_tokens >= shortest,
            "data.max_tokens",
            f"at least the {shortest} samples of one clip of min_seconds ({self.min_seconds})",
            self.max_tokens,
        )
        # few distinct lengths: allocators and per-shape kernel caches then stay small
        require(
            self.crop_multiple >= 1 and shortest % self.crop_multiple == 0,
            "data.crop_multiple",
            f"a divisor of the {shortest} samples of min_seconds ({self.min_seconds})",
            self.crop_multiple,
        )
        require(
            len(self.extensions) > 0 and all(e == e.lower() and e.startswith(".") for e in self.extensions),
            "data.extensions",
            "lower-case suffixes with a dot",
            self.extensions,
        )


def read_waveform(path: str | Path | BinaryIO) -> np.ndarray:
    """Decode a file to float32 [S] at 16 kHz; channels are averaged, other rates resampled (soxr, high quality).

    Raises:
        UnreadableFile: missing, broken, empty, or with samples that are not finite.
    """
    try:
        with soundfile.SoundFile(path) as file:
            _check_rate(path, file.samplerate)
            wave, rate = _decode(file), file.samplerate  # [S, channels]
    except (soundfile.SoundFileError, OSError) as error:
        raise UnreadableFile(path, _reason(error)) from error
    wave = wave[:, 0] if wave.shape[1] == 1 else wave.mean(axis=1)
    if wave.size == 0:
        raise UnreadableFile(path, "no samples")
    if not np.isfinite(wave).all():
        raise UnreadableFile(path, "samples that are not finite")
    return wave if rate == SAMPLE_RATE else soxr.resample(wave, rate, SAMPLE_RATE)


def _decode(file: soundfile.SoundFile) -> np.ndarray:
    """All frames, float32 [S, channels], without room for those that the header promises in vain."""
    count, pieces = max(1, READ_AT_ONCE // file.channels), []
    while not pieces or len(pieces[-1]) == count:
        pieces.append(file.read(count, dtype="float32", always_2d=True))
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _check_rate(name: str | Path | BinaryIO, rate: int) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise UnreadableFile(name, f"a header with {rate} Hz; expected {RATES[0]} to {RATES[1]}")


def _header_length(file: BinaryIO) -> int:
    """Samples at 16 kHz by the header.

    Raises:
        UnreadableFile: more than the file can hold, or a rate that is none.
        SoundFileError, OSError: there is no header.
    """
    header = soundfile.info(file)
    size = file.seek(0, os.SEEK_END)
    if header.frames > FRAMES_PER_BYTE * size:
        raise UnreadableFile("", f"a header with {header.frames} samples in a file of {size} bytes")
    _check_rate("", header.samplerate)
    # rounds as soxr does
    return (2 * header.frames * SAMPLE_RATE + header.samplerate) // (2 * header.samplerate)


def normalize_waveform(wave: np.ndarray) -> np.ndarray:
    """Zero mean and unit (biased) variance over float32 [S], epsilon 1e-5, as fairseq's ``F.layer_norm``."""
    mean, var = wave.mean(dtype=np.float64), wave.var(dtype=np.float64)
    return ((wave - mean) / np.sqrt(var + 1e-5)).astype(np.float32)


class SpeechData(PretrainData):
    """Batches of waveforms [B, S] float32 with span masks [B, T], T = ``model.frontend.num_frames(S)``.

    Raises:
        ConfigError: a model for another modality or rate, or ``min_seconds`` too short for its masks.
        DataError: nothing usable under ``config.path``.
    """

    def __init__(self, config: SpeechDataConfig, model: Data2VecConfig, seed: int) -> None:
        super().__init__(seed)
        require(model.modality == "speech", "model.modality", "'speech' for speech data", model.modality)
        require(model.frontend.sample_rate == SAMPLE_RATE, "sample_rate", str(SAMPLE_RATE), model.frontend.sample_rate)
        self.config, self.model, self.max_bad_fraction = config, model, config.max_bad_fraction
        self.min_samples = round(config.min_seconds * SAMPLE_RATE)
        self.max_samples = min(round(config.max_seconds * SAMPLE_RATE), config.max_tokens)
        frames = model.frontend.num_frames(self.min_samples)
        require(
            frames > model.mask.length,
            "data.min_seconds",
            f"long enough for more than mask.length = {model.mask.length} frames",
            f"{config.min_seconds} s = {frames} frames",
        )
        self.source, lengths, reasons = _list_items(config)
        self._keep(lengths, reasons)

    def _keep(self, lengths: np.ndarray, reasons: np.ndarray) -> None:
        """Keep the items that are long enough; lengths are in samples at 16 kHz, or -1, and a reason says why."""
        names = self.source.names
        bad = [(names[i], reasons[i]) for i in np.flatnonzero(lengths < 0)]
        if len(bad) < len(names):
            check_items(bad, len(names), self.max_bad_fraction)
        short = np.flatnonzero((lengths >= 0) & (lengths < self.min_samples))
        skipped = [*bad, *((names[i], self._too_short(int(lengths[i]))) for i in short)]
        self.skipped = [*self.source.skipped, *skipped]
        self.items = np.flatnonzero(lengths >= self.min_samples)  # of the source
        self.lengths = lengths[self.items]  # [items] samples
        self.names = names.take(self.items)
        log_skipped(skipped, len(names), "items")
        if not self.items.size:
            raise nothing_left(self.config.path, self.skipped, f"audio of at least {self.config.min_seconds} s")

    def _too_short(self, length: int) -> str:
        return f"{length / SAMPLE_RATE:.2f} s, shorter than min_seconds = {self.config.min_seconds}"

    def describe(self) -> str:
        """Files, hours and what was left out."""
        hours = self.lengths.sum() / SAMPLE_RATE / 3600
        return f"speech {self.config.path}: {len(self.items)} files, {hours:.2f} h, {len(self.skipped)} skipped"

    def contents(self) -> list[bytes]:
        """Names and lengths; see :meth:`PretrainData.fingerprint`."""
        return [*(name.encode() for name in self.names), self.lengths.tobytes()]

    def plan(self, epoch: int) -> list[tuple[int, ...]]:
        """Longest first with random ties, packed while items times longest fit ``max_tokens``, batches shuffled.

        With ``static_shapes`` the longest counts as the next multiple of ``crop_multiple``: batches have few sizes.
        """
        unit = self.config.crop_multiple if self.static_shapes else 1
        return packed_batches(
            self.rng(self.ORDER, epoch),
            np.minimum(self.lengths, self.max_samples),
            self.config.max_tokens,
            lambda length: min(-(-length // unit) * unit, self.max_samples),
        )

    def load(self, epoch: int, index: int, items: tuple[int, ...]) -> Batch | None:
        """Decode, normalise, crop to the shortest and mask; see :meth:`PretrainData.load`."""
        waves, skipped = self.read_each(items, self._read)
        if not waves:
            return None
        # a manifest may understate the lengths, so the budget is enforced once more
        size = min(min(w.size for w in waves), self.max_samples, self.config.max_tokens // len(waves))
        size -= size % self.config.crop_multiple
        crop = self.rng(self.CROP, epoch, index)
        starts = [int(crop.integers(w.size - size + 1)) for w in waves]
        inputs = np.stack([w[s : s + size] for w, s in zip(waves, starts, strict=True)])  # [B, S]
        frames = self.model.frontend.num_frames(size)
        mask = self.model.mask.draw(self.rng(self.MASK, epoch, index), np.full(len(waves), frames), frames)
        return make_batch(torch.from_numpy(inputs), mask, skipped=skipped, num_masked=self.num_masked(mask))

    def _read(self, item: int) -> np.ndarray:
        wave = self.source.read(int(self.items[item]), read_waveform)
        if wave.size < self.min_samples:
            raise UnreadableFile(self.names[item], self._too_short(wave.size))
        return normalize_waveform(wave) if self.config.normalize else wave


def _list_items(config: SpeechDataConfig) -> tuple[Source, np.ndarray, np.ndarray]:
    """The items at ``config.path``, their lengths int64 [items] at 16 kHz, or -1 and the reason why.

    What has none is looked at anew on every start.
    """
    if config.path.endswith(".tsv") and config.format == "auto":  # also if it is missing
        found = Found("manifest", Path(), [Path(config.path).expanduser()])
    else:
        kinds = {"files": config.extensions, "manifest": (".tsv",), **SHARDS}
        what = "audio files, a .tsv manifest, uncompressed tars or tables"
        found = find(config.path, kinds, config.format, config.split, what)
    if found.format == "manifest":
        source, lengths = read_manifest(_of_split(found.files, config))
        return source, lengths, np.full(len(lengths), "")
    source = open_source(found, config, config.extensions)
    # which items there are depends on which files could be opened this time
    key = None if source.key is None else ["lengths", *source.key, len(source.names), [n for n, _ in source.skipped]]
    number = len(source.names)
    return source, *measured(config.cache_dir, "lengths", key, number, lambda items: _scan(source, items))


def _of_split(manifests: list[Path], config: SpeechDataConfig) -> Path:
    """The manifest to be read: the only one, or the one called after the split."""
    chosen = [path for path in manifests if path.stem == config.split] if len(manifests) > 1 else manifests
    if len(chosen) != 1:
        names = ", ".join(path.name for path in manifests)
        raise DataError(f"data path {config.path} holds the manifests {names}; data.split is {config.split!r}")
    return chosen[0]


def _scan(source: Source, items: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Lengths in samples at 16 kHz by the headers of ``items``, or -1 and why there is none."""

    def length(item: int) -> tuple[int, str]:
        try:
            return source.read(item, _header_length), ""
        except UnreadableFile as error:
            return -1, error.reason
        except (soundfile.SoundFileError, OSError) as error:
            return -1, _reason(error)

    with ThreadPoolExecutor(source.threads) as pool:
        found = list(pool.map(length, items.tolist()))
    return np.array([samples for samples, _ in found], np.int64), [reason for _, reason in found]


def _reason(error: Exception) -> str:
    return getattr(error, "error_string", str(error))  # libsndfile's text without the path

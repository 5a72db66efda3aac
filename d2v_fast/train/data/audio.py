"""Speech: files or a manifest to batches of equally long waveforms (fairseq ``FileAudioDataset`` without padding).

Every file is decoded, mixed to mono, resampled to 16 kHz and normalised as a whole (data2vec section 5.2, fairseq
``normalize``); then the items of a batch are cropped at random to the shortest of them, so there is no padding.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch

from d2v_fast.nn.batch import Batch, make_batch
from d2v_fast.nn.config import Data2VecConfig
from d2v_fast.train.data.base import (
    PretrainData,
    UnreadableFile,
    list_files,
    log_skipped,
    nothing_left,
    relative_names,
    require,
)
from d2v_fast.train.errors import DataError

SAMPLE_RATE = 16_000  # Hz
AUDIO_EXTENSIONS = (".wav", ".flac", ".ogg", ".opus", ".mp3")
SCAN_THREADS = 8  # reading headers waits for the disk, not for Python


@dataclass(frozen=True, kw_only=True)
class SpeechDataConfig:
    """Where the speech is and how it is batched; the defaults are those of the released base recipe."""

    path: str  # folder, searched recursively; or a fairseq .tsv manifest; or one audio file
    max_tokens: int = 3_800_000  # samples in a batch: items times the longest of them; also caps a crop
    min_seconds: float = 2.0  # shorter files are skipped
    max_seconds: float = 20.0  # longer ones are cropped
    crop_multiple: int = 1  # crops are a multiple of so many samples; 1 = exactly the shortest clip, as fairseq
    normalize: bool = True  # zero mean and unit variance per file
    extensions: tuple[str, ...] = AUDIO_EXTENSIONS

    def __post_init__(self) -> None:
        object.__setattr__(self, "extensions", tuple(self.extensions))
        require(bool(self.path), "data.path", "a folder or a .tsv manifest", self.path)
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


def read_waveform(path: str | Path) -> np.ndarray:
    """Decode a file to float32 [S] at 16 kHz; channels are averaged, other rates resampled (soxr, high quality).

    Raises:
        UnreadableFile: missing, broken, empty, or with samples that are not finite.
    """
    try:
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)  # [S, channels]
    except (soundfile.SoundFileError, OSError) as error:
        raise UnreadableFile(path, _reason(error)) from error
    wave = wave[:, 0] if wave.shape[1] == 1 else wave.mean(axis=1)
    if wave.size == 0:
        raise UnreadableFile(path, "no samples")
    if not np.isfinite(wave).all():
        raise UnreadableFile(path, "samples that are not finite")
    return wave if rate == SAMPLE_RATE else soxr.resample(wave, rate, SAMPLE_RATE)


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
        self.config, self.model = config, model
        self.min_samples = round(config.min_seconds * SAMPLE_RATE)
        self.max_samples = min(round(config.max_seconds * SAMPLE_RATE), config.max_tokens)
        frames = model.frontend.num_frames(self.min_samples)
        require(
            frames > model.mask.length,
            "data.min_seconds",
            f"long enough for more than mask.length = {model.mask.length} frames",
            f"{config.min_seconds} s = {frames} frames",
        )
        if config.path.endswith(".tsv"):
            files, names, lengths = _read_manifest(Path(config.path).expanduser())
        else:
            files = list_files(config.path, config.extensions, "audio files or a .tsv manifest")
            names = relative_names(config.path, files)
            with ThreadPoolExecutor(SCAN_THREADS) as pool:
                lengths = list(pool.map(_file_length, files))
        self._keep(files, names, lengths)

    def _keep(self, files: list[Path], names: list[str], lengths: list[int | str]) -> None:
        """Keep the files that are long enough; a length is in samples at 16 kHz, or the reason for having none."""
        self.files, self.names, kept, self.skipped = [], [], [], []
        for file, name, length in zip(files, names, lengths, strict=True):
            if isinstance(length, int) and length >= self.min_samples:
                self.files.append(file)
                self.names.append(name)
                kept.append(length)
            else:
                self.skipped.append((name, length if isinstance(length, str) else self._too_short(length)))
        self.lengths = np.array(kept, np.int64)  # [items] samples
        log_skipped(self.skipped, len(files))
        if not self.files:
            raise nothing_left(self.config.path, self.skipped, f"audio of at least {self.config.min_seconds} s")

    def _too_short(self, length: int) -> str:
        return f"{length / SAMPLE_RATE:.2f} s, shorter than min_seconds = {self.config.min_seconds}"

    def describe(self) -> str:
        """Files, hours and what was left out."""
        hours = self.lengths.sum() / SAMPLE_RATE / 3600
        return f"speech {self.config.path}: {len(self.files)} files, {hours:.2f} h, {len(self.skipped)} skipped"

    def contents(self) -> list[bytes]:
        """Names and lengths; see :meth:`PretrainData.fingerprint`."""
        return [*(name.encode() for name in self.names), self.lengths.tobytes()]

    def plan(self, epoch: int) -> list[tuple[int, ...]]:
        """Longest first with random ties, packed while items times longest fit ``max_tokens``, batches shuffled.

        With ``static_shapes`` the longest counts as the next multiple of ``crop_multiple``: batches have few sizes.
        """
        rng = self.rng(self.ORDER, epoch)
        lengths = np.minimum(self.lengths, self.max_samples)
        order = np.lexsort((rng.permutation(len(lengths)), -lengths))
        unit = self.config.crop_multiple if self.static_shapes else 1
        packed: list[tuple[int, ...]] = []
        start = 0
        while start < len(order):
            count = self.config.max_tokens // min(-(-int(lengths[order[start]]) // unit) * unit, self.max_samples)
            packed.append(tuple(order[start : start + count].tolist()))
            start += count
        return [packed[i] for i in rng.permutation(len(packed))]

    def load(self, epoch: int, index: int, items: tuple[int, ...]) -> Batch | None:
        """Decode, normalise, crop to the shortest and mask; see :meth:`PretrainData.load`."""
        waves, skipped = self.read_each(items, self.names, self._read)
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
        wave = read_waveform(self.files[item])
        if wave.size < self.min_samples:
            raise UnreadableFile(self.files[item], self._too_short(wave.size))
        return normalize_waveform(wave) if self.config.normalize else wave


def _reason(error: Exception) -> str:
    return getattr(error, "error_string", str(error))  # libsndfile's text without the path


def _file_length(path: Path) -> int | str:
    """Samples at 16 kHz by the file's header, or why there are none."""
    try:
        header = soundfile.info(path)
    except (soundfile.SoundFileError, OSError) as error:
        return _reason(error)
    return (2 * header.frames * SAMPLE_RATE + header.samplerate) // (2 * header.samplerate)  # rounds as soxr does


def _read_manifest(path: Path) -> tuple[list[Path], list[str], list[int | str]]:
    """Files, names and lengths of a fairseq manifest: the root, then one ``path<TAB>samples`` a line (at 16 kHz)."""
    if not path.is_file():
        raise DataError(f"manifest {path} does not exist; expected a .tsv file: the root, then path<TAB>samples lines")
    try:
        root, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    except UnicodeDecodeError as error:
        raise DataError(f"manifest {path} is not UTF-8 text: {error}") from error
    files, names, lengths = [], [], []
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        name, tab, samples = line.partition("\t")
        if not tab or not samples.strip().isdecimal():
            raise DataError(f"manifest {path}, line {number}: expected path<TAB>samples, got {line!r}")
        if ".zip:" in name:
            raise DataError(f"manifest {path}, line {number}: slices of archives are not supported, got {name!r}")
        files.append(path.parent / root.strip() / name)  # an absolute root replaces the manifest's folder
        names.append(name)
        lengths.append(int(samples))
    if not files:
        raise DataError(f"manifest {path} lists no files; expected the root, then path<TAB>samples lines")
    return files, names, lengths

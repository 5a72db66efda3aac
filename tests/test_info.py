"""The doctor: settings of threads, and what a run's metrics say."""

import json

import pytest

import d2v_fast
from d2v_fast import _info
from d2v_fast.train.doctor import examine
from d2v_fast.train.errors import DataError


@pytest.mark.parametrize(
    ("gpu", "cores", "threads", "processes", "omp", "words"),
    [
        (True, 128, 64, 8, "unset", "set OMP_NUM_THREADS=1 when training on a GPU"),
        (True, 16, 4, 8, "4", "8 x 4 threads are more than 16 cores: set OMP_NUM_THREADS=1"),
        (True, 128, 1, 8, "1", None),
        (False, 8, 8, 2, "8", "2 x 8 threads are more than 8 cores: set OMP_NUM_THREADS=4"),
        (False, 8, 1, 1, "1", "use more of its cores with OMP_NUM_THREADS=8"),
        (False, 8, 1, 8, "1", None),
        (False, 2, 2, 1, "unset", None),
    ],
)
def test_threads(gpu, cores, threads, processes, omp, words):
    advice = _info._advice(gpu, cores, threads, processes, omp)
    assert words in advice[0] if words else advice == []


def test_cores_of_a_container(monkeypatch, tmp_path):
    monkeypatch.setattr(_info, "QUOTA", tmp_path / "cpu.max")
    everything = _info._cores()
    for text, cores in (("max 100000", everything), ("100000 100000", 1), ("50000 100000", 1), ("", everything)):
        (tmp_path / "cpu.max").write_text(text)
        assert _info._cores() == cores


def run(folder, *rows, config=""):
    """A run's folder with these records, after one of its start that must not count."""
    start = {"update": 1, "loss": 1.0, "data_wait": 0.9, "seconds_per_update": 60.0, "gpu_idle": 0.9, "skipped": 0}
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in (start, *rows)]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "config.yaml").write_text(config or "{updates: 1000, workers: 2}", encoding="utf-8")
    return folder


def row(update=100, **more):
    healthy = {"data_wait": 0.01, "seconds_per_update": 2.0, "host_seconds": 0.5, "gpu_idle": 0.02, "device_idle": 0.01}
    return {"update": update, "loss": 1.0, "skipped": 0, "skipped_files": 0, **healthy, **more}


def advice(folder, cores=8) -> list[str]:
    return [line for line in examine(folder, cores) if line.startswith("advice: ")]


def test_a_healthy_run(tmp_path):
    rows = [row(100), row(200, audio_seconds_per_s=900.0, mfu=0.41, peak_memory=2**31, seconds_per_update=4.0)]
    lines = examine(run(tmp_path, *rows), 8)
    assert f"{tmp_path}: update 200 of 1000, 3.000 s each, 0.7 h to go" in lines[0]
    assert "audio_seconds_per_s 900, mfu 0.41" in lines[1]
    assert lines[2].endswith("1.0 % of the time") and lines[3].endswith("2.0 %; between updates 1.0 %")
    assert lines[4].endswith("0 updates, 0 files") and lines[5].endswith("2.00 GiB")
    assert advice(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data_wait": 0.2}, "updates wait for data: workers=4 (now 2; 8 cores)"),
        ({"data_wait_worst": 0.3}, "one rank waits for data much longer"),
        ({"gpu_idle": 0.4, "host_seconds": 1.95}, "the GPU waits for the host, not for data: cuda_graph=auto"),
        ({"gpu_idle": 0.4}, "the GPU waits between updates, not for data: raise log_every"),
        ({"skipped": 2}, "updates were skipped, loss or gradient not finite: lower optim.lr"),
        ({"skipped_files": 3}, "files could not be read"),
        ({"graph_replays": 50, "graph_fallbacks": 50}, "many updates were not replayed as CUDA graphs"),
    ],
)
def test_what_is_wrong_is_named_with_what_to_change(tmp_path, changes, words):
    found = advice(run(tmp_path, row(**changes)))
    assert any(words in line for line in found), found


def test_no_core_is_left_for_workers(tmp_path, monkeypatch):
    folder = run(tmp_path, row(data_wait=0.5), config="{workers: 2}")
    assert "with 2 workers on 3 cores: data on a local disk" in advice(folder, cores=3)[0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert "with 2 workers on 8 cores" in advice(folder, cores=8)[0]  # two for each process


def test_a_run_on_a_cpu_and_an_old_one(tmp_path):
    old = {"update": 100, "loss": 1.0, "data_wait": 0.01, "seconds_per_update": 2.0}
    lines = examine(run(tmp_path, old), 8)
    assert "none logged" in lines[1] and "not measured; between updates not measured" in lines[3]
    (tmp_path / "config.yaml").unlink()
    assert "update 100, 2.000 s each" in examine(tmp_path, 8)[0]


def test_no_run(tmp_path):
    with pytest.raises(DataError, match=r"no metrics.jsonl with a whole line; expected the folder \(out=...\)"):
        d2v_fast.info(tmp_path)


def test_report_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    report = d2v_fast.info(run(tmp_path, row(data_wait=0.5)))
    assert "processes: 3, torch uses" in report and "loader wait   50.0 % of the time" in report
    lines = report.splitlines()
    end = lines.index("")  # of what is said of the run, in front of the rest
    assert lines[0].startswith(f"run           {tmp_path}: update 100") and lines[end + 1].startswith("d2v_fast ")
    assert lines[end - 1].startswith("advice: updates wait for data")

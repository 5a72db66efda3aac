"""Two runs of the benchmarks side by side: what moved, what is missing, and what cannot be compared."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import compare_runs
import measured

ENVIRONMENT = {"device": "GPU", "driver": "1", "cuda": "13", "torch": "2", "triton": "3", "commit": "c" * 40}


def run(folder, ms=None, environment=(), noise=0.01, graph=5.0):
    """Results with an op and a recipe; ``ms`` of providers of the op."""
    folder.mkdir()
    ms = {"d2v_fast": 1.0, "fairseq": 10.0} | (ms or {})
    rows = [{"case": "a", "mode": "fwd", "provider": p, "status": "ok", "ms_p50": t} for p, t in ms.items() if t]
    rows[0]["noise"] = noise
    rows.append({"case": "a", "mode": "fwd", "provider": "apex", "status": "not installed"})
    record = {"environment": {**ENVIRONMENT, **dict(environment)}, "kind": "gpu", "op": "ema", "results": rows}
    (folder / "ema.json").write_text(json.dumps(record))
    steps = [{"case": "text_base", "provider": "d2v_fast graph", "status": "ok", "ms": graph}]
    record = {"environment": record["environment"], "benchmark": "train_step", "results": steps}
    (folder / "train_step_text_base.json").write_text(json.dumps(record))
    (folder / "other.json").write_text("[]")
    return folder


@pytest.mark.parametrize(
    ("second", "status", "said"),
    [
        ({}, 0, "3 rows in both, 2 of them ours: these moved by 0.0 % at most; 0 refused"),
        ({"ms": {"d2v_fast": 1.04}}, 0, "+4.0 %  1.0000 -> 1.0400 ms  ema: a, fwd, d2v_fast"),
        ({"ms": {"d2v_fast": 1.06}}, 1, "d2v_fast  noise 1.0 %  MOVED"),
        ({"ms": {"d2v_fast": 0.94}}, 1, "-6.4 %"),
        ({"ms": {"fairseq": 20.0}}, 0, "+100.0 %"),
        ({"noise": 0.06}, 1, "noise 6.0 %  NOISY"),
        ({"graph": 5.5}, 1, "train_step: text_base, step, d2v_fast graph  MOVED"),
        ({"ms": {"d2v_fast": None, "fairseq": 1.0}}, 1, "in one run only: ema, a, fwd, d2v_fast  MISSING"),
        ({"ms": {"fairseq": None}}, 0, "in one run only: ema, a, fwd, fairseq"),
    ],
)
def test_verdict(tmp_path, capsys, second, status, said):
    folders = [str(run(tmp_path / "a")), str(run(tmp_path / "b", **second))]
    assert compare_runs.main(folders) == status
    printed = capsys.readouterr().out
    assert said in printed


def test_rows_that_a_budget_cut_off(tmp_path, capsys):
    folders = [str(run(tmp_path / "a")), str(run(tmp_path / "b", {"d2v_fast": None, "fairseq": 10.0}))]
    assert compare_runs.main([*folders, "--common"]) == 0
    assert "in one run only: ema, a, fwd, d2v_fast\n" in capsys.readouterr().out


def test_worst_first_and_tolerance(tmp_path, capsys):
    folders = [str(run(tmp_path / "a")), str(run(tmp_path / "b", {"d2v_fast": 1.02, "fairseq": 5.0}, graph=4.0))]
    assert compare_runs.main([*folders, "--tolerance", "30"]) == 0
    first, second, third, *_ = capsys.readouterr().out.splitlines()
    assert "-100.0 %" in first and "-25.0 %" in second and "+2.0 %" in third


@pytest.mark.parametrize("name", compare_runs.COMPARED)
def test_other_devices_and_programs_are_refused(tmp_path, capsys, name):
    folders = [str(run(tmp_path / "a")), str(run(tmp_path / "b", environment={name: "another"}))]
    with pytest.raises(SystemExit) as stop:
        compare_runs.main(folders)
    assert stop.value.code == 2 and f"{name}: {ENVIRONMENT[name]} and another" in capsys.readouterr().err
    assert compare_runs.main([*folders, "--any"]) == 0


def test_bad_folders(tmp_path, capsys):
    good = str(run(tmp_path / "a"))
    (tmp_path / "empty").mkdir()
    for wrong, message in (("none", "is not a folder"), ("empty", "no results of a GPU")):
        with pytest.raises(SystemExit) as stop:
            compare_runs.main([good, str(tmp_path / wrong)])
        assert stop.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare_runs.main([good, good, "--tolerance", "0"])


def test_runs_without_rows_of_ours_prove_nothing(tmp_path, capsys):
    a = run(tmp_path / "a", {"d2v_fast": None})
    (a / "train_step_text_base.json").unlink()
    assert compare_runs.main([str(a), str(a)]) == 1 and "no row of ours" in capsys.readouterr().err


def test_names_of_steps(tmp_path):
    """Ours is the faster of two; what was run at other sizes is none of the results."""
    folder = run(tmp_path / "a")
    file = folder / "train_step_text_base.json"
    record = json.loads(file.read_text())
    times = {
        "d2v_fast": 4.0,
        "as written, autocast": 20.0,
        "as written": 30.0,
        "eager": 9.0,
        "torch.compile": 6.0,
        "patched": 8.0,
    }
    record["results"] += [{"case": "text_base", "provider": p, "status": "ok", "ms": t} for p, t in times.items()]
    file.write_text(json.dumps(record))
    (folder / "train_step_smoke.json").write_text(json.dumps({**record, "smoke": True, "results": [{"case": "y"}]}))
    rows = measured.load(folder).providers("train_step", "text_base", "step")
    assert rows["ours"].ms == 4.0 and rows["reference"].provider == "as written"
    for row in record["results"]:
        row |= {"d2v_fast": {"machine": "a", "mean_ms": 4.5}, "eager": {"machine": "a"}}.get(row["provider"], {})
    file.write_text(json.dumps(record))
    rows = measured.load(folder).providers("train_step", "text_base", "step")
    assert (rows["ours"].ms, rows["eager"].ms, rows["reference"].ms) == (4.5, 9.0, None)
    assert rows["reference"].status == measured.OTHER_MACHINE
    file.write_text(json.dumps({**record, "results": [{**row, "machine": "a"} for row in record["results"]]}))

"""Every benchmark in its smoke form, the harness around them, and what it refuses."""

import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
OPS = sorted(p.stem.removeprefix("bench_") for p in BENCHMARKS.glob("bench_*.py") if p.stem != "bench_train_step")
COMPILED_HERE = "masked_smooth_l1"  # torch.compile takes seconds a case on a CPU: one op stands for all
sys.path.insert(0, str(BENCHMARKS))

import cli  # noqa: E402
import cost_formulas  # noqa: E402
import driver  # noqa: E402
import plot  # noqa: E402
from driver import OURS, Provider  # noqa: E402
from shapes import PARAMETERS  # noqa: E402


def bench_of(op):
    return __import__(f"bench_{op}").BENCH


def smoke(bench, *arguments):
    """Run the command in this process; its JSON."""
    file = Path(arguments[arguments.index("--json") + 1])
    cli.main(bench, ["--smoke", *arguments])
    return json.loads(file.read_text())


def plain(bench):
    return [name for name, provider in bench.providers.items() if not provider.compiled]


@pytest.mark.parametrize("op", OPS)
def test_smoke(op, tmp_path, capsys):
    bench = bench_of(op)
    names = plain(bench)
    record = smoke(bench, "--json", str(tmp_path / "x.json"), "--providers", *names)
    assert record["op"] == op and record["schema"] == cli.SCHEMA and record["kind"] == "cpu-smoke"
    assert record["complete"] is True
    assert {"device", "torch", "triton", "python", "d2v_fast", "commit"} <= set(record["environment"])
    rows = record["results"]
    expected = {(c.name, m, n) for c in bench.smoke for m in bench.modes for n in names}
    assert {(r["case"], r["mode"], r["provider"]) for r in rows} == expected and len(rows) == len(expected)
    for row in rows:
        if row["peer"] and row["status"] == "not installed":
            assert "ratio" not in row
            continue
        assert row["status"] == "ok", row
        assert 0 < row["p20"] <= row["ratio"] <= row["p80"] and row["error_of_limit"] <= 1
        assert row["provider"] != OURS or row["ratio"] == 1
        assert not [key for key in row if "ms" in key.split("_") or key in ("gb_per_s", "host_us")]
    assert "not installed" in capsys.readouterr().out or not any(r["peer"] for r in rows)


def test_parts_of_the_front_end(tmp_path, capsys):
    """One command for all parts; clips of different lengths give the same frames padded and packed."""
    import bench_conv_encoder

    none = ["--smoke", "--providers", OURS, "eager", "--out", str(tmp_path), "--budget", "0"]
    cli.main_parts(bench_conv_encoder.PARTS, none)
    files = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "cpu-smoke").glob("*.json")}
    assert set(files) == {"conv_encoder", "conv_encoder_lengths", "conv0", "strided_conv", "pos_conv"}
    assert {row["status"] for record in files.values() for row in record["results"]} == {"skipped: out of time"}
    providers = plain(bench_conv_encoder.LENGTHS)
    one = ["--smoke", "--parts", "lengths", "--json", str(tmp_path / "x.json"), "--providers", *providers]
    cli.main_parts(bench_conv_encoder.PARTS, one)
    rows = json.loads((tmp_path / "x.json").read_text())["results"]
    assert {"d2v_fast padded", "eager packed"} < {row["provider"] for row in rows}
    assert {row["status"] for row in rows} == {"ok"}
    with pytest.raises(SystemExit):
        cli.main_parts(bench_conv_encoder.PARTS, ["--smoke", "--json", str(tmp_path / "x.json")])
    assert "--json names the file of one part" in capsys.readouterr().err


def test_wrong_part_does_not_keep_the_others_from_running(tmp_path):
    right = bench_of("l2_norm")
    wrong = with_wrong(bench_of("masked_smooth_l1"), lambda r: {"loss": r["loss"] * 2})
    wrong = replace(wrong, providers={OURS: wrong.providers[OURS], "eager": wrong.providers["wrong"]})
    with pytest.raises(SystemExit, match=r"first: .* measurements were refused"):
        cli.main_parts(
            {"first": wrong, "second": right}, ["--smoke", "--providers", OURS, "eager", "--out", str(tmp_path)]
        )
    assert (tmp_path / "cpu-smoke" / "l2_norm.json").exists()


@pytest.mark.parametrize("op", OPS)
def test_cases_are_distinct_and_their_bytes_positive(op):
    bench = bench_of(op)
    assert OURS in bench.providers and {"fairseq", "eager", "eager+compile"} <= set(bench.providers)
    for cases in (bench.cases, bench.smoke):
        assert len({case.name for case in cases}) == len(cases)
    assert sum(case.main for case in bench.cases) >= 2
    for case in bench.cases:
        sizes = [bench.minimal_bytes(case, mode) for mode in bench.modes]
        assert sizes == sorted(sizes) and sizes[0] > 0


def test_bytes_of_known_cases():
    """Recomputed by hand: B=15, T=780, C=768, K=8, N=5230 in bfloat16; 38 and 12 bytes a parameter."""
    loss = bench_of("data2vec_loss")
    case = loss.cases[0]
    layers = 2 * 768 * 8 * (15 * 780 + 5230)
    assert loss.minimal_bytes(case, "fwd+bwd") == layers + 5230 * (8 + 2 * 2 * 768)
    ema = bench_of("ema")
    teacher = driver.make_inputs(ema, ema.smoke[0])["teacher"]
    assert ema.minimal_bytes(ema.smoke[0], "fwd") == 12 * sum(e.numel() for e in teacher)


def test_work_of_the_convolutions():
    """Recomputed by hand: 15 x 249 600 samples leave 49 919 frames of 512 channels; bfloat16."""
    conv0 = bench_of("conv0")
    case = conv0.cases[0]
    y = 15 * 49_919 * 512 * 2
    waves = 15 * 249_600 * 4
    assert conv0.passes(case, "fwd") == [(2 * 10 * y // 2, waves + y)]
    assert conv0.minimal_bytes(case, "fwd+bwd") == 2 * (waves + y)
    strided = bench_of("strided_conv")
    case = next(case for case in strided.cases if case.name.startswith("conv 1,"))
    x, y = case.sizes["B"] * case.sizes["S"] * 512 * 2, 15 * 24_959 * 512 * 2
    assert abs(x - 15 * 49_919 * 512 * 2) < 0.001 * x  # on the lattice there are a few more
    product, norm = strided.passes(case, "fwd")
    assert product == (pytest.approx(2 * y // 2 * 512 * 3, rel=1e-3), pytest.approx(x + y, rel=1e-3))
    assert norm == (0, pytest.approx(2 * y, rel=1e-3))
    assert [flop > 0 for flop, _ in strided.passes(case, "fwd+bwd")] == [True, False, False, True, True]
    positions = bench_of("pos_conv")
    flop = sum(flop for flop, _ in positions.passes(positions.cases[0], "fwd+bwd"))
    assert flop == 5 * 3 * 2 * 15 * 780 * 768 * 48 * 19


@pytest.mark.parametrize("op", ["masked_smooth_l1", "layer_norm_gelu", "ema"])
def test_minimal_bytes_are_the_bytes_of_the_tensors(op):
    """Forward: what the inputs hold and what comes out, less the vectors that the formulas leave out."""
    bench = bench_of(op)
    case = bench.smoke[0]
    inputs = driver.make_inputs(bench, case)
    results = driver.make_call(bench, case, "fwd", bench.providers[OURS].load(), inputs)()
    size = sum(x.nbytes for x in driver._tensors([inputs, results]))
    if op == "ema":  # the copies are not read; teacher and copies are both an input and a result
        size -= sum(x.nbytes for x in inputs["copies"])
    assert bench.minimal_bytes(case, "fwd") == pytest.approx(size, rel=0.01)


COUNTED = {  # op: what benchmarks/cost_formulas.py calls the sizes of its first case
    "data2vec_loss": lambda s: {
        "shape": (s["B"], s["T"], s["C"]),
        "num_layers": s["K"],
        "fraction": s["N"] / (s["B"] * s["T"]),
    },
    "ema": lambda s: {"sizes": PARAMETERS[s["model"]], "student": torch.bfloat16, "copies": torch.bfloat16},
    "adamw_ema": lambda s: {"sizes": PARAMETERS[s["model"]], "ema_copies": torch.bfloat16},
    "l2_norm": lambda s: {"sizes": PARAMETERS[s["model"]]},
    "bias_gelu": lambda s: {"rows": s["rows"], "width": s["width"]},
    "layer_norm_gelu": lambda s: {"rows": s["B"] * s["T"], "width": s["C"]},
    "residual_dropout_layer_norm": lambda s: {"shape": (s["B"], s["T"], s["C"])},
}


@pytest.mark.parametrize("op", COUNTED)
def test_minimal_bytes_agree_with_what_our_kernels_move(op):
    """static_cost.py counts the bytes of our kernels: never fewer than the least traffic, and not many more."""
    bench = bench_of(op)
    case = bench.cases[0]
    formula = getattr(cost_formulas, {"ema": "ema_update"}.get(op, op))
    minimal, counted = bench.minimal_bytes(case, bench.modes[-1]), formula(**COUNTED[op](case.sizes))
    assert minimal <= counted * (1 + 1e-6)
    assert counted <= 1.1 * minimal


def test_truth_table_has_every_kernel():
    table = (BENCHMARKS / "results" / "README.md").read_text()
    for file in (ROOT / "d2v_fast" / "ops").glob("[!_]*.py"):
        public = {"ema": "ema_update_", "adamw_ema": "adamw_ema_", "conv0": "conv0_norm_gelu"}.get(file.stem, file.stem)
        assert f"| `{public}`" in table, public
        assert file.stem in OPS


def with_wrong(bench, change, peer=False):
    def wrong(**arguments):
        return change(bench.exact(**arguments))

    return replace(bench, providers={**bench.providers, "wrong": Provider(lambda: wrong, peer=peer)})


@pytest.mark.parametrize(
    "change,reason",
    [
        (lambda r: {"loss": r["loss"] * (1 + 1e-3)}, "relative error"),
        (lambda r: {"loss": r["loss"] * math.nan}, "relative error nan"),
        (lambda r: {"loss": r["loss"].expand(2)}, "has shape"),
        (lambda r: {"other": r["loss"]}, "missing"),
    ],
)
def test_wrong_provider_is_not_timed(change, reason, tmp_path, capsys):
    bench = with_wrong(bench_of("masked_smooth_l1"), change)
    file = tmp_path / "x.json"
    with pytest.raises(SystemExit, match="measurements were refused"):
        smoke(bench, "--json", str(file), "--providers", OURS, "wrong")
    rows = [row for row in json.loads(file.read_text())["results"] if row["provider"] == "wrong"]
    assert rows and all(row["status"].startswith("wrong") and "ratio" not in row for row in rows)
    assert any(reason in row["status"] for row in rows)
    assert reason in capsys.readouterr().out


def test_wrong_gradient_is_not_timed(tmp_path):
    class DoubledGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    bench = with_wrong(bench_of("masked_smooth_l1"), lambda r: {"loss": DoubledGradient.apply(r["loss"])})
    file = tmp_path / "x.json"
    with pytest.raises(SystemExit):
        smoke(bench, "--json", str(file), "--providers", OURS, "wrong")
    rows = [row for row in json.loads(file.read_text())["results"] if row["provider"] == "wrong"]
    assert {row["mode"]: row["status"][:5] for row in rows} == {"fwd": "ok", "fwd+bwd": "wrong"}


def test_wrong_dropout_rate_is_not_timed(tmp_path):
    bench = bench_of("residual_dropout_layer_norm")
    keeps_all = Provider(lambda: lambda **arguments: bench.exact(**{**arguments, "p": 0.0}))
    bench = replace(bench, providers={**bench.providers, "keeps all": keeps_all})
    file = tmp_path / "x.json"
    with pytest.raises(SystemExit):
        smoke(bench, "--json", str(file), "--providers", OURS, "keeps all", "--cases", bench.smoke[0].name)
    rows = [row for row in json.loads(file.read_text())["results"] if row["provider"] == "keeps all"]
    assert all("dropout kept 1.000" in row["status"] for row in rows)


def test_failing_provider_is_reported_and_a_peer_does_not_fail_the_run(tmp_path):
    def raises(**arguments):
        raise RuntimeError("no such kernel")

    bench = bench_of("masked_smooth_l1")
    for peer in (True, False):
        changed = replace(bench, providers={**bench.providers, "broken": Provider(lambda: raises, peer=peer)})
        arguments = ["--json", str(tmp_path / "x.json"), "--providers", OURS, "broken"]
        if peer:
            rows = smoke(changed, *arguments)["results"]
            assert {r["status"] for r in rows} == {"ok", "failed: RuntimeError: no such kernel"}
        else:
            with pytest.raises(SystemExit):
                smoke(changed, *arguments)


@pytest.mark.skipif(" " in tempfile.gettempdir(), reason="Inductor cannot compile in a folder with a blank in its name")
def test_compiled_provider(tmp_path):
    """In a process of its own: Inductor imports setuptools, which refuses to come after distutils."""
    case, path = bench_of(COMPILED_HERE).smoke[0].name, tmp_path / "x.json"
    command = [sys.executable, str(BENCHMARKS / f"bench_{COMPILED_HERE}.py"), "--smoke", "--json", str(path)]
    command += ["--providers", OURS, "eager+compile", "--cases", case]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row for row in json.loads(path.read_text())["results"] if row["provider"] == "eager+compile"]
    assert [row["status"] for row in rows] == ["ok"] * 2
    assert all(row["ratio"] > 0 for row in rows)


def test_budget(tmp_path):
    bench = bench_of("ema")
    rows = smoke(bench, "--json", str(tmp_path / "x.json"), "--budget", "0", "--providers", *plain(bench))["results"]
    assert {row["status"] for row in rows} == {"skipped: out of time"}


def test_resume(tmp_path):
    """Rows of an earlier run of the same code stay; what was skipped or is new is measured."""
    bench = bench_of("l2_norm")
    arguments = ["--json", str(tmp_path / "x.json"), "--commit", "abc", "--resume"]
    first, second = bench.smoke
    both = smoke(bench, *arguments, "--cases", first.dtype, "--providers", OURS, "eager")
    assert both["complete"] and len(both["results"]) == 2
    none = smoke(bench, *arguments, "--budget", "0", "--providers", OURS, "eager")
    assert not none["complete"]
    assert [row["status"] for row in none["results"]] == ["ok"] * 2 + ["skipped: out of time"] * 2
    assert none["results"][:2] == both["results"]
    rest = smoke(bench, *arguments, "--providers", OURS, "eager")
    assert rest["complete"] and rest["results"][:2] == both["results"]
    assert {row["case"] for row in rest["results"] if "ratio" in row} == {first.name, second.name}
    changed = smoke(bench, *arguments, "--budget", "0", "--commit", "abc-dirty", "--providers", OURS, "eager")
    assert {row["status"] for row in changed["results"]} == {"skipped: out of time"}


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "no GPU here"),
        (["--smoke", "--cases", "nothing"], "--cases must be"),
        (["--providers", "x"], "invalid choice"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    if torch.cuda.is_available() and not arguments:
        pytest.skip("a GPU is here")
    with pytest.raises(SystemExit) as stop:
        cli.main(bench_of("ema"), arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_pytest_entry():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(BENCHMARKS / "bench_l2_norm.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS, check=False)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout and "not installed" in done.stdout


def test_plot_refuses_empty_input(tmp_path):
    with pytest.raises(ValueError, match="no results of benchmarks"):
        plot.load(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        plot.load(tmp_path / "x")
    (tmp_path / "ema.json").write_text(json.dumps({"op": "ema", "results": [{"status": "not installed"}]}))
    with pytest.raises(ValueError, match=r"no results of benchmarks in .*: ema: nothing was timed"):
        plot.load(tmp_path)


def test_peer_of_another_release_counts_as_not_installed(monkeypatch):
    import peers

    monkeypatch.setitem(sys.modules, "amp_C", None)
    with pytest.raises(driver.NotInstalled, match="apex"):
        peers.apex_l2_norm()

"""Results of a GPU in the tables of the repository: reached, not reached, missing, wrong, and nothing invented.

The results are made up, and lie in a copy.
"""

import importlib
import itertools
import json
import re
import shutil
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import limits  # noqa: E402
import measured  # noqa: E402
import publish  # noqa: E402
import publish_rules  # noqa: E402
import verdicts  # noqa: E402

COMMIT = "c" * 40
GPU = "Some GPU"
ENVIRONMENT = {
    "device": GPU, "driver": "1.0", "cuda": "13.0", "torch": "2.11", "triton": "3.6", "extension": "available",
    "commit": COMMIT, "date": "2026-01-02",
}  # fmt: skip
SIZES = {"B": 2, "T": 3, "C": 4, "H": 1, "D": 4, "S": 5, "N": 6, "rows": 7, "width": 8, "gathered": True, "size": {}}
SPEED = {"fairseq": 31.0, "eager": 3.7, "eager+compile": 3.3, "fairseq+compile": 6.1, "sdpa_efficient": 2.9}
SPEED |= {"d2v_fast padded": 1.9, "flash-attn 2": 0.99}


PERCENTS = ("percent_of_copy", "bwd_percent_of_copy", limits.ROOFLINE, "percent_of_matmul")


def op_row(case, mode, provider, ms, **more):
    row = {"case": case, "mode": mode, "provider": provider, "peer": False, "status": "ok", "sizes": SIZES}
    row |= {"dtype": "bfloat16", "ms_p20": ms, "ms_p50": ms, "ms_p80": ms, "wall_ms": 30 * ms, "bwd_ms": 0.8 * ms}
    row |= {"peak_mib": 100 * ms, "held_mib": 50 * ms, "host_us": 9.0}
    return row | dict.fromkeys(PERCENTS, 97.0) | more


def step_row(provider, ms, **more):
    row = {"provider": provider, "status": "ok", "ms": ms, "peak_mib": 300 * ms, "host_ms": 0.02 * ms}
    return row | {"percent_of_matmul": 51.0, "launches": 3} | more


def cases_of(op):
    """A case for each pattern of a limit or headline, in its mode."""
    found = [(p, x.mode) for t in limits.TABLES for x in t.limits if x.op == op for p in (*x.cases, *x.also)]
    found += [(x.case, x.mode) for x in limits.HEADLINES if x.op == op]
    return dict.fromkeys((pattern.replace("*", "x"), mode) for pattern, mode in found)


def write(folder, change=lambda row: row):
    """Results in which everything is reached, but for what ``change`` makes of a row; None leaves the row out."""
    (folder / "parts").mkdir(parents=True)
    for op in {x.op for t in limits.TABLES for x in t.limits if x.op} | {x.op for x in limits.HEADLINES}:
        if op == measured.STEP:
            continue
        rows = [
            op_row(case, mode, name, ms)
            for case, mode in cases_of(op)
            for name, ms in {"d2v_fast": 1.0, **SPEED}.items()
        ]
        rows = [new for row in rows if (new := change({**row, "op": op})) is not None]
        record = {"environment": ENVIRONMENT, "op": op, "kind": "gpu", "copy_gb_per_s": 1.0, "results": rows}
        (folder / f"{op}.json").write_text(json.dumps(record))
    for recipe in ("speech_base", "text_base", "image_base", "speech_large", "image_large"):
        sides = {"d2v_fast graph": 13.1, "d2v_fast": 14.2, "patched": 20.3, "eager": 40.4, "torch.compile": 23.5}
        sides |= {"as written, autocast": 70.2, "as written": 71.6}
        sides |= {"as written, today's defaults": 99.3} if recipe.startswith("image") else {}
        rows = [step_row(name, ms, **({"peak_mib": 1000.0} if name == "patched" else {})) for name, ms in sides.items()]
        rows = [new for row in rows if (new := change({**row, "op": recipe, "case": recipe})) is not None]
        record = {"environment": ENVIRONMENT, "benchmark": "train_step", "smoke": False, "results": rows}
        (folder / f"train_step_{recipe}.json").write_text(json.dumps(record))
    for name in publish.part_names():
        part = {"name": name, "status": "passed", "commit": COMMIT, "seconds": 1.0, "detail": ""}
        (folder / "parts" / f"{name}.json").write_text(json.dumps(part))
    return folder


@pytest.fixture
def root(tmp_path):
    """A copy of what is written to, without results."""
    for name in publish.FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def results_of(root, change=lambda row: row):
    return write(root / "benchmarks" / "results" / "some-gpu", change)


def line(root, start):
    text = (root / "benchmarks" / "results" / "README.md").read_text()
    return next(one for one in text.splitlines() if one.startswith(f"| {start}"))


def last_cell(root, start):
    """Of a line of the limits."""
    text = (root / "benchmarks" / "results" / "README.md").read_text().split("## Limits")[1]
    found = next(one for one in text.splitlines() if one.startswith(f"| {start}"))
    return found.strip("| ").split(" | ")[-1]


def test_committed_tables_are_what_is_written():
    """From the results that published.json names; without it, nothing is claimed anywhere."""
    assert publish.main(["--check"]) == 0
    if not (ROOT / "benchmarks" / "results" / "published.json").exists():
        tables = (ROOT / "benchmarks" / "results" / "README.md").read_text()
        assert tables.count("not yet run on a GPU") > 40
        assert "nothing has been\n> timed on a GPU" in (ROOT / "README.md").read_text()


def test_without_results_nothing_changes(root, capsys):
    before = {name: (root / name).read_text() for name in publish.FILES}
    assert publish.main(["--check"], root) == publish.main([], root) == 0
    assert "nothing to change" in capsys.readouterr().out
    assert before == {name: (root / name).read_text() for name in publish.FILES}
    assert not (root / "benchmarks" / "results" / "published.json").exists()


def test_edited_tables_are_noticed(root, capsys):
    file = root / "benchmarks" / "results" / "README.md"
    file.write_text(file.read_text().replace("| 75 | 12 | 2.5 |", "| 65 | 12 | 2.5 |"))
    assert publish.main(["--check"], root) == 1 and "benchmarks/results/README.md" in capsys.readouterr().err
    assert publish.main([], root) == 0 and publish.main(["--check"], root) == 0
    assert "| 75 | 12 | 2.5 |" in file.read_text()
    file.write_text(file.read_text().replace("<!-- end of ops -->", ""))
    with pytest.raises(ValueError, match="must have the blocks"):
        publish.main(["--check"], root)


def test_everything_reached(root, capsys):
    folder = results_of(root)
    assert publish.main([str(folder)], root) == 0
    assert publish.main(["--check"], root) == 0  # again, by published.json
    text = (root / "benchmarks" / "results" / "README.md").read_text()
    for table in limits.TABLES:
        for limit in table.limits:
            if limit.op:
                assert last_cell(root, f"{limit.part} |").startswith("reached: "), limit.part
    assert "torch.compile is faster in no case" in text
    assert all(line(root, what).endswith(f"| yes: {GPU}, cccccccccc |") for what in publish.BEYOND)
    where = f"yes: {GPU}, cccccccccc"
    assert line(root, "`bias_gelu` forward").endswith(f"| {where} | {where} |")
    assert line(root, "`conv0_norm_gelu`").endswith(f"| {where} | {where} |")
    first = (root / "README.md").read_text()
    share = "51.0 % of a matrix product"
    assert f"| update of `speech_base` | 71.6 | 23.5 | 13.1 | 5.47 | 1.79 | {share} | 21480, 3930 |" in first
    assert "| `conv0_norm_gelu`, speech base, layer norm | 31.0 | 3.30 | 1.00 | 31.0 | 3.30 | 97.0 % of copy |" in first
    assert f"Timed on one {GPU} (2026-01-02; driver 1.0, CUDA 13.0, PyTorch 2.11, Triton 3.6" in first
    assert "nothing has been" not in first


def test_no_number_that_is_not_measured(root):
    """Every number in a last cell or on the first screen is of the JSON, a ratio of two of its rows, or a limit."""
    counter = itertools.count()

    def unlike(row):  # no two rows alike
        i = next(counter)
        return {k: v * (1 + i * 1e-3) if isinstance(v, float) else v for k, v in row.items()}

    folder = results_of(root, unlike)
    publish.main([str(folder)], root)
    results = measured.load(folder)
    allowed = {f"{reach.limit:g}" for t in limits.TABLES for x in t.limits for cell in x.cells for reach in cell}
    for key in dict.fromkeys(row.key[:3] for row in results.rows):
        rows = [row.values for row in results.rows if row.key[:3] == key]
        for row in rows:
            floats = {k: v for k, v in row.items() if isinstance(v, float)}
            allowed |= {verdicts.number(v) for v in floats.values()} | {f"{v:.0f}" for v in floats.values()}
            for name, other in itertools.product(floats, rows):
                ratio = other[name] / floats[name]
                allowed |= {verdicts.number(ratio), verdicts.number(100 * ratio)}
    checked = 0
    for table in limits.TABLES:
        for limit in table.limits:
            if limit.op:
                cell = last_cell(root, f"{limit.part} |").replace("flash-attn 2", "")
                for token in re.findall(r"(?<![\w.+-])\d+(?:\.\d+)?", cell):
                    assert token in allowed, (token, cell)
                    checked += 1
    first = (root / "README.md").read_text().split("<!-- end of headline")[0]
    for one in [one for one in first.splitlines() if one.startswith("| ")][1:]:
        for token in re.findall(r"\d+\.\d+|\d+", one.split(" | ", 1)[1]):
            assert token in allowed, (token, one)
            checked += 1
    assert checked > 100


def test_not_reached_missing_and_wrong(root):
    def change(row):
        op, ours = row["op"], row["provider"] == "d2v_fast"
        if op == "bias_gelu" and ours and row["case"].startswith("vision"):
            return row | {"percent_of_copy": 61.0}
        if op == "adamw_ema" and row["case"].startswith("speech large"):
            return None
        if op == "pos_conv" and ours:
            return {**row, "status": "wrong: y: relative error 1.0e-01 against float64"} | {"ms_p50": 1.0}
        if op == "attention" and row["provider"] == "flash-attn 2":
            return {**row, "status": "not installed"}
        if op == "conv0" and row["provider"] == "fairseq+compile" and row["mode"] == "fwd":
            return row | {"ms_p50": 0.5}
        if op == "text_base" and row["provider"].startswith("d2v_fast"):
            return row | {"ms": 19.0}
        return row

    folder = results_of(root, change)
    part = folder / "parts" / "gpu-test_ema.json"
    part.write_text(part.read_text().replace("passed", "failed"))
    (folder / "parts" / "racecheck.json").unlink(), (folder / "parts" / "test_updates_repeat.json").unlink()
    old = folder / "parts" / "gpu-test_l2_norm.json"
    old.write_text(old.read_text().replace(COMMIT, "d" * 40))
    assert publish.main([str(folder)], root) == 0
    cell = last_cell(root, "`bias_gelu` |")
    assert cell.startswith("**not reached**: 61.0 % of copy (asked: 85). reached: 31.0 times fairseq; 3.30 times eager")
    assert last_cell(root, "`adamw_ema_` |") == "not measured: no rows of speech large"
    assert "not measured: ours in 5 x k19, 15 x: wrong: y" in last_cell(root, "position convolutions")
    assert last_cell(root, "attention, what") == "not measured: flash-attn 2 not installed in speech base,x"
    assert "**not reached**: 0.500 times fairseq+compile (asked: 5)" in last_cell(root, "conv0 + norm + GELU, forward")
    assert "**not reached**: 19.0 ms (at most 18)" in last_cell(root, "`text_base`")
    assert "| **failed**: gpu-test_ema (" in line(root, "`ema_update_`")
    assert "in part: gpu-test_l2_norm not run" in line(root, "`l2_norm`")
    assert "in part: racecheck not run" in line(root, "`conv0_norm_gelu`")
    assert line(root, "updates that give the same bits").endswith("| not yet run on a GPU |")
    assert "| **no**: wrong: y" in line(root, "`pos_conv`") and line(root, "`layer_targets`").endswith("| not yet |")
    text = (root / "benchmarks" / "results" / "README.md").read_text()
    assert "| conv0 | layer norm, 15 x | fwd | 1.00 | 0.500 | fairseq+compile | 0.500 |" in text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda e: e | {"commit": "d" * 40}, "several commits"),
        (lambda e: e | {"device": "Other GPU"}, "several devices"),
        (lambda e: e | {"torch": "2.12"}, "several torchs"),
    ],
)
def test_results_must_belong_together(root, spoil, message, capsys):
    folder = results_of(root)
    file = folder / "ema.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"environment": spoil(record["environment"])}))
    assert publish.main([str(folder)], root) == 2 and message in capsys.readouterr().err
    if "commit" in message:
        assert publish.main([str(folder), "--commit", "ccc"], root) == 0
        assert "not measured: no rows" in last_cell(root, "`ema_update_`, 89")


def test_results_that_nobody_could_repeat(root, tmp_path, capsys):
    assert publish.main([str(write(tmp_path / "elsewhere"))], root) == 2
    assert "must lie in benchmarks/results" in capsys.readouterr().err
    folder = results_of(root)
    for file in folder.glob("*.json"):
        file.write_text(file.read_text().replace(COMMIT, f"{COMMIT}-dirty"))
    assert publish.main([str(folder)], root) == 2 and "which code ran" in capsys.readouterr().err
    (folder / "ema.json").write_text("{")
    assert publish.main([str(folder)], root) == 2 and "ema.json is no JSON" in capsys.readouterr().err
    assert publish.main([str(tmp_path / "nothing")], root) == 2 and "not a folder" in capsys.readouterr().err


def test_tests_that_are_named_are_parts_of_the_check():
    assert {name for names in publish.BEYOND.values() for name in names} <= set(publish.part_names())
    named = "".join((ROOT / "benchmarks" / "results" / "README.md").read_text().split("<!-- publish.py: truth")[1:3])
    ops = {p.stem for p in (ROOT / "d2v_fast" / "ops").glob("[a-z]*.py")}
    assert {publish.OPS.get(n, n) for n in publish.names_of(named)} & ops == ops


def test_limits_are_of_cases_that_are_measured():
    """Each pattern fits a case of the standard run, in a mode that the op has; its providers are the op's."""
    for limit in (limit for table in limits.TABLES for limit in table.limits if limit.op):
        reaches = [reach for cell in limit.cells for reach in cell]
        assert all(reach.measure in limits.MEASURES for reach in reaches)
        if limit.op == measured.STEP:
            continue
        bench = importlib.import_module(f"bench_{limit.op}").BENCH
        names = {case.name: case.main for case in bench.cases}
        for pattern in limit.cases:
            assert any(fnmatchcase(name, pattern) and main for name, main in names.items()), (limit.part, pattern)
        assert all(any(fnmatchcase(name, pattern) for name in names) for pattern in limit.also)
        assert limit.mode in bench.modes
        assert {name for reach in reaches for name in reach.over} <= set(bench.providers), limit.part
        if any(reach.measure in (limits.ROOFLINE, "percent_of_matmul") for reach in reaches):
            assert bench.passes is not None
    for wanted in limits.HEADLINES:
        if wanted.op != measured.STEP:
            cases = importlib.import_module(f"bench_{wanted.op}").BENCH.cases
            assert sum(fnmatchcase(case.name, wanted.case) for case in cases) == 1, wanted.name


def rules_of(folder, tmp_path):
    text = publish_rules.proposal(measured.load(folder))
    names = {}
    exec("import torch\nfrom d2v_fast.patches._rules import Slower\n" + text, names)
    return names["SLOWER"], names["TIMED"], text


def test_rules(root, tmp_path):
    """An entry for what every other side won at a size, compiled or not; noise and mixed sizes make none."""
    import torch

    def change(row):
        if row["op"] == "bias_gelu" and row["provider"] in ("fairseq", "eager"):
            return row | {"ms_p50": 0.8}
        if row["op"] == "residual_dropout_layer_norm" and row["provider"].endswith("compile"):
            return row | {"ms_p50": 0.9 if row["provider"].startswith("fairseq") else 0.7}
        if row["op"] == "bias_attention" and row["provider"] == "eager+compile":
            return row | {"ms_p50": 0.5}  # and not fairseq's, compiled
        if row["op"] == "encoder" and row["provider"].endswith("compile"):
            return row | {"ms_p50": 0.5 if row["case"].startswith("speech") else 2.0}  # of one size here
        if row["op"] == "attention" and row["provider"].endswith("compile"):
            return row | {"ms_p50": 0.99}
        if row["op"] == "attention" and row["provider"] == "d2v_fast":
            return row | {"noise": 0.02}
        if row["op"] == "ema" and row["provider"].endswith("compile"):
            return row | {"ms_p50": 0.7}
        return row

    slower, timed, text = rules_of(results_of(root, change), tmp_path)
    assert [(x.op, x.compiled, x.ratio) for x in slower] == [
        ("bias_gelu", False, 0.8), ("residual_dropout_layer_norm", True, 0.9)
    ]  # fmt: skip
    first = slower[0]
    assert (first.rows, first.width, first.dtype, first.device) == ((7, 7), (8, 8), torch.bfloat16, GPU)
    assert first.source == "some-gpu/bias_gelu.json" and (ROOT / "benchmarks" / "results").is_dir()
    assert set(timed) == {"cpu", GPU} and {"ema", "attention"} <= timed[GPU]
    assert COMMIT in text and "# slower than theirs, and in no seam: ema, speech base,x, compiled: 0.700" in text


def test_every_seam_with_an_op_has_a_size():
    sources = "".join(file.read_text() for file in (ROOT / "d2v_fast" / "patches").rglob("*.py"))
    for op in set(re.findall(r'^ +op="(\w+)"', sources, re.MULTILINE)):
        bench = importlib.import_module(f"bench_{op}").BENCH
        for case in bench.cases:
            rows, width = publish_rules.first_tensor(op, case.sizes)
            assert rows > 0 and width > 0


def test_both_references_of_images(root):
    """With TF32 in products, which the limits are held against, and without it."""
    results = measured.load(results_of(root))
    found = {line.name: line.reference.ms for x in limits.HEADLINES if (line := verdicts.headline(results, x))}
    for recipe in ("image_base", "image_large"):
        assert found[f"update of `{recipe}`"] == 71.6
        assert found[f"update of `{recipe}`, reference without TF32"] == 99.3
    assert results.providers("train_step", "image_base", "step")["reference"].ms == 71.6

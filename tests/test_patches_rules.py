"""The table of measured losses: its form, where it comes from, and that upstream's code runs at its sizes.

And what ``info()`` says about the drop-in.
"""

import importlib.metadata
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy_patches as toy

import d2v_fast
from d2v_fast.patches import _rules, _versions
from d2v_fast.patches._core import Options, Patch, Seam, Site

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RESULTS = BENCHMARKS / "results"
LOSS = _rules.Slower("bias_gelu", "cpu", torch.float32, (1, 3), (4, 4), 0.8, "cpu/bias_gelu.json")


def folder(device: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())


def test_entries_are_measured_losses():
    for case in _rules.SLOWER:
        assert case.ratio < 1 and case.rows[0] <= case.rows[1] and case.width[0] <= case.width[1]
        record = json.loads((RESULTS / case.source).read_text(encoding="utf-8"))
        assert record["op"] == case.op and case.source.startswith(folder(case.device))
        assert any(row.get("ratio", 1) < 1 for row in record["results"])


def test_every_gpu_with_results_is_in_the_table():
    timed = {path.name for path in RESULTS.iterdir() if path.is_dir() and path.name != "static"}
    assert {folder(device) for device in _rules.TIMED} - {"cpu"} == timed
    known = {path.stem.removeprefix("bench_") for path in BENCHMARKS.glob("bench_*.py")}
    assert set().union(*_rules.TIMED.values(), (case.op for case in _rules.SLOWER)) <= known


@pytest.mark.parametrize("rows, width, dtype", [(4, 4, torch.float32), (3, 5, torch.float32), (3, 4, torch.float64)])
def test_only_what_was_measured(monkeypatch, rows, width, dtype):
    monkeypatch.setattr(_rules, "SLOWER", (LOSS,))
    size = {"rows": rows, "width": width, "dtype": dtype, "device": torch.device("cpu")}
    assert _rules.use("bias_gelu", **size) == (True, "not timed on cpu")
    assert _rules.use("bias_gelu", **(size | {"device": torch.device("meta")})) == (True, "not timed on meta")
    assert "ours is slower there: 1" in _rules.describe()


def test_upstream_runs_where_ours_is_slower(monkeypatch):
    monkeypatch.setattr(_rules, "SLOWER", (LOSS,))
    layer = toy.Layer()
    seam = Seam("norms", "forward", toy.make_double, "twice as much", op="bias_gelu")
    patch = Patch("toy").apply([Site("", layer, seam)], Options(strict=True))
    for rows, factor in ((2, 1), (3, 1), (5, 2)):
        x = torch.ones(rows, 4)
        assert torch.equal(layer(x), factor * layer.linear(x))
        assert torch.equal(layer(x=x), factor * layer.linear(x))
    reason = "bias_gelu takes 1.25 times as long at 2 x 4, float32 on cpu (cpu/bias_gelu.json)"
    assert patch.fallbacks()["Layer.forward", reason] == 2 and reason in str(patch)


def test_some_losses_are_those_of_compiled_code(monkeypatch):
    """Where upstream's code is the faster one only when compiled, ours runs otherwise; and vice versa."""
    for compiled, factors in ((True, (2, 1)), (False, (1, 2))):
        monkeypatch.setattr(_rules, "SLOWER", (replace(LOSS, compiled=compiled),))
        layer = toy.Layer()
        seam = Seam("norms", "forward", toy.make_double, "twice as much", op="bias_gelu")
        patch = Patch("toy").apply([Site("", layer, seam)], Options())
        x, together = torch.ones(2, 4), torch.compile(layer, backend="aot_eager")
        for call, factor in zip((layer, together), factors, strict=True):
            torch.testing.assert_close(call(x), factor * layer.linear(x))
        assert ("compiled, on cpu" in str(patch)) == compiled


def test_the_device_is_no_reason_to_leave_a_graph(monkeypatch):
    """The name of a GPU is asked for while a compiler traces, which cannot look into that call."""
    monkeypatch.setattr(_rules, "SLOWER", (replace(LOSS, compiled=True, device="Some GPU"),))
    monkeypatch.setattr(torch.cuda, "get_device_name", torch.compiler.disable(lambda device: "Some GPU"))
    found = []

    def asks(x):
        device = torch.device("cuda", 0)
        found.append(_rules.use("bias_gelu", rows=2, width=4, dtype=x.dtype, device=device)[0])
        return x + found[-1]

    assert torch.equal(torch.compile(asks, fullgraph=True, backend="aot_eager")(torch.zeros(2)), torch.zeros(2))


def test_tested_releases_are_those_that_are_required():
    folder = BENCHMARKS.parent / "requirements"
    pinned = "\n".join((folder / name).read_text(encoding="utf-8") for name in ("constraints.txt", "peers.txt"))
    for framework in _versions.FRAMEWORKS:
        if framework.name != "timm":  # which the tests only need parts of
            assert f"{framework.distributions[0]}=={framework.tested}" in pinned


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({"ve-fairseq": "0.12.3"}, "fairseq 0.12.3: supported, tested with this release"),
        ({"fairseq": "0.12.2"}, "fairseq 0.12.2: tested with 0.12.3; methods with another source are left"),
        ({}, "fairseq not installed (tested with 0.12.3)"),
    ],
)
def test_info_says_what_the_drop_in_finds(monkeypatch, found, says):
    known = importlib.metadata.version

    def version(name):
        if "fairseq" not in name:
            return known(name)
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert f"drop-in       {says}" in d2v_fast.info()
    monkeypatch.setenv("D2V_FAST_DISABLE", "1")
    assert "drop-in       off: D2V_FAST_DISABLE=1\n" in d2v_fast.info()

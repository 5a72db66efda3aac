"""The one command for a GPU: which parts it finds, how it spends its budget, what it reports."""

import ast
import json
import os
import re
import subprocess
import sys
import tarfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import common  # noqa: E402
import gpu_check  # noqa: E402
import gpu_parts  # noqa: E402


def test_parts():
    parts = gpu_parts.find_parts()
    names = [part.name for part in parts]
    ops = {file.stem for file in BENCHMARKS.glob("bench_*.py")} - {"bench_train_step"}
    assert ops <= set(names) and set(gpu_parts.ORDER) <= set(names)
    gpu = {part.name for part in parts if part.kind == "gpu tests"}
    assert {"gpu-test_ema", "gpu-test_layer_targets", "gpu-test_masked_smooth_l1"} <= gpu
    assert "test_ema" in names
    assert not {"gpu-test_train_loop", f"gpu-{Path(__file__).stem}", Path(__file__).stem} & set(names)
    kinds = ["build", "gpu tests", "sanitizer", "tests", "measured"]
    of_part = ["measured" if p.kind in gpu_parts.MEASURED else p.kind for p in parts]
    assert of_part == sorted(of_part, key=kinds.index)
    assert [p.name for p in parts if p.kind in ("build", "sanitizer")] == ["extension", "memcheck", "racecheck"]
    assert {p.name for p in parts if p.kind == "step"} == {f"step_{recipe}" for recipe in gpu_parts.RECIPES}
    assert {p.kind for p in parts} == {*gpu_parts.TEST_KINDS, *gpu_parts.MEASURED}


def test_missing_modules_are_found_through_own_modules(monkeypatch):
    found = gpu_parts.importlib.util.find_spec
    monkeypatch.setattr(
        gpu_parts.importlib.util, "find_spec", lambda n: None if n in ("omegaconf", "triton", "psutil") else found(n)
    )
    assert "omegaconf" in gpu_parts.missing_modules(ROOT / "d2v_fast" / "train" / "loop.py")
    assert gpu_parts.missing_modules(ROOT / "kernels" / "ema.py") == {"triton"}
    assert (
        gpu_parts.missing_modules(ROOT / "d2v_fast" / "ops" / "ema.py") == set()
    )  # Triton is imported by the first call
    assert gpu_parts.missing_modules(ROOT / "d2v_fast" / "train" / "step.py") == set()
    needs = {part.name: part.needs for part in gpu_parts.find_parts()}
    assert gpu_parts.own_file("common", ROOT / "tests") == BENCHMARKS / "common.py"
    assert [name for name, missing in needs.items() if "omegaconf" in missing] == ["gpu-test_distributed_gpu_runs"]
    assert needs["gpu-test_distributed_gpu"] == []


def test_modules_of_python_are_not_taken_for_files_beside(monkeypatch):
    """The package has a logging.py of its own, which needs rich; and PyTorch has parts that need tensorboard."""
    found = gpu_parts.importlib.util.find_spec
    gone = ("rich", "tensorboard")
    monkeypatch.setattr(gpu_parts.importlib.util, "find_spec", lambda n: None if n in gone else found(n))
    assert gpu_parts.missing_modules(ROOT / "d2v_fast" / "train" / "distributed.py") == set()
    assert gpu_parts.missing_modules(ROOT / "d2v_fast" / "train" / "logging.py") == set(gone)
    assert all(
        "rich" not in part.needs for part in gpu_parts.find_parts() if part.file.stem != "test_distributed_gpu_runs"
    )


def test_without_hypothesis_only_property_tests_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_parts, "is_installed", lambda name: name != "hypothesis")
    (tmp_path / "test_x.py").write_text(
        "import pytest\nfrom hypothesis import given, settings\nfrom hypothesis import strategies as st\n"
        "@pytest.mark.parametrize('k', [1, 2])\n@settings(max_examples=2)\n"
        "@given(st.lists(st.integers(0, 3)), y=st.data())\n"
        "def test_property(k, x, y): assert 0\n"
        "def test_other(): pass\n"
    )
    environment = gpu_parts.child_environment()
    assert str(gpu_parts.STAND_INS) in environment["PYTHONPATH"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "test_x.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert "1 passed, 2 skipped" in done.stdout, done.stdout


def test_extension_parts_need_the_toolkit(monkeypatch):
    monkeypatch.setattr(gpu_parts, "program", lambda name: None)
    needs = {part.name: part.needs for part in gpu_parts.extension_parts()}
    assert needs["extension"] == ["nvcc"] and needs["memcheck"] == ["nvcc", "compute-sanitizer"]


@pytest.mark.parametrize(
    ("which", "names"),
    [
        ("bench_ema", {"extension", "bench_ema"}),
        ("gpu-test_conv0", {"extension", "gpu-test_conv0"}),
        ("memcheck", {"extension", "memcheck"}),
        ("no such part", set()),
    ],
)
def test_every_selection_is_run_with_the_extension(which, names):
    assert {part.name for part in gpu_parts.select(gpu_parts.find_parts(), which)} == names


def test_selection_of_kinds():
    parts = gpu_parts.find_parts()
    assert gpu_parts.select(parts, "all") == parts
    assert {part.kind for part in gpu_parts.select(parts, "tests")} == set(gpu_parts.TEST_KINDS)
    assert {part.kind for part in gpu_parts.select(parts, "bench")} == {"build", "bench", "step"}
    assert {part.kind for part in gpu_parts.select(parts, "ops")} == {"build", "bench"}
    assert {part.kind for part in gpu_parts.select(parts, "steps")} == {"build", "step"}
    tests = [part.name for part in parts if part.kind == "gpu tests"]
    assert tests[:2] == ["gpu-test_conv0", "gpu-test_pos_conv"]


def test_tests_without_the_extension_are_not_a_pass(tmp_path):
    """And it is built again, whatever an earlier run on another machine left."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n")
    skips = f"import pytest\ndef test_a(): pytest.skip({gpu_check.NO_EXTENSION!r})\ndef test_b(): pass\n"
    tests = part(tmp_path, "test_skips", skips, kind="tests")
    build = part(tmp_path, "extension", "print('built')", kind="build")
    (tmp_path / "parts").mkdir()
    small = part(
        tmp_path, "test_small", skips.replace(gpu_check.NO_EXTENSION, "needs 40 GB of GPU memory"), kind="tests"
    )
    outcome = gpu_check.run_part(small, tmp_path, "abc", gpu_check.time.monotonic() + 100)
    assert outcome.status == "incomplete" and "too little GPU memory" in outcome.detail
    for _ in range(2):
        outcomes = gpu_check.run_all([build, tests], tmp_path, "abc", budget=100, jobs=1, resume=True)
        assert {o.name: o.status for o in outcomes} == {"extension": "passed", "test_skips": "incomplete"}
        assert "1 passed, 1 skipped" in outcomes[1].detail and "no CUDA extension" in outcomes[1].detail


def test_commands_of_benchmarks(tmp_path):
    """Every file is written to the folder of the device; the front-end's parts are run once."""
    out = tmp_path / "some-gpu"
    parts = {part.name: part for part in gpu_parts.find_parts()}
    whole = gpu_parts.command(parts["bench_conv_encoder"], out, "abc", 10.0, resume=True)
    assert whole[-8:] == ["--parts", "whole", "lengths", "--out", str(tmp_path), "--budget", "10", "--resume"]
    conv0 = gpu_parts.command(parts["bench_conv0"], out, "abc", 10.0, resume=False)
    assert conv0[-4:] == ["--json", str(out / "conv0.json"), "--budget", "10"]
    step = gpu_parts.command(parts["step_text_base"], out, "abc", 10.0, resume=True)
    json_file = str(out / "train_step_text_base.json")
    assert step[2:6] == ["--commit", "abc", "--recipe", "text_base"]
    assert step[6:] == ["--json", json_file, "--budget", "10", "--resume"]


def test_every_published_preset_is_timed():
    presets = {file.stem for file in (ROOT / "d2v_fast" / "train" / "presets").glob("*.yaml")}
    assert set(gpu_parts.RECIPES) == {name for name in presets if not name.endswith("_demo")}


# what a GPU must show of every op, the names of tests that show it, and whether these need the mark
KINDS = {
    "waits for nothing": ("wait", True),
    "is captured in a graph": ("captur", True),
    "offsets beyond 2**31": ("2_31|beyond_int32", True),
    "the same bits again": ("determin|repeat|order_of_threads", False),
    "compiled as eager": ("compile", False),
}


@pytest.mark.parametrize("op", sorted(p.stem for p in (ROOT / "d2v_fast" / "ops").glob("[a-z]*.py")))
def test_every_op_has_every_kind_of_gpu_test(op):
    """By the names of tests in test_OP.py and test_OP_*.py that run on a GPU there."""
    marked, all_names = set(), set()
    for file in [ROOT / "tests" / f"test_{op}.py", *(ROOT / "tests").glob(f"test_{op}_*.py")]:
        tree = ast.parse(file.read_text())
        on_device = any(isinstance(node, ast.Name) and node.id == "DEVICE" for node in ast.walk(tree))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                all_names |= {node.name} if on_device else set()
                if "pytest.mark.gpu" in map(ast.unparse, node.decorator_list):
                    marked.add(node.name)
    for kind, (pattern, needs_mark) in KINDS.items():
        assert any(re.search(pattern, name) for name in (marked if needs_mark else all_names)), f"{op}: {kind}"


def test_every_kernel_of_the_extension_is_checked_under_the_sanitizers():
    """Both ops of csrc/, both 16-bit types, whole rows and segments; each call ends with gradients of all leaves."""
    import extension_check

    sources = {p.stem for p in (ROOT / "csrc").glob("*.cu")} - {"runtime"}
    names = [name for name, _ in extension_check.checks("cpu")]
    for source in sources:
        for dtype in ("bfloat16", "float16"):
            of = [name for name in names if name.startswith(source) and dtype in name]
            assert of and any("segments" in name for name in of) and not all("segments" in name for name in of)
    assert sources == {"conv0", "pos_conv"} and any("group" in name for name in names)
    call = dict(extension_check.checks("cpu"))["pos_conv 64 k4 torch.bfloat16"]
    assert [x.shape for x in call()] == [(1, 133, 128), (1, 133, 128), (128, 64, 4), (128,)]


def test_long_logs_keep_their_ends_and_no_paths(tmp_path):
    noisy = part(tmp_path, "bench_noisy", f"print('first'); print('x' * 10**6); print({str(ROOT / 'a.py')!r}, 'last')")
    (outcome,) = gpu_check.run_all([noisy], tmp_path, "abc", budget=100, jobs=1, resume=False)
    log = gpu_check.log_file("bench_noisy", tmp_path).read_text()
    assert "first" in log and log.endswith("a.py last\n") and "characters left out" in log
    assert len(log) < gpu_check.LOG_HEAD + gpu_check.LOG_TAIL + 1000
    assert str(ROOT) not in log and outcome.detail == "a.py last" and "passed after" in log


def test_measurements_share_the_time_by_weight(tmp_path, monkeypatch):
    shares = []
    monkeypatch.setattr(gpu_check, "run_part", lambda part, *arguments: shares.append(arguments[3]) or outcome(part))

    def outcome(part):
        return gpu_parts.Outcome(part.name, "passed")

    kinds = ("bench", "step", "bench")
    gpu_check.run_all([part(tmp_path, f"p{i}", "", kind=k) for i, k in enumerate(kinds)], tmp_path, "abc", 9, 1, False)
    assert shares == pytest.approx([1 / 6, 4 / 5, 1])


def test_sanitizers_have_all_the_time_when_nothing_follows(tmp_path, monkeypatch):
    shares = {}

    def run_part(part, out, commit, deadline, share, *_):
        shares.setdefault(part.name, []).append(share)
        return gpu_parts.Outcome(part.name, "passed")

    monkeypatch.setattr(gpu_check, "run_part", run_part)
    parts = [part(tmp_path, "memcheck", "", kind="sanitizer"), part(tmp_path, "test_x", "", kind="tests")]
    for chosen in (parts, parts[:1]):
        gpu_check.run_all(chosen, tmp_path, "abc", 9, 1, False)
    assert shares == {"memcheck": [gpu_check.SANITIZER_SHARE, 1.0], "test_x": [1.0]}


def test_whole_command_on_a_device_that_only_has_a_name(tmp_path, monkeypatch, capsys):
    """One process a part, summary, archive, exit status; and again, with nothing left to do."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=2**36))
    parts = [part(tmp_path, "bench_a", "print('timed')"), part(tmp_path, "bench_b", "import sys; sys.exit('wrong')")]
    monkeypatch.setattr(gpu_check, "find_parts", lambda: parts)
    archive = tmp_path / "x.tgz"
    command = ["gpu_check.py", "--out", str(tmp_path / "out"), "--commit", "abc", "--resume", "--pack", str(archive)]
    for said in ("1 passed, 1 failed", "1 passed before, 1 failed"):
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stop:
            gpu_check.main()
        printed = capsys.readouterr().out
        assert stop.value.code == 1 and said in printed and "x.tgz: 0.0 MiB" in printed and "wrong" in printed
    with tarfile.open(archive) as content:
        names = {member.name for member in content}
    assert {"some-gpu/summary.md", "some-gpu/parts/bench_a.log", "some-gpu/parts/bench_b.json"} <= names
    monkeypatch.setattr(sys, "argv", [*command[:-1], str(tmp_path / "x.zip")])
    with pytest.raises(SystemExit) as stop:
        gpu_check.main()
    assert stop.value.code == 2 and "--pack must name a .tgz file" in capsys.readouterr().err


def test_every_part_is_recorded_and_packed_as_it_ends(tmp_path, monkeypatch):
    """The slow one first in the order, recorded last; what ends the check then loses only what runs."""
    archive, packed = tmp_path / "results.tgz", []

    def run_part(part, *_):
        gpu_check.time.sleep(0.5 if part.name == "test_slow" else 0)
        return gpu_parts.Outcome(part.name, "passed")

    def pack(out, file, really=gpu_check.pack):
        packed.append(sorted(f.stem for f in (out / "parts").glob("*.json")))
        return really(out, file)

    monkeypatch.setattr(gpu_check, "run_part", run_part)
    monkeypatch.setattr(gpu_check, "pack", pack)
    parts = [part(tmp_path, name, "", kind="tests") for name in ("test_slow", "test_quick")]
    out = tmp_path / "some-gpu"
    gpu_check.run_all(parts, out, "abc", 100, 2, False, archive=archive)
    assert packed[:2] == [["test_quick"], ["test_quick", "test_slow"]]
    with tarfile.open(archive) as content:
        assert "| test_slow | passed |" in content.extractfile("some-gpu/summary.md").read().decode()


def test_tests_run_beside_each_other_as_memory_allows(tmp_path):
    """Small ones pass large ones that have to wait; one that is larger than all there is runs alone."""
    found, together = [], []

    def run(part):
        found.append(part)
        together.append({p.name for p in found})
        gpu_check.time.sleep(0.2)
        found.remove(part)
        return gpu_parts.Outcome(part.name, "passed")

    sizes = {"a": 50, "b": 40, "c": 20, "d": 2, "huge": 100}
    parts = [gpu_parts.Part(name, "gpu tests", tmp_path, [], size) for name, size in sizes.items()]
    done = []
    gpu_check.run_beside(parts, run, done.append, jobs=3, memory=76)
    assert {o.name for o in done} == set(sizes) and all(
        sum(map(sizes.get, names)) <= 76 or names == {"huge"} for names in together
    )
    assert {"a", "c", "d"} in together
    memory = {p.name: p.memory for p in gpu_parts.find_parts()}
    assert memory["gpu-test_pos_conv"] > 40 > memory["gpu-test_adamw_ema_promises"] > 31 and memory["bench_ema"] == 0


def test_pack(tmp_path):
    out = tmp_path / "some-gpu"
    (out / "parts").mkdir(parents=True)
    for name in ("ema.json", "summary.md", "parts/bench_ema.json", "parts/bench_ema.log", "trace.ncu-rep"):
        (out / name).write_text(name)
    archive = tmp_path / "carried" / "results.tgz"
    assert gpu_check.pack(out, archive) == archive.stat().st_size
    with tarfile.open(archive) as content:
        names = {member.name for member in content}
    assert names == {f"some-gpu/{n}" for n in ("ema.json", "summary.md", "parts/bench_ema.json", "parts/bench_ema.log")}


FAKE_SANITIZER = """#!/bin/sh
case "$*" in
    *"--tool memcheck "*"extension_check.py run") echo "========= ERROR SUMMARY: 0 errors";;
    *"--tool racecheck "*"--error-exitcode 9 "*) echo "========= hazard in conv0"; exit 9;;
    *) exit 2;;
esac
"""


def test_sanitizer_decides(tmp_path, monkeypatch):
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(FAKE_SANITIZER)
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    parts = [part for part in gpu_parts.extension_parts() if part.kind == "sanitizer"]
    for part in parts:
        part.needs = []
    outcomes = gpu_check.run_all(parts, tmp_path, "abc", budget=100, jobs=1, resume=False)
    assert [(o.name, o.status) for o in outcomes] == [("memcheck", "passed"), ("racecheck", "failed")]
    assert "hazard in conv0" in gpu_check.log_file("racecheck", tmp_path).read_text()


def test_failed_build_is_reported_plainly(tmp_path):
    environment = {**gpu_parts.child_environment(), "CUDA_HOME": str(tmp_path)}
    command = [sys.executable, str(gpu_parts.EXTENSION), "build"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: nvcc not found"), done.stderr


def test_kernels_are_compared_with_the_other_path():
    import extension_check

    turns = iter([1.0, 1.0, 1.0, 1.5, float("nan"), 1.0])
    calls = [(name, lambda: [torch.full((3,), next(turns))]) for name in ("right", "wrong", "undefined")]
    wrong = extension_check.compare(iter(calls), nullcontext)
    assert [text.split(":")[0] for text in wrong] == ["wrong", "undefined"]


def test_without_the_extension(monkeypatch):
    from d2v_fast.ops import _extension

    for before in (None, "0"):
        if before:
            monkeypatch.setenv(_extension.REFUSED, before)
        with common.without_extension():
            assert _extension.why_not() == f"refused by {_extension.REFUSED}=1"
        assert os.environ.get(_extension.REFUSED) == before


def part(tmp_path, name, code, needs=(), kind="bench"):
    file = tmp_path / f"{name}.py"
    file.write_text(code)
    return gpu_parts.Part(name, kind, file, list(needs))


def test_run_all(tmp_path, capsys, monkeypatch):
    """Fails, runs out of time, is skipped, is resumed: every part has its line and its file."""
    monkeypatch.setattr(gpu_check, "SHORTEST", 0.1)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    mixed = "import pytest\ndef test_a(): pass\n@pytest.mark.gpu\ndef test_b(): assert 0, 'broken kernel'"
    good, bad = part(tmp_path, "test_good", mixed, kind="tests"), part(tmp_path, "test_bad", mixed, kind="gpu tests")
    needs = part(tmp_path, "test_needs", "import x", needs=["x"], kind="tests")
    short = part(tmp_path, "bench_short", "print('skipped: out of time')")
    outcomes = gpu_check.run_all([good, bad, needs, short], tmp_path, "abc", budget=200, jobs=2, resume=False)
    want = {"test_bad": "failed", "test_good": "passed", "test_needs": "skipped", "bench_short": "incomplete"}
    assert {o.name: o.status for o in outcomes} == want
    printed = capsys.readouterr().out
    assert "broken kernel" in printed and "needs x" in printed
    assert json.loads((tmp_path / "parts" / "test_good.json").read_text())["detail"].startswith("1 passed")

    again = gpu_check.run_all([good, needs], tmp_path, "abc", budget=100, jobs=2, resume=True)
    assert {o.name: o.status for o in again} == {"test_good": "passed before", "test_needs": "skipped"}
    assert not gpu_check.passed_before(good, tmp_path, "another commit")


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ({"test_a": "passed", "bench_a": "passed"}, 0),
        ({"test_a": "passed before", "bench_a": "incomplete", "bench_b": "skipped"}, 0),
        ({"test_a": "incomplete", "bench_a": "passed"}, 3),
        ({"test_a": "skipped", "bench_a": "passed"}, 3),
        ({"test_a": "skipped", "bench_a": "failed"}, 1),
        ({"test_a": "failed"}, 1),
    ],
)
def test_exit_status(statuses, expected):
    outcomes = [gpu_parts.Outcome(name, status) for name, status in statuses.items()]
    assert gpu_check.exit_status(outcomes, {"test_a"}) == expected


def test_budget_ends_what_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "SHORTEST", 0.1)
    hangs = part(tmp_path, "bench_hangs", "import time; print('started', flush=True); time.sleep(60)")
    late = part(tmp_path, "bench_late", "print('written')")
    outcomes = gpu_check.run_all([hangs, late], tmp_path, "abc", budget=1, jobs=1, resume=False)
    assert [(o.status, o.detail) for o in outcomes] == [
        ("incomplete", "stopped: took more than its time"),
        ("skipped", "no time left"),
    ]
    assert outcomes[0].seconds < 30


def test_a_benchmark_that_lost_its_device_goes_on(tmp_path, monkeypatch, capsys):
    """In a new process, with what it has; not where the commit does not say that this belongs together."""
    monkeypatch.setattr(gpu_check, "SHORTEST", 0.1)
    code = """
import pathlib, sys
file = pathlib.Path(sys.argv[sys.argv.index("--json") + 1])
rows = file.read_text().split() if "--resume" in sys.argv and file.exists() else []
file.write_text(" ".join([*rows, "row"]))
if len(rows) < 1:
    sys.exit("graph left a device on which nothing can be measured: failed: illegal access")
sys.exit("failed: graph")
"""
    loses = part(tmp_path, "bench_loses", code)
    file = tmp_path / "out" / "loses.json"
    monkeypatch.setattr(gpu_check, "summary", lambda *_: "")
    (outcome,) = gpu_check.run_all([loses], file.parent, "abc", budget=60, jobs=1, resume=False)
    assert (outcome.status, outcome.detail, file.read_text()) == ("failed", "failed: graph", "row row")
    assert "started again: bench_loses" in capsys.readouterr().out
    (outcome,) = gpu_check.run_all([loses], file.parent, "abc-dirty", budget=60, jobs=1, resume=False)
    assert outcome.status == "failed" and file.read_text() == "row"


def test_step_benchmark_says_that_a_device_is_lost():
    assert gpu_check.DEVICE_LOST in gpu_parts.STEP.read_text()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_what_a_part_started_ends_with_it(tmp_path, monkeypatch):
    """Ranks are in sessions of their own; one that lives on would hold the device, and waiting for it the budget."""
    monkeypatch.setattr(gpu_check, "SHORTEST", 0.1)
    pid = tmp_path / "pid"
    started = f"import time, pathlib, os; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {started!r}], start_new_session=True)"
    hangs = part(tmp_path, "gpu-test_ranks", "", kind="bench")
    hangs.file.write_text(code)
    (outcome,) = gpu_check.run_all([hangs], tmp_path, "abc", budget=3, jobs=1, resume=False)
    assert outcome.status == "incomplete" and outcome.seconds < 20
    stat = Path("/proc", pid.read_text(), "stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        gpu_check.time.sleep(0.1)
    pytest.fail("the rank lives on")


FROM_ANYWHERE = """
import importlib.util, os, runpy, sys
import torch
assert importlib.util.find_spec("d2v_fast") is None
for file in sys.argv[1:]:
    if os.fork() == 0:
        sys.argv, sys.path[0] = [file, "--help"], os.path.dirname(file)
        runpy.run_path(file, run_name="__main__")
    _, status = os.wait()
    if status:
        print("failed:", os.path.basename(file))
"""


def test_scripts_run_from_a_checkout_that_is_not_installed():
    """With PyTorch on the path, and no PYTHONPATH that names the checkout."""
    names = ("profile_op", "tune", "convergence", "publish", "compare_runs", "bench_ema", "bench_train_step")
    files = [str(BENCHMARKS / f"{name}.py") for name in names]
    where = os.pathsep.join({str(Path(module.__file__).parent.parent) for module in (torch, pytest)})
    command = [sys.executable, "-S", "-c", FROM_ANYWHERE, *files]
    environment = {**os.environ, "PYTHONPATH": where}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", check=False)
    assert done.returncode == 0 and "failed:" not in done.stdout, done.stdout[-500:] + done.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_gpu_check_without_a_gpu():
    """From a copy that is not installed, with nothing but the standard library and PyTorch on the path."""
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2 and "needs a CUDA device" in done.stderr

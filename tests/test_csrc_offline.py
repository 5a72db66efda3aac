"""Compile csrc/ for real GPUs on a machine without one, compare the machine code with the table, load the library.

The report runs in its own process (benchmarks/csrc_report.py): it records launches in the emulated build.
"""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from d2v_fast.ops import _build

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "static" / "csrc.json"
LOAD = """
import sys, torch
from d2v_fast.ops import _extension
_extension.load(sys.argv[1])
names = torch._C._dispatch_get_all_op_names()
ours = sorted(name for name in names if name.startswith("d2v_fast::") and name.endswith("_cuda"))
print(all(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA") for name in ours), *ours)
"""


@pytest.fixture(scope="module")
def csrc_report():
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import csrc_report
        import sass
    if not sass.tools_installed():
        pytest.skip("triton's nvidia tools (cuobjdump, nvdisasm) are not installed")
    return csrc_report


@pytest.fixture
def committed():
    return json.loads(TABLE.read_text())


@pytest.mark.skipif(_build.find_nvcc() is None, reason="needs nvcc")
def test_kernels_compile_as_committed_and_load(csrc_report):
    """No spills, no more registers, shared memory or instructions than in the table; every binding is there."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "csrc_report.py"), "--check"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    library = ROOT / "build" / "csrc" / _build.NAME
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(library)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    on_cuda, *names = done.stdout.split()
    defined = re.findall(r'm\.def\(\s*"(\w+_cuda)\(', "".join(p.read_text() for p in (ROOT / "csrc").glob("*.cpp")))
    assert on_cuda == "True" and names == sorted(f"d2v_fast::{name}" for name in defined)


def test_every_kernel_is_covered(committed):
    defined = {
        kernel
        for path in (ROOT / "csrc").glob("**/*.cu*")
        for kernel in re.findall(r"D2V_KERNEL[^;{]*?\bvoid\s+(?:D2V_BOUNDS\([^)]*\)\s*)?(\w+)\(", path.read_text())
    }
    listed = {row["kernel"].partition("<")[0] for row in committed["kernels"]}
    assert defined == listed and len(listed) >= 4


def test_table_has_no_problems(csrc_report, committed):
    assert {row["arch"] for row in committed["kernels"]} == {"80", "90a"}
    assert csrc_report.problems(committed["kernels"], committed["kernels"], True) == []
    text = (TABLE.with_suffix(".md")).read_text()
    assert text == csrc_report.markdown(committed["kernels"], committed["nvcc"])


def spill(row):
    row["spills"] = 2


def need_registers(row):
    row["registers"] += 9


def ask_for_shared_memory(row):
    row["dynamic"] += 16


def grow(row):
    row["instructions"] = int(1.06 * row["instructions"]) + 5


def grow_the_loop(row):
    row["main"] = int(1.06 * (row["main"] or 0)) + 5


def be_too_big(row):
    row["threads"] = 4096


def go_unlaunched(row):
    del row["threads"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spill, "2 spill instructions"),
        (need_registers, "registers, "),
        (ask_for_shared_memory, "bytes of dynamic shared memory"),
        (grow, "instructions (whole)"),
        (grow_the_loop, "instructions (main loop)"),
        (be_too_big, "does not fit on an SM"),
        (go_unlaunched, "launched by none of the cases"),
    ],
)
def test_regressions_are_found(csrc_report, committed, change, message):
    now = copy.deepcopy(committed["kernels"])
    change(now[0])
    (found,) = csrc_report.problems(now, committed["kernels"], True)
    assert found.startswith(f"{now[0]['kernel']} | sm_{now[0]['arch']}: ") and message in found


def test_new_and_lost_kernels_are_found(csrc_report, committed):
    rows = committed["kernels"]
    assert "no longer compiled" in csrc_report.problems(rows[1:], rows, True)[0]
    assert "not in the committed table" in csrc_report.problems(rows, rows[1:], True)[0]
    other_compiler = copy.deepcopy(rows)
    need_registers(other_compiler[0])
    assert csrc_report.problems(other_compiler, rows, False) == []

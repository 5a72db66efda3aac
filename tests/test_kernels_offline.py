"""Compile every Triton kernel for real GPUs on a machine without one, and compare the machine code with the table.

The compilation runs in its own process (benchmarks/aot_report.py): under TRITON_INTERPRET=1 nothing can be compiled.
"""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "static" / "aot.json"


@pytest.fixture(scope="module")
def aot_report():
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import aot_report
        import sass
    if not sass.tools_installed():
        pytest.skip("triton's nvidia tools (ptxas, cuobjdump, nvdisasm) are not installed")
    return aot_report


@pytest.fixture
def committed():
    return json.loads(TABLE.read_text())


def check(*arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    command = [sys.executable, str(ROOT / "benchmarks" / "aot_report.py"), "--check", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def test_kernels_compile_as_committed(aot_report):
    """No spills, 128-bit accesses in the main loops, no more registers or instructions than in the table."""
    done = check()
    assert done.returncode == 0, done.stdout + done.stderr


def test_check_fails_on_another_table(aot_report, committed, tmp_path):
    for row in committed["kernels"]:
        row["whole"]["instructions"] //= 2
    table = tmp_path / "aot.json"
    table.write_text(json.dumps(committed))
    done = check("--only", "masked", "--table", str(table))
    assert done.returncode == 1, done.stderr
    assert "instructions (whole)" in done.stdout


def test_every_kernel_is_covered(committed):
    defined = {
        kernel
        for path in (ROOT / "kernels").glob("*.py")
        for kernel in re.findall(r"^def (\w+_kernel)\(", path.read_text(), flags=re.MULTILINE)
    }
    assert defined == {row["kernel"] for row in committed["kernels"]}


def test_table_has_no_problems(aot_report, committed):
    assert committed["kernels"]
    assert aot_report.problems(committed["kernels"], committed) == []


def spill(row):
    row["spills"] = 2


def lose_wide_loads(row):
    row["main"]["loads"] = {"32": 4}


def lose_wide_stores(row):
    row["main"]["stores"], row["whole"]["stores"] = {}, {"32": 4}


def gain_wide_accesses(row):
    row["whole"]["stores"]["128"] = 2


def grow_registers(row):
    row["registers"] += 16


def grow_main_loop(row):
    row["main"]["instructions"] *= 2


def fail_to_compile(row):
    row["error"] = "does not compile: reason"


DEFECTS = {
    spill: "spill instructions",
    lose_wide_loads: "no 128-bit load",
    lose_wide_stores: "no 128-bit store",
    gain_wide_accesses: "128-bit accesses to rows that start off",
    grow_registers: "registers",
    grow_main_loop: "instructions (main)",
    fail_to_compile: "does not compile",
}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("same_compiler", [True, False])
def test_defects_are_reported(aot_report, committed, defect, same_compiler):
    rows = copy.deepcopy(committed["kernels"])
    part = "whole" if defect is lose_wide_stores else "main"
    kind = "stores" if defect is lose_wide_stores else "loads"
    vector = defect is not gain_wide_accesses
    defect(next(row for row in rows if bool(row[part][kind].get("128")) == row["vector"] == vector))
    if not same_compiler:
        committed["triton"] = "3.0.0"
    found = aot_report.problems(rows, committed)
    if same_compiler or defect not in (grow_registers, grow_main_loop):
        assert any(DEFECTS[defect] in problem for problem in found), found
    else:
        assert found == []  # another compiler may allocate and schedule differently


def test_kernels_that_appear_and_vanish_are_reported(aot_report, committed):
    rows = committed["kernels"]
    assert len(aot_report.problems(rows[1:], committed)) == 1
    assert len(aot_report.problems(rows, {**committed, "kernels": rows[1:]})) == 1

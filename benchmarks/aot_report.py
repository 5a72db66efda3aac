"""Compile every kernel launch of the public ops for sm_80 and sm_90, without a GPU, and tabulate the machine code.

    python benchmarks/aot_report.py            # writes results/static/aot.json and aot.md
    python benchmarks/aot_report.py --check    # compares with the committed table, exit code 1 on a regression

The launches are those that the ops make at real shapes (recorded_cases.py), specialised as Triton would on the GPU.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton
from recorded_cases import CASES, Case
from recorder import Specialization, record, specialize
from sass import inspect

ARCHS = (80, 90)
FOLDER = Path(__file__).parent / "results" / "static"
REGISTERS = 8  # tolerated growth: the granularity in which an SM hands them out
INSTRUCTIONS = 1.05  # likewise, of the main loop and of the whole kernel, next to 4 instructions
# Kernels of one short launch: scalars, tables of addresses, sums of partial sums. Their accesses may be narrow.
HELPERS = {"_coefficients_kernel", "_merge_kernel", "_pointer_table_kernel", "_root_of_sum_kernel"}
# Kernels whose results are a few numbers per row or column: only what they read is worth wide accesses.
REDUCTIONS = {"_column_stats_kernel", "_masked_smooth_l1_fwd_kernel", "_sum_of_squares_kernel"}

Row = dict[str, Any]


def specializations(cases: Iterable[Case]) -> list[tuple[Case, Specialization]]:
    """Every different compilation that ``cases`` need, with the first case that needs it."""
    found: dict[str, tuple[Case, Specialization]] = {}
    for case in cases:
        for launch in record(case.call()).triton:
            for special in (specialize(launch, arch) for arch in ARCHS):
                found.setdefault(special.key, (case, special))
    return list(found.values())


def tile_per_thread(special: Specialization) -> float:
    """Elements per thread and pass of the main loop: the product of all constants named BLOCK*, over the threads."""
    names = special.kernel.arg_names
    blocks = [value for (i, *_), value in special.constants.items() if names[i].startswith("BLOCK")]
    return math.prod(blocks) / (32 * special.options["num_warps"])


def measure(special: Specialization) -> Row:
    """Compile and disassemble: everything that a row of the table says about the machine code."""
    try:
        compiled = special.compile()
    except triton.compiler.errors.TritonError as error:
        return {"error": f"does not compile: {str(error).splitlines()[-1]}"}
    code = inspect(compiled)
    tile = tile_per_thread(special)
    counted = tile >= 1 and special.kernel.fn.__name__ not in HELPERS
    return {
        "registers": code.registers,
        "spills": code.spills,
        "shared": code.shared,
        "warps": special.options["num_warps"],
        "whole": asdict(code.whole),
        "main": asdict(code.main),
        "loops": len(code.loops),
        "instructions_per_element": round(code.main.instructions / tile, 2) if counted else None,
    }


def report(cases: Iterable[Case], workers: int, only: str = "") -> list[Row]:
    """One row per different compilation, of the ops whose name contains ``only``."""
    _WORK[:] = [(case, special) for case, special in specializations(cases) if only in case.op]
    # forked workers share the recording: kernels and their arguments cannot be pickled
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        measured = pool.map(_measure, range(len(_WORK)), chunksize=1)
    rows: list[Row] = []
    for (case, special), code in zip(_WORK, measured, strict=True):
        row = {"op": case.op, "case": case.name, "kernel": special.kernel.fn.__name__, "arch": special.target.arch}
        same = sum(all(other[key] == row[key] for key in row) for other in rows)
        rows.append({**row, "variant": same + 1, "vector": case.vector, **code})
    return json.loads(json.dumps(rows))  # keys are strings, as in the file


_WORK: list[tuple[Case, Specialization]] = []


def _measure(index: int) -> Row:
    return measure(_WORK[index][1])


def name(row: Row) -> str:
    """What identifies a row in two tables."""
    variant = f" ({row['variant']})" if row["variant"] > 1 else ""
    return f"{row['op']} | {row['case']} | {row['kernel']}{variant} | sm_{row['arch']}"


def problems(rows: list[Row], committed: dict[str, Any]) -> list[str]:
    """What is wrong with ``rows``, by itself and against the committed table."""
    found = [problem for row in rows for problem in _absolute(row)]
    then, now = ({name(row): row for row in table} for table in (committed["kernels"], rows))
    found += [f"{key}: not in the committed table" for key in now.keys() - then.keys()]
    found += [f"{key}: in the committed table, but no longer launched" for key in then.keys() - now.keys()]
    same_compiler = committed["triton"] == triton.__version__
    for key in sorted(key for key in now.keys() & then.keys() if "error" not in now[key]):
        found += [f"{key}: {text}" for text in _regressions(now[key], then[key], same_compiler)]
    return found


def _absolute(row: Row) -> list[str]:
    if "error" in row:
        return [f"{name(row)}: {row['error']}"]
    found = []
    if row["spills"]:
        found.append(f"{name(row)}: {row['spills']} spill instructions")
    if row["kernel"] in HELPERS:
        return found
    if row["vector"]:
        if not row["main"]["loads"].get("128"):
            found.append(f"{name(row)}: no 128-bit load in the main loop")
        if row["kernel"] not in REDUCTIONS and not row["whole"]["stores"].get("128"):
            found.append(f"{name(row)}: no 128-bit store")  # of the whole kernel: tiles are often written after a loop
    elif row["whole"]["loads"].get("128") or row["whole"]["stores"].get("128"):
        found.append(f"{name(row)}: 128-bit accesses to rows that start off their boundary")  # a fault on a GPU
    return found


def _regressions(now: Row, then: Row, same_compiler: bool) -> list[str]:
    found = []
    for kind in ("loads", "stores"):
        wide, before = (row["main"][kind].get("128", 0) for row in (now, then))
        if bool(wide) < bool(before):
            found.append(f"128-bit {kind} of the main loop are gone")
        narrow, before = (_narrow(row["main"][kind]) for row in (now, then))
        if same_compiler and narrow > before:
            found.append(f"{narrow} {kind} below 128 bits in the main loop, {before} before")
    if not same_compiler:
        return found
    if now["registers"] > then["registers"] + REGISTERS:
        found.append(f"{now['registers']} registers, {then['registers']} before")
    for part in ("main", "whole"):
        count, before = now[part]["instructions"], then[part]["instructions"]
        if count > INSTRUCTIONS * before + 4:
            found.append(f"{count} instructions ({part}), {before} before")
    return found


def _narrow(widths: dict[str, int]) -> int:
    return sum(count for bits, count in widths.items() if bits != "128")


def markdown(rows: list[Row], compiler: str) -> str:
    """The table for people."""
    lines = [
        "# Machine code of every kernel",
        "",
        f"Triton {compiler}, written by `python benchmarks/aot_report.py`; nothing here was run on a GPU.",
        "*Main loop*: the shortest innermost loop with 128-bit accesses, or the whole kernel where there is no loop",
        "(then including the path of a last, partial block).",
        "Loads and stores count the instructions of one thread in it, by bits. *Per element*: its instructions over",
        "the elements that one thread handles in one pass (product of the BLOCK constants over the threads).",
        "",
        "| op | case | kernel | sm | warps | registers | spills | shared B | instructions | main loop | per element "
        "| loads | stores |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in (row for row in rows if "error" not in row):
        kernel = row["kernel"] + (f" ({row['variant']})" if row["variant"] > 1 else "")
        cells = [row["op"], row["case"], f"`{kernel}`", row["arch"], row["warps"], row["registers"], row["spills"]]
        cells += [row["shared"], row["whole"]["instructions"], row["main"]["instructions"]]
        cells += [row["instructions_per_element"] or "–", *(_text(row["main"][kind]) for kind in ("loads", "stores"))]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _text(widths: dict[str, int]) -> str:
    return ", ".join(f"{count}×{bits}" for bits, count in widths.items()) or "–"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed table instead of writing it")
    parser.add_argument("--table", type=Path, default=FOLDER / "aot.json", help="the table to write or compare with")
    parser.add_argument("--only", default="", help="ops whose name contains this")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8))
    options = parser.parse_args(arguments)
    rows = report(CASES, options.workers, options.only)
    if options.check:
        committed = json.loads(options.table.read_text(encoding="utf-8"))
        committed["kernels"] = [row for row in committed["kernels"] if options.only in row["op"]]
        found = problems(rows, committed)
        print("\n".join(found) if found else f"{len(rows)} compiled kernels: as committed, no spills")
        return bool(found)
    options.table.parent.mkdir(parents=True, exist_ok=True)
    table = {"triton": triton.__version__, "kernels": rows}
    options.table.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    options.table.with_suffix(".md").write_text(markdown(rows, triton.__version__), encoding="utf-8")
    found = [problem for row in rows for problem in _absolute(row)]
    print("\n".join([f"{len(rows)} compiled kernels written to {options.table}", *found]))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())

"""Compile csrc/ with nvcc for sm_80 and sm_90a, without a GPU, and tabulate the machine code of every kernel.

    python benchmarks/csrc_report.py            # writes results/static/csrc.json and csrc.md
    python benchmarks/csrc_report.py --check    # compares with the committed table, exit code 1 on a regression

The library is made in build/csrc, where ninja keeps what has not changed. Threads and dynamic shared memory are what
the launchers ask for at real widths: recorded in the emulated build (tests/emulator.py), which then launches nothing.
"""

import argparse
import ctypes
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import sass
import torch

from d2v_fast import ops
from d2v_fast.ops import _build, _extension

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
import emulator  # noqa: E402

TABLE = Path(__file__).parent / "results" / "static" / "csrc.json"
ARCHITECTURES = "8.0;9.0a"
SHARED_PER_SM = {"80": 164 * 1024, "90a": 228 * 1024}
RESERVED = 1024  # bytes of shared memory that the system takes of every block; counted as static from sm_90 on
THREADS_PER_SM, REGISTERS_PER_SM = 2048, 65536
REGISTERS = 8  # tolerated growth: the granularity in which an SM hands them out
INSTRUCTIONS = 1.05  # likewise, next to 4 instructions
# Output elements of one thread in one pass of the main loop, where that is what a kernel is about.
ELEMENTS = {"conv0_fwd": 32, "conv0_bwd": 32}

Row = dict[str, Any]


def launches() -> dict[str, dict[str, int]]:
    """Threads and dynamic shared memory of every kernel, by its name: those of the launches that need most."""
    _extension.load(emulator.library())
    library = ctypes.CDLL(str(emulator.library()))
    library.d2v_emulator_launches.restype = ctypes.c_char_p
    _extension.use_emulated = True
    library.d2v_emulator_record(1)
    try:
        for dtype in (torch.bfloat16, torch.float16):
            _launch_conv0(dtype)
            _launch_pos_conv(dtype)
        lines = library.d2v_emulator_launches().decode().splitlines()
    finally:
        library.d2v_emulator_record(0)
        _extension.use_emulated = False
    found: dict[str, dict[str, int]] = {}
    for name, _, threads, shared in (line.split("\t") for line in lines):
        most = found.setdefault(name, {"threads": 0, "dynamic": 0})
        most["threads"] = max(most["threads"], int(threads))
        most["dynamic"] = max(most["dynamic"], int(shared))
    return found


def _launch_conv0(dtype: torch.dtype) -> None:
    segments = torch.tensor([[0, 20], [25, 10]])
    for norm, taps, where in itertools.product(("layer", "group"), (10, 16), (None, segments)):
        waveforms = torch.randn(1, 400)
        weight, bias, gamma, beta = (torch.randn(512, *rest).requires_grad_() for rest in ((1, taps), (), (), ()))
        settings = {"stride": 5, "norm": norm, "segments": where, "dtype": dtype}
        y = ops.conv0_norm_gelu(waveforms, weight, bias, gamma, beta, **settings)
        y.backward(torch.ones_like(y))


def _launch_pos_conv(dtype: torch.dtype) -> None:
    for width, (taps, depth, norm) in itertools.product((32, 48, 64, 80), ((19, 2, True), (128, 1, False))):
        x = torch.randn(4, 300, 16 * width, dtype=dtype).requires_grad_()
        weights = [torch.randn(16 * width, width, taps, dtype=dtype).requires_grad_() for _ in range(depth)]
        biases = [torch.randn(16 * width, dtype=dtype).requires_grad_() for _ in range(depth)]
        y = ops.pos_conv(x, weights, biases, groups=16, norm=norm)
        y.backward(torch.ones_like(y))


def build() -> tuple[Path, str]:
    """The compiled extension and the version of nvcc."""
    tools = _build.find_toolchain(Path(torch.__file__).parent, None)
    tools.architectures = ARCHITECTURES
    folder = ROOT / "build" / "csrc"
    library = folder / _build.NAME
    with _build.locked(folder):
        _build.run(_build.extension_steps(ROOT / "csrc", folder, tools, library), folder)
    return library, f"{tools.cuda[0]}.{tools.cuda[1]}"


def report(library: Path) -> list[Row]:
    """One row for every kernel and architecture in ``library``."""
    asked = launches()
    folder = library.parent / "cubins"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.cubin"):
        old.unlink()
    subprocess.run([sass.TOOLS / "cuobjdump", "-xelf", "all", library], cwd=folder, capture_output=True, check=True)
    rows = []
    for cubin in sorted(folder.glob("*.cubin")):
        usage = _usage(cubin)
        found = sass.functions(cubin)
        for mangled, name in zip(found, _demangle(list(found)), strict=True):
            row = {"kernel": _short(name), "arch": cubin.suffixes[-2].removeprefix(".sm_")}
            rows.append({**row, **asked.get(name, {}), **usage[mangled], **_code(name, *found[mangled])})
    return sorted(rows, key=lambda row: (row["kernel"], row["arch"]))


def _usage(cubin: Path) -> dict[str, dict[str, int]]:
    said = sass.tool("cuobjdump", "-res-usage", cubin)
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:\d+ SHARED:(\d+)"
    system = 0 if "sm_80" in cubin.name else RESERVED
    return {name: {"registers": int(r), "static": int(s) - system} for name, r, s in re.findall(pattern, said)}


def _demangle(names: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [name.removeprefix("void ").partition("(")[0] for name in done.stdout.splitlines()]


def _short(name: str) -> str:
    return name.replace("d2v::", "").replace("> >", ">>")


def _code(name: str, instructions: list[str], loops: list[tuple[int, int]]) -> Row:
    """Counts of the whole kernel and of its main loop: the shortest with the most matrix instructions."""
    kinds = [instruction.partition(".")[0] for instruction in instructions]
    main = max(loops, key=lambda span: (kinds[slice(*span)].count("HMMA"), span[0] - span[1]), default=(0, 0))
    counts = Counter(kinds[slice(*main)])
    size = counts.total() if counts["HMMA"] else None
    elements = next((n for kernel, n in ELEMENTS.items() if f"::{kernel}<" in name), None)
    return {
        "spills": sum(kind in ("LDL", "STL") for kind in kinds),
        "instructions": len(kinds),
        "main": size,
        "hmma": counts["HMMA"],
        "per_element": round(size / elements, 1) if size and elements else None,
    }


def blocks_per_sm(row: Row) -> int | None:
    """Blocks of a kernel that an SM can hold at once, by threads, registers and shared memory."""
    if "threads" not in row:
        return None
    registers = -(-row["registers"] // 8) * 8 * (-(-row["threads"] // 32) * 32)
    shared = row["static"] + row["dynamic"] + RESERVED
    limits = (THREADS_PER_SM // row["threads"], REGISTERS_PER_SM // registers, SHARED_PER_SM[row["arch"]] // shared)
    return min(*limits, 32)


def problems(now: list[Row], then: list[Row], same_compiler: bool) -> list[str]:
    """What is wrong with the rows ``now``, by themselves and against those of the committed table."""
    found = []
    for row in now:
        if row["spills"]:
            found.append(f"{_name(row)}: {row['spills']} spill instructions")
        if "threads" not in row:
            found.append(f"{_name(row)}: launched by none of the cases of csrc_report.py")
        elif blocks_per_sm(row) == 0:
            found.append(f"{_name(row)}: does not fit on an SM")
    rows, before = ({_name(row): row for row in table} for table in (now, then))
    found += [f"{key}: not in the committed table" for key in sorted(rows.keys() - before.keys())]
    found += [f"{key}: in the committed table, but no longer compiled" for key in sorted(before.keys() - rows.keys())]
    for key in sorted(rows.keys() & before.keys()):
        found += [f"{key}: {text}" for text in _regressions(rows[key], before[key], same_compiler)]
    return found


def _name(row: Row) -> str:
    return f"{row['kernel']} | sm_{row['arch']}"


def _regressions(now: Row, then: Row, same_compiler: bool) -> list[str]:
    found = []
    for key in ("static", "dynamic"):
        if now.get(key, 0) > then.get(key, 0):
            found.append(f"{now[key]} bytes of {key} shared memory, {then[key]} before")
    if not same_compiler:
        return found
    if now["registers"] > then["registers"] + REGISTERS:
        found.append(f"{now['registers']} registers, {then['registers']} before")
    for key, what in (("instructions", "whole"), ("main", "main loop")):
        if (now[key] or 0) > INSTRUCTIONS * (then[key] or 0) + 4:
            found.append(f"{now[key]} instructions ({what}), {then[key]} before")
    return found


def markdown(rows: list[Row], nvcc: str) -> str:
    """The table for people."""
    lines = [
        "# Machine code of the CUDA extension",
        "",
        f"nvcc {nvcc}, written by `python benchmarks/csrc_report.py`; nothing here was run on a GPU.",
        "*Threads* and *shared B* (static + dynamic): the most that a launch asks for at the widths of the published",
        "models. *Blocks/SM*: how many fit by threads, registers and shared memory. *Main loop*: instructions of the",
        "shortest loop with the most matrix instructions (HMMA). *Per element*: those over the output elements of one",
        "thread in one pass.",
        "",
        "| kernel | sm | threads | registers | spills | shared B | blocks/SM | instructions | main loop | HMMA "
        "| per element |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shared = row["static"] + row.get("dynamic", 0)
        cells = [f"`{row['kernel']}`", row["arch"], row.get("threads"), row["registers"], row["spills"], shared]
        cells += [blocks_per_sm(row), row["instructions"], row["main"], row["hmma"] or None, row["per_element"]]
        lines.append("| " + " | ".join("–" if cell is None else str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed table instead of writing it")
    parser.add_argument("--table", type=Path, default=TABLE, help="the table to write or compare with")
    options = parser.parse_args(arguments)
    library, nvcc = build()
    rows = report(library)
    if options.check:
        committed = json.loads(options.table.read_text(encoding="utf-8"))
        found = problems(rows, committed["kernels"], committed["nvcc"] == nvcc)
        print("\n".join(found) if found else f"{len(rows)} compiled kernels: as committed, no spills")
        return bool(found)
    options.table.write_text(json.dumps({"nvcc": nvcc, "kernels": rows}, indent=1) + "\n", encoding="utf-8")
    options.table.with_suffix(".md").write_text(markdown(rows, nvcc), encoding="utf-8")
    print(f"{len(rows)} compiled kernels in {options.table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

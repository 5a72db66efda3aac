"""Launches and bytes of every op, ours against eager PyTorch, counted without a GPU.

    python benchmarks/static_cost.py           # writes results/static/cost.json and cost.md
    python benchmarks/static_cost.py --check   # compares with the committed table, exit code 1 on a difference

Ours: launches are recorded at the real shape; bytes are a formula (cost_formulas.py), held against the loads and
stores of the interpreted kernels at a small shape, plus whatever ATen does around them. Eager: operators counted on
meta tensors, as if every operator read its inputs and wrote its outputs once.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from cost_cases import COSTS, MODULES, Cost
from recorder import Recording, record
from traffic import measure

FOLDER = Path(__file__).parent / "results" / "static"
TOLERANCE = 0.05  # of a formula against the bytes counted at the small shape
SMALL_SMS = 1  # few programs for small shapes: partial sums are not to weigh more than they do at real ones
Row = dict[str, Any]


def _native_dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x  # one kernel, as on a GPU


def _steady(call: Callable[[], Any], num_masked: int | None = None) -> Recording:
    record(call, num_masked)  # tables and upstream gradients are made once
    return record(call, num_masked)


def _entry(recording: Recording, nbytes: int) -> Row:
    return {
        "launches": recording.launches,
        "bytes": nbytes,
        "allocated": recording.allocated,
        "saved": recording.saved,
        "syncs": recording.syncs,
    }


def count(cost: Cost) -> Row:
    """The row of the table, without what the interpreter sees."""
    ours = _steady(cost.ours())
    row = {
        "op": cost.op,
        "workload": cost.workload,
        "kernels": ours.kernels,
        "ours": _entry(ours, cost.formula() + ours.partials + ours.bytes),
        "predicted": cost.predicted,
    }
    for provider, module in MODULES.items():
        call = cost.eager(module)
        with mock.patch.object(F, "dropout", _native_dropout):
            eager = _steady(call, cost.num_masked)
        row[provider] = _entry(eager, eager.bytes)
    return row


def traffic() -> dict[str, dict[str, int]]:
    """Bytes counted at the small shapes; needs TRITON_INTERPRET=1."""
    return {cost.name: asdict(measure(cost.ours(small=True), SMALL_SMS)) for cost in COSTS}


@contextmanager
def _interpreted() -> Iterator[Callable[[], dict[str, dict[str, int]]]]:
    """:func:`traffic` in a process of its own: a process either interprets or records."""
    command = [sys.executable, __file__, "--traffic"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:

        def result() -> dict[str, dict[str, int]]:
            output, _ = process.communicate()
            if process.returncode != 0:
                raise RuntimeError(f"{' '.join(command)} failed, see above")
            return json.loads(output)

        yield result


def formula_error(cost: Cost, partials: int, seen: dict[str, int]) -> float:
    """How far the formula is off the bytes ``seen`` at the small shape; ValueError where that is too far."""
    formula = cost.formula(small=True) + partials
    error = formula / seen["distinct"] - 1 if seen["distinct"] else float(formula)  # 0 where Triton launches nothing
    if abs(error) > TOLERANCE:
        raise ValueError(f"{cost.name}: the formula is {error:+.1%} off the bytes counted in the interpreter")
    return round(error, 4)


def table() -> list[Row]:
    """All rows; raises ValueError where a formula and the interpreter disagree."""
    with _interpreted() as counted:
        rows = [count(cost) for cost in COSTS]
        partials = [record(cost.ours(small=True), num_sms=SMALL_SMS).partials for cost in COSTS]
        traffic_of = counted()
    for cost, row, left in zip(COSTS, rows, partials, strict=True):
        seen = traffic_of[cost.name]
        row["formula_error"] = formula_error(cost, left, seen)
        row["requested_per_distinct"] = round(seen["requested"] / seen["distinct"], 2) if seen["distinct"] else None
    return rows


def problems(rows: list[Row], committed: dict[str, Any]) -> list[str]:
    """Differences from the committed table. Another PyTorch may launch other kernels: then only ours are compared."""
    then, now = ({f"{row['op']} | {row['workload']}": row for row in t} for t in (committed["costs"], rows))
    found = [f"{name}: only in one of the tables" for name in sorted(then.keys() ^ now.keys())]
    compared = ["kernels", "ours", *(MODULES if committed["torch"] == _torch_version() else ())]
    for name in sorted(then.keys() & now.keys()):
        for part in compared:
            if now[name][part] != then[name][part]:
                found.append(f"{name}: {part} is {now[name][part]}, committed is {then[name][part]}")
    return found


def _torch_version() -> str:
    return ".".join(torch.__version__.split(".")[:2])


def markdown(rows: list[Row]) -> str:
    """The table for people."""
    lines = [
        "# Launches and bytes of every op",
        "",
        f"Counted with PyTorch {_torch_version()} by `python benchmarks/static_cost.py`; nothing was run on a GPU.",
        "Forward and backward where there is one. *fairseq*: the op as fairseq writes it; *eager*: idiomatic PyTorch.",
        "Bytes: ours from the formulas of `cost_formulas.py` (their error against the interpreter at a small shape is",
        "in the last but one column) and the ATen operators around them; eager: inputs and outputs of every operator,",
        "changes of layout inside of cuDNN left out; kernels of the extension: every tensor they are given, once.",
        "*Allocated*: all tensors made inside, results and gradients included. *Saved*: those of them that autograd",
        "keeps for backward. *Re-read*: bytes asked of the caches over bytes asked of memory, at the small shape.",
        "*Model*: launches / GB of ours and of eager code, predicted.",
        "",
        "| op | workload | launches: ours | fairseq | eager | MB: ours | fairseq | eager | fewer bytes, × "
        "| allocated MB: ours | fairseq | eager | saved MB: ours | fairseq | eager | syncs: fairseq "
        "| model: ours, eager | formula | re-read |",
        "|" + "---|" * 19,
    ]
    for row in rows:
        sides = [row["ours"], row["fairseq"], row["eager"]]
        cells = [row["op"], row["workload"], *(side["launches"] for side in sides), *(_mb(s["bytes"]) for s in sides)]
        cells.append(" / ".join(f"{side['bytes'] / sides[0]['bytes']:.1f}" for side in sides[1:]))
        cells += [_mb(side[name]) for name in ("allocated", "saved") for side in sides]
        cells += [row["fairseq"]["syncs"], _prediction(row["predicted"])]
        cells += [f"{row['formula_error']:+.1%}", row["requested_per_distinct"] or "–"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f}"


def _prediction(values: dict[str, float]) -> str:
    if not values:
        return "–"
    return "{ours launches:g} / {ours GB:g}, {eager launches:g} / {eager GB:g}".format(**values)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed table instead of writing it")
    parser.add_argument("--table", type=Path, default=FOLDER / "cost.json", help="the table to write or compare with")
    parser.add_argument("--traffic", action="store_true", help=argparse.SUPPRESS)  # the interpreted half
    options = parser.parse_args(arguments)
    if options.traffic:
        print(json.dumps(traffic()))
        return 0
    rows = table()
    if options.check:
        found = problems(rows, json.loads(options.table.read_text(encoding="utf-8")))
        print("\n".join(found) if found else f"{len(rows)} costs: as committed")
        return bool(found)
    options.table.parent.mkdir(parents=True, exist_ok=True)
    record_ = {"torch": _torch_version(), "costs": rows}
    options.table.write_text(json.dumps(record_, indent=1) + "\n", encoding="utf-8")
    options.table.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    print(f"{len(rows)} costs written to {options.table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

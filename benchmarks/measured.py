"""Reads the results of one GPU: the rows of all benchmarks, whole steps included, and the parts of a GPU check."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

OURS, GRAPH = "d2v_fast", "d2v_fast graph"
STEP = "train_step"
STEP_MODE = "step"
COMPILED = ("eager+compile", "fairseq+compile", "torch.compile")
# the references of a step; the second where today's defaults differ from those of the PyTorch that the code pins
WRITTEN, WRITTEN_TODAY, WRITTEN_AUTOCAST = "as written", "as written, today's defaults", "as written, autocast"
OTHER_MACHINE = "timed on another machine than d2v_fast"
SAME = ("device", "torch", "triton", "cuda", "driver", "commit")  # of an environment


class UnfitResults(ValueError):
    """Results that cannot be read, or do not belong together."""


@dataclass(frozen=True)
class Row:
    """What one provider took in one case. ``values`` are the JSON's."""

    op: str  # of benchmarks/bench_*.py; STEP for whole training steps
    case: str  # of a step: the recipe
    mode: str  # "fwd", "fwd+bwd" or STEP_MODE
    provider: str
    status: str
    values: Mapping[str, Any]

    @property
    def ms(self) -> float | None:
        """Median milliseconds, None where nothing was timed; of a step that was timed twice the mean of both."""
        if self.status != "ok":
            return None
        return self.values.get("mean_ms", self.values.get("ms")) if self.op == STEP else self.values.get("ms_p50")

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.op, self.case, self.mode, self.provider

    def get(self, name: str) -> float | None:
        """A number of the row, None where it has none."""
        if name == "ms":
            return self.ms
        return self.values.get(name) if self.status == "ok" else None


@dataclass(frozen=True)
class Results:
    """All rows of one GPU at one commit. ``parts``: the outcome of each part of ``gpu_check.py`` at that commit."""

    folder: Path
    environment: dict[str, str]
    rows: tuple[Row, ...]
    parts: dict[str, dict]

    def providers(self, op: str, case: str, mode: str) -> dict[str, Row]:
        """The rows of one case, by provider; "ours" (the faster one) and, for steps, "reference" are names of some.

        Steps that another machine has timed than ours stand there without numbers.
        """
        found = {row.provider: row for row in self.rows if (row.op, row.case, row.mode) == (op, case, mode)}
        if op == STEP and OURS in found:
            here = found[OURS].values.get("machine")
            for name, row in found.items():
                if row.status == "ok" and row.values.get("machine") != here:
                    found[name] = replace(row, status=OTHER_MACHINE)
        mine = [found[name] for name in (OURS, GRAPH) if name in found and found[name].ms is not None]
        if mine:
            found["ours"] = min(mine, key=lambda row: row.ms)
        elif OURS in found:
            found["ours"] = found[OURS]
        if WRITTEN in found:
            found["reference"] = found[WRITTEN]
        return found

    def cases(self, op: str, mode: str) -> list[str]:
        """Names of the cases of an op that have rows in a mode."""
        return list(dict.fromkeys(row.case for row in self.rows if (row.op, row.mode) == (op, mode)))


def read(file: Path) -> dict | None:
    """A file of results; None for JSON of another kind. Raises :class:`UnfitResults` where it is damaged."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnfitResults(f"{file} is no JSON: {error}") from error
    if not isinstance(record, dict):
        return None
    is_step = record.get("benchmark") == STEP and isinstance(record.get("results"), list) and not record.get("smoke")
    return record if record.get("kind") == "gpu" or is_step else None


def rows_of(record: dict) -> list[Row]:
    """The rows of one file."""
    if record.get("benchmark") != STEP:
        rows = [(record["op"], row["case"], row["mode"], row) for row in record["results"]]
    else:
        rows = [(STEP, row["case"], STEP_MODE, row) for row in record["results"]]
    return [Row(op, case, mode, row["provider"], row["status"], row) for op, case, mode, row in rows]


def load(folder: Path, commit: str | None = None) -> Results:
    """The results in ``folder``; with ``commit`` only those of that commit (a beginning is enough).

    Raises:
        UnfitResults: there are none, a file is damaged, or they come from several devices, versions or commits.
    """
    if not folder.is_dir():
        raise UnfitResults(f"{folder} is not a folder of results")
    records = {file: record for file in sorted(folder.glob("*.json")) if (record := read(file)) is not None}
    if commit:
        records = {f: r for f, r in records.items() if r["environment"]["commit"].startswith(commit)}
    if not records:
        raise UnfitResults(f"no results of a GPU in {folder}" + (f" at commit {commit}" if commit else ""))
    for name in SAME:
        found: dict[str, str] = {}
        for file, record in records.items():
            found.setdefault(record["environment"].get(name, "unknown"), file.name)
        if len(found) > 1:
            which = ", ".join(f"{value} ({file})" for value, file in found.items())
            raise UnfitResults(f"results of several {name}s in {folder}: {which}")
    rows = [row for record in records.values() for row in rows_of(record)]
    environment = next(iter(records.values()))["environment"]
    parts = {}
    for file in sorted((folder / "parts").glob("*.json")):
        part = json.loads(file.read_text(encoding="utf-8"))
        if part["commit"] == environment["commit"]:
            parts[part["name"]] = part
    return Results(folder, environment, tuple(rows), parts)

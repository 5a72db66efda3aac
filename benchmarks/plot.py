"""Draws the JSON of the benchmarks: a figure an op, the time of every provider over that of d2v_fast, and one of whole
updates, the milliseconds of every provider for each recipe.

python benchmarks/plot.py benchmarks/results/nvidia-h100-80gb-hbm3 --out docs/img
"""

import argparse
import json
import math
import sys
from pathlib import Path

from gpu_parts import MEASURED, find_parts

OURS = "d2v_fast"
STEP = "train_step"
BAR = 0.16  # height in inches


def load(folder: Path) -> tuple[list[dict], list[str]]:
    """The results under ``folder`` that can be drawn, and what cannot be, with the reason.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of results")
    ops, steps, lacking, names = [], [], [], set()
    for file in sorted(folder.glob("*.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            lacking.append(f"{file.name}: no JSON ({error})")
            continue
        if not isinstance(record, dict) or not isinstance(record.get("results"), list):
            continue
        rows = record["results"]
        if record.get("benchmark") == STEP:
            timed = {row["case"] for row in rows if row.get("ms") is not None}
            lacking += [f"{case}: no update was timed" for case in sorted({row["case"] for row in rows} - timed)]
            names |= {f"step_{row['case']}" for row in rows}
            steps += [record] if timed else []
        elif "op" in record:
            names.add(f"bench_{record['op']}")
            if any("ratio" in row for row in rows):
                ops.append(record)
            else:
                lacking.append(f"{record['op']}: nothing was timed")
    if not ops and not steps:
        said = "; ".join(lacking) or "run a benchmark with --json or --out first"
        raise ValueError(f"no results of benchmarks in {folder}: {said}")
    known = [part.name for part in find_parts() if part.kind in MEASURED]
    return ops + steps, lacking + [f"{name}: no results" for name in known if name not in names]


def bars(record: dict) -> list[tuple[str, list[tuple[str, float, str]]]]:
    """For each case and mode: providers with their ratio and a remark."""
    groups: dict[str, list[tuple[str, float, str]]] = {}
    for row in record["results"]:
        if "ratio" not in row:
            continue
        remark = f"{row['ratio']:.2f}"
        if row["provider"] == OURS and "percent_of_copy" in row:
            remark = f"{row['ms_p50']:.3f} ms, {row['percent_of_copy']:.0f} % of copy"
        groups.setdefault(f"{row['case']}\n{row['mode']}", []).append((row["provider"], row["ratio"], remark))
    return list(groups.items())


def draw_steps(records: list[dict], file: Path) -> None:
    """Whole updates: a group of bars for each recipe, a bar for each provider that was timed."""
    from matplotlib.figure import Figure

    rows = [row for record in records for row in record["results"] if row.get("ms") is not None]
    if not rows:
        raise ValueError("no update was timed")
    recipes, providers = (list(dict.fromkeys(row[key] for row in rows)) for key in ("case", "provider"))
    colors = {name: "black" if name.startswith(OURS) else f"C{i}" for i, name in enumerate(providers)}
    height = BAR * sum(1 + sum(row["case"] == recipe for row in rows) for recipe in recipes)
    figure = Figure(figsize=(9, height + 1.2), layout="constrained")
    axes = figure.add_subplot()
    y, ticks = 0, []
    for recipe in recipes:
        bars_of = [row for row in rows if row["case"] == recipe]
        ticks.append((y + (len(bars_of) - 1) / 2, recipe))
        for row in bars_of:
            name = row["provider"]
            axes.barh(y, row["ms"], color=colors[name], height=0.85, alpha=0.6 if name == OURS else 1.0)
            axes.text(row["ms"], y, f" {row['ms']:.1f} ms, {name}", va="center", fontsize=7)
            y += 1
        y += 1
    axes.set_yticks([tick for tick, _ in ticks], [label for _, label in ticks], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    environment = records[0]["environment"]
    versions = f"torch {environment['torch']}, {environment['commit'][:10]}"
    axes.set_title(f"one update: {environment['device']}\n{versions}", fontsize=9)
    axes.set_xlabel("ms", fontsize=8)
    figure.savefig(file, dpi=120)


def draw(record: dict, file: Path) -> None:
    """One figure of an op."""
    from matplotlib.figure import Figure

    groups = bars(record)
    providers = list(dict.fromkeys(name for _, rows in groups for name, _, _ in rows))
    colors = {name: "black" if name == OURS else f"C{i}" for i, name in enumerate(providers)}
    height = BAR * sum(len(rows) + 1 for _, rows in groups)
    figure = Figure(figsize=(9, height + 1.2), layout="constrained")
    axes = figure.add_subplot()
    y, ticks = 0, []
    for label, rows in groups:
        ticks.append((y + (len(rows) - 1) / 2, label))
        for name, ratio, remark in rows:
            axes.barh(y, ratio, color=colors[name], height=0.85)
            axes.text(ratio, y, f" {remark}", va="center", fontsize=7)
            y += 1
        y += 1
    axes.set_yticks([tick for tick, _ in ticks], [label for _, label in ticks], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="grey", linewidth=0.8)
    if math.log10(max(ratio for _, rows in groups for _, ratio, _ in rows)) > 1:
        axes.set_xscale("log")
    axes.margins(x=0.15)
    environment = record["environment"]
    smoke = "" if record["kind"] == "gpu" else ", small sizes: says nothing about a GPU"
    title = (
        f"{record['op']}: {environment['device']}{smoke}\ntorch {environment['torch']}, {environment['commit'][:10]}"
    )
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(f"time / {OURS}", fontsize=8)
    handles = [axes.barh([math.nan], [math.nan], color=colors[name]) for name in providers]
    axes.legend(handles, providers, fontsize=7)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder with the JSON of one device")
    parser.add_argument("--out", type=Path, default=Path("docs/img"), help="folder of the figures")
    args = parser.parse_args()
    try:
        records, lacking = load(args.results)
    except ValueError as error:
        sys.exit(f"error: {error}")
    args.out.mkdir(parents=True, exist_ok=True)
    for record in records:
        if record.get("benchmark") != STEP:
            draw(record, args.out / f"{record['op']}.png")
            print(args.out / f"{record['op']}.png")
    steps = [record for record in records if record.get("benchmark") == STEP]
    if steps:
        draw_steps(steps, args.out / f"{STEP}.png")
        print(args.out / f"{STEP}.png")
    for line in lacking:
        print(f"not drawn: {line}")


if __name__ == "__main__":
    main()

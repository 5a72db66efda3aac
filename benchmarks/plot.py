"""Draws the JSON of the benchmarks: one figure an op, the time of every provider over that of d2v_fast.

python benchmarks/plot.py benchmarks/results/nvidia-h100-80gb-hbm3 --out docs/img
"""

import argparse
import json
import math
import sys
from pathlib import Path

OURS = "d2v_fast"
BAR = 0.16  # height in inches


def load(folder: Path) -> list[dict]:
    """The results under ``folder``; raises ValueError when there is none, or one has nothing to draw."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of results")
    records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    records = [record for record in records if "op" in record and "results" in record]
    if not records:
        raise ValueError(f"no results of benchmarks in {folder}: run one with --json or --out first")
    for record in records:
        if not any("ratio" in row for row in record["results"]):
            raise ValueError(f"nothing was timed in the results of {record['op']}")
    return records


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


def draw(record: dict, file: Path) -> None:
    """One figure."""
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
        records = load(args.results)
    except ValueError as error:
        sys.exit(f"error: {error}")
    args.out.mkdir(parents=True, exist_ok=True)
    for record in records:
        file = args.out / f"{record['op']}.png"
        draw(record, file)
        print(file)


if __name__ == "__main__":
    main()

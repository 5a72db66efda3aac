"""``summary.md`` of a GPU check: a line for each part, and tables of what was measured."""

import json
from collections.abc import Sequence
from pathlib import Path

from gpu_parts import Outcome


def summary(outcomes: Sequence[Outcome], out: Path) -> str:
    """Markdown: a line for each part, then the measurements of ours beside what it is compared with."""
    lines = ["# GPU check", "", "| part | status | seconds | |", "|---|---|---|---|"]
    lines += [f"| {o.name} | {o.status} | {o.seconds:.0f} | {o.detail.strip('= ')} |" for o in outcomes]
    for file in sorted(out.glob("*.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:  # cut off by an end from outside: no reason to lose the others
            lines += ["", f"{file.name}: no JSON ({error})"]
            continue
        if record.get("benchmark") == "train_step":
            lines += step_table(record)
        if record.get("kind") != "gpu":
            continue
        environment = record["environment"]
        lines += ["", f"## {record['op']}", ""]
        lines += [
            f"{environment['device']}, driver {environment['driver']}, torch {environment['torch']}, triton "
            f"{environment['triton']}, commit {environment['commit']}, copy {record['copy_gb_per_s']:.0f} GB/s"
            + (
                f", matrix product {record['matmul_tflop_per_s']:.0f} TFLOP/s" if "matmul_tflop_per_s" in record else ""
            ),
            f"Extension: {environment['extension']}.",
            "",
            "| case | mode | provider | time / ours | wall / ours | ms p20 | p50 | p80 | GB/s | % of copy | peak MiB "
            "| host us | % of matmul | % of roofline | held MiB | backward ms | % of copy | / ours |",
            "|---" * 18 + "|",
        ]
        lines += [result_line(row) for row in record["results"]]
    return "\n".join(lines) + "\n"


STEP_COLUMNS = (  # of a row: key, label, digits
    ("ratio", "time / ours", 2),
    ("ms", "ms", 1),
    ("samples_per_s", "samples/s", 1),
    ("percent_of_matmul", "% of matmul", 1),
    ("peak_mib", "peak MiB", 0),
    ("host_ms", "host ms", 2),
    ("launches", "launches", 0),
    ("ms_p20", "ms p20", 1),
    ("ms_p80", "p80", 1),
    ("units_per_s", "units/s", 0),
    ("percent_of_peak", "% of peak", 1),
    ("memory_ratio", "memory / as written", 2),
    ("computed_tflop", "TFLOP computed", 2),
    ("tflop", "of", 2),
)


def step_table(record: dict) -> list[str]:
    """Whole training steps, a line for each provider."""
    environment = record["environment"]
    lines = ["", "## training step", "", f"{environment['device']}, torch {environment['torch']}", ""]
    lines += [f"| case | provider | {' | '.join(label for _, label, _ in STEP_COLUMNS)} |"]
    lines += ["|---" * (2 + len(STEP_COLUMNS)) + "|"]
    for row in record["results"]:
        values = [f"{row[name]:.{digits}f}" if name in row else "" for name, _, digits in STEP_COLUMNS]
        values[0] = values[0] or ("" if row["status"] == "ok" else row["status"])
        lines.append(f"| {row['case']} | {row['provider']} | {' | '.join(values)} |")
    return lines


def result_line(row: dict) -> str:
    """A measurement, or the reason why there is none."""
    start = f"| {row['case']} | {row['mode']} | {row['provider']} |"
    if "ms_p50" not in row:
        return f"{start} {row['status']} |" + " |" * 14
    ratio = f"{row['ratio']:.2f} | {row['wall_ratio']:.2f}" if "ratio" in row else " | "
    times = " | ".join(f"{row[name]:.4f}" for name in ("ms_p20", "ms_p50", "ms_p80"))
    rates = f"{row['gb_per_s']:.0f} | {row['percent_of_copy']:.1f} | {row['peak_mib']:.1f} | {row['host_us']:.0f}"
    optional = {"percent_of_matmul": 1, "percent_of_roofline": 1, "held_mib": 1, "bwd_ms": 4}
    optional |= {"bwd_percent_of_copy": 1, "bwd_ratio": 2}
    rest = " | ".join(f"{row[name]:.{digits}f}" if name in row else "" for name, digits in optional.items())
    return f"{start} {ratio} | {times} | {rates} | {rest} |"

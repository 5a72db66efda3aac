"""One HTML file about a demo: data, curves, probes. Nothing outside the file is loaded, and it needs no script.

Of each run's folder it reads ``metrics.jsonl`` (written by training), ``run.json`` and ``probe.json`` (see
:func:`save_run`).
"""

import base64
import io
import json
import platform
from dataclasses import dataclass
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

from d2v_fast import __version__
from d2v_fast.train.logging import read_metrics
from d2v_fast.train.probe import ProbeResult

STYLE = """
:root { color-scheme: light dark; --text: #1c2430; --soft: #5a6675; --page: #f6f7f9; --card: #fff; --line: #dde2e8;
  --bar: #9db8d9; --best: #2f6db3; }
@media (prefers-color-scheme: dark) { :root { --text: #e6eaf0; --soft: #a3afbd; --page: #14181e; --card: #1d232b;
  --line: #343d48; --bar: #41587a; --best: #6fa8e8; } }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { margin: 0 0 .25rem; font-size: 1.9rem; } h2 { margin: 0 0 .25rem; font-size: 1.35rem; }
p { margin: .5rem 0; } .soft { color: var(--soft); font-size: .92rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .75rem; padding: 1.25rem 1.5rem;
  margin-top: 1.5rem; overflow-x: auto; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin: 1rem 0; }
dt { color: var(--soft); font-size: .85rem; } dd { margin: 0; font-weight: 600; }
img { display: block; width: 100%; height: auto; margin: .5rem 0; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 .25rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .35rem; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td.bar { text-align: left; } td.bar { width: 34%; }
thead th { color: var(--soft); font-weight: 500; font-size: .85rem; } tbody th { font-weight: 400; }
.fill { height: .7rem; border-radius: .2rem; background: var(--bar); } .pretrained .fill { background: var(--best); }
.pretrained th, .pretrained td { font-weight: 700; }
"""
CURVES = (("target_var", "targets", "-"), ("pred_var", "predictions", "--"))


@dataclass(frozen=True)
class RunSummary:
    """What is shown of one pretrained model."""

    name: str  # heading, e.g. "speech"
    about: dict[str, Any]  # title, pretrain, source, license of the data
    parameters: int  # of the student with its head
    architecture: str
    device: str
    peak_memory: int  # bytes
    metrics: list[dict[str, Any]]
    probes: list[tuple[str, ProbeResult]]  # (question, result)

    @property
    def seconds(self) -> float:
        """Training time over all sessions, from the logged seconds per update."""
        ends = [row["update"] for row in self.metrics]
        steps = (end - start for start, end in zip([0, *ends], ends, strict=False))
        return sum(count * row["seconds_per_update"] for count, row in zip(steps, self.metrics, strict=True))


def save_run(folder: Path, run: RunSummary) -> None:
    """Write ``run.json`` and ``probe.json`` into the folder of a run."""
    keys = ("name", "about", "parameters", "architecture", "device", "peak_memory")
    values = {key: getattr(run, key) for key in keys}
    probes = [{"question": question, "result": result.to_dict()} for question, result in run.probes]
    (folder / "run.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    (folder / "probe.json").write_text(json.dumps(probes, indent=1) + "\n", encoding="utf-8")


def load_run(folder: Path) -> RunSummary:
    """Read back what :func:`save_run` and training left in the folder of a run."""
    values = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    probes = json.loads((folder / "probe.json").read_text(encoding="utf-8"))
    results = [(probe["question"], ProbeResult.from_dict(probe["result"])) for probe in probes]
    return RunSummary(**values, metrics=read_metrics(folder), probes=results)


def write_report(folders: list[Path], path: Path) -> Path:
    """Write the report of the runs in ``folders`` to ``path``; returns ``path``."""
    runs = [load_run(folder) for folder in folders]
    versions = [f"d2v_fast {__version__}", f"Python {platform.python_version()}"]
    versions += [f"{package} {metadata.version(package)}" for package in ("torch", "numpy", "scikit-learn")]
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>d2v_fast demo</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>d2v_fast demo</h1>
<p>Small data2vec models, pretrained without labels, then judged by logistic regression on their frozen features.
They are minutes of training, not the published models.</p>
<p class="soft">{escape(", ".join([*versions, platform.platform()]))}</p>
{"".join(_section(run) for run in runs)}
</main>
</body>
</html>
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _section(run: RunSummary) -> str:
    about = run.about
    facts = {
        "Data": about["pretrain"],
        "Model": f"{run.parameters / 1e6:.2f} M parameters, {run.architecture}",
        "Updates": f"{run.metrics[-1]['update']:,}",
        "Time": f"{_duration(run.seconds)} on {run.device}",
        "Peak memory": f"{run.peak_memory / 2**20:,.0f} MiB",
    }
    terms = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    origin = ", ".join(about[key] for key in ("source", "license") if about.get(key))
    probes = "".join(_probe(question, result) for question, result in run.probes)
    return f"""<section aria-labelledby="{escape(run.name)}">
<h2 id="{escape(run.name)}">{escape(about["title"])}</h2>
<p class="soft">{escape(origin)}</p>
<dl>{terms}</dl>
{_picture(run)}
{probes or "<p>No labelled data here, so nothing was probed.</p>"}
</section>
"""


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _probe(question: str, result: ProbeResult) -> str:
    """Table of one probe and a sentence on what pretraining gained."""
    names = ["chance", *(row.name for row in result.rows)]
    tests = [result.chance, *(row.test_accuracy for row in result.rows)]
    trains = ["", *(f"{100 * row.train_accuracy:.1f}" for row in result.rows)]
    errors = ["", *(f"{100 * row.test_stderr:.1f}" for row in result.rows)]
    body = "".join(
        f'<tr class="{"pretrained" if name == "pretrained" else "other"}"><th scope="row">{escape(name)}</th>'
        f'<td>{train}</td><td>{100 * test:.1f}</td><td>{error}</td><td class="bar">'
        f'<div class="fill" style="width:{100 * test:.1f}%" aria-hidden="true"></div></td></tr>'
        for name, train, test, error in zip(names, trains, tests, errors, strict=True)
    )
    skipped = f" {len(result.skipped)} unreadable files were skipped." if result.skipped else ""
    return f"""<table>
<caption>{escape(question)}</caption>
<thead><tr><th scope="col">features</th><th scope="col">train %</th><th scope="col">test %</th>
<th scope="col">standard error</th><td></td></tr></thead>
<tbody>{body}</tbody>
</table>
<p class="soft">{result.num_train} examples to fit on, {result.num_test} to test; layer: {escape(str(result.layer))}.
{escape(gain(result))}{skipped}</p>
"""


def gain(result: ProbeResult) -> str:
    """One sentence: test accuracy, untrained to pretrained, and whether the difference exceeds two standard errors."""
    old, new = result.row("untrained"), result.row("pretrained")
    difference = 100 * (new.test_accuracy - old.test_accuracy)
    error = 100 * (old.test_stderr**2 + new.test_stderr**2) ** 0.5
    verdict = "" if abs(difference) > 2 * error else ", no clear difference"
    return (
        f"Untrained to pretrained: {100 * old.test_accuracy:.1f} % to {100 * new.test_accuracy:.1f} %, "
        f"{difference:+.1f} points (standard error {error:.1f}){verdict}."
    )


def _picture(run: RunSummary) -> str:
    first, last = run.metrics[0], run.metrics[-1]
    text = (
        f"Two curves over the updates. Loss: {first['loss']:.3f} at update {first['update']}, {last['loss']:.3f} at "
        f"update {last['update']}. Standard deviation of the targets: {first['target_var']:.3f}, then "
        f"{last['target_var']:.3f}; of the predictions: {first['pred_var']:.3f}, then {last['pred_var']:.3f}."
    )
    dark, light = (_plot(run.metrics, colour) for colour in ("#e6eaf0", "#1c2430"))
    return f"""<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">
<img src="{light}" alt="{escape(text)}"></picture>"""


def _plot(metrics: list[dict[str, Any]], colour: str) -> str:
    """Loss, and standard deviations, over the updates, as a data URL; transparent, with text and axes in ``colour``."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with rc_context({**dict.fromkeys(keys, colour), "font.size": 10, "axes.spines.top": False}):
        figure = Figure(figsize=(9.6, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        updates = [row["update"] for row in metrics]
        left.plot(updates, [row["loss"] for row in metrics], color="#3f83cc", label="loss")
        left.set_title("loss per masked position", fontsize=10)
        for (key, label, style), line in zip(CURVES, ("#d9822b", "#3f83cc"), strict=True):
            right.plot(updates, [row[key] for row in metrics], style, color=line, label=label)
        right.set_title("standard deviation (near zero: collapse)", fontsize=10)
        right.legend(frameon=False, labelcolor=colour)
        for axis in (left, right):
            axis.set_xlabel("update")
            axis.set_ylim(bottom=0)
            axis.spines["right"].set_visible(False)
            axis.grid(alpha=0.25, color=colour, linewidth=0.6)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=140, transparent=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

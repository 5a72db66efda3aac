"""Compares the arms of ``convergence.py``: statistics and figure.

Three checks for each modality, over the seeds that both arms have:

* beginning: loss of the fused arm over that of the plain one, less 1, at each of the first ``BEGINNING`` updates, where
  both arms still have nearly the same weights. Runs without dropout in float32 must agree to ``EXACT`` at each of the
  first ``EXACT_UPDATES``; others to ``CLOSE`` in the mean over updates and seeds.
* final loss, the mean of the last 10 % of updates: differences of the arms in pairs of a seed, and Student's 95 %
  interval of their mean (n - 1 degrees of freedom). "ok" if all of it is within ``EQUAL`` of the plain arm's loss, so
  that a larger difference is excluded; "FAILED" if it reaches beyond and all of it is on one side of 0; "undecided" if
  it reaches beyond and holds 0: so wide an interval says nothing.
* probe: the fused arm's mean accuracy is lower than the plain one's by at most the larger of two standard errors from
  seeds (sqrt(2 / n) times the pooled deviation) and one binomial standard error of the test set, which all seeds share.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from convergence_arms import ARMS
from scipy import stats

EXACT, EXACT_UPDATES = 1e-4, 20
CLOSE, BEGINNING = 5e-3, 40  # the presets warm up for so long; later, what dropout drew decides when a loss falls
LEVEL = 0.95
EQUAL = 0.02  # of the final loss: a difference that two arms may have and still be the same
OK, FAILED, UNDECIDED = "ok", "FAILED", "undecided"
SMOOTHED = 0.02  # of the updates: window of the curves that are drawn
COLORS = {"plain": "black", "fused": "C1"}
ALIKE = ("updates", "data")  # what all runs of a modality have in common
Runs = dict[str, dict[int, dict[str, Any]]]  # arm -> seed -> run


@dataclass(frozen=True)
class Check:
    """One comparison: a difference, and how large it may be."""

    name: str
    text: str
    verdict: str  # OK, FAILED or UNDECIDED


def _decided(name: str, text: str, passed: bool) -> Check:
    return Check(name, text, OK if passed else FAILED)


def load(files: Sequence[str | Path], seeds: int) -> tuple[dict[str, Runs], dict[str, Any]]:
    """Runs by modality, and the environment of all of them.

    Raises:
        ValueError: a file that ``convergence.py run`` did not write, a run that is there twice, fewer than ``seeds``
            seeds, a seed that one arm lacks, or runs that do not belong together.
    """
    if seeds < 2:
        raise ValueError(
            f"seeds must be at least 2, as their spread is what differences are compared with, got {seeds}"
        )
    found: dict[str, Runs] = {}
    environments: list[dict[str, Any]] = []
    for file in files:
        try:
            record = json.loads(Path(file).read_text(encoding="utf-8"))
            runs, environment = record["runs"], record["environment"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} must be a file of convergence.py run: {type(error).__name__}: {error}") from error
        environments.append(environment)
        for run in runs:
            of_arm = found.setdefault(run["modality"], {arm: {} for arm in ARMS})[run["arm"]]
            if run["seed"] in of_arm:
                raise ValueError(f"{file}: {run['modality']}, seed {run['seed']}, {run['arm']} is there twice")
            of_arm[run["seed"]] = run
    if not found:
        raise ValueError(f"no runs in {', '.join(map(str, files))}")
    for name in ("commit", "device", "torch"):
        if len(values := {environment[name] for environment in environments}) > 1:
            raise ValueError(f"the files must be of one {name}, got {', '.join(sorted(values))}")
    for modality, runs in found.items():
        _check_complete(modality, runs, seeds)
    return found, environments[0]


def _check_complete(modality: str, runs: Runs, seeds: int) -> None:
    plain, fused = (set(runs[arm]) for arm in ARMS)
    if plain != fused:
        lacking = [
            f"{arm} lacks {sorted(other - own)}"
            for arm, own, other in (("plain", plain, fused), ("fused", fused, plain))
            if other - own
        ]
        raise ValueError(f"{modality}: both arms must have the same seeds; {', '.join(lacking)}")
    if len(plain) < seeds:
        raise ValueError(f"{modality}: there must be at least {seeds} seeds, got {sorted(plain)}")
    every = [run for arm in ARMS for run in runs[arm].values()]
    for name in ALIKE:
        if len(values := {run[name] for run in every}) > 1:
            raise ValueError(f"{modality}: runs must have the same {name}, got {', '.join(map(str, values))}")
    if ours := {op for run in runs["plain"].values() for op in run["ops"] if op.startswith("d2v_fast")}:
        raise ValueError(f"{modality}: the plain arm must use no operator of ours, it used {', '.join(sorted(ours))}")
    if not all(any(op.startswith("d2v_fast") for op in run["ops"]) for run in runs["fused"].values()):
        raise ValueError(f"{modality}: the fused arm must use operators of ours, a run used none")


def losses(runs: Runs, arm: str) -> np.ndarray:
    """[seeds, updates], seeds rising; NaN where a loss was not finite."""
    return np.array([runs[arm][seed]["curves"]["loss"] for seed in sorted(runs[arm])], float)


def standard_error(a: np.ndarray, b: np.ndarray) -> float:
    """Of the difference of the means of a and b [n]: sqrt(2 / n) times the pooled deviation."""
    return math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / len(a))


def checks(runs: Runs) -> list[Check]:
    """The comparisons of one modality; see the module's text."""
    plain, fused = (losses(runs, arm) for arm in ARMS)
    bad = [arm for arm, x in zip(ARMS, (plain, fused), strict=True) if not np.isfinite(x).all()]
    if bad:
        return [Check("loss", f"not finite in the {' and the '.join(bad)} arm", FAILED)]
    return [_beginning(runs, plain, fused), _final(plain, fused), _probe(runs)]


def _beginning(runs: Runs, plain: np.ndarray, fused: np.ndarray) -> Check:
    exact = all(run["exact"] for run in runs["fused"].values())
    if exact:
        largest = np.abs(fused / plain - 1)[:, :EXACT_UPDATES].max()
        text = f"at most {largest:.1e} apart in {EXACT_UPDATES} updates, {EXACT:.0e} allowed (float32, no dropout)"
        return _decided("beginning", text, bool(largest <= EXACT))
    first = (fused / plain - 1)[:, :BEGINNING]
    mean = first.mean()
    text = f"fused / plain - 1 = {mean:+.3%} in the mean of {first.shape[1]} updates, {CLOSE:.1%} allowed"
    return _decided("beginning", text, bool(abs(mean) <= CLOSE))


def _final(plain: np.ndarray, fused: np.ndarray) -> Check:
    count = max(1, plain.shape[1] // 10)
    a, b = (x[:, -count:].mean(1) for x in (plain, fused))
    difference, seeds = b - a, len(a)
    half = stats.t.ppf((1 + LEVEL) / 2, seeds - 1) * difference.std(ddof=1) / math.sqrt(seeds)
    low, high = (100 * (difference.mean() + side * half) / a.mean() for side in (-1, 1))
    text = (
        f"plain {a.mean():.4f}, fused {b.mean():.4f}: {difference.mean():+.4f}; from {seeds} pairs of a seed between "
        f"{low:+.2f} % and {high:+.2f} % with {LEVEL:.0%}, {100 * EQUAL:.0f} % allowed"
    )
    if max(abs(low), abs(high)) <= 100 * EQUAL:
        return Check("final loss", text, OK)
    return Check("final loss", text, UNDECIDED if low <= 0 <= high else FAILED)


def _probe(runs: Runs) -> Check:
    rows = [[{row["name"]: row for row in runs[arm][seed]["probe"]} for seed in sorted(runs[arm])] for arm in ARMS]
    if not all(row.keys() >= {"pretrained", "untrained"} for arm in rows for row in arm):
        return Check("probe", "a run has no probe", FAILED)
    a, b = (np.array([row["pretrained"]["test_accuracy"] for row in arm]) for arm in rows)
    binomial = float(np.mean([row["pretrained"]["test_stderr"] for row in rows[0]]))
    untrained = np.mean([row["untrained"]["test_accuracy"] for row in rows[0]])
    allowed, difference = max(2 * standard_error(a, b), binomial), b.mean() - a.mean()
    text = (
        f"plain {a.mean():.1%}, fused {b.mean():.1%} (untrained {untrained:.1%}): {100 * difference:+.2f} points, "
        f"{100 * -allowed:.2f} allowed"
    )
    return _decided("probe", text, bool(difference >= -allowed))


def _smooth(y: np.ndarray) -> np.ndarray:
    """Means over a window that ends at each update, shorter at the beginning."""
    window = max(1, round(SMOOTHED * len(y)))
    sums = np.concatenate([[0.0], y.cumsum()])
    ends = np.arange(1, len(y) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw(found: dict[str, Runs], environment: dict[str, Any], file: Path) -> None:
    """Curves of both arms over each other, below them their ratio, a column for each modality."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(found), 5.5), layout="constrained")
    axes = figure.subplots(2, len(found), squeeze=False, sharex="col", height_ratios=(3, 1))
    for (modality, runs), (top, bottom) in zip(found.items(), axes.T, strict=True):
        curves = {arm: [_smooth(y) for y in losses(runs, arm)] for arm in ARMS}
        for arm, style in zip(ARMS, ("-", "--"), strict=True):
            precision = next(iter(runs[arm].values()))["precision"]
            for i, y in enumerate(curves[arm]):
                label = f"{arm}, {precision}" if i == 0 else None
                top.plot(np.arange(1, len(y) + 1), y, style, color=COLORS[arm], linewidth=1, label=label)
        for a, b in zip(*curves.values(), strict=True):
            bottom.plot(np.arange(1, len(a) + 1), 100 * (b / a - 1), color=COLORS["fused"], linewidth=0.8)
        bottom.axhline(0, color="black", linewidth=0.8)
        top.set_title(f"{modality}, {len(curves['plain'])} seeds", fontsize=9)
        top.set_yscale("log")
        top.legend(fontsize=8)
        bottom.set_xlabel("update", fontsize=8)
    axes[0, 0].set_ylabel("loss", fontsize=8)
    axes[1, 0].set_ylabel("fused / plain - 1, %", fontsize=8)
    figure.suptitle(f"{environment['device']}, torch {environment['torch']}, {environment['commit'][:10]}", fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)

"""What the table of measured losses of the drop-in should hold, from the results of a GPU (``publish.py --rules``)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from measured import STEP, Results, Row

EAGER = ("fairseq", "eager")  # what runs in place of ours: upstream's code, as written or as others write it today
UNDER_COMPILE = ("fairseq+compile", "eager+compile")
Size = tuple[int, int]


def first_tensor(op: str, sizes: Mapping[str, Any]) -> Size | None:
    """Rows and width of the first tensor of a seam in a case of an op's benchmark; None where no seam has that op."""
    if op == "bias_gelu":
        return sizes["rows"], sizes["width"]
    if op == "masked_smooth_l1" and sizes["gathered"]:
        return sizes["N"], sizes["C"]
    if op in ("masked_smooth_l1", "layer_targets", "residual_dropout_layer_norm", "pos_conv"):
        return sizes["B"] * sizes["T"], sizes["C"]
    if op in ("attention", "bias_attention"):
        return sizes["B"] * sizes["T"], sizes["H"] * sizes["D"]
    if op == "conv_encoder":
        return sizes["B"], sizes["S"]
    if op == "encoder":
        return sizes["B"] * sizes["T"], sizes["size"].get("dim", 768)
    return None


@dataclass(frozen=True)
class Loss:
    """A size at which all that was timed in place of ours was faster, in every case of that size."""

    op: str
    dtype: str
    size: Size
    ratio: float  # their time over ours: of the slowest of them, in the case that is best for ours
    compiled: bool


def ratio(rows: Mapping[str, Row], names: tuple[str, ...]) -> float | None:
    """Time of the slowest of ``names`` over ours, None where neither was timed."""
    ours = rows.get("d2v_fast")
    times = [rows[name].ms for name in names if name in rows and rows[name].ms is not None]
    return max(times) / ours.ms if ours is not None and ours.ms is not None and times else None


def losses(results: Results) -> tuple[list[Loss], list[str]]:
    """Losses beyond the noise at sizes that a rule can name, and in words those that none can."""
    ratios: dict[tuple[str, str, Size, bool], list[float]] = {}
    others = []
    for op, case in dict.fromkeys(row.key[:2] for row in results.rows if row.op != STEP):
        modes = [mode for mode in ("fwd+bwd", "fwd") if case in results.cases(op, mode)]
        rows = results.providers(op, case, modes[0])
        ours = rows.get("d2v_fast")
        for compiled, names in ((False, EAGER), (True, UNDER_COMPILE)):
            found = ratio(rows, names)
            if found is None:
                continue
            size = first_tensor(op, ours.values["sizes"])
            if size is None:
                if found < 1:
                    others.append(f"{op}, {case}{', compiled' if compiled else ''}: {found:.3f}")
                continue
            key = op, ours.values["dtype"], size, compiled
            # equal programs differ by the noise, so that a smaller difference decides nothing
            ratios.setdefault(key, []).append(found if found < 1 - (ours.get("noise") or 0.0) else max(found, 1.0))
    lost = [Loss(op, d, size, max(all_), c) for (op, d, size, c), all_ in ratios.items() if max(all_) < 1]
    return sorted(lost, key=lambda one: (one.op, one.compiled, one.ratio)), others


def proposal(results: Results) -> str:
    """``SLOWER`` and ``TIMED`` of ``d2v_fast/patches/_rules.py`` with this GPU's entries in place of older ones."""
    from d2v_fast.patches import _rules

    device, folder = results.environment["device"], results.folder.name
    lost, others = losses(results)
    lines = [f"# {device}, commit {results.environment['commit']}", "SLOWER: tuple[Slower, ...] = ("]
    for old in _rules.SLOWER:
        if old.device != device:
            lines.append(f"    {old!r},")
    for one in lost:
        (rows, width), flag = one.size, ", compiled=True" if one.compiled else ""
        entry = f"{one.op!r}, {device!r}, torch.{one.dtype}, ({rows}, {rows}), ({width}, {width}), {one.ratio:.3f}"
        lines.append(f"    Slower({entry}, '{folder}/{one.op}.json'{flag}),")
    lines.append(")")
    timed = {**_rules.TIMED, device: frozenset(row.op for row in results.rows if row.op != STEP and row.ms is not None)}
    lines.append("TIMED: dict[str, frozenset[str]] = {")
    lines += [f"    {name!r}: frozenset({{{', '.join(map(repr, sorted(ops)))}}})," for name, ops in timed.items()]
    lines.append("}")
    lines += [f"# slower than theirs, and in no seam: {text}" for text in others]
    return "\n".join(lines)

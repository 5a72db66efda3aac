"""Holds the results of a GPU against the limits: what was reached, what was not, and where torch.compile is faster."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from limits import MEASURES, SHARES, TIMES, Headline, Limit, Reach
from measured import COMPILED, Results, Row


@dataclass(frozen=True)
class Found:
    """A number in the case where it is worst, or why there is none."""

    reach: Reach
    value: float | None = None
    case: str = ""
    against: str = ""  # the provider that it was compared with
    missing: str = ""

    @property
    def holds(self) -> bool | None:
        return None if self.value is None else self.reach.holds(self.value)

    def words(self) -> str:
        """The number and what it is of; the limit too where it was not reached."""
        if self.value is None:
            return f"not measured: {self.missing}"
        unit = MEASURES[self.reach.measure].format(names=self.against)
        text = f"{number(self.value)} {unit}"
        return text if self.holds else f"{text} ({'at most' if self.reach.most else 'asked:'} {self.reach.limit:g})"


def number(value: float) -> str:
    """Three digits, or all before the point."""
    if value == 0:
        return "0"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"


def find(results: Results, limit: Limit, reach: Reach) -> Found:
    """The worst number of the cases of ``limit``."""
    names = results.cases(limit.op, limit.mode)
    worst: Found | None = None
    for pattern in (*limit.cases, *limit.also):
        fits = [name for name in names if fnmatchcase(name, pattern)]
        if not fits and pattern in limit.cases:
            return Found(reach, missing=f"no rows of {pattern.rstrip('*, ')}")
        for name in fits:
            found = measure(reach, results.providers(limit.op, name, limit.mode), name)
            if found.value is None:
                return found
            if worst is None or (found.value > worst.value) == reach.most:
                worst = found
    return worst or Found(reach, missing="no rows")


def measure(reach: Reach, rows: dict[str, Row], case: str) -> Found:
    """One number of one case."""
    mine = rows.get(reach.of)
    if mine is None or mine.ms is None:
        return Found(reach, missing=f"{reach.of} in {case}: {mine.status if mine else 'no row'}")
    if not reach.over:
        value = mine.get(reach.measure)
        return Found(reach, value, case, missing=f"no {reach.measure} in {case}")
    key = SHARES.get(reach.measure) or TIMES[reach.measure]
    theirs = [rows[name] for name in reach.over if name in rows]
    numbers = [(row.get(key), row.provider) for row in theirs if row.get(key) is not None]
    if not numbers or mine.get(key) is None:
        why = ", ".join(f"{row.provider} {row.status}" for row in theirs) or f"no row of {' or '.join(reach.over)}"
        return Found(reach, missing=f"{why} in {case}")
    theirs_least, name = min(numbers)
    if theirs_least <= 0 or mine.get(key) <= 0:
        return Found(reach, missing=f"{key} of nothing in {case}")
    ratio = mine.get(key) / theirs_least
    value = 100 * ratio if reach.measure in SHARES or reach.measure == "time_share" else 1 / ratio
    return Found(reach, value, case, name)


def verdict(results: Results, limit: Limit) -> str:
    """The last cell of a line of the tables."""
    found = [find(results, limit, reach) for cell in limit.cells for reach in cell]
    bad = [one.words() for one in found if one.holds is False]
    good = [one.words() for one in found if one.holds]
    unknown = [one.words() for one in found if one.holds is None]
    said = []
    if bad:
        said.append(f"**not reached**: {'; '.join(bad)}")
    if good:
        said.append(f"reached: {'; '.join(good)}")
    return ". ".join([*said, *dict.fromkeys(unknown)])


@dataclass(frozen=True)
class Line:
    """A row of the README's first table."""

    name: str
    reference: Row | None
    compiled: Row | None
    ours: Row
    share: float | None
    share_of: str


def headline(results: Results, line: Headline) -> Line | None:
    """What was timed of a headline; None where ours was not."""
    for name in results.cases(line.op, line.mode):
        rows = results.providers(line.op, name, line.mode)
        if fnmatchcase(name, line.case) and "ours" in rows and rows["ours"].ms is not None:
            reference = rows.get(line.reference) if line.reference else rows.get("reference", rows.get("fairseq"))
            reference = reference if reference and reference.ms is not None else None
            share, unit = rows["ours"].get(line.share), MEASURES[line.share].removeprefix("% ")
            return Line(line.name, reference, fastest_compiled(rows), rows["ours"], share, unit)
    return None


def fastest_compiled(rows: dict[str, Row]) -> Row | None:
    """The fastest of plain PyTorch under torch.compile."""
    found = [rows[name] for name in COMPILED if name in rows and rows[name].ms is not None]
    return min(found, key=lambda row: row.ms, default=None)


def lost_to_compile(results: Results) -> list[tuple[Row, Row]]:
    """Ours and torch.compile's, for each case in which it is faster; the largest loss first."""
    found = []
    for op, case, mode in dict.fromkeys(row.key[:3] for row in results.rows):
        rows = results.providers(op, case, mode)
        ours, theirs = rows.get("ours"), fastest_compiled(rows)
        if ours is not None and ours.ms is not None and theirs is not None and theirs.ms < ours.ms:
            found.append((ours, theirs))
    return sorted(found, key=lambda pair: pair[1].ms / pair[0].ms)

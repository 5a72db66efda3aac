"""Writes the results of a GPU into the tables of the repository, between markers.

python benchmarks/publish.py benchmarks/results/nvidia-h100-80gb-hbm3    # from these results
python benchmarks/publish.py                # again from those that results/published.json names, if any
python benchmarks/publish.py --check        # writes nothing; exit status 1 when a table is not what it would write
python benchmarks/publish.py RESULTS --rules    # prints what d2v_fast/patches/_rules.py should hold

Generated: the status and the table on the first screen of README.md; in results/README.md the last two columns of the
truth tables, the tables of limits (from limits.py) with what was measured, and where torch.compile is faster. Every
number comes from the JSON of the benchmarks or is a ratio of two of them. "Validated" means that the tests of an op
passed in a GPU check at the commit of the results. Without results the tables say so.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from gpu_parts import SANITIZERS, find_parts
from limits import HEADLINES as WANTED
from limits import NOT_RUN, TABLES, Table
from measured import Results, Row, UnfitResults, load
from publish_rules import proposal
from verdicts import Line, headline, lost_to_compile, number, verdict

ROOT = Path(__file__).resolve().parent.parent
OPS = {"ema_update_": "ema", "adamw_ema_": "adamw_ema", "conv0_norm_gelu": "conv0"}  # kernels called otherwise
EXTENSION_OPS = ("conv0", "pos_conv")
BEYOND = {  # what a GPU check says beside the ops: by which of its parts
    "updates that wait for nothing outside of log steps": ("gpu-test_data2vec", "gpu-test_optim"),
    "updates as CUDA graphs; LayerDrop, checkpointing": ("gpu-test_train_graph", "gpu-test_encoder_checkpointing"),
    "updates that give the same bits again": ("test_updates_repeat",),
    "the speech front-end, packed and padded": ("gpu-test_speech_frontend", "test_speech_frontend"),
    "the loss on ranks; one rank over NCCL: DDP, FSDP2, HSDP": ("test_data2vec_loss_ranks", "gpu-test_distributed_gpu"),
    "whole runs by the command over NCCL": ("gpu-test_distributed_gpu_runs",),
    "patched speech models": ("gpu-test_patches_audio",),
}
NOT_TIMED = "not yet"
STATUS = (
    "> Status: early. The training loop, all ops and the converters work and are tested on CPU; **nothing has been\n"
    "> timed on a GPU yet**, so no speed is claimed ([truth table](benchmarks/results/README.md))."
)
MARKER = re.compile(r"(<!-- publish\.py: (\w+) -->\n)(.*?)(<!-- end of \2 -->)", re.DOTALL)


@cache
def part_names() -> tuple[str, ...]:
    return tuple(part.name for part in find_parts())


def names_of(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", text)


def said(results: Results) -> str:
    """Device and commit, short."""
    return f"{results.environment['device']}, {results.environment['commit'][:10]}"


def outcome(results: Results, names: Sequence[str]) -> str:
    """Whether these parts of the GPU check passed at the commit of the results."""
    states = {name: results.parts.get(name, {"status": "not run"})["status"] for name in names}
    failed = [name for name, state in states.items() if state == "failed"]
    if failed:
        return f"**failed**: {', '.join(failed)} ({said(results)})"
    rest = [f"{name} {state}" for name, state in states.items() if state != "passed"]
    if len(rest) == len(names):
        return NOT_RUN
    return f"in part: {', '.join(rest)} ({said(results)})" if rest else f"yes: {said(results)}"


def validated(results: Results, op: str) -> str:
    """Whether the GPU tests of an op passed, and, of the extension's kernels, the sanitizers."""
    wanted = [name for name in part_names() if re.fullmatch(rf"(gpu-)?test_{op}(_\w+)?", name)]
    return outcome(results, [*wanted, *(SANITIZERS if op in EXTENSION_OPS else ())])


def timed(results: Results, op: str) -> str:
    """Whether all cases of an op were timed."""
    ours = [row for row in results.rows if row.op == op and row.provider == "d2v_fast"]
    done = [row for row in ours if row.ms is not None]
    if not done:
        return NOT_TIMED if not ours else f"**no**: {ours[0].status}"
    return f"yes: {said(results)}" if len(done) == len(ours) else f"{len(done)} of {len(ours)}: {said(results)}"


def backends(results: Results, names: list[str]) -> tuple[str, str]:
    """The last cells of backends of attention: by the tests of attention, and by the rows that have their names."""
    rows: dict[str, list[Row]] = {name: [] for name in names}
    for row in results.rows:
        if row.op == "attention" and row.provider in rows:
            rows[row.provider].append(row)
    absent = [name for name, found in rows.items() if found and all(row.status == "not installed" for row in found)]
    there = [name for name in names if name not in absent]
    note = f"; not installed: {', '.join(absent)}" if absent else ""
    valid = validated(results, "attention") + note if there else f"not installed: {said(results)}"
    done = [name for name in there if any(row.ms is not None for row in rows[name])]
    return valid, f"{', '.join(f'`{name}`' for name in done)}: {said(results)}" if done else NOT_TIMED


def truth(results: Results | None, block: str) -> str:
    """The block with the last two cells of every line replaced, heads left as they are."""
    lines = []
    for line in block.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        names = names_of(cells[0])
        if not line.startswith("|") or not names:
            lines.append(line)
            continue
        last = NOT_RUN, NOT_TIMED
        if results is not None:
            op = OPS.get(names[0], names[0])
            is_op = f"bench_{op}" in part_names()
            last = (validated(results, op), timed(results, op)) if is_op else backends(results, names)
        lines.append(f"| {' | '.join([*cells[:-2], *last])} |")
    return "\n".join(lines) + "\n"


def limits_table(results: Results | None, table: Table) -> str:
    """A table of limits, its last column from the results."""
    lines = [f"| {' | '.join((table.first, *table.columns, 'measured'))} |", "|---" * (len(table.columns) + 2) + "|"]
    for limit in table.limits:
        cells = list(limit.stated) or ["; ".join(reach.words() for reach in cell) for cell in limit.cells]
        if len(cells) != len(table.columns):
            raise ValueError(
                f"{limit.part} has {len(cells)} cells for the {len(table.columns)} columns of {table.name}"
            )
        last = limit.measured or (NOT_RUN if results is None else verdict(results, limit))
        lines.append(f"| {' | '.join([limit.part, *cells, last])} |")
    return "\n".join(lines) + "\n"


def beyond(results: Results | None) -> str:
    """What the tests of updates and ranks said."""
    lines = ["| What | Tests | On a GPU |", "|---|---|---|"]
    for what, names in BEYOND.items():
        tests = ", ".join(f"`{name}`" for name in names)
        lines.append(f"| {what} | {tests} | {NOT_RUN if results is None else outcome(results, names)} |")
    return "\n".join(lines) + "\n"


def compile_wins(results: Results | None) -> str:
    """Where plain PyTorch under torch.compile is faster than ours."""
    if results is None:
        return f"Where torch.compile is faster: {NOT_RUN}.\n"
    lost = lost_to_compile(results)
    if not lost:
        return f"torch.compile is faster in no case that was timed ({said(results)}).\n"
    lines = ["torch.compile is faster here:", "", "| op | case | mode | ours, ms | torch.compile, ms | | of ours |"]
    lines.append("|---" * 7 + "|")
    for ours, theirs in lost:
        cells = (ours.op, ours.case, ours.mode, number(ours.ms), number(theirs.ms), theirs.provider)
        lines.append(f"| {' | '.join(cells)} | {number(theirs.ms / ours.ms)} |")
    return "\n".join(lines) + "\n"


def source(results: Results | None) -> str:
    """What the tables were made from."""
    if results is None:
        return ""
    e = results.environment
    return (
        f"Measured on one {e['device']} on {e.get('date', 'an unknown day')}: driver {e['driver']}, CUDA {e['cuda']}, "
        f"PyTorch {e['torch']}, Triton {e['triton']}, extension {e['extension']}, commit `{e['commit']}`; raw results "
        f"and logs in [{results.folder.name}/]({results.folder.name}/summary.md).\n"
    )


def first_screen(results: Results | None) -> str:
    """Status and headlines for README.md."""
    if results is None:
        return STATUS + "\n"
    e = results.environment
    lines = [
        f"> Timed on one {e['device']} ({e.get('date', 'an unknown day')}; driver {e['driver']}, CUDA {e['cuda']}, "
        f"PyTorch {e['torch']}, Triton {e['triton']}; commit `{e['commit'][:10]}`).",
        "> [All results, what was not reached, and where torch.compile is faster](benchmarks/results/README.md).",
        "",
        "| One update, or one call | reference, ms | torch.compile, ms | ours, ms | reference / ours "
        "| torch.compile / ours | of the limit | peak MiB: reference, ours |",
        "|---" * 8 + "|",
    ]
    found = [line for wanted in WANTED if (line := headline(results, wanted)) is not None]
    return "\n".join([*lines, *map(headline_cells, found)]) + "\n"


def headline_cells(line: Line) -> str:
    """A row of the first table; a side that was not timed is a dash."""
    ms = [number(row.ms) if row else "–" for row in (line.reference, line.compiled, line.ours)]
    ratios = [number(row.ms / line.ours.ms) if row else "–" for row in (line.reference, line.compiled)]
    share = f"{number(line.share)} % {line.share_of}" if line.share is not None else "–"
    peaks = [row.get("peak_mib") if row else None for row in (line.reference, line.ours)]
    memory = ", ".join("–" if peak is None else f"{peak:.0f}" for peak in peaks)
    return f"| {' | '.join([line.name, *ms, *ratios, share, memory])} |"


def blocks(results: Results | None) -> dict[str, Callable[[str], str]]:
    """Name of a block -> what becomes of its text."""
    made: dict[str, Callable[[str], str]] = {f"truth{i}": lambda old: truth(results, old) for i in (1, 2, 3)}
    made |= {table.name: lambda old, table=table: limits_table(results, table) for table in TABLES}
    made["beyond"] = lambda old: beyond(results)
    made["compiled"] = lambda old: compile_wins(results)
    made["source"] = lambda old: source(results)
    made["headline"] = lambda old: first_screen(results)
    return made


FILES = {
    "README.md": ("headline",),
    "benchmarks/results/README.md": (
        "source", "truth1", "truth2", "beyond", "truth3", *(table.name for table in TABLES), "compiled",
    ),
}  # fmt: skip


def rewritten(text: str, results: Results | None, wanted: tuple[str, ...], file: str) -> str:
    """A file with its blocks made anew; ValueError where a marker is missing or unknown."""
    made = blocks(results)
    there = [name for _, name, _, _ in MARKER.findall(text)]
    if sorted(there) != sorted(wanted):
        raise ValueError(f"{file} must have the blocks {', '.join(wanted)}, got {', '.join(there) or 'none'}")
    return MARKER.sub(lambda m: f"{m[1]}{made[m[2]](m[3])}{m[4]}", text)


def rewritten_all(root: Path, results: Results | None) -> dict[str, str]:
    """The files that are not as they should be, and what they should be."""
    made = {}
    for name, wanted in FILES.items():
        old = (root / name).read_text(encoding="utf-8")
        new = rewritten(old, results, wanted, name)
        made |= {name: new} if new != old else {}
    return made


def published(root: Path) -> Results | None:
    """The results that ``published.json`` names, None where there is no such file."""
    file = root / "benchmarks" / "results" / "published.json"
    if not file.exists():
        return None
    named = json.loads(file.read_text(encoding="utf-8"))
    return load(file.parent / named["folder"], named["commit"])


def fit_to_publish(results: Results, root: Path) -> None:
    """Raises :class:`UnfitResults` for results that no reader could find or repeat."""
    commit = results.environment["commit"]
    if commit == "unknown" or commit.endswith("-dirty"):
        raise UnfitResults(f"results must be of a commit that says which code ran, got {commit}")
    if results.folder.resolve().parent != (root / "benchmarks" / "results").resolve():
        raise UnfitResults(f"results must lie in benchmarks/results, which the tables link to, got {results.folder}")


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", help="folder of one GPU; those published before by default")
    parser.add_argument("--commit", help="take only results of this commit")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--rules", action="store_true", help="print entries for d2v_fast/patches/_rules.py and stop")
    args = parser.parse_args(argv)
    try:
        results = load(args.results, args.commit) if args.results else published(root)
        if args.rules:
            if results is None:
                parser.error("--rules needs the folder of results")
            print(proposal(results))
            return 0
        if results is not None:
            fit_to_publish(results, root)
    except UnfitResults as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    stale = rewritten_all(root, results)
    if args.check:
        if stale:
            print(f"not what publish.py writes: {', '.join(stale)}; run python benchmarks/publish.py", file=sys.stderr)
        return 1 if stale else 0
    for name, text in stale.items():
        (root / name).write_text(text, encoding="utf-8")
    if results is not None:
        named = {"folder": results.folder.name, "commit": results.environment["commit"]}
        file = root / "benchmarks" / "results" / "published.json"
        file.write_text(json.dumps(named, indent=1) + "\n", encoding="utf-8")
    print(f"written: {', '.join(stale)}" if stale else "nothing to change")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Other tiles than those of ``config_for``: each is checked against float64 and timed beside the one the kernel has.

python benchmarks/tune.py layer_norm_gelu                       # on a GPU: the main cases, forward and backward tiles
python benchmarks/tune.py bias_attention --cases vision --kernel dq dkv --budget 120
python benchmarks/tune.py ema --list                            # what would be tried
TRITON_INTERPRET=1 python benchmarks/tune.py bias_gelu --smoke  # on a CPU: small inputs, checks only

A tile is varied by halving and doubling what ``TILES`` names, at most two of its numbers at a time; those that do not
fit a processor become a row that says so. Nothing is changed: a tile that is faster by more than the noise, at all
sizes that matter, is written into ``config_for`` by hand, with prediction and result in docs/kernels.md. Times are of
the whole op in a mode, so that a tile of backward is judged by what the op takes.
"""

import argparse
import importlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import driver
import torch
from cli import select
from common import DEVICE, RESULTS, device_folder, write_json
from driver import OURS, Bench, Case, Results

STEPS = {"num_stages": (-1, 1)}  # added; other numbers are halved and doubled
COUNTS = ("max_programs", "tiles")  # need not be powers of two
LARGEST = {"num_warps": 32, "num_stages": 4}
ELEMENTS = (1, 256)  # of a tile, for a thread: fewer leave threads idle, more spill for certain
NOT_LAUNCHED = "not launched"  # status of a row
SAME = 0.02  # of the time: differences below are no reason to change a tile
Config = Any  # a LaunchConfig of the kernels


class NoLaunch(LookupError):
    """The op makes no launch of this kernel in this case."""


class NoTile(ValueError):
    """A change that leads to no tile, or to one that is slow for certain: it is not tried."""


@dataclass(frozen=True)
class Tile:
    """One kernel's tile: whose ``config_for`` says it, when it is meant, and which of its numbers are varied."""

    kernel: str
    module: str  # of d2v_fast.kernels
    vary: tuple[str, ...]
    mode: str = "fwd+bwd"
    meant: Callable[..., bool] = lambda *args, **kwargs: True  # called with the arguments of ``config_for``


def _pass(backward: bool) -> Callable[..., bool]:
    return lambda x, backward=False, *rest, wanted=backward, **kwargs: backward == wanted


def _attention(kernel: str) -> Callable[..., bool]:
    return lambda q, k, name: name == kernel


ROWS, PERSISTENT = ("block_n", "num_warps"), ("block_n", "num_warps", "max_programs")
CHUNKS, MATRIX = ("chunk", "block", "num_warps"), ("block_m", "block_n", "num_warps", "num_stages")
TILES: dict[str, tuple[Tile, ...]] = {
    "layer_norm_gelu": (
        Tile("forward", "layer_norm_gelu", ROWS, "fwd", _pass(False)),
        Tile("backward", "layer_norm_gelu", PERSISTENT, meant=_pass(True)),
    ),
    "residual_dropout_layer_norm": (
        Tile("forward", "residual_dropout_layer_norm", ROWS, "fwd", _pass(False)),
        Tile("backward", "residual_dropout_layer_norm", PERSISTENT, meant=_pass(True)),
    ),
    "bias_gelu": (Tile("both", "bias_gelu", ("block_n", "block_c", "num_warps", "max_programs")),),
    "data2vec_loss": (
        Tile("rows", "data2vec_loss", ("block_n", "tiles", "num_warps")),
        Tile("statistics", "layer_targets", ("block_t", "block_c_stats", "num_warps")),
    ),
    "layer_targets": (
        Tile("all", "layer_targets", ("block_t", "block_c_stats", "block_n", "num_warps"), "fwd"),
    ),
    "masked_smooth_l1": (Tile("both", "masked_smooth_l1", ("block_n", "block_d", "num_warps")),),
    "ema": (Tile("all", "chunks", CHUNKS, "fwd"),),
    "adamw_ema": (Tile("all", "chunks", CHUNKS, "fwd"),),
    "l2_norm": (Tile("all", "l2_norm", CHUNKS, "fwd"),),
    "bias_attention": (
        Tile("fwd", "bias_attention", MATRIX, "fwd", _attention("fwd")),
        Tile("dq", "bias_attention_grad", MATRIX, meant=_attention("dq")),
        Tile("dkv", "bias_attention_grad", MATRIX, meant=_attention("dkv")),
        Tile("dbias", "bias_attention_dbias", MATRIX, meant=_attention("dbias")),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """Numbers of a tile and what becomes of them: factors, or what is added (``STEPS``)."""

    by: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        return " ".join(f"{name}{f'{by:+d}' if name in STEPS else f'*{by:g}'}" for name, by in self.by) or "as it is"

    def apply(self, config: Config) -> Config:
        """The changed tile; raises :class:`NoTile` where there is none, such as a tile of half a row."""
        new = {}
        for name, by in self.by:
            old = getattr(config, name)
            value = old + by if name in STEPS else old * by
            value = math.ceil(value) if name in COUNTS else value
            if value != int(value) or not 1 <= value <= LARGEST.get(name, math.inf):
                raise NoTile(f"{name} would be {value:g}")
            new[name] = int(value)
        changed = replace(config, **new)
        sizes = asdict(changed)
        if "chunk" in sizes and sizes["chunk"] % sizes["block"]:
            raise NoTile(f"chunk {sizes['chunk']} is no multiple of block {sizes['block']}")
        each = elements(changed) / (32 * changed.num_warps)
        if not ELEMENTS[0] <= each <= ELEMENTS[1]:
            raise NoTile(f"{each:g} elements for a thread")
        return changed


def elements(config: Config) -> int:
    """Elements of one tile of ``config``."""
    sizes = {name: value for name, value in asdict(config).items() if name.startswith("block")}
    if "block_t" in sizes:  # statistics and rows are tiles of their own
        return sizes["block_t"] * sizes["block_c_stats"]
    return math.prod(sizes.values())


def changes(tile: Tile) -> list[Change]:
    """What is tried, one number at a time first; a grid of all of them would take an hour."""
    singles = {name: STEPS.get(name, (0.5, 2)) for name in tile.vary}
    found = [Change(((name, by),)) for name, steps in singles.items() for by in steps]
    for a, b in combinations(singles, 2):
        found += [Change(((a, x), (b, y))) for x, y in product(singles[a], singles[b])]
    return found


@contextmanager
def changed(tile: Tile, change: Change) -> Iterator[list[Config]]:
    """Inside, the launcher gets the changed tile. Yields the tiles it got, none if it did not ask."""
    module = importlib.import_module(f"d2v_fast.kernels.{tile.module}")
    original, seen = module.config_for, []

    def config_for(*args: Any, **kwargs: Any) -> Config:
        config = original(*args, **kwargs)
        if tile.meant(*args, **kwargs):
            config = change.apply(config)
            seen.append(config)
        return config

    with patch.object(module, "config_for", config_for):
        yield seen


def gpu_ms(bench: Bench, case: Case, mode: str, function: Callable[..., Results]) -> float:
    """Median milliseconds of a call, inputs taking turns."""
    from timing import gpu_time, input_sets

    provider = bench.providers[OURS]
    first = driver.make_inputs(bench, case, provider)
    seeds = range(1, input_sets(sum(x.nbytes for x in driver._tensors(first))))
    inputs = [first, *(driver.make_inputs(bench, case, provider, seed) for seed in seeds)]
    calls = [driver.make_call(bench, case, mode, function, x, provider.around) for x in inputs]
    return gpu_time(calls, provider.capturable).p50


def try_change(
    bench: Bench, case: Case, tile: Tile, change: Change, exact: Results,
    time_of: Callable[[Bench, Case, str, Callable[..., Results]], float] | None,
) -> dict[str, Any]:  # fmt: skip
    """A row: the tile, its error in terms of the limit, its time, or the reason why there is none."""
    row: dict[str, Any] = {"case": case.name, "kernel": tile.kernel, "mode": tile.mode, "change": str(change)}
    provider = bench.providers[OURS]
    function = provider.load()
    try:
        with changed(tile, change) as seen:
            row["error_of_limit"] = driver.check(bench, case, tile.mode, provider, function, exact)
            if not seen:
                raise NoLaunch
            row["tile"] = asdict(seen[-1])
            if time_of is not None:
                row["ms"] = time_of(bench, case, tile.mode, function)
        row["status"] = "ok"
    except NoLaunch:
        row["status"] = NOT_LAUNCHED
    except NoTile as error:
        row["status"] = f"not tried: {error}"
    except driver.WrongResult as error:
        row["status"] = f"wrong: {error}"
    except Exception as error:  # does not compile, or takes more registers or shared memory than there are
        row["status"] = f"failed: {driver.reason(error)}"
    return row


def tune(
    bench: Bench, case: Case, tile: Tile, deadline: float,
    time_of: Callable[[Bench, Case, str, Callable[..., Results]], float] | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of all changes until ``deadline`` (of ``time.monotonic``); the tile as it is comes first and last."""
    as_it_is = Change(())
    kind = {"case": case.name, "kernel": tile.kernel, "mode": tile.mode}
    exact = driver.exact_results(bench, case, tile.mode)
    rows = [try_change(bench, case, tile, as_it_is, exact, time_of)]
    if rows[0]["status"] == NOT_LAUNCHED:
        return rows
    if rows[0]["status"] != "ok":
        raise RuntimeError(f"{case.name}, {tile.kernel}: the tile as it is: {rows[0]['status']}")
    for change in changes(tile):
        if time.monotonic() > deadline:
            rows.append({**kind, "change": str(change), "status": "skipped: out of time"})
            continue
        rows.append(try_change(bench, case, tile, change, exact, time_of))
    rows.append(try_change(bench, case, tile, as_it_is, exact, time_of))
    return rows


def report(rows: list[dict[str, Any]]) -> list[str]:
    """The tiles from the fastest on, and a sentence on the best of them. ``rows`` of one case and kernel."""
    first, last = rows[0], rows[-1]
    timed = [row for row in rows[1:-1] if row["status"] == "ok" and row.get("ms")]
    lines = [f"{first['case']}, {first['kernel']} ({first['mode']})"]
    if first["status"] == NOT_LAUNCHED:
        return [f"{lines[0]}: {NOT_LAUNCHED} in this case"]
    if not first.get("ms"):
        good, tried = (sum(row["status"].startswith(s) for row in rows) for s in ("ok", ("ok", "wrong", "failed")))
        return [*lines, f"  right: {good} of {tried} tiles; not timed", *_refused(rows)]
    base = statistics.mean([first["ms"], last["ms"]])
    noise = max(abs(first["ms"] - last["ms"]) / base, SAME)
    for row in sorted(timed, key=lambda row: row["ms"]):
        lines.append(f"  {row['change']:34} {row['ms']:9.4f} ms  {row['ms'] / base:6.3f}  {_numbers(row['tile'])}")
    best = min(timed, key=lambda row: row["ms"], default=None)
    lines.append(f"  {'as it is':34} {base:9.4f} ms   1.000  {_numbers(first['tile'])}  (noise {noise:.1%})")
    if best is not None and best["ms"] < base * (1 - noise):
        lines.append(f"  faster: {best['change']}, {base / best['ms']:.2f} times")
    else:
        lines.append("  none is faster by more than the noise")
    return lines + _refused(rows)


def _refused(rows: list[dict[str, Any]]) -> list[str]:
    shown = [row for row in rows if row["status"].startswith(("wrong", "failed", "skipped"))]
    return [f"  {row['change']:34} {row['status']}" for row in shown]


def _numbers(tile: dict[str, int | None]) -> str:
    return ", ".join(f"{name} {value}" for name, value in tile.items() if value is not None)


def parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    result.add_argument("op", choices=list(TILES))
    result.add_argument("--kernel", nargs="+", help="tiles of the op to vary; all of them if not given")
    result.add_argument("--cases", default="main", help='"main", "all", or a part of the names')
    result.add_argument("--budget", type=float, default=240, help="seconds after which no tile is begun")
    result.add_argument(
        "--smoke", action="store_true", help="small inputs, checks only; on a CPU with TRITON_INTERPRET=1"
    )
    result.add_argument("--list", action="store_true", help="print what would be tried")
    result.add_argument("--json", type=Path, help="default on a GPU: benchmarks/results/<gpu>/tune/OP.json")
    result.add_argument("--commit", help="what to record where the checkout has no .git")
    return result


def main(argv: list[str] | None = None) -> None:
    arguments = parser()
    args = arguments.parse_args(argv)
    tiles = TILES[args.op]
    known = [tile.kernel for tile in tiles]
    if args.kernel and not set(args.kernel) <= set(known):
        arguments.error(f"--kernel must be of {', '.join(known)}; got {' '.join(args.kernel)}")
    tiles = [tile for tile in tiles if not args.kernel or tile.kernel in args.kernel]
    if args.list:
        for tile in tiles:
            print("\n  ".join([f"{tile.kernel} ({tile.mode})", *map(str, changes(tile))]))
        return
    timed = DEVICE.type == "cuda" and not args.smoke
    if DEVICE.type == "cpu" and not (args.smoke and os.environ.get("TRITON_INTERPRET") == "1"):
        arguments.error("no GPU here: --smoke under TRITON_INTERPRET=1 checks the tiles, --list names them")
    bench: Bench = importlib.import_module(f"bench_{args.op}").BENCH
    cases = select(bench, args.cases, args.smoke)
    if not cases:
        arguments.error(f"--cases must be main, all or a part of: {', '.join(case.name for case in bench.cases)}")
    out = args.json or (RESULTS / device_folder() / "tune" / f"{args.op}.json" if timed else None)
    deadline, rows, work = time.monotonic() + args.budget, [], list(product(cases, tiles))
    for i, (case, tile) in enumerate(work):
        torch.manual_seed(0)
        now = time.monotonic()
        until = now + max(deadline - now, 0) / (len(work) - i)
        found = tune(bench, case, tile, until, gpu_ms if timed else None)
        print("\n".join(report(found)), flush=True)
        rows += found
        if out:
            write_json(out, {"benchmark": "tune", "op": bench.op, "results": rows}, args.commit)
    if out:
        print(f"written: {out}")
    if all(row["status"] == NOT_LAUNCHED for row in rows):
        sys.exit("nothing was launched")
    bad = ("wrong",) if timed else ("wrong", "failed")
    if any(row["status"].startswith(bad) for row in rows):
        sys.exit("a tile gives another result; see above")


if __name__ == "__main__":
    main()

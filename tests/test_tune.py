"""``benchmarks/tune.py``: changes of tiles reach the launchers, and what is wrong, impossible or no faster is said."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import driver  # noqa: E402
import tune  # noqa: E402

from d2v_fast.kernels import bias_attention, bias_gelu, chunks, layer_norm_gelu  # noqa: E402
from d2v_fast.kernels.attention_tiles import LaunchConfig as MatrixTile  # noqa: E402
from d2v_fast.kernels.rows import LaunchConfig as RowTile  # noqa: E402


def tile_of(op: str, kernel: str) -> tune.Tile:
    return next(tile for tile in tune.TILES[op] if tile.kernel == kernel)


def test_every_op_with_a_table_of_tiles_can_be_tuned():
    """A new kernel with a ``config_for`` of its own must be listed."""
    sources = (BENCHMARKS.parent / "kernels").glob("*.py")
    with_tiles = {file.stem for file in sources if "\ndef config_for(" in file.read_text(encoding="utf-8")}
    users = {"attention_tiles": {"bias_attention", "bias_attention_grad", "bias_attention_dbias"}}
    wanted = set().union(*(users.get(name, {name}) for name in with_tiles))
    assert {tile.module for tiles in tune.TILES.values() for tile in tiles} == wanted


@pytest.mark.parametrize("op", tune.TILES)
def test_there_is_a_benchmark_and_the_mode_is_one_of_its(op):
    bench = __import__(f"bench_{op}").BENCH
    assert {tile.mode for tile in tune.TILES[op]} <= set(bench.modes)


def test_changes_vary_one_number_first_then_two():
    found = [str(change) for change in tune.changes(tile_of("layer_norm_gelu", "forward"))]
    assert found[:4] == ["block_n*0.5", "block_n*2", "num_warps*0.5", "num_warps*2"]
    assert found[4:] == [f"block_n*{a} num_warps*{b}" for a in (0.5, 2) for b in (0.5, 2)]
    assert "num_stages+1" in [str(change) for change in tune.changes(tile_of("bias_attention", "dq"))]


@pytest.mark.parametrize(
    ("config", "by", "message"),
    [
        (RowTile(1, 1024, 4, 132), ("block_n", 0.5), "block_n would be 0.5"),
        (RowTile(1, 1024, 1, 132), ("num_warps", 0.5), "num_warps would be 0.5"),
        (RowTile(64, 1024, 32, 132), ("num_warps", 2), "num_warps would be 64"),
        (RowTile(64, 512, 4, 132), ("block_n", 2), "512 elements for a thread"),
        (RowTile(1, 32, 1, 132), ("num_warps", 2), "0.5 elements for a thread"),
        (MatrixTile(64, 64, 4, num_stages=1), ("num_stages", -1), "num_stages would be 0"),
        (chunks.LaunchConfig(1024, 1024, 4), ("block", 2), "chunk 1024 is no multiple of block 2048"),
    ],
)
def test_what_is_no_tile_is_not_tried(config, by, message):
    with pytest.raises(tune.NoTile, match=message):
        tune.Change((by,)).apply(config)


def test_counts_are_rounded_up():
    assert tune.Change((("max_programs", 0.5),)).apply(RowTile(4, 512, 4, 3)).max_programs == 2


def test_the_changed_tile_is_what_the_launcher_asks_for():
    x = torch.empty(8, 512)
    before = layer_norm_gelu.config_for(x), layer_norm_gelu.config_for(x, backward=True)
    with tune.changed(tile_of("layer_norm_gelu", "backward"), tune.Change((("num_warps", 2),))) as seen:
        assert layer_norm_gelu.config_for(x) == before[0]
        assert seen == []
        assert layer_norm_gelu.config_for(x, backward=True).num_warps == 2 * before[1].num_warps
    assert len(seen) == 1
    assert (layer_norm_gelu.config_for(x), layer_norm_gelu.config_for(x, backward=True)) == before


def test_a_tile_of_another_kernel_of_the_op_is_left_as_it_is():
    q = torch.empty(1, 64, 2, 64)
    with tune.changed(tile_of("bias_attention", "fwd"), tune.Change((("block_m", 0.5),))) as seen:
        whole = bias_attention.config_for(q, q, "dq")
        assert seen == []
        assert bias_attention.config_for(q, q, "fwd").block_m * 2 == whole.block_m


def fake_bench(launch=True, factor=1.0) -> driver.Bench:
    """Doubles x; ``factor`` is what a changed tile makes of it."""

    def double(x, **_) -> dict:
        tile = bias_gelu.config_for(x) if launch else None
        return {"y": x * (2 * factor if tile and tile.max_programs != 3 else 2)}

    return driver.Bench(
        op="double",
        cases=[],
        smoke=[],
        inputs=lambda dtype, n: {"x": torch.randn(n, 512).to(dtype)},
        exact=lambda x: {"y": 2 * x},
        providers={driver.OURS: driver.ours(double)},
        minimal_bytes=lambda case, mode: 1,
    )


CASE = driver.Case("case", "float32", {"n": 8}, {})
TILE = tune.Tile("both", "bias_gelu", ("max_programs",), "fwd")


def run(bench, times=None, deadline=float("inf")):
    left = iter(times or ())
    return tune.tune(bench, CASE, TILE, deadline, (lambda *_: next(left)) if times else None)


@pytest.mark.parametrize(
    ("times", "sentence"),
    [
        ((1.0, 1.0, 0.8, 1.0), "faster: max_programs*2, 1.25 times"),
        ((1.0, 1.0, 0.99, 1.0), "none is faster by more than the noise"),
        ((1.0, 1.0, 0.8, 1.6), "none is faster by more than the noise"),  # the tile as it is took 1.0 and 1.6
    ],
)
def test_a_tile_is_named_if_it_is_faster_by_more_than_the_noise(times, sentence):
    lines = tune.report(run(fake_bench(), times))
    assert sum(sentence in line for line in lines) == 1
    assert sum(" ms " in line for line in lines) == 3


def test_a_wrong_tile_is_not_timed():
    rows = run(fake_bench(factor=1.01), (1.0, 1.0))
    assert [row["status"][:5] for row in rows] == ["ok", "wrong", "wrong", "ok"]
    assert sum("wrong" in line for line in tune.report(rows)) == 2


def test_an_op_without_such_a_launch_says_so():
    assert tune.report(run(fake_bench(launch=False))) == ["case, both (fwd): not launched in this case"]


def test_the_budget_is_kept():
    rows = run(fake_bench(), deadline=0.0)
    assert [row["status"] for row in rows] == ["ok", "skipped: out of time", "skipped: out of time", "ok"]


def test_the_tile_as_it_is_must_be_right():
    bench = fake_bench()
    wrong = driver.Bench(**{**vars(bench), "exact": lambda x: {"y": 3 * x}})
    with pytest.raises(RuntimeError, match="case, both: the tile as it is: wrong"):
        run(wrong)


def call(*arguments: str, interpret: str = "0", **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / "tune.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, **options)


def test_real_kernels_under_the_interpreter(tmp_path):
    result = call("l2_norm", "--smoke", "--cases", "float32", "--json", str(tmp_path / "l2.json"), interpret="1")
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "l2.json").read_text(encoding="utf-8"))["results"]
    tiles = {tuple(row["tile"].items()) for row in rows if row["status"] == "ok"}
    assert len(tiles) > 10
    assert not any(row["status"].startswith(("wrong", "failed")) for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_works():
    result = call("ema")
    assert result.returncode == 2
    assert "no GPU here" in result.stderr

"""Whole runs on several ranks: four, two and one in turn, faults of a single rank, signals, the command."""

import json
import os
from pathlib import Path

import pytest
import text_runs
import torch
import torch.distributed as dist
from checks import INTERPRET
from torchrun import launch, torchrun

from d2v_fast.train import checkpoint, load_config, loop, pretrain
from d2v_fast.train.errors import ConfigError
from d2v_fast.train.logging import read_metrics

pytestmark = pytest.mark.skipif(INTERPRET or not dist.is_gloo_available(), reason="needs gloo; on the reference")
UPDATES = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    text_runs.write_text(folder / "text")
    return folder


def overrides(folder: Path, out: str, *more: str) -> list[str]:
    own = [f"updates={UPDATES}", "optim.lr=0.01", "schedule.warmup_updates=1", "log_every=1", "checkpoint_every=100"]
    own += ["distributed.timeout=60"]  # less than a launch may take, so that a hang says where
    return text_runs.overrides(folder / "text", folder / out, *own, *more)


@pytest.fixture(scope="module")
def four(folder):
    """On four ranks: a whole run, and the first updates of another one, as two replicas of two shards."""
    first = overrides(folder, "parts", "stop_after=3", "distributed.mode=hsdp", "distributed.shard_size=2")
    return launch(
        "distributed_runs.py",
        {"whole": {"overrides": overrides(folder, "whole")}, "first": {"overrides": first}},
        folder,
        ranks=4,
    )


@pytest.fixture(scope="module")
def two(folder, four):
    """On two ranks: the next updates of that one, and runs in which something goes wrong on one rank."""
    hsdp = ("distributed.mode=hsdp", "distributed.shard_size=1")
    cases = {
        "second": {"overrides": overrides(folder, "parts", "stop_after=3", "accumulate=2", "workers=1")},
        "other batch": {"overrides": overrides(folder, "parts", "accumulate=1")},
        "other settings": {"overrides": overrides(folder, "x"), "of_rank": {"1": ["optim.lr=0.5", "seed=3"]}},
        "failing loader": {"overrides": overrides(folder, "fail"), "fail": {"rank": 1, "call": 5}},
        "failing loader, shards": {
            "overrides": overrides(folder, "fail2", "distributed.mode=fsdp2"),
            "fail": {"rank": 0, "call": 4},
        },
        "nothing readable": {"overrides": overrides(folder, "empty"), "empty": {"rank": 1, "call": 3}},
        "nan": {"overrides": overrides(folder, "nan"), "nan": {"rank": 1, "call": 3}},
        "nan, shards": {
            "overrides": overrides(folder, "nan2", "distributed.mode=fsdp2"),
            "nan": {"rank": 1, "call": 3},
        },
        "SIGTERM": {
            "overrides": overrides(folder, "term"),
            "signal": {"rank": 1, "call": 2, "number": "SIGTERM"},
        },
        "SIGINT": {
            "overrides": overrides(folder, "int", *hsdp),
            "signal": {"rank": 0, "call": 2, "number": "SIGINT"},
        },
        "skipped": {
            "overrides": overrides(folder, "skipped"),
            "skipped": {"0": [["a"], ["b"], [], ["b", "c"]], "1": [["a"], ["c"], ["b"], ["a"]]},
        },
        "too many skipped": {
            "overrides": overrides(folder, "skipped2"),
            "skipped": {str(rank): [[f"{rank}{i}"] for i in range(UPDATES)] for rank in (0, 1)},
        },
        "full disk": {"overrides": overrides(folder, "full", "stop_after=2"), "close": {"rank": 0, "call": 1}},
        "uneven": {"overrides": overrides(folder, "y", "distributed.mode=hsdp", "distributed.shard_size=3")},
    }
    return launch("distributed_runs.py", cases, folder, ranks=2)


def test_items_that_several_ranks_could_not_read_count_once(folder, two):
    assert all(result["finished"] for result in two["skipped"])
    assert [row["skipped_files"] for row in read_metrics(folder / "skipped")] == [1, 3, 3, 3, 3, 3, 3, 3]


def test_items_that_could_not_be_read_are_bounded_for_all_ranks_together(folder, two):
    """Each has met six of them, which is few, but they are different ones."""
    for result in two["too many skipped"]:
        assert result["error"] == "DataError" and result["everywhere"], result
        assert "12 of 200 items could not be read (6.00%)" in result["message"]
    assert checkpoint.checkpoints(folder / "skipped2")[-1].name == "checkpoint-00000006"  # nothing is lost


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.read(checkpoint.checkpoints(folder)[-1])["model"]
    return {name: x.double() for name, x in found.items() if x.is_floating_point()}


def gap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Relative norm of the difference of all parameters."""
    assert a.keys() == b.keys()
    size = sum(x.square().sum() for x in b.values())
    return (sum((a[name] - b[name]).square().sum() for name in a) / size).sqrt().item()


def test_ranks_agree(four, two):
    for name, results in {**four, **two}.items():
        assert len({(r.get("updates"), r.get("finished"), r.get("checkpoint")) for r in results}) == 1, name
        assert len({r["model"] for r in results if "model" in r}) <= 1, name  # ddp: bit for bit
    assert all(r["finished"] and r["updates"] == UPDATES for r in four["whole"])


def test_four_two_and_one_rank_equal_an_uninterrupted_run(folder, four, two):
    """Sharded and replicated on four, replicated on two, alone: same data, masks, dropout, layers and logs."""
    assert [r["updates"] for r in (four["first"][0], two["second"][0])] == [3, 6]
    result = pretrain(load_config("text_demo", overrides(folder, "parts", "accumulate=4")))
    assert result.finished
    whole, start = weights(folder / "whole"), weights(folder / "nan")  # the other one only for the scale of things
    assert gap(weights(folder / "parts"), whole) < 1e-6 < 1e-2 < gap(start, whole)
    rows = [(row["update"], row["masked"], row["epoch"], row["loss"]) for row in read_metrics(folder / "parts")]
    wanted = [(row["update"], row["masked"], row["epoch"], row["loss"]) for row in read_metrics(folder / "whole")]
    assert [row[:3] for row in rows] == [row[:3] for row in wanted] and len(rows) == UPDATES
    assert [row[3] for row in rows] == pytest.approx([row[3] for row in wanted], rel=1e-5)


def test_another_number_of_micro_batches_is_refused(two):
    messages = {r["error"]: r["message"] for r in two["other batch"]}
    assert "accumulate=2" in messages["CheckpointError"]


def test_different_settings_are_refused_and_named(folder, two):
    for result in two["other settings"]:
        assert result["error"] == "ConfigError"
        assert "optim.lr: 0.01 on rank 0, 0.5 on rank 1; seed: 1 on rank 0, 3 on rank 1" in result["message"]
    assert not (folder / "x").exists()


@pytest.mark.parametrize(
    ("name", "out", "rank", "done"), [("failing loader", "fail", 1, 4), ("failing loader, shards", "fail2", 0, 3)]
)
def test_an_error_of_one_rank_ends_all_with_everything_saved(folder, two, name, out, rank, done):
    failed, other = two[name][rank], two[name][1 - rank]
    assert (failed["error"], failed["message"]) == ("DataError", "the disk is gone")
    assert other["error"] == "TrainingStopped"
    assert other["message"] == f"update {done + 1} failed on rank {rank}: the disk is gone"
    assert [p.name for p in checkpoint.checkpoints(folder / out)] == [f"checkpoint-{done:08d}"]


def test_a_log_that_cannot_be_closed_loses_nothing(folder, two):
    first, other = two["full disk"]
    assert first["error"] == "CheckpointError" and "quota exceeded" in first["message"].lower()
    assert other["message"] == f"the last log failed on rank 0: {first['message']}"
    assert [p.name for p in checkpoint.checkpoints(folder / "full")] == ["checkpoint-00000002"]


def test_a_rank_without_readable_data_keeps_step(folder, two, monkeypatch):
    """The update is that of the other micro-batches, as one process makes it that cannot read this one either."""
    assert all(r["finished"] for r in two["nothing readable"])
    real, calls = loop.batches, []

    def batches(*args, **kwargs):
        for epoch, index, batch in real(*args, **kwargs):
            calls.append(batch)
            yield epoch, index, None if len(calls) == 6 else batch  # the second one of the third update

    monkeypatch.setattr(loop, "batches", batches)
    pretrain(load_config("text_demo", overrides(folder, "empty alone", "accumulate=2")))
    assert gap(weights(folder / "empty"), weights(folder / "empty alone")) < 1e-6
    rows = [read_metrics(folder / out) for out in ("empty", "empty alone")]
    assert [row["loss"] for row in rows[0]] == pytest.approx([row["loss"] for row in rows[1]], rel=1e-5)


@pytest.mark.parametrize("out", ["nan", "nan2"])
def test_a_nan_of_one_rank_skips_the_update_on_all(folder, two, out):
    rows = read_metrics(folder / out)
    assert [row["skipped"] for row in rows] == [0, 0, 1, 0, 0, 0, 0, 0]
    assert all(x.isfinite().all() for x in weights(folder / out).values())


@pytest.mark.parametrize(("name", "interrupted"), [("SIGTERM", False), ("SIGINT", True)])
def test_a_signal_to_one_rank_stops_all_after_the_same_update(two, name, interrupted):
    """It comes in the second update, after the vote, and so is heard in the third."""
    for result in two[name]:
        assert (result["updates"], result["finished"], result["interrupted"]) == (3, False, interrupted)
        assert result["checkpoint"] == "checkpoint-00000003"


def test_shards_have_to_divide_the_ranks(two):
    assert all("shard_size must divide the 2 ranks, got 3" in r["message"] for r in two["uneven"])


def test_an_update_takes_one_sum_and_a_log_step_one_exchange(two):
    """On the control group; saves and the start and end of a session gather what they need."""
    for result in two["nan"]:
        assert result["counts"]["sum"] == UPDATES and result["counts"]["exchange"] == UPDATES  # log_every=1
    assert two["second"][0]["counts"]["sum"] == 3


def test_command_under_torchrun(folder):
    """As typed in the README; rank 0 alone prints, and an error that all have is printed once."""
    command = ("-m", "d2v_fast", "pretrain", "text_demo")
    done = torchrun(2, *command, *overrides(folder, "cli", "updates=2", "distributed.mode=fsdp2"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [json.loads(line)["update"] for line in lines[:-1]] == [1, 2]
    assert lines[-1].startswith("update 2: loss ")
    assert done.stderr.count("blocks of 16") == 1
    stopped = ("guards.after_updates=1", "guards.min_target_var=50")
    done = torchrun(2, *command, *overrides(folder, "cli2", *stopped))
    assert done.returncode == 1 and done.stderr.count("the representations have collapsed") == 1
    assert (folder / "cli2" / "checkpoint-00000002").exists()


def test_half_an_environment_is_refused(folder, monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"says WORLD_SIZE=2, but not RANK, .*start all ranks by torchrun"):
        pretrain(load_config("text_demo", overrides(folder, "z")))

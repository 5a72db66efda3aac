"""A run with one rank on a GPU, by the command: saved from shards, gone on with as a replica; and in bfloat16."""

import math

import matplotlib  # noqa: F401  this and typer: what the command needs, and imports late
import pytest
import torch.distributed as dist
import typer  # noqa: F401
from checks import INTERPRET
from test_distributed_runs import UPDATES, gap, overrides, weights
from torchrun import torchrun

from d2v_fast.train import checkpoint, load_config, loop
from d2v_fast.train.logging import read_metrics

pytestmark = pytest.mark.skipif(INTERPRET or not dist.is_gloo_available(), reason="needs gloo; on the reference")


def check(folder, device: str) -> None:
    (folder / "text").mkdir()
    words = ["red", "green", "blue", "one", "two", "three", "sun", "moon", "star", "rain", "snow", "wind"]
    lines = [" ".join(words[(i * k + k) % 12] for k in range(1, 12)) for i in range(240)]
    (folder / "text" / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    how = (f"device={device}", "precision=fp32", "workers=1", "checkpoint_every=2", "log.tensorboard=false")

    command = ("-m", "d2v_fast", "pretrain", "text_demo")
    shards = ("distributed.mode=fsdp2", "stop_after=3")
    done = torchrun(1, *command, *overrides(folder, "parts", *how, *shards), timeout=100)
    assert done.returncode == 0, done.stderr[-6000:]
    assert [p.name for p in checkpoint.checkpoints(folder / "parts")] == ["checkpoint-00000002", "checkpoint-00000003"]
    result = loop.pretrain(load_config("text_demo", overrides(folder, "parts", *how, "distributed.mode=ddp")))
    assert result.finished and result.updates == UPDATES
    loop.pretrain(load_config("text_demo", overrides(folder, "whole", *how)))
    start = ("updates=1", "optim.lr=0")
    loop.pretrain(load_config("text_demo", overrides(folder, "start", *how, *start)))
    whole = weights(folder / "whole")
    assert gap(weights(folder / "parts"), whole) < 1e-4 < 1e-2 < gap(weights(folder / "start"), whole)

    narrow = ("precision=bf16", "distributed.mode=fsdp2")
    loop.pretrain(load_config("text_demo", overrides(folder, "narrow", *how, *narrow)))
    wide, rounded = ([row["loss"] for row in read_metrics(folder / out)] for out in ("whole", "narrow"))
    assert all(map(math.isfinite, rounded)) and rounded == pytest.approx(wide, rel=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not dist.is_nccl_available(), reason="needs NCCL")
def test_a_run_with_one_rank_on_a_gpu(tmp_path):
    """Eight updates; float32 sums of a GPU come in any order, so that runs differ by rounding."""
    check(tmp_path, "cuda")

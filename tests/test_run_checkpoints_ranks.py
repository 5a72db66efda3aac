"""Checkpoints of runs on two ranks (gloo, CPU): any mode to any other and to one process; faults of one rank."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_folders import ALONE, DATA, Run, hidden, names, save_file

from d2v_fast.train import checkpoint
from d2v_fast.train.checkpoint import Progress

HERE = Path(__file__).parent


def state_of(run: Run) -> dict[str, torch.Tensor]:
    state = dict(run.model.state_dict())
    for name, p in run.model.named_parameters():
        state |= {f"optimizer.{name}.{key}": x for key, x in run.optimizer.state.get(p, {}).items()}
    return state


@pytest.fixture(scope="module")
def launch(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The folder in which two ranks have made their checks, and how they ended."""
    folder = tmp_path_factory.mktemp("ranks")
    run = Run(updates=2)
    run.config = replace(run.config, accumulate=2)  # as many micro-batches as two ranks take
    (folder / "one").mkdir()
    run.save(folder / "one", 1)
    save_file(folder / "one", run.model, run.optimizer, Progress(2), run.config)
    torch.save(state_of(run), folder / "one.state")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(HERE / "run_checkpoints_ranks.py"), str(folder)]
    return folder, subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_the_checks_of_both_ranks(launch):
    folder, done = launch
    assert {path.name for path in folder.glob("checked-*")} == {"checked-0", "checked-1"}, done.stderr


def test_one_process_goes_on(launch):
    """With twice the micro-batches, from replicas and from shards."""
    folder, _ = launch
    for mode in ("ddp", "fsdp2", "hsdp"):
        run = Run()
        run.config = replace(run.config, accumulate=2)
        path = checkpoint.newest_valid(folder / mode, ALONE)
        progress = checkpoint.restore(path, run.model, run.optimizer, ALONE, run.config, DATA)
        assert progress == Progress(1, 2, 3)
        want, got = torch.load(folder / f"{mode}.state"), state_of(run)
        assert want.keys() == got.keys()
        assert all(torch.equal(got[name], x) for name, x in want.items()), mode
        model = checkpoint.load_model(path).state_dict()
        assert all(torch.equal(x, want[name]) for name, x in model.items()), mode


def test_kill_9_of_one_rank_in_a_save(launch):
    """The launch ends with an error, the checkpoint before is whole, and the next start removes what is left."""
    folder, done = launch
    assert done.returncode != 0
    out = folder / "killed"
    assert checkpoint.newest_valid(out, ALONE) == out / "checkpoint-00000001" and len(hidden(out)) == 1
    Run().writer(out)
    assert hidden(out) == [] and names(out) == ["checkpoint-00000001"]

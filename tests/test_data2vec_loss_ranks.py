"""Spreads of the fused loss over several processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checks import DEVICE, RUNS_KERNELS
from eager_targets import eager_spread, eager_targets, make_layers, some_positions
from loss_cases import make_pred

from d2v_fast.ops import data2vec_loss
from d2v_fast.ops.data2vec_loss import _spread_over_ranks

pytestmark = pytest.mark.usefixtures("poison")


# rows of rank 0 and of rank 1; the second case leaves one rank without any, the last has too few for a spread
RANKS = [(7, 12), (0, 5), (1, 0)]
IGNORED = 2  # rows in front of each rank's


def rank_inputs(rank: int):
    torch.manual_seed(5)
    both = [
        (300.0 + torch.randn(n + IGNORED, 6), make_layers(2, 2, 10, 6), torch.arange(-IGNORED, n))
        for case in RANKS
        for n in case
    ]
    return both[rank::2]


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = []
    for pred, layers, positions in rank_inputs(rank):
        out = data2vec_loss(pred, layers, positions, norm="layer", all_reduce_variance=True)
        found.append((out.target_var.item(), out.pred_var.item()))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def fairseq_var(ranks: list[torch.Tensor]) -> float:
    """``compute_var`` of fairseq over processes, in float64: from the counts, sums and squares of each."""
    n = sum(len(y) for y in ranks)
    if n < 2:
        return 0.0
    total, squares = (sum(f(y.double()).sum(0) for y in ranks) for f in (lambda y: y, torch.square))
    return (squares / (n - 1) - total**2 / (n * (n - 1)) + 1e-6).sqrt().mean().item()


@pytest.mark.skipif(RUNS_KERNELS or not dist.is_gloo_available(), reason="two processes with gloo, on the reference")
def test_variance_over_two_processes(tmp_path):
    code = "import sys, test_data2vec_loss_ranks as t; t.run_rank(int(sys.argv[1]), sys.argv[2])"
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    ranks = [
        subprocess.Popen(  # not spawned by multiprocessing, which hands over whatever sys.path other tests left
            [sys.executable, "-c", code, str(rank), str(tmp_path)],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in ranks:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert found[0] == found[1]
    for index in range(len(RANKS)):
        inputs = [rank_inputs(rank)[index] for rank in range(2)]
        targets = [eager_targets([x.double() for x in xs], "layer", positions=i[IGNORED:]) for _, xs, i in inputs]
        expected = fairseq_var(targets), fairseq_var([p[IGNORED:] for p, _, _ in inputs])
        assert found[0][index] == pytest.approx(expected, rel=1e-5)


def test_one_packed_all_reduce_and_only_when_asked_for(monkeypatch):
    sent = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda x: sent.append(x.shape) or x.mul_(2))  # a twin on every rank
    positions = some_positions(2, 30)
    pred, layers = make_pred(len(positions), 12), make_layers(2, 2, 30, 12)
    data2vec_loss(pred, layers, positions)
    assert not sent
    out = data2vec_loss(pred, layers, positions, all_reduce_variance=True)
    assert sent == [(4 * 12 + 1,)]
    torch.testing.assert_close(out.pred_var, eager_spread(torch.cat((pred, pred)).double()).float())


def test_nan_survives_the_all_reduce(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda x: None)
    moments = torch.ones(2, 2, 3, device=DEVICE)
    moments[1, 0, 1] = float("nan")
    assert _spread_over_ranks(moments, torch.tensor(5, device=DEVICE)).isnan().tolist() == [False, True]

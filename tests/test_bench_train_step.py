"""The benchmark of whole training steps: all sides compute the same, and ours needs less of the CPU than fairseq's."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checks import INTERPRET
from tiny import NO_DROPOUT, tiny_batch, tiny_config
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import bench_train_step
import gpu_summary
import step_gpu
import step_peers
import step_plain

from d2v_fast.nn import Data2Vec

MODALITIES = ["speech", "text", "image"]
LIMIT = 1.3  # of the whole model; convolutions are most of two layers' step, so that it is far above
pytestmark = [
    pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not to be timed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmark itself runs on this machine's GPU"),
]


def without_dropout(modality):
    config = tiny_config(modality, "fairseq", **NO_DROPOUT)
    if modality == "text":
        config = replace(config, frontend=replace(config.frontend, dropout=0.0))
    return config


@pytest.mark.parametrize("modality", MODALITIES)
def test_plain_step_computes_the_same(modality):
    """Loss, metrics, gradients, and weights after a step; none of our ops is called."""
    config, batch = without_dropout(modality), tiny_batch(without_dropout(modality))
    ours, plain = Data2Vec(config).train(), Data2Vec(step_plain.plain_config(config)).train()
    plain.load_state_dict(ours.state_dict())
    want = ours(batch)
    with step_plain.plain_ops():
        got = plain(batch)
    for a, b in zip(got, want, strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-4)
    got.loss.backward()
    want.loss.backward()
    for (name, p), q in zip(plain.named_parameters(), ours.named_parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q[1].grad, rtol=1e-3, atol=1e-4, msg=name)
    plain.zero_grad()
    before = [p.clone() for p in plain.parameters()]
    step_plain.plain_step(plain, bench_train_step.OPTIM)(batch)
    assert not any(torch.equal(p, old) for p, old in zip(plain.head.parameters(), before[-2:], strict=False))


@pytest.mark.parametrize("modality", MODALITIES)
def test_providers_make_steps(modality):
    config, batch = without_dropout(modality), tiny_batch(without_dropout(modality))
    for name in ("d2v_fast", "patched", "as written", "eager"):
        step = step_gpu.provider(name, config, bench_train_step.OPTIM, bench_train_step.peer_step)
        if step is None:
            assert modality != "image" and name in ("patched", "as written")
            continue
        step(batch)
    with pytest.raises(RuntimeError, match="CUDA graphs need a CUDA device"):
        step_gpu.provider(step_gpu.GRAPH, config, bench_train_step.OPTIM, bench_train_step.peer_step)(batch)


@pytest.mark.parametrize("modality", ["text", "image"])
def test_flop(modality):
    """By formula and counted: student and teacher alike, the student three times as much with its backward."""
    config = replace(without_dropout(modality), targets=tiny_config(modality).targets)
    config = step_plain.plain_config(config)
    config = replace(config, encoder=replace(config.encoder, attention_backend="sdpa_math"))
    batch, counter = tiny_batch(config), FlopCounterMode(display=False)
    with counter, step_plain.plain_ops(), torch.no_grad():
        Data2Vec(config)(batch)
    assert step_gpu.step_tflop(config, batch) == pytest.approx(2 * counter.get_total_flops() / 1e12, rel=0.1)


def test_nothing_is_timed_that_computes_something_else(monkeypatch):
    load = step_peers.load

    def wrong(ours):
        peer = load(ours)
        return replace(peer, loss=lambda batch: 1.001 * peer.loss(batch))

    monkeypatch.setattr(step_peers, "load", wrong)
    with pytest.raises(SystemExit, match="nothing was timed"):
        bench_train_step.check_equal_losses("image")


def test_summary_has_the_steps(tmp_path):
    row = {"case": "text", "provider": "d2v_fast", "status": "ok", "ratio": 1.0, "ms": 2.0, "samples_per_s": 3.0}
    row |= {"percent_of_matmul": 4.0, "peak_mib": 5.0, "host_ms": 6.0, "launches": 7, "p20": 1.0, "p80": 1.0}
    rows = [row, {"case": "text", "provider": "torch.compile", "status": "skipped: out of time"}]
    record = {"environment": {"device": "x", "torch": "y"}, "benchmark": "train_step", "results": rows}
    (tmp_path / "train_step.json").write_text(json.dumps(record))
    text = gpu_summary.summary([], tmp_path)
    assert "| text | d2v_fast | 1.00 | 2.0 | 3.0 | 4.0 | 5 | 6.00 | 7 |" in text
    assert "| text | torch.compile | skipped: out of time |" in text
    assert "2.0 ms, 3.0 samples/s" in step_gpu.line(row) and "out of time" in step_gpu.line(rows[1])


def test_faster_than_fairseq(capsys):
    """Processor time of one thread, two layers and the whole front-end: neither other programs nor waiting count."""
    pytest.importorskip("fairseq", reason="needs ve-fairseq (requirements/peers.txt)")
    assert torch.get_num_threads() == 1
    found = bench_train_step.ratios(bench_train_step.measure("speech", rounds=1, layers=2))
    with capsys.disabled():
        for name, r in found.items():
            print(f"\nspeech step, two layers, one thread: processor time of fairseq / {name} = {r['processor']:.2f}")
    assert found["d2v_fast"]["processor"] > LIMIT
    assert found["patched"]["processor"] > 1

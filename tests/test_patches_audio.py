"""fairseq's ``Data2VecAudioModel`` patched against not: same weights, masks and layers, dropout off."""

import copy

import numpy as np
import pytest
import torch
from parity import assert_equal

pytest.importorskip("fairseq_peer")

from fairseq_pairs import NORMS
from patched import allow_meta, perturb, same_as_upstream
from patched_audio import EVEN, ODD, assert_same, batch, pair, run, trained, upstreams

import d2v_fast
from d2v_fast.patches._core import PARTS, is_ours


@pytest.mark.parametrize("norm", NORMS)
def test_targets(norm, monkeypatch):
    theirs, ours, patch = pair(norm)
    assert_same(theirs, ours, monkeypatch)
    assert_same(theirs, ours, monkeypatch, batch(1, ODD, padded=True))
    assert not patch.fallbacks()


@pytest.mark.parametrize("samples", [EVEN, ODD])
@pytest.mark.parametrize("padded", [False, True])
def test_batches(samples, padded, monkeypatch):
    theirs, ours, patch = pair()
    assert_same(theirs, ours, monkeypatch, batch(2, samples, padded))
    assert not patch.fallbacks()


def test_a_row_without_frames(monkeypatch):
    """Upstream counts them from the end, and so computes all of it."""
    theirs, ours, patch = pair()
    inputs = batch(2, padded=True)
    inputs["padding_mask"][1, 100:] = True
    assert_same(theirs, ours, monkeypatch, inputs)
    assert not patch.fallbacks()


@pytest.mark.parametrize(
    "options",
    [
        {"loss_beta": 0.5, "loss_scale": 0.3},
        {"feature_grad_mult": 0.1},
        {"feature_grad_mult": 0.0},
        {"average_top_k_layers": 3},
        {"average_top_k_layers": 9},  # more than there are
    ],
)
def test_options(options, monkeypatch):
    theirs, ours, patch = pair(**options)
    assert_same(theirs, ours, monkeypatch, batch(3, ODD))
    assert not patch.fallbacks()


def test_masks_that_are_given(monkeypatch):
    theirs, ours, patch = pair()
    assert_same(theirs, ours, monkeypatch)  # others were drawn before
    mask = np.random.Generator(np.random.PCG64(0)).random((3, 24)) < 0.4  # rows of different counts
    for given in (mask, torch.from_numpy(mask)):
        assert_same(theirs, ours, monkeypatch, {**batch(4), "mask_indices": given})
    assert not patch.fallbacks()


def test_layerdrop(monkeypatch):
    """The same layers are left out, and have no gradient."""
    theirs, ours, patch = pair()
    theirs.encoder.layerdrop = ours.encoder.layerdrop = 0.5
    theirs.ema.model.layerdrop = ours.ema.model.layerdrop = 0.5  # draws, and drops nothing: it is in eval mode
    assert_same(theirs, ours, monkeypatch)
    assert any(p.grad is None for p in ours.encoder.layers.parameters())
    assert not patch.fallbacks()


def test_a_teacher_of_the_whole_model(monkeypatch):
    theirs = upstreams()
    theirs.cfg.ema_transformer_only = theirs.cfg.ema_layers_only = False
    theirs.ema = None
    theirs.set_num_updates(0)
    perturb(theirs.ema.model)
    ours = copy.deepcopy(theirs)
    patch = d2v_fast.patch(ours)
    assert_same(theirs, ours, monkeypatch, batch(5, padded=True))
    assert not patch.fallbacks()


@pytest.mark.parametrize("part", PARTS)
def test_every_switch(part, monkeypatch):
    theirs, ours, patch = pair(switches={part: False})
    assert_same(theirs, ours, monkeypatch, batch(6, ODD, padded=True))
    assert is_ours(ours.forward) == (part not in ("loss", "targets"))
    assert is_ours(ours.apply_mask) == (part != "masks")
    assert not patch.fallbacks()


def test_five_updates(monkeypatch):
    """Optimizer and teacher; the weights, the averages and the teacher itself."""
    theirs, ours, patch = pair()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=2e-5) for model in (theirs, ours)]
    for update in range(5):
        for model in (theirs, ours):
            model.set_num_updates(update)
        assert_same(theirs, ours, monkeypatch, batch(update, ODD if update % 2 else EVEN, padded=update % 2))
        for optimizer in optimizers:
            optimizer.step()
    for tensors in (
        lambda m: m.ema.fp32_params,
        lambda m: m.ema.model.state_dict(),
        lambda m: dict(m.named_parameters()),
    ):
        assert_equal(trained(tensors(ours)), trained(tensors(theirs)))
    assert not patch.fallbacks()


def test_checkpoints_go_both_ways(tmp_path, monkeypatch):
    theirs, ours, _ = pair()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for number, (saved, loaded) in enumerate(((ours, upstreams()), (theirs, copy.deepcopy(ours)))):
        perturb(saved)
        saved.set_num_updates(1)
        torch.save(saved.state_dict(), tmp_path / f"{number}.pt")
        perturb(loaded)
        loaded.set_num_updates(1)
        loaded.load_state_dict(torch.load(tmp_path / f"{number}.pt"))
        assert_equal(loaded.ema.fp32_params, saved.ema.fp32_params, 0)
        assert_same(saved, loaded, monkeypatch)


@pytest.mark.parametrize(("name", "least"), [("min_target_var", "target"), ("min_pred_var", "pred")])
def test_collapse_stops_the_run(name, least, monkeypatch):
    theirs, ours, _ = pair(**{name: 1e3})
    alone = np.zeros((3, 24), bool)
    alone[1, 3] = True  # has no spread
    for model in (theirs, ours):
        model.num_updates = 5000
        run(model, monkeypatch, batch())  # not in the first updates
        model.num_updates = 5001
        run(model, monkeypatch, {**batch(), "mask_indices": alone})
    messages = []
    for model in (theirs, ours):
        with pytest.raises(Exception, match=rf"{least} var is .* < 1000\.0, exiting") as caught:
            run(model, monkeypatch, batch())
        messages.append(str(caught.value).split())
    assert float(messages[0][3]) == pytest.approx(float(messages[1][3]), rel=1e-5)
    assert messages[0][:3] + messages[0][4:] == messages[1][:3] + messages[1][4:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype, monkeypatch):
    """As the trainer converts it: the student, and the teacher made of it with averages in float32."""
    theirs = upstreams().to(dtype)
    theirs.ema = None
    theirs.set_num_updates(0)
    ours = copy.deepcopy(theirs)
    patch = d2v_fast.patch(ours)
    inputs = {**batch(), "source": batch()["source"].to(dtype)}
    (want, _), (got, grads) = (run(model, monkeypatch, inputs) for model in (theirs, ours))
    same_as_upstream(got, want, 5e-3)
    assert all(x.dtype == dtype and x.isfinite().all() for x in grads.values())
    for model in (theirs, ours):
        model.set_num_updates(1)
    assert_equal(ours.ema.fp32_params, theirs.ema.fp32_params)
    assert not patch.fallbacks()


def test_spreads_over_ranks(tmp_path, monkeypatch):
    """With a process group of one the same values, from one collective."""
    _, ours, _ = pair()
    want, _ = run(ours, monkeypatch, batch())
    calls = []
    reduce = torch.distributed.all_reduce
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **more: calls.append(1) or reduce(*args, **more))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        got, _ = run(ours, monkeypatch, batch())
    finally:
        torch.distributed.destroy_process_group()
    same_as_upstream(got, want, 1e-6)
    assert len(calls) == 1


def test_nothing_waits_for_the_device(monkeypatch):
    """Forward, backward and the teacher's step where tensors have no values that could be read."""
    allow_meta(monkeypatch)
    ours = pair()[1].to("meta")
    ours.ema.model.to("meta")
    ours.ema.fp32_params = {name: x.to("meta") for name, x in ours.ema.fp32_params.items()}
    out = ours(batch()["source"].to("meta"))
    out["losses"]["regression"].backward()
    ours.set_num_updates(1)
    assert out["sample_size"] > 0
    assert {p.device.type for p in ours.parameters() if p.grad is not None} == {"meta"}


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch):
    """Equal to upstream; nothing waits for the device; a collapse stops the call after the one that sees it."""
    theirs, ours, patch = pair()
    for model in (theirs, ours):
        model.cuda().ema.model.cuda()
        model.ema.fp32_params = {name: x.cuda() for name, x in model.ema.fp32_params.items()}
    inputs = {"source": batch()["source"].cuda()}
    assert_same(theirs, ours, monkeypatch, inputs, 1e-3)
    ours.set_num_updates(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(**inputs)["losses"]["regression"].backward()
        ours.set_num_updates(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not patch.fallbacks()
    ours.num_updates, ours.cfg.min_target_var = 5001, 1e3
    ours(**inputs)
    with pytest.raises(Exception, match=r"target var is .* < 1000\.0, exiting"):
        ours(**inputs)

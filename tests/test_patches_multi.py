"""fairseq's data2vec 2.0 with our ops against itself without them: tiny models for speech, images and text.

There is no noise in front of the decoder and masks are given, so that both sides compute the same. Upstream's order of
the tokens that are left is one of an unstable sort: each side sorts the same masks the same way.
"""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from parity import assert_equal

pytest.importorskip("fairseq_peer")

import fairseq_multi_peer as peer
from fairseq_multi_peer import KINDS, same, step
from torch import nn

import d2v_fast
from d2v_fast.patches.fairseq import multi_attention
from d2v_fast.patches.fairseq.multi_attention import Alibi

CASES = {
    "audio": ("audio", {}),
    "audio, a scale for each layer": ("audio", {"part": {"learned_alibi_scale_per_layer": True}}),
    "audio, one scale for all": ("audio", {"part": {"learned_alibi_scale_per_head": False}}),
    "audio, fewer heads with ALiBi": ("audio", {"part": {"num_alibi_heads": 2}}),
    "audio, pre-norm, outputs as targets": ("audio", {"layer_norm_first": True, "end_of_block_targets": True}),
    "audio, one mask": ("audio", {"clone_batch": 1}),
    "image": ("image", {}),
    "image, wider decoder of even kernels": (
        "image",
        {"decoder": {"decoder_dim": 48, "decoder_kernel": 4, "decoder_groups": 8}},
    ),
    "image, no norms": ("image", {"layer_norm_target_layer": False, "norm_affine": False, "loss_scale": 2.0}),
    "text": ("text", {}),
    "text, batch norm, long projection": (
        "text",
        {"layer_norm_target_layer": False, "batch_norm_target_layer": True, "decoder": {"projection_layers": 2}},
    ),
    "text, two decoders": ("text", {"shared_decoder": peer.decoder_config()}),
}


def batch_of(kind, overrides):
    batch = peer.batch(kind)
    if overrides.get("clone_batch") == 1:
        batch["precomputed_mask"] = batch["precomputed_mask"][::2]
    return batch


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(case):
    kind, overrides = CASES[case]
    model = peer.build(kind, **overrides)
    # the gradients of two scales nearly cancel: upstream is 7e-6 from float64 there, ours 3e-6
    patch = same(model, batch_of(kind, overrides), 3e-5 if "fewer" in case else 1e-5)
    assert not patch.skipped
    assert not patch.fallbacks()


@pytest.mark.parametrize("kind", KINDS)
def test_masks_that_upstream_draws(kind):
    """By seeds from ids, for each clone its own; LayerDrop and the noise of the decoder by the same draws."""
    masks = {"mask_length": 1} if kind == "text" else {"mask_length": 3, "mask_prob": 0.4, "mask_prob_adjust": 0.1}
    part = {**masks, "mask_noise_std": 0.01}
    model, batch = peer.build(kind, part=part, layerdrop=0.5, depth=3), peer.batch(kind)
    del batch["precomputed_mask"]
    batch["id"] = torch.tensor([3, 7, 8])
    results = []
    for patched in (False, True):
        if patched:
            d2v_fast.patch(model)
        np.random.seed(1)
        torch.manual_seed(1)
        results.append(step(model, batch))
    (losses, grads, others), (got_losses, got_grads, got_others) = results
    assert got_others["masked_pct"] == others["masked_pct"]
    assert_equal(got_losses, losses)
    assert_equal(got_grads, grads)


def test_two_kinds_in_one_model():
    """Names of what is logged say which; and speech still has no tensor of biases."""
    model = peer.build("audio", "text")
    for kind in ("audio", "text"):
        patch = same(model, {**peer.batch(kind), "mode": kind.upper()})
        assert not patch.fallbacks()
        assert f"pred_var_{kind.upper()}" in step(model, {**peer.batch(kind), "mode": kind.upper()})[2]
        patch.revert()


def test_second_view_of_an_image():
    """Upstream's teacher reads it in place of the source."""
    model, batch = peer.build("image"), peer.batch("image")
    alone = step(model, batch)[0]["IMAGE_regression"]
    batch["target"] = torch.randn_like(batch["source"])
    same(model, batch)
    assert step(model, batch)[0]["IMAGE_regression"] != pytest.approx(alone.item(), rel=1e-3)


@pytest.mark.parametrize("spread", ["target", "pred"])
def test_collapse_stops_the_run(spread):
    model = peer.build("text", **{f"min_{spread}_var": 10.0})
    model.num_updates = 5001
    with pytest.raises(Exception, match=f"{spread}.var is .* < 10.0, exiting"):
        step(model, peer.batch("text"))
    d2v_fast.patch(model)
    with pytest.raises(Exception, match=f"{spread} var is .* < 10.0, exiting"):
        step(model, peer.batch("text"))


@pytest.mark.parametrize("kind", ["audio", "text"])
def test_padding(kind):
    model, batch = peer.build(kind), peer.batch(kind)
    length = batch["source"].shape[1]
    batch["padding_mask"] = torch.arange(length) >= torch.tensor([[length], [length * 3 // 4], [length // 2]])
    assert not same(model, batch).fallbacks()


def test_alibi_is_no_tensor(monkeypatch):
    """Neither student nor teacher makes it; and its scale has a gradient."""
    model = peer.build("audio")
    monkeypatch.setattr(Alibi, "dense", lambda self: pytest.fail("a bias [B, H, T, T] was made"))
    monkeypatch.setattr(peer.base, "masked_alibi", lambda *_: pytest.fail("a bias was gathered"))
    d2v_fast.patch(model)
    step(model, peer.batch("audio"))
    assert model.modality_encoders["AUDIO"].alibi_scale.grad.abs().min() > 0
    assert model.alibi_biases == model.ema.model.alibi_biases == {}


def test_scale_below_zero():
    """Counts as 0, and has no gradient."""
    model = peer.build("audio")
    scale = model.modality_encoders["AUDIO"].alibi_scale
    with torch.no_grad():
        scale[0, 0, 1] = -0.3
    same(model, peer.batch("audio"))
    assert scale.grad.flatten().count_nonzero() == 3


def test_first_call_without_gradients():
    """What it keeps for later calls does not stop them."""
    model, batch = peer.build("audio"), peer.batch("audio")
    losses, grads, _ = step(model, batch)
    d2v_fast.patch(model)
    with torch.inference_mode():
        model(**batch)
    got_losses, got_grads, _ = step(model, batch)
    assert_equal(got_losses, losses)
    assert_equal(got_grads, grads)


def test_attention_of_gpus(monkeypatch):
    """What the table takes there: the op with slopes and positions, here its reference."""
    monkeypatch.setattr(multi_attention, "attention", partial(multi_attention.attention, backend="bias_attention"))
    same(peer.build("audio"), peer.batch("audio"))


def test_alibi_becomes_a_tensor_for_others():
    slopes, positions = torch.rand(3), torch.randint(0, 50, (2, 7))
    want = -slopes[:, None, None] * (positions[:, None, :, None] - positions[:, None, None, :]).abs()
    bias, scale = Alibi(slopes, positions), torch.rand(1, 3, 1, 1)
    torch.testing.assert_close((bias * scale.type_as(bias)).dense(), want * scale)
    torch.testing.assert_close((scale.double().type_as(bias) * bias).dense(), want * scale)
    assert isinstance(bias * scale, Alibi)
    assert bias.shape == want.shape
    torch.testing.assert_close(bias * 2.0, want * 2.0)
    torch.testing.assert_close(bias * want, want * want)
    torch.testing.assert_close(torch.zeros(2, 3, 7, 7) + bias, want)
    torch.testing.assert_close(nn.functional.pad(bias, (1, 0)), nn.functional.pad(want, (1, 0)))


def test_gelu_of_gpus(monkeypatch):
    """Bias and GELU are one op there, but not with a dropout between the products."""
    monkeypatch.setattr(multi_attention, "runs_reference", lambda *_: False)
    calls, model = [], peer.build("image")
    monkeypatch.setattr(multi_attention, "bias_gelu", lambda x, b: calls.append(b) or nn.functional.gelu(x + b))
    same(model, peer.batch("image"))
    assert len(calls) == 6  # three blocks, student and teacher
    model = peer.build("image", activation_dropout=0.1)
    d2v_fast.patch(model)
    step(model, peer.batch("image"))
    assert len(calls) == 9  # the teacher's


def test_rates_of_dropout(monkeypatch):
    """Each of them reaches the op that does it, in training alone."""
    rates = {"attention_dropout": 0.1, "encoder_dropout": 0.2, "post_mlp_drop": 0.3}
    model = peer.build("text", **rates, end_drop_path_rate=0.4)
    d2v_fast.patch(model)
    seen = []

    def attention(*args, dropout_p, **options):
        seen.append(dropout_p)
        return args[2]

    def add_norm(x, residual, *args, p, row_scale, **options):
        seen.append((p, row_scale is not None))
        return x

    monkeypatch.setattr(multi_attention, "attention", attention)
    monkeypatch.setattr(multi_attention, "residual_dropout_layer_norm", add_norm)
    model.blocks[1](torch.randn(2, 5, 32))
    assert seen == [0.1, (0.2, True), (0.3, True)]
    seen.clear()
    model.eval().blocks[1](torch.randn(2, 5, 32))
    assert seen == [0.0, (0.0, False), (0.0, False)]


def test_dropout_trains():
    """With all of it on, losses are finite, differ from call to call, and every weight has a gradient."""
    rates = {"attention_dropout": 0.1, "encoder_dropout": 0.1, "post_mlp_drop": 0.1, "end_drop_path_rate": 0.2}
    model = peer.build("audio", part={"prenet_dropout": 0.1}, decoder={"input_dropout": 0.1}, **rates)
    expected = {name for name, grad in step(model, peer.batch("audio"))[1].items() if grad.any()}
    d2v_fast.patch(model)
    first, grads, _ = step(model, peer.batch("audio"))
    second, *_ = step(model, peer.batch("audio"))
    assert first != second
    assert {name for name, grad in grads.items() if grad.any()} == expected
    assert all(grad.isfinite().all() for grad in grads.values())


def test_updates():
    """Three updates with the teacher's: losses, weights and averages."""
    results = []
    for patched in (False, True):
        model = peer.build("audio")
        if patched:
            d2v_fast.patch(model)
        optimizer, losses = torch.optim.SGD(model.parameters(), 1e-3), []
        for update in range(3):
            model.set_num_updates(update + 1)
            losses.append(sum(step(model, peer.batch("audio", update))[0].values()))
            optimizer.step()
        results.append((torch.stack(losses), dict(model.named_parameters()), dict(model.ema.fp32_params)))
    (want_loss, want, averages), (loss, got, got_averages) = results
    assert_equal({"losses": loss}, {"losses": want_loss})
    assert_equal(got, want)
    assert_equal(got_averages, averages)


def test_criterion():
    """fairseq's criterion adds up what it is given: rows here, elements there."""
    from fairseq.criterions.model_criterion import ModelCriterion

    model = peer.build("image")
    criterion = ModelCriterion(SimpleNamespace(), loss_weights={}, log_keys=["pred_var", "target_var"], can_sum=True)
    sample = {"net_input": peer.batch("image"), "id": torch.arange(3)}
    want, want_size, want_log = criterion(model, sample)
    d2v_fast.patch(model)
    loss, size, log = criterion(model, sample)
    assert size == want_size
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert log.keys() == want_log.keys()
    assert {k: float(v) for k, v in log.items()} == pytest.approx({k: float(v) for k, v in want_log.items()}, rel=1e-5)


def test_features_for_other_tasks():
    """What fine-tuning calls, after the pretraining modules are gone; with the results of all layers."""
    results = []
    for patched in (False, True):
        model = peer.build("audio")
        if patched:
            d2v_fast.patch(model)
        model.remove_pretraining_modules()
        waves = peer.batch("audio")["source"]
        padding = torch.arange(400) >= torch.tensor([[400], [300], [200]])
        found = model.extract_features(waves, padding_mask=padding)
        results.append({"x": found["x"], **dict(enumerate(found["layer_results"]))})
        assert found["padding_mask"].sum() > 0
    assert_equal(results[1], results[0])


def test_half_precision():
    """Everything in bfloat16, averages in float32: as far from float32 as upstream's own."""
    model, batch = peer.build("audio"), peer.batch("audio")
    exact, *_ = step(model, batch)
    model.bfloat16()
    batch["source"] = batch["source"].bfloat16()
    upstream, *_ = step(model, batch)
    d2v_fast.patch(model)
    ours, grads, _ = step(model, batch)
    (exact,), (upstream,), (ours,) = exact.values(), upstream.values(), ours.values()
    assert abs(ours - exact) <= 2 * abs(upstream - exact) + 5e-3 * exact
    assert all(grad.dtype == torch.bfloat16 for grad in grads.values())


@pytest.mark.parametrize("targets", [True, False])
def test_autocast(targets):
    """Weights, teacher and what goes from block to block stay float32."""
    model, batch = peer.build("text", clone_batch=1), peer.batch("text")
    batch["precomputed_mask"] = batch["precomputed_mask"][::2]
    (exact,) = step(model, batch)[0].values()
    d2v_fast.patch(model, targets=targets)
    with torch.autocast("cpu", torch.bfloat16):
        (ours,) = step(model, batch)[0].values()
        assert model.extract_features(batch["source"])["x"].dtype == torch.float32
    assert ours.item() == pytest.approx(exact.item(), rel=1e-2)
    assert {p.dtype for p in model.ema.model.parameters()} == {torch.float32}

"""One update and its pieces: accumulation, the teacher's steps, non-finite gradients, optimizer, saved state."""

from dataclasses import replace

import pytest
import torch
from run_folders import restore, save
from tiny import tiny_batch, tiny_config

from d2v_fast.nn import Data2Vec, make_batch
from d2v_fast.train import load_config
from d2v_fast.train.checkpoint import Progress
from d2v_fast.train.optim import OptimConfig, build_optimizer
from d2v_fast.train.step import train_step


def step_model(modality="text", **config):
    torch.manual_seed(0)
    base = tiny_config(modality, dropout=0.0, attention_dropout=0.0, layerdrop=0.0, drop_path=0.0)
    if modality == "text":
        base = replace(base, frontend=replace(base.frontend, dropout=0.0))
    return Data2Vec(replace(base, **config)).train()


@pytest.mark.parametrize("modality", ["speech", "image", "text"])
def test_accumulation_equals_one_large_batch(modality):
    """Two micro-batches of one update against both rows in one batch; one teacher step either way."""
    small, large = step_model(modality), step_model(modality)
    a, b = tiny_batch(small.config, 1, size=2), tiny_batch(small.config, 2, size=2)
    both = make_batch(torch.cat([a.inputs, b.inputs]), torch.cat([a.mask, b.mask]).numpy())
    optim = OptimConfig(lr=1e-3, eps=1e-3)
    for model, batches in ((small, [a, b]), (large, [both])):
        metrics = train_step(model, batches, build_optimizer(model, optim), lr=1e-3, update=0)
        assert metrics.num_masked == both.num_masked
    for (name, p), q in zip(small.named_parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


def test_micro_batch_means_of_the_vision_reference():
    """token_weighted=False: mean of the micro-batches' means, as the reference's data parallelism computes it."""
    model = step_model("image")
    model = Data2Vec(replace(model.config, loss=replace(model.config.loss, token_weighted=False)))
    batches = [tiny_batch(model.config, seed, size=size) for seed, size in ((1, 1), (2, 3))]
    with torch.no_grad():
        want = sum(model(batch).loss / batch.num_masked for batch in batches) / 2
    got = train_step(model, batches, build_optimizer(model, OptimConfig(lr=0.0)), lr=0.0, update=0).loss
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


def test_teacher_steps_once_per_update_or_micro_batch(monkeypatch):
    for per, calls in (("update", [4]), ("micro_batch", [3, 3, 4])):
        model = step_model("text")
        model = Data2Vec(replace(model.config, ema=replace(model.config.ema, per=per)))
        seen = []
        monkeypatch.setattr(model.teacher, "update_", lambda update, seen=seen, **how: seen.append(update) or 0.9)
        batches = [tiny_batch(model.config, seed) for seed in range(3)]
        train_step(model, batches, build_optimizer(model, OptimConfig()), lr=1e-4, update=3)
        assert seen == calls


@pytest.mark.parametrize("one_pass", [False, True])
def test_non_finite_gradient_changes_nothing(one_pass):
    model = step_model("text")
    optimizer = build_optimizer(model, OptimConfig(one_pass=one_pass))
    batch = tiny_batch(model.config)
    train_step(model, [batch], optimizer, lr=1e-3, update=0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v.clone() for k, v in optimizer.state[model.head[0].weight].items()}
    handle = model.head[0].register_forward_hook(lambda module, args, output: output * float("nan"))
    metrics = train_step(model, [batch], optimizer, lr=1e-3, update=1)
    handle.remove()
    assert metrics.skipped.item() == 1.0
    for k, v in model.state_dict().items():
        assert torch.equal(v, before[k]), k
    for k, v in optimizer.state[model.head[0].weight].items():
        assert torch.equal(v, state[k]), k
    assert train_step(model, [batch], optimizer, lr=1e-3, update=1).skipped.item() == 0.0


@pytest.mark.parametrize("modality,autocast", [("text", False), ("speech", True), ("image", True)])
def test_bfloat16_student_with_a_float32_teacher(modality, autocast):
    """Inputs stay float32, hence autocast where the front-end reads numbers."""
    model = step_model(modality).bfloat16()
    student, mine = model.encoder.layers[0].fc1.weight, model.teacher.module["encoder"].layers[0].fc1.weight
    assert student.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in model.teacher.parameters())
    want, start = mine.clone(), student.detach().clone()
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2))
    for update in range(2):
        metrics = train_step(
            model, [tiny_batch(model.config, update)], optimizer, lr=1e-2, update=update, autocast=autocast
        )
        assert metrics.loss.isfinite() and metrics.skipped.item() == 0.0
        want.lerp_(student.detach().float(), 1 - metrics.ema_decay)
    assert not torch.equal(student, start)
    torch.testing.assert_close(mine.detach(), want, rtol=1e-6, atol=1e-7)
    with pytest.raises(TypeError, match="parameter 0 of group 0 must be a float32 master"):
        build_optimizer(model, OptimConfig(one_pass=True))


def gap(a, b):
    """Largest difference of two models' tensors, relative to the largest element of each."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(((x - y).abs().max() / x.abs().max().clamp(min=1e-3)).item() for x, y in pairs if x.is_floating_point())


@pytest.mark.parametrize("modality", ["speech", "image", "text"])
def test_one_pass_equals_one_by_one_over_20_updates(modality):
    """Float32 rounding apart: below 1e-5 of every tensor's size after 20 updates, the teacher included."""
    config = OptimConfig(lr=1e-3, eps=1e-3, weight_decay=0.1, decay_vectors=False)
    models = [step_model(modality) for _ in range(2)]
    optimizers = [
        build_optimizer(model, replace(config, one_pass=flag))
        for model, flag in zip(models, (False, True), strict=True)
    ]
    start = {k: v.clone() for k, v in models[0].state_dict().items()}
    for update in range(20):
        batches = [tiny_batch(models[0].config, seed=3 * update + i, size=2) for i in range(2)]
        a, b = (
            train_step(model, batches, optimizer, lr=1e-3, update=update, clip_norm=0.5)
            for model, optimizer in zip(models, optimizers, strict=True)
        )
        assert b.grad_norm.item() == pytest.approx(a.grad_norm.item(), rel=1e-4)
        assert (a.skipped.item(), a.ema_decay) == (b.skipped.item(), b.ema_decay)
    apart = gap(*models)
    weight = "teacher.module.encoder.layers.0.fc1.weight"
    travelled = (models[1].state_dict()[weight] - start[weight]).abs().max() / start[weight].abs().max()
    assert apart < 1e-5 and travelled > 100 * apart


def test_one_path_goes_on_from_the_other(tmp_path):
    """A checkpoint of either path resumes under the other, and both then do the same."""
    config = replace(load_config("text_demo", ["data.path=x"]), model=step_model("text").config)
    for first in (False, True):
        optims = {flag: OptimConfig(lr=1e-3, eps=1e-3, one_pass=flag) for flag in (first, not first)}
        model = step_model("text")
        optimizer = build_optimizer(model, optims[first])
        for update in range(3):
            train_step(model, [tiny_batch(model.config, update)], optimizer, lr=1e-3, update=update)
        saved = replace(config, optim=optims[first])
        path = save(tmp_path, model, optimizer, Progress(3, 0, 3), saved)
        other = Data2Vec(model.config).train()
        optimizer2 = build_optimizer(other, optims[not first])
        wanted = replace(config, optim=optims[not first])
        assert restore(path, other, optimizer2, wanted).update == 3
        assert gap(model, other) == 0.0
        for update in range(3, 6):
            for m, o in ((model, optimizer), (other, optimizer2)):
                train_step(m, [tiny_batch(m.config, update)], o, lr=1e-3, update=update)
        assert gap(model, other) < 2e-6
        assert optimizer2.param_groups[0]["fused"] is True


def test_optimizer_is_adamw_without_decay_on_vectors():
    model = step_model("image")
    optimizer = build_optimizer(model, OptimConfig(decay_vectors=False, weight_decay=0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"]}
    free = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    assert "encoder.layers.0.fc1.weight" in decayed and "encoder.relative_bias.table" in decayed
    assert "frontend.mask_embedding" in decayed  # as in the released vision code
    assert {
        "frontend.class_token",
        "encoder.layers.0.fc1.bias",
        "encoder.norm.weight",
        "encoder.layers.0.scale1",
    } <= free
    assert not any(name.startswith("teacher.") for name in decayed | free)


def test_progress_round_trip(tmp_path):
    model = step_model("text")
    optimizer = build_optimizer(model, OptimConfig())
    train_step(model, [tiny_batch(model.config)], optimizer, lr=1e-3, update=0)
    config = replace(load_config("text_demo", ["data.path=x"]), model=model.config)
    path = save(tmp_path, model, optimizer, Progress(1, 2, 3), config)
    other = Data2Vec(model.config)
    optimizer2 = build_optimizer(other, OptimConfig())
    assert restore(path, other, optimizer2, config) == Progress(1, 2, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    key = "exp_avg"
    assert torch.equal(optimizer.state[model.head[0].weight][key], optimizer2.state[other.head[0].weight][key])

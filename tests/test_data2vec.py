"""The whole model: loss against a straight float64 re-statement, gradients, padding, features, bad input.

Also run with TRITON_INTERPRET=1, where the model's ops are the Triton kernels.
"""

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from checks import INTERPRET, no_synchronisation
from tiny import NO_DROPOUT, tiny_batch, tiny_config
from torch import nn

from d2v_fast.nn import Data2Vec, Data2VecConfig, make_batch
from d2v_fast.nn.encoder import TransformerEncoder
from d2v_fast.nn.frontends import build_frontend
from d2v_fast.nn.heads import build_head
from d2v_fast.train.step import train_step

MODALITIES = ("speech", "image", "text")


def restated_targets(config: Data2VecConfig, results, mask, lengths) -> torch.Tensor:
    """Section 4 of the recipe in float64: normalise each layer result, average, normalise again, gather."""
    normed = []
    for r in results:
        if config.targets.norm == "instance":
            out = torch.empty_like(r)
            for b in range(r.shape[0]):
                n = r.shape[1] if lengths is None else int(lengths[b])
                mean, var = r[b, :n].mean(0), r[b, :n].var(0, unbiased=False)
                out[b] = (r[b] - mean) / (var + 1e-5).sqrt()
            normed.append(out)
        else:
            normed.append(F.layer_norm(r, r.shape[-1:], eps=1e-5))
    y = sum(normed) / len(normed)
    if config.targets.post_norm == "layer":
        y = F.layer_norm(y, y.shape[-1:], eps=1e-5)
    return y[mask]


def restated_loss(config: Data2VecConfig, pred, target) -> torch.Tensor:
    d = pred - target
    beta = config.loss.beta
    each = d**2 if beta == 0 else torch.where(d.abs() < beta, d**2 / (2 * beta), d.abs() - beta / 2)
    return each.sum() * {"speech": 32**-0.5, "image": 1 / 32, "text": 1.0}[config.modality]


@pytest.mark.parametrize(
    ("modality", "norm", "padded"),
    [
        *((modality, norm, padded) for modality in ("speech", "text") for norm in ("instance", "layer")
          for padded in (False, True)),
        ("image", "layer", False), ("image", "instance", False),
    ],
)  # fmt: skip
def test_loss_is_the_recipe(modality, norm, padded):
    """Also with the other norm of the targets; that of images over time is without the class token."""
    config = tiny_config(modality, **NO_DROPOUT)
    config = replace(config, targets=replace(config.targets, norm=norm))
    if modality == "text":
        config = replace(config, frontend=replace(config.frontend, dropout=0.0))
    model = Data2Vec(config)
    with torch.no_grad():
        for p in model.teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    batch = tiny_batch(config, padded=padded)
    got = model(batch)

    exact = Data2Vec(config).double()
    exact.load_state_dict(model.state_dict())
    inputs = batch.inputs.double() if batch.inputs.is_floating_point() else batch.inputs
    tracked = exact.teacher.module
    clean = exact.frontend(inputs, None, batch.padding_mask)
    teacher_x = clean if modality == "speech" else tracked["frontend"](inputs, None, batch.padding_mask)
    results = tracked["encoder"](teacher_x, padding_mask=batch.padding_mask, top_k=2).layer_results
    x = exact.encoder(exact.frontend(inputs, batch.mask, batch.padding_mask), padding_mask=batch.padding_mask).x
    if modality == "image":
        results, x = [r[:, 1:] for r in results], x[:, 1:]
    target = restated_targets(config, results, batch.mask, batch.lengths).detach()
    pred = exact.head(x[batch.mask])
    want = restated_loss(config, pred, target)

    assert got.loss.dtype == torch.float32
    assert got.loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert got.target_var.item() == pytest.approx((target.var(0) + 1e-6).sqrt().mean().item(), rel=1e-4)
    assert got.pred_var.item() == pytest.approx((pred.var(0) + 1e-6).sqrt().mean().item(), rel=1e-4)
    assert got.num_masked == int(batch.mask.sum())

    upstream = 0.37
    (got.loss * upstream).backward()
    (want * upstream).backward()
    grads = {name: p.grad for name, p in exact.named_parameters()}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert (p.grad - grads[name]).norm() <= 1e-4 * grads[name].norm() + 1e-6, name
        else:
            assert p.grad is None, name


def references_on_the_cpu(monkeypatch) -> None:
    """Let every op run its reference, in a process whose CPU kernels are the interpreted Triton kernels."""
    from d2v_fast.kernels import launch

    monkeypatch.setattr(launch, "device_guard", None)  # no launcher gets past it
    for name, module in list(sys.modules.items()):
        if name.startswith("d2v_fast.ops.") and hasattr(module, "cpu_runs_triton"):
            monkeypatch.setattr(module, "cpu_runs_triton", lambda dtype: False)


@pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("modality", MODALITIES)
def test_training_step_of_the_kernels_is_that_of_the_references(modality, monkeypatch):
    """Forward, backward, optimizer and teacher, two updates, with padding where there is any."""

    def train():
        torch.manual_seed(0)
        model = Data2Vec(tiny_config(modality, **NO_DROPOUT)).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
        batch = tiny_batch(model.config, padded=modality != "image")
        torch.manual_seed(1)
        metrics = [train_step(model, [batch], optimizer, lr=1e-3, update=i, clip_norm=1.0) for i in range(2)]
        return [torch.stack(m[:5]) for m in metrics], model.state_dict()

    metrics, state = train()
    with monkeypatch.context() as patch:
        references_on_the_cpu(patch)
        want_metrics, want = train()
    torch.testing.assert_close(metrics, want_metrics, rtol=2e-5, atol=1e-6)
    for name, value in state.items():
        difference = (value.double() - want[name].double()).norm()
        assert difference <= 1e-4 * want[name].double().norm() + 1e-6, name


@pytest.mark.parametrize("modality", MODALITIES)
def test_teacher_is_frozen_and_follows(modality):
    model = Data2Vec(tiny_config(modality)).train()
    assert not any(module.training for module in model.teacher.modules())
    before = {k: v.clone() for k, v in model.teacher.module.state_dict().items()}
    batch = tiny_batch(model.config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(batch).loss.backward()
    optimizer.step()
    model.teacher.update_(1)
    moved = [k for k, v in model.teacher.module.state_dict().items() if not torch.equal(v, before[k])]
    assert len(moved) > len(before) // 2


def test_text_teacher_input_is_a_named_choice():
    """The released code shows the teacher the masked tokens only; the loss must then be another one."""
    losses = {}
    for profile in ("paper", "fairseq"):
        torch.manual_seed(1)
        model = Data2Vec(tiny_config("text", profile)).eval()
        losses[profile] = model(tiny_batch(model.config)).loss.item()
    assert model.config.targets.teacher_input == "masked"
    assert abs(losses["paper"] - losses["fairseq"]) > 1e-3 * losses["paper"]


@pytest.mark.parametrize("modality", ["image", "text"])  # speech is masked after the convolutions, see test_frontends
def test_masked_inputs_do_not_reach_the_student(modality):
    """Changing what lies under the mask changes the targets, not the student's encoder input."""
    config = tiny_config(modality)
    model = Data2Vec(config).eval()
    batch = tiny_batch(config)
    if modality == "text":
        changed = torch.where(batch.mask, 7, batch.inputs)
    else:
        patches = batch.mask.view(-1, 6, 6).repeat_interleave(4, 1).repeat_interleave(4, 2)
        changed = torch.where(patches[:, None], 0.0, batch.inputs)
    with torch.no_grad():
        assert torch.equal(model.frontend(batch.inputs, batch.mask), model.frontend(changed, batch.mask))
        assert not torch.equal(model.frontend(batch.inputs), model.frontend(changed))


def test_padding_does_not_change_valid_features():
    """Text: a padded row gives the features of the same row alone."""
    model = Data2Vec(tiny_config("text")).eval()
    batch = tiny_batch(model.config, padded=True)
    with torch.no_grad():
        together = model.encode(batch.inputs, batch.padding_mask)
        alone = model.encode(batch.inputs[2:3, : int(batch.lengths[2])])
    torch.testing.assert_close(together[2:3, : int(batch.lengths[2])], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("modality", MODALITIES)
def test_encode_and_hidden_states(modality):
    model = Data2Vec(tiny_config(modality)).eval()
    inputs = tiny_batch(model.config).inputs
    with torch.no_grad():
        states = model.hidden_states(inputs)
        assert len(states) == 4
        for layer, state in enumerate(states):
            assert torch.equal(model.encode(inputs, layer=layer), state)
        final = model.encode(inputs)
    assert final.shape == states[-1].shape
    if modality == "image":  # pre-norm encoders normalise at the end
        torch.testing.assert_close(final, model.encoder.norm(states[-1]), rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(final, states[-1])


@pytest.mark.gpu
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("modality", MODALITIES)
def test_no_synchronisation(modality, fixed):
    """With padding, packed rows and the teacher's copies, under autocast."""
    model = Data2Vec(tiny_config(modality, layerdrop=0.0)).cuda().train()
    batch = tiny_batch(model.config, padded=modality != "image")
    if fixed:
        lengths = None if batch.lengths is None else batch.lengths.numpy()
        numbers = {"num_masked": batch.num_masked + 3} | ({} if lengths is None else {"num_valid": batch.mask.numel()})
        batch = make_batch(batch.inputs, batch.mask.numpy(), lengths, **numbers)
    batch = batch.to("cuda")

    def step(update):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(batch).loss
        loss.backward()
        model.teacher.update_(update)
        return loss

    step(1)
    with no_synchronisation():
        loss = step(2)
    assert loss.isfinite()


@pytest.mark.parametrize("modality", MODALITIES)
def test_low_precision_model(modality):
    """A bfloat16 model runs its teacher in bfloat16, the averages staying float32."""
    model = Data2Vec(tiny_config(modality, **NO_DROPOUT)).eval()
    batch = tiny_batch(model.config)
    want = model(batch).loss.item()
    model.bfloat16()
    output = model(replace(batch, inputs=batch.inputs.bfloat16() if modality != "text" else batch.inputs))
    assert output.loss.item() == pytest.approx(want, rel=0.02)
    output.loss.backward()
    assert model.encoder.layers[0].fc1.weight.grad.isfinite().all()
    assert all(x.dtype == torch.float32 for x in model.teacher.averages().values())


@pytest.mark.parametrize(
    ("modality", "profile", "padded"),
    [("text", "paper", False), ("text", "fairseq", True), ("speech", "paper", True), ("image", "paper", False)],
)
def test_compiles_without_graph_breaks(modality, profile, padded):
    """Forward and backward are one graph, packed rows and teachers that see the masked tokens alone included."""
    torch._dynamo.reset()
    config = tiny_config(modality, profile, **NO_DROPOUT)
    if modality == "text":
        config = replace(config, frontend=replace(config.frontend, dropout=0.0))
    small = {"encoder": replace(config.encoder, layers=2)}
    model = Data2Vec(replace(config, **small))
    batch = tiny_batch(config, padded=padded)
    eager = model(batch)
    (want,) = torch.autograd.grad(eager.loss * 0.5, model.head[0].weight)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(batch)
    (got,) = torch.autograd.grad(compiled.loss * 0.5, model.head[0].weight)
    torch.testing.assert_close(compiled.loss, eager.loss)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("build", "elements"),
    [
        (lambda: Data2VecConfig.speech(), 93_754_880),
        (lambda: Data2VecConfig.image(), 86_256_720),
        (lambda: Data2VecConfig.image("large"), 304_186_816),
        (lambda: Data2VecConfig.text(), 87_812_352 + 50_265 * 768),
    ],
    ids=["speech base", "image base", "image large", "text base"],
)
def test_published_sizes(build, elements):
    """Parameters of the published models."""
    config = build()
    with torch.device("meta"):
        parts = nn.ModuleList(
            [
                build_frontend(config),
                TransformerEncoder(config.encoder, getattr(config.frontend, "grid", 0)),
                build_head(config),
            ]
        )
    assert sum(p.numel() for p in parts.parameters()) == elements


@pytest.mark.parametrize("modality", MODALITIES)
def test_wrong_mask_shape(modality):
    model = Data2Vec(tiny_config(modality))
    batch = tiny_batch(model.config)
    with pytest.raises(ValueError, match=r"batch.mask must be \(3, \d+\) for these inputs, got \(3, \d+\)"):
        model(replace(batch, mask=batch.mask[:, :-1]))
    with pytest.raises(TypeError, match=r"batch\.mask must be bool, got torch\.uint8"):
        model(replace(batch, mask=batch.mask.byte()))


def test_wrong_positions():
    model = Data2Vec(tiny_config("text"))
    batch = replace(tiny_batch(model.config), masked=None)
    for positions, error, match in (
        (batch.positions.float(), TypeError, "batch.positions must be int32 or int64, got torch.float32"),
        (batch.positions[None], ValueError, r"batch.positions must be \[M\], got \(1, \d+\)"),
        (batch.positions[1:], ValueError, r"batch.positions must be the \d+ masked positions, got \d+"),
    ):
        with pytest.raises(error, match=match):
            model(replace(batch, positions=positions))


def test_wrong_padding_mask():
    model = Data2Vec(tiny_config("speech"))
    batch = tiny_batch(model.config, padded=True)
    samples = torch.zeros(3, 8000, dtype=torch.bool)
    for call in (model.encode, model.hidden_states, lambda x, m: model(replace(batch, padding_mask=m))):
        with pytest.raises(
            ValueError, match=r"padding_mask must be \(3, 24\) .*, got \(3, 8000\); it counts frames, not"
        ):
            call(batch.inputs, samples)
        with pytest.raises(TypeError, match=r"padding_mask must be bool, got torch\.float32"):
            call(batch.inputs, batch.padding_mask.float())
    model = Data2Vec(tiny_config("image"))
    images = tiny_batch(model.config).inputs
    with pytest.raises(ValueError, match="padding_mask must be None: images have no padding"):
        model.encode(images, torch.zeros(3, 36, dtype=torch.bool))


def test_wrong_layer():
    model = Data2Vec(tiny_config("text"))
    with pytest.raises(ValueError, match=r"layer must be in 0\.\.3, got 4"):
        model.encode(tiny_batch(model.config).inputs, layer=4)


def test_wrong_device():
    model = Data2Vec(tiny_config("text"))
    batch = tiny_batch(model.config)
    with pytest.raises(ValueError, match=r"batch\.inputs must be on cpu, where the model is, got meta"):
        model(batch.to("meta"))
    with pytest.raises(ValueError, match="padding_mask must be on cpu"):
        model.encode(batch.inputs, torch.zeros(batch.inputs.shape, dtype=torch.bool, device="meta"))

"""Data2VecPretraining computes what our Data2Vec computes with the same weights."""

from dataclasses import replace

import pytest
import torch
from parity import relative
from pretraining_models import EMA, MODALITIES, draw, encoder, grads, inputs

from d2v_fast import Data2Vec, Data2VecPretraining
from d2v_fast.checkpoints.transformers import read
from d2v_fast.patches import PatchError, patch
from d2v_fast.patches._pretraining_network import teacher_rules


def native(model):
    """Our Data2Vec with the weights of ``model``, its teacher's included."""
    ours, loaded = Data2Vec(model.recipe), read(model.base).model
    if model.recipe.modality != "text":  # one embedding there are two of in transformers
        for rule in model._rules():
            if rule.ours.startswith("frontend.mask_embedding") or rule.ours.startswith("encoder.norm"):
                target = loaded.get_parameter(rule.ours)
                target.data.copy_(model.get_parameter(rule.theirs[0]).reshape(target.shape))
    ours.frontend.load_state_dict(loaded.frontend.state_dict())
    ours.encoder.load_state_dict(loaded.encoder.state_dict())
    ours.head.load_state_dict(model.head.state_dict())
    tracked = (
        {"encoder": ours.encoder}
        if model.recipe.modality == "speech"
        else {"encoder": ours.encoder, "frontend": ours.frontend}
    )
    ours.teacher.load_ema_state(torch.nn.ModuleDict(tracked).state_dict())
    return ours.train()


def merged(model, values):
    """``values`` by the names of ``model``'s parameters, under ours."""
    out = {}
    for rule in model._rules():
        x = torch.cat([values[name] for name in rule.theirs])
        out[rule.ours] = x.reshape(x.shape[rule.lead :])
    return out


@pytest.mark.parametrize("profile", ["paper", "fairseq"])
@pytest.mark.parametrize("modality", MODALITIES)
def test_is_our_data2vec(modality, profile):
    """Loss, gradients, and both again after an update that moved the teacher."""
    student = encoder(modality)
    if modality == "text":  # transformers has two tables for positions of our one: let one of them learn
        student.embeddings.token_type_embeddings.requires_grad_(False)
    model = Data2VecPretraining(student, profile=profile, ema=replace(EMA, skip=()), head_layers=2).train()
    ours = native(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, ours)]
    for update in range(3):
        given = inputs(modality, padded=modality != "image", seed=update)
        batch = draw(model, given, update)
        out = model(**given, mask=batch.mask)
        want = ours(batch)
        assert relative(out.loss, want.loss / batch.num_masked) <= 1e-5
        assert relative(out.target_var, want.target_var) <= 1e-5
        assert out.num_masked == batch.num_masked and out["pred_var"].ndim == 0
        for optimizer, loss in zip(optimizers, (out.loss, want.loss / batch.num_masked), strict=True):
            optimizer.zero_grad()
            loss.backward()
        got = merged(model, grads(model))
        for name, grad in grads(ours).items():
            assert (got[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-7, name
        for optimizer in optimizers:
            optimizer.step()
        ours.teacher.update_(update + 1)
        assert model.num_updates == update + 1
    teacher = merged_teacher(model)
    for name, x in ours.teacher.ema_state().items():
        assert relative(teacher[name], x) <= 1e-5 or not x.any(), name


def merged_teacher(model):
    values = model.teacher.ema_state()
    out = {}
    for rule in teacher_rules(model.recipe, model.base):
        x = torch.cat([values[name] for name in rule.theirs])
        out[rule.ours] = x.reshape(x.shape[rule.lead :])
    if model.recipe.modality == "text":
        out["frontend.positions.weight"] += values["embeddings.token_type_embeddings.weight"][0]
    return out


@pytest.mark.parametrize(
    ("modality", "kind", "options"),
    [
        ("speech", "ForCTC", {"vocab_size": 20}),
        ("speech", "Model", {"mask_time_prob": 0.0}),
        ("text", "ForMaskedLM", {}),
        ("image", "ForImageClassification", {"use_mean_pooling": True, "use_mask_token": False}),
        ("image", "Model", {"use_shared_relative_position_bias": False}),
    ],
)
def test_other_models(modality, kind, options):
    """With heads, and without what pretraining needs: it has its own then. What LayerDrop skips has gradients too."""
    model = Data2VecPretraining(encoder(modality, kind, dropout=0.1, **options)).train()
    torch.manual_seed(8)
    before = {name: x.clone() for name, x in model.state_dict().items() if name.startswith("encoder.")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(**inputs(modality)).loss.backward()
    optimizer.step()
    unused = set(model._ddp_params_and_buffers_to_ignore)
    missing = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert missing == unused
    assert model.num_updates == 1
    changed = {name for name, x in model.state_dict().items() if name in before and not torch.equal(before[name], x)}
    assert changed and not changed & unused


def test_low_precision():
    model = Data2VecPretraining(encoder("image")).train()
    given = inputs("image")
    want = model(**given).loss
    with torch.autocast("cpu", torch.bfloat16):
        model._forwards[True] = 0
        assert relative(model(**given).loss, want) <= 0.02
    model.bfloat16()
    assert {p.dtype for p in model.teacher.parameters()} == {torch.float32}
    model._forwards[True] = 0
    out = model(pixel_values=given["pixel_values"].bfloat16())
    assert relative(out.loss.float(), want) <= 0.02
    out.loss.backward()


def test_checkpointing():
    model = Data2VecPretraining(encoder("text")).train()
    batch = draw(model, inputs("text"))
    model(batch=batch).loss.backward()
    want = {name: x.clone() for name, x in grads(model).items()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.recipe.encoder.checkpointing == "full"
    model(batch=batch).loss.backward()
    for name, grad in grads(model).items():
        torch.testing.assert_close(grad, want[name])
    model.gradient_checkpointing_disable()
    assert model.recipe.encoder.checkpointing == "none"


def test_mask_token():
    model = Data2VecPretraining(encoder("text"), mask_token_id=7)
    assert model.recipe.frontend.mask_index == 7
    assert Data2VecPretraining(encoder("text")).recipe.frontend.mask_index == 49
    default, other = Data2VecPretraining(encoder("text")).eval(), model.eval()
    batch = draw(model, inputs("text"))
    assert not torch.equal(default(batch=batch).loss, other(batch=batch).loss)


def test_patch_has_nothing_to_do():
    with pytest.raises(PatchError, match="Data2VecPretraining: it computes with ours already"):
        patch(Data2VecPretraining(encoder("text")))

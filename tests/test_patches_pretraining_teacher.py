"""The teacher of Data2VecPretraining: when it moves, and that copies and saved states go on as the original."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from pretraining_models import EMA, MODALITIES, encoder, inputs

from d2v_fast import Data2VecPretraining


def test_teacher_follows_any_loop():
    model = Data2VecPretraining(encoder("text"), ema=EMA).train()
    first, *others = model.base.encoder.parameters()
    anchored, rest = torch.optim.SGD([first], lr=0.1), torch.optim.SGD(others, lr=0.1)
    before = model.teacher.ema_state()["encoder.layer.0.attention.self.query.weight"].clone()
    model(**inputs("text")).loss.backward()
    rest.step()
    assert model.num_updates == 0
    anchored.step()
    assert model.num_updates == 1
    after = model.teacher.ema_state()["encoder.layer.0.attention.self.query.weight"]
    decay = EMA.decay_at(1)
    torch.testing.assert_close(after, decay * before + (1 - decay) * first.detach())
    torch.optim.SGD(torch.nn.Linear(1, 1).parameters()).step()  # somebody else's
    assert model.num_updates == 1
    assert model.update_teacher() == EMA.decay_at(2)


def test_changed_without_a_step_is_noticed(caplog):
    model = Data2VecPretraining(encoder("text")).train()
    given = inputs("text")
    model(**given)
    model(**given)
    assert not caplog.records
    with torch.no_grad():
        next(model.base.encoder.parameters()).mul_(1.1)  # as an optimizer with its own loop would
    model(**given)
    assert "update_teacher" in caplog.text
    caplog.clear()
    with torch.no_grad():
        next(model.base.encoder.parameters()).mul_(1.1)
    model.update_teacher()
    model(**given)
    model.load_state_dict(model.state_dict())
    model(**given)
    assert not caplog.records
    model.base.encoder.layer[0].register_forward_hook(lambda *args: None)
    model(**given)
    model(**given)
    assert caplog.text.count("do not run") == 1


def test_micro_batches_move_the_teacher_as_released():
    model = Data2VecPretraining(encoder("text"), profile="fairseq", ema=replace(EMA, per="micro_batch")).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**inputs("text")).loss.backward()
    optimizer.step()
    name = "encoder.layer.0.attention.self.query.weight"
    once = model.teacher.ema_state()[name].clone()
    model(**inputs("text"))
    assert torch.equal(model.teacher.ema_state()[name], once)
    model(**inputs("text"))
    student = model.base.get_parameter(name).detach()
    decay = EMA.decay_at(1)
    torch.testing.assert_close(model.teacher.ema_state()[name], decay * once + (1 - decay) * student)


@pytest.mark.parametrize(("modality", "kind"), [*((m, "Model") for m in MODALITIES), ("text", "ForMaskedLM")])
def test_copies_and_state(modality, kind, tmp_path):
    """Deep copies, pickles and state dictionaries go on as the original; safetensors can hold the state."""
    from safetensors.torch import load_file, save_file

    model = Data2VecPretraining(encoder(modality, kind)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    given = inputs(modality)
    model(**given).loss.backward()
    optimizer.step()
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    fresh = Data2VecPretraining(encoder(modality, kind)).train()
    fresh.load_state_dict(load_file(tmp_path / "x.safetensors"))
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh]
    want = model(**given).loss
    for other in others:
        assert other.num_updates == 1
        assert torch.equal(other(**given).loss, want)  # the mask too: of the seed and the update
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
        optimizer.step()
        assert other.num_updates == 2
    assert model.num_updates == 1


def test_copies_are_not_changed_students(caplog):
    """A copy's parameters count their versions anew."""
    model = Data2VecPretraining(encoder("text")).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(**inputs("text")).loss.backward()
        optimizer.step()
    model(**inputs("text"))
    copy.deepcopy(model)(**inputs("text"))
    pickle.loads(pickle.dumps(model))(**inputs("text"))
    assert "weights changed" not in caplog.text
    with torch.no_grad():
        next(model.base.encoder.parameters()).add_(1)
    model(**inputs("text"))
    assert "weights changed" in caplog.text


@pytest.mark.parametrize("trained", ["embeddings", "head"])
def test_frozen_encoder(trained):
    """Updates are counted, and the teacher follows what else it averages."""
    model = Data2VecPretraining(encoder("text"), ema=replace(EMA, skip=())).train()
    model.requires_grad_(False)
    (model.base.embeddings if trained == "embeddings" else model.head).requires_grad_(True)
    before = {name: x.clone() for name, x in model.teacher.ema_state().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**inputs("text")).loss.backward()
    optimizer.step()
    assert model.num_updates == 1
    moved = {name for name, x in model.teacher.ema_state().items() if not torch.equal(x, before[name])}
    assert bool(moved) == (trained == "embeddings") and not any("encoder" in name for name in moved)

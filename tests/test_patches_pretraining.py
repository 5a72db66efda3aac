"""Data2VecPretraining: transformers' encoders pretrained by our Data2Vec, in loops, Trainer and accelerate."""

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from parity import relative

from d2v_fast import Data2Vec, Data2VecConfig, Data2VecPretraining
from d2v_fast.checkpoints.transformers import read
from d2v_fast.errors import CheckpointError
from d2v_fast.nn import make_batch
from d2v_fast.nn.config import EMAConfig
from d2v_fast.nn.masking import BlockMask
from d2v_fast.patches import PatchError, patch
from d2v_fast.patches._pretraining_data import INPUTS, build_batch
from d2v_fast.patches._pretraining_network import teacher_rules

transformers = pytest.importorskip("transformers")
MODALITIES = ("speech", "text", "image")
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
EMA = EMAConfig(decay=0.8, end_decay=0.9, anneal_updates=10)


def encoder(modality, kind="Model", dropout=0.0, **options):
    """A tiny model of transformers."""
    torch.manual_seed(0)
    if modality == "speech":
        rates = {f"{name}_dropout": dropout for name in ("hidden", "attention", "activation")}
        options = {"conv_dim": (16,) * 7, "layerdrop": dropout, **rates, **options}
        name = "Audio"
    else:
        rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        if modality == "text":
            options, name = {"vocab_size": 50, "max_position_embeddings": 40, **rates, **options}, "Text"
        else:
            shape = {"image_size": 8, "patch_size": 2, "drop_path_rate": dropout, "layer_norm_eps": 1e-6}
            tokens = {"use_mask_token": True, "use_mean_pooling": False, "use_shared_relative_position_bias": True}
            options, name = {**shape, **tokens, **rates, **options}, "Vision"
    config = getattr(transformers, f"Data2Vec{name}Config")(**SIZES | options)
    model = getattr(transformers, f"Data2Vec{name}{kind}")(config)
    with torch.no_grad():
        for parameter in model.parameters():  # no token stays zero, no norm one
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def inputs(modality, padded=False, seed=0):
    """Arguments of forward."""
    g = torch.Generator().manual_seed(seed)
    if modality == "image":
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=g)}
    n = 4000 if modality == "speech" else 21
    x = torch.randn(3, n, generator=g) if modality == "speech" else torch.randint(4, 49, (3, n), generator=g)
    if not padded:
        return {INPUTS[modality]: x}
    kept = torch.arange(n) < torch.tensor([n, n * 3 // 4, n // 2])[:, None]
    return {INPUTS[modality]: x.masked_fill(~kept, 0 if modality == "speech" else 1), "attention_mask": kept.long()}


def draw(model, given, seed=1):
    """The batch that forward would make, with its mask."""
    x, attention_mask = given[INPUTS[model.recipe.modality]], given.get("attention_mask")
    return build_batch(model.recipe, x, attention_mask, None, np.random.default_rng(seed))


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


def grads(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


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


def test_patch_has_nothing_to_do():
    with pytest.raises(PatchError, match="Data2VecPretraining: it computes with ours already"):
        patch(Data2VecPretraining(encoder("text")))


def test_data_parallel():
    """A replica has other parameters than ours in it: an error, and no wrong numbers."""
    model = Data2VecPretraining(encoder("text"))
    with pytest.raises(ValueError, match="one process a GPU, got a replica of DataParallel: start it with torchrun"):
        model._replicate_for_data_parallel()(**inputs("text"))
    torch.nn.DataParallel(model)(**inputs("text"))  # of no GPU: the model itself


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


@pytest.mark.parametrize("modality", MODALITIES)
def test_collator(modality):
    """Items of different lengths are what the padded batch is."""
    model = Data2VecPretraining(encoder(modality)).eval()
    collate = pickle.loads(pickle.dumps(model.collator()))
    given = inputs(modality, padded=modality != "image")
    x = given[INPUTS[modality]]
    if modality == "image":
        items = [{"pixel_values": image} for image in x]
    else:
        lengths = given["attention_mask"].sum(1)
        items = [{INPUTS[modality]: row[:n].tolist()} for row, n in zip(x, lengths, strict=True)]
    torch.manual_seed(3)
    batch = collate(items)["batch"]
    assert torch.equal(batch.inputs, x)
    assert torch.equal(model(batch=batch).loss, model(**given, mask=batch.mask).loss)
    torch.manual_seed(3)
    assert torch.equal(collate(items)["batch"].mask, batch.mask)
    assert not torch.equal(collate(items)["batch"].mask, batch.mask)
    if modality != "image":  # padded already
        padded = [
            {INPUTS[modality]: row, "attention_mask": kept}
            for row, kept in zip(x, given["attention_mask"], strict=True)
        ]
        assert torch.equal(collate(padded)["batch"].lengths, batch.lengths)


def test_masks_of_forward():
    """Of seed and update; evaluation has the same each time, and does not change those of training."""
    model = Data2VecPretraining(encoder("text"), seed=1)
    given = inputs("text")
    drawn = []
    draw_mask, kind = type(model.recipe.mask).draw, type(model.recipe.mask)

    def watched(self, *args):
        drawn.append(draw_mask(self, *args))
        return drawn[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kind, "draw", watched)
        for training in (False, False, True, True, False, False):
            model.train(training)(**given)
        other = Data2VecPretraining(encoder("text"), seed=1).train()
        other(**given)
        Data2VecPretraining(encoder("text"), seed=2).train()(**given)
    a, b, c, d, e, f, again, changed = drawn
    assert (a == e).all() and (b == f).all() and (c == again).all()
    assert (a != b).any() and (c != d).any() and (a != c).any() and (c != changed).any()


def test_mask_token():
    model = Data2VecPretraining(encoder("text"), mask_token_id=7)
    assert model.recipe.frontend.mask_index == 7
    assert Data2VecPretraining(encoder("text")).recipe.frontend.mask_index == 49
    default, other = Data2VecPretraining(encoder("text")).eval(), model.eval()
    batch = draw(model, inputs("text"))
    assert not torch.equal(default(batch=batch).loss, other(batch=batch).loss)


def test_recipe():
    mask = BlockMask(num_masked=5, min_block=2)
    model = Data2VecPretraining(encoder("image"), mask=mask, head_layers=2)
    assert model.recipe.mask == mask and len(model.head) == 3
    config = replace(model.recipe, ema=EMA)
    assert Data2VecPretraining(encoder("image"), config=config).recipe == config
    assert Data2VecPretraining(encoder("speech", hidden_dropout=0.3)).recipe.encoder.dropout == 0.3
    assert model.config is model.encoder.config


def test_bad_models():
    with pytest.raises(PatchError, match=r"Data2VecAudioModel, Data2VecTextModel, Data2VecVisionModel, got Linear"):
        Data2VecPretraining(torch.nn.Linear(1, 1))
    with pytest.raises(PatchError, match="got str"):
        Data2VecPretraining("facebook/data2vec-audio-base")
    with pytest.raises(CheckpointError, match="hidden_act='relu'"):
        Data2VecPretraining(encoder("text", hidden_act="relu"))
    with pytest.raises(PatchError, match="use_shared_relative_position_bias"):
        Data2VecPretraining(encoder("image", use_shared_relative_position_bias=False, use_relative_position_bias=True))
    model = encoder("text")

    class Adapter(torch.nn.Linear):
        pass

    model.encoder.layer[0].output.dense = Adapter(48, 32)
    with pytest.raises(PatchError, match=r"encoder\.layer\.0\.output\.dense must be .* got .*Adapter"):
        Data2VecPretraining(model)


def test_bad_recipes():
    with pytest.raises(TypeError, match="targets, loss, ema, mask, prune, head_layers, got 'top_k'"):
        Data2VecPretraining(encoder("text"), top_k=3)
    with pytest.raises(ValueError, match="config must be for text, as hf_model is, got one for speech"):
        Data2VecPretraining(encoder("text"), config=Data2VecConfig.speech())
    with pytest.raises(ValueError, match=r"frontend\.vocab_size is 50 there, 50265 in config; .*encoder\.layers is 3"):
        Data2VecPretraining(encoder("text"), config=Data2VecConfig.text())
    with pytest.raises(ValueError, match=r"mask_token_id must be in 0\.\.49, got 50"):
        Data2VecPretraining(encoder("text"), mask_token_id=50)
    with pytest.raises(ValueError, match="mask_token_id must be None for image, got 1"):
        Data2VecPretraining(encoder("image"), mask_token_id=1)
    with pytest.raises(ValueError, match=r"ema\.skip: nothing .* 'elsewhere'"):
        Data2VecPretraining(encoder("text"), ema=replace(EMA, skip=("elsewhere",)))
    with pytest.raises(ValueError, match="profile must be"):
        Data2VecPretraining(encoder("text"), profile="other")


def test_bad_inputs():
    model = Data2VecPretraining(encoder("text")).eval()
    ids = inputs("text")["input_ids"]
    mask = torch.zeros(3, 21, dtype=torch.bool)
    bad = [
        (ValueError, "text must be input_ids, got none", {}),
        (ValueError, "text must be input_ids, got input_values", {"input_values": torch.randn(2, 400)}),
        (ValueError, r"input_ids must be \[B, T\]", {"input_ids": ids[0]}),
        (TypeError, "mask must be a bool tensor, got torch.int64", {"input_ids": ids, "mask": mask.long()}),
        (ValueError, r"mask must be \(3, 21\), .* got \(3, 20\)", {"input_ids": ids, "mask": mask[:, 1:]}),
        (ValueError, "mask must have a masked position, got none", {"input_ids": ids, "mask": mask}),
        (ValueError, r"attention_mask must be \(3, 21\)", {"input_ids": ids, "attention_mask": mask[0]}),
        (ValueError, "ones, then zeros", {"input_ids": ids, "attention_mask": torch.arange(21).expand(3, -1) > 2}),
        (TypeError, "tokens must be int64", {"input_ids": ids.float(), "mask": ~mask}),
        (TypeError, "batch must be a Batch, .* got dict", {"batch": {}}),
        (ValueError, "batch must have a masked position", {"batch": make_batch(ids, mask.numpy())}),
        (ValueError, "batch must come alone", {"batch": draw(model, {"input_ids": ids}), "input_ids": ids}),
    ]
    for error, message, given in bad:
        with pytest.raises(error, match=message):
            model(**given)
    images = Data2VecPretraining(encoder("image"))
    with pytest.raises(ValueError, match="images have no padding"):
        images(**inputs("image"), attention_mask=torch.ones(3, 16))


def digits():
    """Real scanned digits [N, 3, 8, 8]."""
    images = pytest.importorskip("sklearn.datasets").load_digits().images[:256]
    x = torch.from_numpy(images).float()[:, None] / 8 - 1
    return [{"pixel_values": image} for image in x.expand(-1, 3, -1, -1)]


BLOCKED = """
import json, sys
sys.modules["d2v_fast"] = None
import torch, transformers
model = transformers.AutoModel.from_pretrained(sys.argv[1])
want = torch.load(sys.argv[2])
state = model.state_dict()
same = state.keys() == want.keys() and all(torch.equal(state[name], x) for name, x in want.items())
print(json.dumps([type(model).__name__, same]))
"""


def test_trainer(tmp_path):
    """20 steps on real images: the loss falls; a resumed run ends with the same bits; plain transformers loads it."""
    pytest.importorskip("accelerate")

    def trainer(folder, **options):
        model = Data2VecPretraining(encoder("image", dropout=0.1), ema=EMA)
        arguments = transformers.TrainingArguments(
            str(folder),
            max_steps=20,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            learning_rate=5e-3,
            logging_steps=1,
            save_steps=10,
            eval_strategy="steps",
            eval_steps=10,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=1,
        )
        data = digits()
        return transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data[:32], **options)

    whole = trainer(tmp_path / "a")
    whole.train()
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert len(losses) == 20 and np.mean(losses[-5:]) < 0.95 * np.mean(losses[:3])
    assert "eval_loss" in whole.state.log_history[-2]
    assert whole.model.num_updates == 20

    resumed = trainer(tmp_path / "a")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-10"))
    assert resumed.model.num_updates == 20
    for name, x in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], x), name

    whole.model.save_pretrained(tmp_path / "model")
    torch.save(whole.model.encoder.state_dict(), tmp_path / "want.pt")
    command = [sys.executable, "-c", BLOCKED, str(tmp_path / "model"), str(tmp_path / "want.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["Data2VecVisionModel", True]

    collated = trainer(tmp_path / "b", data_collator=whole.model.collator())
    collated.args.max_steps = 2
    collated.train()
    assert collated.model.num_updates == 2


def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision="bf16")
    try:
        model = Data2VecPretraining(encoder("image"), ema=EMA)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        loader = torch.utils.data.DataLoader(digits()[:64], 16, collate_fn=model.collator())
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        prepared.train()
        for batch in loader:
            with accelerator.accumulate(prepared):
                out = prepared(**batch)
                accelerator.backward(out.loss)
                optimizer.step()
                optimizer.zero_grad()
        assert model.num_updates == 2 and torch.isfinite(out.loss)
        accelerator.save_state(str(tmp_path))
        before = {name: x.clone() for name, x in model.state_dict().items()}
        model.update_teacher()
        accelerator.load_state(str(tmp_path))
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_compile():
    """One graph, traced once: updates, the teacher's too, change no number in it."""
    model = Data2VecPretraining(
        encoder("text", num_hidden_layers=1), targets=replace(Data2VecConfig.text().targets, top_k=1)
    ).train()
    batch = draw(model, inputs("text"))
    want = model(batch=batch).loss
    want.backward()
    expected = {name: x.clone() for name, x in grads(model).items()}
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(batch=batch)
    out.loss.backward()
    assert relative(out.loss, want) <= 1e-5
    for name, grad in grads(model).items():
        torch.testing.assert_close(grad, expected[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with torch.compiler.set_stance("fail_on_recompile"):
        for update in range(3):
            optimizer.step()
            assert model.num_updates == update + 1
            out = compiled(batch=batch)
            assert relative(out.loss, model(batch=batch).loss) <= 1e-5
            out.loss.backward()


def test_distributed_data_parallel():
    """One process: gradients of all parameters that are waited for, heads and poolers left out."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        for modality, kind in (("text", "Model"), ("speech", "ForCTC")):
            model = Data2VecPretraining(encoder(modality, kind, dropout=0.3)).train()
            wrapped = torch.nn.parallel.DistributedDataParallel(model)
            optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
            for update in range(3):  # a gradient that did not come is an error at the next forward
                optimizer.zero_grad()
                wrapped(**inputs(modality, seed=update)).loss.backward()
                optimizer.step()
            assert model.num_updates == 3
    finally:
        distributed.destroy_process_group()

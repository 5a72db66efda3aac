"""fairseq's ``Data2VecTextModel`` patched against not, and the criterion of both models: same weights, dropout off."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from parity import assert_equal, gradients
from torch import nn

pytest.importorskip("fairseq_peer")

from fairseq.criterions.model_criterion import ModelCriterion
from fairseq.logging import metrics
from fairseq.modules import LayerDropModuleList
from fairseq_pairs import TINY, VOCAB, text_config, text_pair
from patched import allow_meta, dictionaries, perturb, same_as_upstream

import d2v_fast
from d2v_fast.patches import PatchError
from d2v_fast.patches._core import PARTS, Options, Patch, Site, is_ours
from d2v_fast.patches.fairseq import text
from d2v_fast.patches.fairseq.criterion import FORWARD

PAD, MASK, T = 1, VOCAB - 1, 37
NORMS = {
    "layer": {},  # the recipe
    "instance": {"layer_norm_target_layer": False, "instance_norm_target_layer": True},
    "batch": {"layer_norm_target_layer": False, "batch_norm_target_layer": True},
    "none+layer": {"layer_norm_target_layer": False, "layer_norm_targets": True},
    "layer+instance": {"instance_norm_targets": True},
}


def batch(seed=0, padded=False, left=False):
    """Tokens of which some are masked; the teacher is shown these alone, as fairseq's task has it."""
    generator = torch.Generator().manual_seed(seed)
    lengths = np.array([T, 25, 30]) if padded else np.full(3, T)
    tokens = torch.randint(4, MASK, (3, T), generator=generator)
    mask = torch.from_numpy(text_config().mask.draw(np.random.Generator(np.random.PCG64(seed)), lengths, T))
    tokens = tokens.where(torch.arange(T) < torch.from_numpy(lengths)[:, None], PAD)
    both = {"src_tokens": tokens.where(~mask, MASK), "target_tokens": tokens.where(mask, PAD)}
    return {name: x.flip(1) for name, x in both.items()} if left else both


def upstreams(**options):
    """fairseq's model with its teacher, moved away from the student; ``options`` are changed in encoder and ``cfg``."""
    torch.manual_seed(0)
    model = text_pair()[0]
    perturb(model)
    model.encoder.target_model = None  # upstream reads it when it loads, and sets it nowhere
    for name, value in options.items():
        setattr(model.encoder.cfg, name, value)
        if hasattr(model.encoder, name):
            setattr(model.encoder, name, value)
    return model


def pair(switches=None, **options):
    theirs = upstreams(**options)
    ours = copy.deepcopy(theirs)
    return theirs, ours, d2v_fast.patch(ours, **(switches or {}))


def run(model, inputs):
    torch.manual_seed(1)
    model.zero_grad()
    out = model(**inputs)
    out["losses"]["main"].backward()
    return out, gradients(model)


def trained(tensors):
    """Without the biases of keys, which have no gradient in exact arithmetic."""
    return {name: x for name, x in tensors.items() if not name.endswith("self_attn.k_proj.bias")}


def assert_same(theirs, ours, inputs=None, tolerance=1e-5):
    inputs = batch() if inputs is None else inputs
    want, grads = run(theirs, inputs)
    got, ours_grads = run(ours, inputs)
    same_as_upstream(got, want, tolerance)
    assert_equal(trained(ours_grads), trained(grads), tolerance)
    none = [{name for name, p in model.named_parameters() if p.grad is None} for model in (ours, theirs)]
    assert none[0] == none[1]


@pytest.mark.parametrize("norm", NORMS)
def test_targets(norm):
    theirs, ours, patch = pair(**NORMS[norm])
    assert_same(theirs, ours)
    assert_same(theirs, ours, batch(1, padded=True))
    assert not patch.fallbacks()


@pytest.mark.parametrize(
    "options",
    [{"loss_beta": 0.0}, {"loss_scale": 0.0}, {"average_top_k_layers": 3}, {"average_top_k_layers": 9}],
)
def test_options(options):
    theirs, ours, patch = pair(**options)
    assert_same(theirs, ours, batch(2, padded=True))
    assert not patch.fallbacks()


def test_batches_of_all_kinds():
    theirs, ours, patch = pair()
    assert_same(theirs, ours, batch(3, padded=True, left=True))  # padding in front
    inputs = batch(4)
    inputs["src_tokens"][1, :5] = 7  # tokens that are targets without being masked
    inputs["target_tokens"][1, :5] = 8
    assert_same(theirs, ours, inputs)
    inputs = batch(5)
    rows = inputs["src_tokens"][2] == MASK
    inputs["src_tokens"][2, rows], inputs["target_tokens"][2] = 9, PAD  # a row of which nothing is masked
    assert_same(theirs, ours, inputs)
    assert not patch.fallbacks()


def test_a_teacher_that_reads_everything():
    theirs, ours, patch = pair()
    inputs = batch(6, padded=True)
    source, target = inputs["src_tokens"], inputs["target_tokens"]
    inputs["target_tokens"] = torch.where(source == MASK, target, source)
    assert_same(theirs, ours, inputs)
    assert not patch.fallbacks()


@pytest.mark.parametrize("training", [True, False])
def test_layerdrop(training):
    """The same layers are left out, and have no gradient."""
    theirs = upstreams()
    for encoder in (theirs.encoder.sentence_encoder, theirs.encoder.ema.model):
        encoder.layers = LayerDropModuleList(0.5, encoder.layers)
    theirs.train(training)
    ours = copy.deepcopy(theirs)
    patch = d2v_fast.patch(ours)
    assert_same(theirs, ours)
    dropped = [p.grad is None for p in ours.encoder.sentence_encoder.layers.parameters()]
    assert any(dropped) == training
    assert not patch.fallbacks()


@pytest.mark.parametrize("part", PARTS)
def test_every_switch(part):
    theirs, ours, patch = pair(switches={part: False})
    assert_same(theirs, ours, batch(7, padded=True))
    assert is_ours(ours.encoder.forward) == (part not in ("loss", "targets"))
    assert not patch.fallbacks()


def test_five_updates():
    """Optimizer and teacher; the weights, the averages and the teacher itself."""
    theirs, ours, patch = pair()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=2e-5) for model in (theirs, ours)]
    for update in range(5):
        for model in (theirs, ours):
            model.set_num_updates(update)
        assert_same(theirs, ours, batch(update, padded=update % 2))
        for optimizer in optimizers:
            optimizer.step()
    teachers = theirs.encoder.ema, ours.encoder.ema
    assert_equal(trained(teachers[1].fp32_params), trained(teachers[0].fp32_params))
    assert_equal(trained(teachers[1].model.state_dict()), trained(teachers[0].model.state_dict()))
    assert_equal(trained(dict(ours.named_parameters())), trained(dict(theirs.named_parameters())))
    assert not patch.fallbacks()


def test_checkpoints_go_both_ways(tmp_path):
    theirs, ours, _ = pair()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for number, (saved, loaded) in enumerate(((ours, upstreams()), (theirs, copy.deepcopy(ours)))):
        perturb(saved)
        torch.save(saved.state_dict(), tmp_path / f"{number}.pt")
        perturb(loaded)
        for model in (saved, loaded):
            model.set_num_updates(1)
        loaded.load_state_dict(torch.load(tmp_path / f"{number}.pt"))
        saved.load_state_dict(torch.load(tmp_path / f"{number}.pt"))
        assert_same(saved, loaded)


def test_revert_leaves_nothing():
    model = upstreams()
    teacher = model.encoder.ema
    want, grads = run(model, batch(8))
    before = dictionaries(model), dictionaries(teacher.model), set(teacher.__dict__)
    with d2v_fast.patch(model):
        run(model, batch(8, padded=True))
        assert set(teacher.__dict__) != before[2]
    assert (dictionaries(model), dictionaries(teacher.model), set(teacher.__dict__)) == before
    got, again = run(model, batch(8))
    assert torch.equal(got["losses"]["main"], want["losses"]["main"])
    assert all(torch.equal(x, grads[name]) for name, x in again.items())


def test_deep_copies_are_patched():
    theirs, ours, patch = pair()
    run(ours, batch())
    copied = copy.deepcopy(ours)
    perturb(ours)  # the copy has parameters of its own
    assert is_ours(copied.encoder.forward)
    assert_same(theirs, copied, batch(9))
    patch.revert()
    assert not is_ours(copied.encoder.forward)


def test_features_for_other_uses_are_upstreams():
    theirs, ours, patch = pair()
    tokens = batch()["src_tokens"]
    (want, _), (got, _) = (model(tokens, features_only=True) for model in (theirs, ours))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not patch.fallbacks()


def test_rows_of_padding_alone():
    """The teacher's are computed as upstream does where they are part of a norm, and those of other uses."""
    theirs, ours, patch = pair(**NORMS["batch"])
    inputs = batch(5)
    inputs["src_tokens"][2], inputs["target_tokens"][2] = 9, PAD  # nothing of it is masked
    assert_same(theirs, ours, inputs)
    assert [why for _, why in patch.fallbacks()] == ["a row without targets has a part in batch_norm_target_layer"]
    inputs["src_tokens"][2] = PAD
    (want, _), (got, _) = (model(inputs["src_tokens"], features_only=True) for model in (theirs, ours))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_float64_on_a_device_is_left_to_upstream():
    ours = upstreams().double().to("meta")
    d2v_fast.patch(ours, strict=True)
    with pytest.raises(PatchError, match="float64 on meta"):
        ours(**batch())


def changed(name, value):
    """A model whose attribute ``name``, with its path, is ``value``."""

    def change(model):
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, value)

    return change


def overridden(path, method, change, home=__name__):
    """A model of which a part's class has its own ``method``: ``change`` is called with what upstream's gives."""

    def override(model):
        part = model.get_submodule(path)
        upstreams = getattr(type(part), method)
        body = {method: lambda self, *args, **more: change(upstreams(self, *args, **more)), "__module__": home}
        part.__class__ = type("Loud", (type(part),), body)

    return override


def louder(out):
    return {**out, "encoder_out": [2 * x for x in out["encoder_out"]]}


LAYER = "encoder.sentence_encoder.layers.1"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (changed("encoder.sentence_encoder.embed_scale", 2.0), "embeddings are scaled by 2.0"),
        (changed("encoder.sentence_encoder.layer_norm", nn.LayerNorm(64)), "a final norm"),
        (changed(f"{LAYER}.fc1", nn.Sequential(nn.Linear(64, 96))), "layers.1.fc1 is a Sequential"),
        (changed(f"{LAYER}.activation_fn", torch.relu), "layers.1 has another activation"),
        (changed(f"{LAYER}.dropout_module.apply_during_inference", True), "dropout although"),
        (lambda m: m.get_submodule(LAYER).register_forward_hook(lambda *_: None), "layers.1 has hooks"),
        (overridden("encoder", "extract_features", lambda out: (2 * out[0], out[1])), "Loud.extract_features"),
        (overridden("encoder.sentence_encoder", "forward", louder, "fairseq.models"), "Loud.forward"),
    ],
)
def test_encoders_that_are_left_to_upstream(change, reason):
    """Targets and loss stay ours."""
    theirs = upstreams()
    change(theirs)
    ours = copy.deepcopy(theirs)
    patch = d2v_fast.patch(ours)
    assert_same(theirs, ours)
    assert [reason in why for _, why in patch.fallbacks()] == [True]


@pytest.mark.parametrize(
    ("options", "change", "reason"),
    [
        ({"instance_norm_target_layer": True}, lambda x: None, "normalised by instance_norm_target_layer and layer"),
        ({}, lambda x: x["src_tokens"].masked_fill_(x["src_tokens"] == MASK, 5), "no token is masked"),
        ({}, lambda x: x["src_tokens"][:, 3].fill_(MASK), "a masked token has no target"),
    ],
)
def test_calls_that_are_left_to_upstream(options, change, reason):
    theirs, ours, patch = pair(**options)
    inputs = batch()
    change(inputs)
    want, got = (model(**inputs) for model in (theirs, ours))
    torch.testing.assert_close(got["losses"]["main"], want["losses"]["main"], rtol=1e-5, atol=0)
    assert [reason in why for _, why in patch.fallbacks()] == [True]
    patch.revert()
    d2v_fast.patch(ours, strict=True)
    with pytest.raises(PatchError, match=reason):
        ours(**inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    theirs = upstreams().to(dtype)
    theirs.encoder.ema = None
    theirs.set_num_updates(0)
    ours = copy.deepcopy(theirs)
    patch = d2v_fast.patch(ours)
    (want, _), (got, grads) = (run(model, batch(padded=True)) for model in (theirs, ours))
    same_as_upstream(got, want, 5e-3)
    assert all(x.dtype == dtype and x.isfinite().all() for x in grads.values())
    assert not patch.fallbacks()


def test_dropout_is_drawn():
    """Rates are those of the modules at the moment; other masks of the same distribution."""
    _, ours, patch = pair()
    first, second = (run(ours, batch())[0]["losses"]["main"].item() for _ in range(2))
    assert first == second
    ours.encoder.sentence_encoder.dropout_module.p = 0.1
    third = run(ours, batch())[0]["losses"]["main"].item()
    ours.encoder.sentence_encoder.dropout_module.p = 0.0
    for layer in ours.encoder.sentence_encoder.layers:
        layer.dropout_module.p = layer.self_attn.dropout_module.p = 0.1
    fourth = run(ours, batch())[0]["losses"]["main"].item()
    assert len({first, third, fourth}) == 3
    ours.eval()
    assert run(ours, batch())[0]["losses"]["main"].item() == pytest.approx(first, rel=1e-6)
    assert not patch.fallbacks()


def test_settings_are_followed():
    """Each rate of dropout is that of its module; norms changed after a first call are as well."""
    theirs, ours, patch = pair()
    assert_same(theirs, ours)
    for model in (theirs, ours):
        for norm in ("layers.1.final_layer_norm", "layernorm_embedding"):
            model.encoder.sentence_encoder.get_submodule(norm).eps = 0.1
    assert_same(theirs, ours)
    encoder = ours.encoder.sentence_encoder
    layer = encoder.layers[1]
    modules = layer.dropout_module, layer.activation_dropout_module, layer.self_attn.dropout_module
    for module, p in zip(modules, (0.1, 0.2, 0.3), strict=True):
        module.p = p
    block = text.text_stack(ours.encoder, "student", encoder).encoder.layers[1]
    assert (block.dropout, block.activation_dropout, block.attention.dropout) == (0.1, 0.2, 0.3)
    assert not patch.fallbacks()


def test_at_the_class():
    """As ``patch_all`` has it."""
    model = upstreams()
    kind, names = type(model.encoder), set(model.encoder.__dict__)
    want, _ = run(model, batch())
    patch = Patch("test").apply([Site("", kind, seam) for seam in text.seams(kind)], Options())
    try:
        same_as_upstream(run(model, batch())[0], want, 1e-5)
        assert not patch.fallbacks()
    finally:
        patch.revert()
    assert not is_ours(kind.forward)
    assert set(model.encoder.__dict__) == names


def test_compiled():
    torch.manual_seed(0)
    theirs = text_pair(sizes={**TINY, "layers": 2})[0]
    ours = copy.deepcopy(theirs)
    patch = d2v_fast.patch(ours)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    want, grads = run(theirs, batch(padded=True))
    got, _ = run(compiled, batch(padded=True))
    same_as_upstream(got, want, 1e-5)
    assert_equal(trained(gradients(ours)), trained(grads))
    assert not patch.fallbacks()


def test_the_tokens_are_all_that_is_waited_for(monkeypatch):
    """Forward, backward and the teacher's step where tensors have no values that could be read."""

    def there(side):
        masked, inside = (x.map(lambda t: t.to("meta")) for x in (side.masked, side.masked_in_valid))
        valid = None if side.valid is None else side.valid.map(lambda t: t.to("meta"))
        return replace(side, tokens=side.tokens.to("meta"), valid=valid, masked=masked, masked_in_valid=inside)

    ours = pair()[1]
    run(ours, batch())
    real = text._sides
    allow_meta(monkeypatch)
    monkeypatch.setattr(text, "_sides", lambda *args: tuple(map(there, real(*args))))
    ours.to("meta").zero_grad()
    teacher = ours.encoder.ema
    teacher.model.to("meta")
    teacher.fp32_params = {name: x.to("meta") for name, x in teacher.fp32_params.items()}
    out = ours(**batch(padded=True))
    out["losses"]["main"].backward()
    ours.set_num_updates(1)
    assert out["sample_size"] == (batch(padded=True)["src_tokens"] == MASK).sum()
    assert {p.device.type for p in ours.parameters() if p.grad is not None} == {"meta"}


def test_report():
    _, _, patch = pair(switches={"attention": False})
    lines = [" ".join(line.split()) for line in str(patch).splitlines()]
    assert lines == [
        "d2v_fast on Data2VecTextModel: 2 replaced, 6 left as they were",
        "replaced 1 x encoder.ema EMAModule._step_internal ema averages and the teacher's copy of them in one pass over"
        " the memory never called",
        "replaced 1 x encoder Data2VecTextEncoder.forward loss no padding, last layers at masked tokens, targets and"
        " loss in one op; waits for the device once never called",
        "left 3 x encoder.sentence_encoder.layers.*.self_attn MultiheadAttention.forward attention attention=False",
        "left 3 x encoder.ema.model.layers.*.self_attn MultiheadAttention.forward attention attention=False",
    ]


class Model(nn.Module):
    """Gives what it is made with."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, **inputs):
        return self.output


def criteria(**options):
    theirs, ours = (ModelCriterion(SimpleNamespace(), **options) for _ in range(2))
    Patch("test").apply([Site("", ours, FORWARD)], Options())
    return theirs, ours


def output(seed):
    loss, var = torch.randn(2, generator=torch.Generator().manual_seed(seed)).unbind()
    return {
        "losses": {"main": loss, "extra": torch.stack((loss, var))},
        "sample_size": 7,
        "target_var": var.requires_grad_(),
        "ema_decay": 999.0,
        "parts": torch.stack((var, loss)),
        "_kept": torch.ones(3),
        "logs": {"decay": 3},
    }


@pytest.mark.parametrize("weights", [{}, {"main": 0.5, "extra": 2.0}, {"main": 1.0, "extra": 0.0}])
def test_criterion(weights):
    """Loss, sample size and what is logged in the end, over two micro-batches, are upstream's."""
    keys = ["target_var", "ema_decay", "parts", "_kept", "absent"]
    sample = {"net_input": {}, "id": torch.arange(4)}
    smoothed = []
    for criterion in criteria(loss_weights=weights, log_keys=keys):
        found = [criterion(Model(output(seed)), sample) for seed in (0, 1)]
        with metrics.aggregate() as meters:
            criterion.reduce_metrics([logged for _, _, logged in found])
        smoothed.append(([(loss.item(), size) for loss, size, _ in found], meters.get_smoothed_values()))
    (want_losses, want), (losses, got) = smoothed
    assert losses == want_losses
    assert list(got) == list(want)
    assert {name: float(x) for name, x in got.items()} == pytest.approx({k: float(x) for k, x in want.items()})
    assert torch.is_tensor(found[0][2]["target_var"])
    assert not found[0][2]["target_var"].requires_grad


def test_criterion_names_what_is_missing():
    for criterion in criteria(loss_weights={"main": 1.0}, log_keys=[]):
        with pytest.raises(KeyError, match="extra"):
            criterion(Model(output(0)), {"net_input": {}, "id": torch.arange(1)})
        with pytest.raises(Exception, match="Could not retrieve losses"):
            criterion(Model({}), {"net_input": {}, "id": torch.arange(1)})

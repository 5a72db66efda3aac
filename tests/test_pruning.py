"""What a training step leaves out changes no result: each flag alone and all together, in float64; and it is less work.

The reference computes everything: padding, all rows of the last layers, features twice.
"""

from collections import Counter
from dataclasses import fields, replace
from functools import cache

import numpy as np
import pytest
import torch
from tiny import NO_DROPOUT, tiny_batch, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from d2v_fast.nn import Data2Vec, Data2VecConfig, make_batch
from d2v_fast.nn.config import PruneConfig

FLAGS = tuple(field.name for field in fields(PruneConfig))
NONE = PruneConfig(**dict.fromkeys(FLAGS, False))
SKIPS_FRONTEND = {"skip": ("frontend.",)}


def case_config(modality: str, profile: str = "paper", norm: str = "", ema: dict | None = None) -> Data2VecConfig:
    config = tiny_config(modality, profile, **NO_DROPOUT)
    if modality == "text":
        config = replace(config, frontend=replace(config.frontend, dropout=0.0))
    targets = replace(config.targets, norm=norm or config.targets.norm)
    return replace(config, targets=targets, ema=replace(config.ema, **(ema or {})))


def double(batch):
    return replace(batch, inputs=batch.inputs.double()) if batch.inputs.is_floating_point() else batch


@cache
def weights(config: Data2VecConfig) -> dict[str, torch.Tensor]:
    """A student, and averages that differ from it where they are averages."""
    torch.manual_seed(0)
    model = Data2Vec(config)
    with torch.no_grad():
        for average in model.teacher.averages().values():
            average.add_(0.1 * torch.randn_like(average))
    return model.state_dict()


def built(config: Data2VecConfig, prune: PruneConfig) -> Data2Vec:
    model = Data2Vec(replace(config, prune=prune))
    model.load_state_dict(weights(config))
    return model.double()


def losses_and_gradients(model: Data2Vec, batch) -> dict[str, torch.Tensor]:
    output = model(batch)
    output.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": output.loss.detach(), "target_var": output.target_var, "pred_var": output.pred_var}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float = 1e-10) -> None:
    assert got.keys() == want.keys()
    size = max(x.norm() for name, x in want.items() if name.endswith(".weight"))  # key biases have gradients of 0
    for name, x in want.items():
        assert (got[name] - x).norm() <= tolerance * (x.norm() + 1e-3 * size), name


CASES = [
    *(("speech", profile, norm, padded) for profile in ("paper", "fairseq") for norm in ("instance", "layer")
      for padded in (False, True)),
    *(("text", profile, norm, padded) for profile in ("paper", "fairseq") for norm in ("instance", "layer", "batch")
      for padded in (False, True)),
    *(("image", "paper", norm, False) for norm in ("instance", "layer", "none")),
]  # fmt: skip


@pytest.mark.parametrize(("modality", "profile", "norm", "padded"), CASES)
def test_each_flag_changes_nothing(modality, profile, norm, padded):
    config = case_config(modality, profile, norm, SKIPS_FRONTEND if modality == "image" else None)
    batch = double(tiny_batch(config, padded=padded))
    want = losses_and_gradients(built(config, NONE), batch)
    assert len(want) > 30 and want["loss"] > 0
    for prune in (PruneConfig(), *(replace(NONE, **{flag: True}) for flag in FLAGS)):
        assert_same(losses_and_gradients(built(config, prune), batch), want)


@pytest.mark.parametrize("modality", ["speech", "text"])
def test_statistics_over_padding(modality):
    """What the teacher makes of padding is a part of the targets then: it is computed."""
    config = case_config(modality, norm="instance")
    config = replace(config, targets=replace(config.targets, padding_aware=False))
    batch = double(tiny_batch(config, padded=True))
    assert_same(
        losses_and_gradients(built(config, PruneConfig()), batch), losses_and_gradients(built(config, NONE), batch)
    )


def test_images_that_average_the_front_end():
    """The recipe: the teacher has patches of its own."""
    config = case_config("image")
    batch = double(tiny_batch(config))
    assert_same(
        losses_and_gradients(built(config, PruneConfig()), batch), losses_and_gradients(built(config, NONE), batch)
    )


def test_shared_features_with_dropout():
    """One embedding for both, the student's with the same dropout as without sharing, the teacher's without any."""
    config = tiny_config("text")
    batch = tiny_batch(config, padded=True)
    outputs = []
    for share in (False, True):
        model = built(config, replace(NONE, share_features=share)).train()
        torch.manual_seed(3)
        outputs.append(losses_and_gradients(model, batch))
    assert_same(outputs[1], outputs[0])


def test_features_are_shared_only_with_the_same_front_end():
    """A load that takes student and teacher apart ends it until the next update."""
    model = built(case_config("text"), PruneConfig())
    assert model.teacher.shares("frontend") and not model.teacher.shares("encoder")
    state = {name: x.clone() for name, x in model.state_dict().items()}
    state["teacher.module.frontend.norm.weight"] += 1
    model.load_state_dict(state)
    assert not model.teacher.shares("frontend")
    alone = Data2Vec(replace(model.config, prune=NONE)).double()
    alone.load_state_dict(state)
    batch = tiny_batch(model.config)
    torch.testing.assert_close(model(batch).loss, alone(batch).loss, rtol=1e-10, atol=0)
    model.teacher.update_(1)
    assert model.teacher.shares("frontend")
    assert not Data2Vec(tiny_config("image")).teacher.shares("frontend")


@pytest.mark.parametrize(("modality", "profile"), [("speech", "paper"), ("text", "paper"), ("text", "fairseq")])
@pytest.mark.parametrize("norm", ["instance", "layer"])
def test_padded_rows_are_as_if_they_were_alone(modality, profile, norm):
    """The loss of a padded batch is the sum of its rows' losses, and so are all gradients."""
    config = case_config(modality, profile, norm)
    if profile == "fairseq" and norm == "instance":
        pytest.skip("statistics over padding")
    batch = double(tiny_batch(config, padded=True))
    got = losses_and_gradients(built(config, PruneConfig()), batch)
    alone, loss = built(config, NONE), 0.0
    for b, length in enumerate(batch.lengths.tolist()):
        size = (length - 1) * 320 + 400 if modality == "speech" else length
        one = make_batch(batch.inputs[b : b + 1, :size], batch.mask[b : b + 1, :length].numpy())
        output = alone(one)
        output.loss.backward()
        loss = loss + output.loss.detach()
    want = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    assert_same({name: got[name] for name in (*want, "loss")}, {**want, "loss": loss})


@pytest.mark.parametrize("modality", ["speech", "text"])
def test_features_of_every_layer(modality):
    """Padded, packed and one by one."""
    model = built(case_config(modality), PruneConfig()).eval()
    batch = double(tiny_batch(model.config, padded=True))
    with torch.no_grad():
        padded = model.hidden_states(batch.inputs, batch.padding_mask)
        x = model.frontend(batch.inputs, None, batch.padding_mask).flatten(0, 1)
        packed = model.encoder(batch.valid.take(x), sequences=batch.valid, hidden_states=True).hidden_states
        if modality == "text":
            tokens = batch.valid.take(batch.inputs.flatten())
            torch.testing.assert_close(model.frontend(tokens, sequences=batch.valid), batch.valid.take(x))
        for b, length in enumerate(batch.lengths.tolist()):
            size = (length - 1) * 320 + 400 if modality == "speech" else length
            start = batch.valid.cu_seqlens[b]
            for layer, want in enumerate(model.hidden_states(batch.inputs[b : b + 1, :size])):
                for got in (padded[layer][b, :length], packed[layer][start : start + length]):
                    torch.testing.assert_close(got, want[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("modality", ["speech", "image", "text"])
@pytest.mark.parametrize("profile", ["paper", "fairseq"])
def test_fixed_numbers_of_rows(modality, profile):
    """Batches of one shape for all masks and lengths give what they give otherwise."""
    config = case_config(modality, profile)
    for padded in (False, True)[: 1 if modality == "image" else 2]:
        batch = double(tiny_batch(config, padded=padded))
        B, T = batch.mask.shape
        lengths = None if batch.lengths is None else batch.lengths.numpy()
        most = {"num_masked": batch.num_masked + 5} | ({} if modality == "image" else {"num_valid": B * T})
        fixed = make_batch(batch.inputs, batch.mask.numpy(), lengths, **most)
        assert fixed.positions.shape == (batch.num_masked + 5,) and fixed.num_masked == batch.num_masked
        for prune in (PruneConfig(), NONE):
            got, want = (losses_and_gradients(built(config, prune), each) for each in (fixed, batch))
            assert_same(got, want)
            assert built(config, prune)(fixed).num_masked == batch.num_masked


def test_fixed_numbers_have_one_shape():
    """Whatever is masked and padded; this is what a CUDA graph is captured for."""

    def shapes(batch):
        found = {}
        for field in fields(batch):
            value = getattr(batch, field.name)
            if isinstance(value, torch.Tensor):
                found[field.name] = value.shape
            elif hasattr(value, "cu_seqlens"):
                found[field.name] = (value.cu_seqlens.shape, value.max_length, value.rows.shape, value.real.shape)
        return found

    rng, tokens = np.random.default_rng(0), torch.full((3, 9), 5)
    seen = []
    for lengths in ([9, 9, 9], [4, 9, 1], [2, 3, 4]):
        mask = rng.random((3, 9)) < 0.3
        mask &= np.arange(9) < np.array(lengths)[:, None]
        seen.append(shapes(make_batch(tokens, mask, np.array(lengths), num_masked=9, num_valid=27)))
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) == 9


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(
    ("modality", "profile", "norm"),
    [
        ("speech", "paper", "instance"), ("speech", "paper", "layer"),
        ("text", "paper", "layer"), ("text", "fairseq", "layer"),
        ("image", "paper", "instance"), ("image", "paper", "layer"),
    ],
)  # fmt: skip
def test_nothing_masked(modality, profile, norm, padded):
    """Loss and gradients are 0 and none of them is missing, whatever is left out; also where M is fixed."""
    if padded and modality == "image":
        pytest.skip("images have no padding")
    config = case_config(modality, profile, norm)
    batch = double(tiny_batch(config, padded=padded))
    lengths, nothing = None if batch.lengths is None else batch.lengths.numpy(), np.zeros(batch.mask.shape, bool)
    some = losses_and_gradients(built(config, NONE), batch)
    for prune in (PruneConfig(), NONE):
        for num_masked in (None, 4):
            model = built(config, prune)
            empty = make_batch(batch.inputs, nothing, lengths, num_masked=num_masked)
            assert empty.num_masked == model(empty).num_masked == 0
            found = losses_and_gradients(model, empty)
            assert found.keys() == some.keys()
            assert not any(x.any() for name, x in found.items() if name not in ("target_var", "pred_var"))
            assert found["target_var"].isfinite() and found["pred_var"].isfinite()


@pytest.mark.parametrize("profile", ["paper", "fairseq"])
@pytest.mark.parametrize("padding_aware", [False, True])
def test_convolutional_positions_in_text(profile, padding_aware):
    """A teacher that is shown the masked tokens only sees them where they are, not pushed together."""
    config = case_config("text", profile)
    positions = {"pos_conv_depth": 2, "pos_conv_width": 9, "pos_conv_groups": 4, "padding_aware": padding_aware}
    config = replace(config, encoder=replace(config.encoder, **positions))
    for padded in (False, True):
        batch = tiny_batch(config, padded=padded)
        got, want = (losses_and_gradients(built(config, prune), batch) for prune in (PruneConfig(), NONE))
        assert_same(got, want)


def test_a_batch_made_by_hand():
    """Without sequences nothing is left out, and the loss is the same; also where M is fixed."""
    for modality in ("speech", "image", "text"):
        config = case_config(modality)
        batch = double(tiny_batch(config, padded=modality != "image"))
        bare = replace(batch, masked=None, valid=None, masked_in_valid=None)
        gap = torch.tensor([-1], dtype=torch.int32)
        filled = torch.cat([gap, batch.positions[:3], gap, batch.positions[3:]])
        model = built(config, PruneConfig())
        want = losses_and_gradients(model, batch)
        for each in (bare, replace(bare, positions=filled, real_masked=batch.num_masked)):
            model.zero_grad()
            assert_same(losses_and_gradients(model, each), want)
            assert model(each).num_masked == batch.num_masked
    with pytest.raises(ValueError, match=r"batch\.masked must have the \d+ rows of positions, got \d+"):
        model(replace(batch, masked=batch.valid))


class Calls(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def work(config: Data2VecConfig, batch, **flags) -> tuple[int, Counter]:
    """Floating point operations of all matrix products of a step, and the operators it runs."""
    model, flops = built(config, replace(NONE, **flags)), FlopCounterMode(display=False)
    with Calls() as calls, flops:
        losses_and_gradients(model, batch)
    products = (torch.ops.aten.mm, torch.ops.aten.addmm)
    return sum(flops.get_flop_counts()["Global"].get(op, 0) for op in products), calls.counts


def test_what_is_left_out():
    """Products of 2 m n k operations, three of them a linear layer in the student, one in the teacher."""
    C, F = 32, 48
    config = case_config("text")
    padded, full = tiny_batch(config, padded=True), tiny_batch(config)
    M, R = full.num_masked, full.mask.numel()
    everything, calls = work(config, full)
    last_layer = 2 * (R - M) * (2 * C * C + 2 * C * F)  # query and out-projection, FFN, of the rows left out
    assert everything - work(config, full, student_rows=True)[0] == 3 * last_layer
    assert everything - work(config, full, teacher_rows=True)[0] == last_layer
    stopped = work(config, full, teacher_stop=True)[1]
    assert calls["native_layer_norm"] - stopped["native_layer_norm"] == 1
    shared = work(config, full, share_features=True)[1]
    assert shared["embedding"] == calls["embedding"]  # the masked rows are embedded apart, but fewer of them

    padding = int(padded.padding_mask.sum())
    layers = 2 * padding * 3 * (4 * C * C + 2 * C * F)
    assert work(config, padded)[0] - work(config, padded, unpad=True)[0] == (3 + 1) * layers

    shown = case_config("text", "fairseq")  # the teacher computes the masked tokens only
    layers = 2 * (R - M) * 3 * (4 * C * C + 2 * C * F)
    assert work(shown, full)[0] - work(shown, full, unpad=True)[0] == layers

    config = case_config("image", ema=SKIPS_FRONTEND)
    batch = double(tiny_batch(config))
    patches = 2 * 3 * 37 * 32 * (3 * 4 * 4)
    assert work(config, batch)[0] - work(config, batch, share_features=True)[0] == patches

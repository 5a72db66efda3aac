"""Packed, padded and single sequences agree, and what is left out of the last layer changes nothing."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from checks import INTERPRET
from tiny import NO_DROPOUT, tiny_config

from d2v_fast.nn import block
from d2v_fast.nn.block import drop_path_scale
from d2v_fast.nn.encoder import TransformerEncoder
from d2v_fast.nn.sequences import Sequences

T, LENGTHS = 37, np.array([31, 37, 6])
VALID = np.arange(T) < LENGTHS[:, None]  # [B, T]
MASKED = VALID & (np.random.default_rng(0).random(VALID.shape) < 0.4)
RECIPES = ("speech", "text", "image")


def encoder_of(modality: str, **options) -> TransformerEncoder:
    """A tiny encoder without dropout whose weights are far from their initial values."""
    config = tiny_config(modality, **NO_DROPOUT, layer_scale=0.5).encoder
    encoder = TransformerEncoder(replace(config, **options), 6)
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return encoder


def among(selected: np.ndarray, taken: Sequences) -> Sequences:
    """The True entries of ``selected`` [B, T] as rows of the packed rows ``taken``."""
    found = Sequences.from_mask(selected)
    return replace(found, rows=torch.searchsorted(taken.rows, found.rows))


def gradients(encoder: TransformerEncoder, output: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    grads = torch.autograd.grad(output, parameters, upstream, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)]


def assert_same(encoder, pairs, rtol=1e-5):
    """Outputs, and the gradients of all parameters for the same upstream gradient, agree in norm."""
    (got, want), *others = pairs
    upstream = torch.randn_like(want)
    each = zip(gradients(encoder, got, upstream), gradients(encoder, want, upstream), strict=True)
    for a, b in [(got, want), *others, *each]:
        assert a.shape == b.shape
        assert (a - b).norm() <= rtol * b.norm() + 1e-6


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("modality", ["speech", "text"])
def test_packed_padded_and_alone(modality, norm):
    encoder = encoder_of(modality, norm=norm)
    x, packing = torch.randn(3, T, 32), Sequences.from_mask(VALID)
    padded = encoder(x, padding_mask=torch.from_numpy(~VALID), top_k=2, hidden_states=True)
    packed = encoder(packing.take(x.flatten(0, 1)), sequences=packing, top_k=2, hidden_states=True)
    alone = [encoder(clip[None, :n], top_k=2, hidden_states=True) for clip, n in zip(x, LENGTHS, strict=True)]

    def rows(output):
        return [output.x, *output.layer_results, *output.hidden_states]

    joined = [torch.cat(clips, 1)[0] for clips in zip(*map(rows, alone), strict=True)]
    assert packed.x.shape == (LENGTHS.sum(), 32) and len(packed.hidden_states) == 4
    assert_same(encoder, list(zip(rows(packed), joined, strict=True)))
    valid = [packing.take(v.flatten(0, 1)) for v in rows(padded)]
    assert_same(encoder, list(zip(valid[:3], joined, strict=False)))


def test_a_fixed_number_of_rows():
    """Rows that only fill up belong to sequences of their own and change no other."""
    encoder = encoder_of("speech")
    x = torch.randn(3, T, 32)
    exact, filled = Sequences.from_mask(VALID), Sequences.from_mask(VALID, num_rows=90)
    want = encoder(exact.take(x.flatten(0, 1)), sequences=exact).x
    got = encoder(filled.take(x.flatten(0, 1)), sequences=filled).x
    assert got.shape == (90, 32) and got.isfinite().all()
    assert_same(encoder, [(got[: len(want)], want)])


@pytest.mark.parametrize("padding_aware", [True, False])
def test_padding_and_convolutional_positions(padding_aware):
    """fairseq convolves over zeros and puts norm and GELU of them in between, which later convolutions see."""
    encoder = encoder_of("speech", padding_aware=padding_aware)
    x = torch.randn(2, T, 32)
    padding = torch.zeros(2, T, dtype=torch.bool)
    padding[0, 20:] = padding[1, :9] = True  # on either side
    got = encoder(x, padding_mask=padding).x
    for row, part in ((0, slice(0, 20)), (1, slice(9, T))):
        alone = encoder(x[row : row + 1, part]).x[0]
        same = (got[row, part] - alone).norm() <= 1e-5 * alone.norm()
        assert same == padding_aware
    everything = encoder(x, padding_mask=torch.ones_like(padding)).x
    assert everything.isfinite().all()


@pytest.mark.parametrize("layout", ["dense", "padded", "packed"])
@pytest.mark.parametrize("layer_result", ["ffn", "block"])
@pytest.mark.parametrize("modality", RECIPES)
def test_selected_rows(modality, layer_result, layout):
    """Exactly the rows of the full computation, results and gradients included; also without the rest of the layer."""
    if modality == "image" and layout != "dense":
        pytest.skip("images are neither padded nor packed")
    encoder = encoder_of(modality, layer_result=layer_result)
    x, packing = torch.randn(3, T, 32), Sequences.from_mask(VALID)
    select, options = Sequences.from_mask(MASKED), {}
    if layout == "padded":
        options = {"padding_mask": torch.from_numpy(~VALID)}
    elif layout == "packed":
        x, select, options = packing.take(x.flatten(0, 1)), among(MASKED, packing), {"sequences": packing}
    full = encoder(x, top_k=2, **options)
    part = encoder(x, top_k=2, select=select, **options)
    want = select.take(full.x.reshape(-1, 32)), select.take(full.layer_results[1].reshape(-1, 32))
    assert torch.equal(part.layer_results[0], full.layer_results[0])
    assert_same(encoder, [(part.x, want[0]), (part.layer_results[1], want[1])])
    ended = encoder(x, top_k=2, select=select, results_only=True, **options)
    assert ended.x is None and torch.equal(ended.layer_results[1], part.layer_results[1])
    ended = encoder(x, top_k=1, results_only=True, **options)
    torch.testing.assert_close(ended.layer_results, full.layer_results[1:])


def test_no_row_selected():
    encoder = encoder_of("speech")
    output = encoder(torch.randn(3, T, 32), select=Sequences.from_mask(np.zeros_like(MASKED)))
    assert output.x.shape == (0, 32)
    output.x.sum().backward()
    assert not any(p.grad.any() for p in encoder.layers[-1].fc2.parameters())


@pytest.mark.parametrize("modality", RECIPES)
def test_selected_rows_with_drop_path(modality):
    """Whole samples are dropped: the same ones for the selected rows as for all rows, from the same seed."""
    encoder = encoder_of(modality, drop_path=0.5).train()
    x, select = torch.randn(3, T, 32), Sequences.from_mask(MASKED)
    outputs = []
    for options in ({}, {"select": select}):
        torch.manual_seed(5)
        outputs.append(encoder(x, **options).x.reshape(-1, 32))
    assert_same(encoder, [(outputs[1], select.take(outputs[0]))])


@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_dropped_samples_are_not_computed(norm, selected, monkeypatch):
    """DropPath multiplies their branches by 0: to leave them out changes nothing, also where none is left."""
    encoder = encoder_of("image", norm=norm, drop_path=0.6, layers=4).train()
    x, options = torch.randn(3, T, 32), {"select": Sequences.from_mask(MASKED)} if selected else {}
    sizes: list[int] = []
    for layer in encoder.layers:
        layer.fc2.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    for seed in range(4):
        torch.manual_seed(seed)
        got = encoder(x, top_k=4, **options)
        with monkeypatch.context() as patch:
            patch.setattr(block, "of_kept", lambda branch, y, row_scale: branch(y))
            torch.manual_seed(seed)
            want = encoder(x, top_k=4, **options)
        assert_same(encoder, [(got.x, want.x), *zip(got.layer_results, want.layer_results, strict=True)])
    assert min(sizes) == 1 and len(set(sizes)) > 2


def test_drop_path_of_packed_rows():
    sequences = Sequences.from_lengths([3, 1, 4, 2])
    scale = drop_path_scale(torch.ones(10, 5), 0.5, True, sequences)
    assert scale.shape == (10,) and set(scale.tolist()) <= {0.0, 2.0}
    assert all(len(set(part.tolist())) == 1 for part in scale.split([3, 1, 4, 2]))


@pytest.mark.skipif(INTERPRET, reason="the memory of PyTorch's operators")
@pytest.mark.parametrize("modality", RECIPES)
def test_results_that_nobody_asked_for_are_released(modality):
    """At the end of a run without gradients, of all FFN outputs only those handed out are alive."""
    encoder = encoder_of(modality, layers=5).eval()
    made = []
    for layer in encoder.layers:
        layer.fc2.register_forward_hook(lambda module, args, output: made.append(weakref.ref(output)))
    alive = []
    encoder.layers[3].fc2.register_forward_hook(
        lambda module, args, output: alive.append([ref() is not None for ref in made])
    )
    with torch.no_grad():
        output = encoder(torch.randn(2, T, 32), top_k=1)
    gc.collect()
    assert alive == [[False, False, False, True]]
    last = modality != "image"  # images hand out the layer's output instead
    assert [ref() is not None for ref in made] == [False] * 4 + [last] and len(output.layer_results) == 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": torch.ones(3, T)}, r"x must be \[B, T, 32\] without sequences, got \(3, 37\)"),
        ({"padding_mask": torch.zeros(3, 36, dtype=torch.bool)}, r"must be \(3, 37\) like x, got \(3, 36\)"),
        ({"sequences": Sequences.from_lengths([4, 5])}, r"x must be \(9, 32\) with these sequences, got \(3, 37, 32\)"),
        ({"select": Sequences.from_mask(MASKED[:2])}, "select must have rows, 3 sequences of them like x, got 2"),
        ({"select": Sequences.from_lengths([1, 1, 1])}, "select must have rows"),
        (
            {"select": replace(Sequences.from_mask(MASKED), rows=Sequences.from_mask(MASKED).rows.flip(0))},
            r"select must have rows of x's own sequences, got \d+ for 0",
        ),
        ({"results_only": True}, "results_only must come with a top_k of at least 1"),
        ({"results_only": True, "top_k": 1, "hidden_states": True}, "without hidden_states"),
    ],
)  # fmt: skip
def test_wrong_arguments(change, match):
    arguments = {"x": torch.ones(3, T, 32), **change}
    with pytest.raises(ValueError, match=match):
        encoder_of("text")(arguments.pop("x"), **arguments)


def test_wrong_arguments_with_sequences():
    x, sequences = torch.ones(9, 32), Sequences.from_lengths([4, 5])
    with pytest.raises(ValueError, match="padding_mask must be None with sequences"):
        encoder_of("text")(x, sequences=sequences, padding_mask=torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="sequences must be None: a relative-position bias belongs to whole images"):
        encoder_of("image")(x, sequences=sequences)

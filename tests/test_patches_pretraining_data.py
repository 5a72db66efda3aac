"""What Data2VecPretraining reads: items through the collator, tensors in forward, and masks of both."""

import pickle

import pytest
import torch
from pretraining_models import MODALITIES, draw, encoder, inputs

from d2v_fast import Data2VecPretraining
from d2v_fast.nn import make_batch
from d2v_fast.patches._pretraining_data import ATTENTION_MASK as MASK
from d2v_fast.patches._pretraining_data import INPUTS


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


def bad_items(modality):
    """(error, message, items) that the collator refuses."""
    name = INPUTS[modality]
    x = inputs(modality)[name]
    rows = [{name: row} for row in x]
    shape, size = str(tuple(x[0].shape)).replace("(", r"\(").replace(")", r"\)"), x.shape[1]
    expected = {"speech": r"\[S\], one sequence", "text": r"\[T\], one sequence", "image": shape}[modality]
    numbers = rf"items\[0\]\['{name}'\] must be a tensor, array or list of numbers, got"
    yield from [
        (ValueError, "items must have at least one item, got none", []),
        (TypeError, rf"items\[1\] must be a mapping with '{name}', got tuple", [rows[0], (x[0], 1)]),
        (ValueError, rf"items\[2\] must have '{name}', got 'audio', 'label'", [*rows[:2], {"audio": x[0], "label": 1}]),
        (ValueError, rf"items\[0\] must have '{name}', got no keys", [{}]),
        (ValueError, rf"items\[1\]\['{name}'\] must be {expected}, got \(1, ", [rows[0], {name: x[:1]}]),
        (TypeError, f"{numbers} NoneType", [{name: None}]),
        (TypeError, f"{numbers} list: expected sequence of length 1", [{name: [[1], [1, 2]]}]),
    ]
    for dtype in (torch.bool, torch.int16, torch.uint8, torch.float64, torch.complex64):
        found = str(dtype).removeprefix("torch.")
        known = "int64 or int32" if modality == "text" else "float32, float16 or bfloat16"
        yield TypeError, rf"items\[1\]\['{name}'\] must be {known}, got {found}$", [rows[0], {name: x[0].to(dtype)}]
    ones = torch.ones(size)
    if modality == "image":
        yield ValueError, "items must have no 'attention_mask', got one: images", [rows[0], rows[1] | {MASK: ones}]
        yield ValueError, rf"items\[1\]\['{name}'\] must be {shape}, got \(3, 8, 7\)", [rows[0], {name: x[0, ..., 1:]}]
        return
    least = "400 samples" if modality == "speech" else "1 token"
    mask = rf"\['{MASK}'\] must be"
    yield from [
        (
            ValueError,
            rf"items\[1\] must have '{MASK}' as other items have, got '{name}'",
            [rows[0] | {MASK: ones}, rows[1]],
        ),
        (ValueError, rf"items\[0\]{mask} \({size},\) like '{name}', got \(5,\)", [rows[0] | {MASK: ones[:5]}]),
        (ValueError, rf"items\[0\]{mask} ones, then zeros", [rows[0] | {MASK: torch.arange(size) > 2}]),
        (TypeError, rf"items\[0\]{mask} a tensor, .* got NoneType", [rows[0] | {MASK: None}]),
        (ValueError, rf"must have at least {least} without padding, got 0", [rows[0] | {MASK: 0 * ones}]),
        (ValueError, rf"items\[1\]\['{name}'\] must have at least {least}", [rows[0], {name: x[0][:0]}]),
    ]


@pytest.mark.parametrize("modality", MODALITIES)
def test_bad_items(modality):
    """Which item it is, what it should have, and what it has."""
    collate = Data2VecPretraining(encoder(modality)).collator()
    for error, message, items in bad_items(modality):
        with pytest.raises(error, match=message):
            collate(items)

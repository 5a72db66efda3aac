"""Image pretraining in an engine of one's own: timm's ModelEmaV2, and targets and loss as functions."""

import copy

import pytest
import torch
import torch.nn.functional as F
import vision_restated
from beit_pairs import TOLERANCE, agree, data, model
from beit_style import ModelEmaV2
from parity import relative

from d2v_fast.patches import PatchError, patch
from d2v_fast.patches.beit.engine import beit_loss, beit_targets


def test_training_run():
    """An engine's loop, with a teacher made from the patched model, ends with the same weights."""

    def run(patched):
        made = model(drop_path=0.3).train()
        if patched:
            patch(made)
        teacher = ModelEmaV2(made, decay=0.5)  # of integers too, exactly
        if patched:
            patch(made, teacher=teacher)  # what is replaced already stays so
        optimizer = torch.optim.AdamW(made.parameters(), lr=1e-4)
        losses = []
        for update in range(5):
            images, mask = data(update)
            torch.manual_seed(update)
            with torch.no_grad():
                results = teacher.module(images, None, True, "end")
            if patched:
                target = beit_targets(results, mask, target_layers=[1, 2])
                loss = beit_loss(made(images, mask), target)
            else:
                flat = mask.flatten(1)
                target = sum(F.layer_norm(x, x.shape[-1:]) for x in results[1:]) / 2
                loss = F.smooth_l1_loss(made(images, mask), F.layer_norm(target, target.shape[-1:])[flat], beta=2.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            teacher.update(made)
            losses.append(loss.detach())
        return losses, made.state_dict(), teacher.module.state_dict()

    for got, want in zip(run(True), run(False), strict=True):
        got, want = (x if isinstance(x, dict) else dict(enumerate(x)) for x in (got, want))
        moved = {name: x for name, x in want.items() if x.is_floating_point()}
        agree({name: got[name] for name in moved}, moved, 1e-4)


def test_ema():
    made = model()
    teacher = ModelEmaV2(made, decay=0.9)
    plain = copy.deepcopy(teacher)
    result = patch(teacher)
    for _ in range(3):
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        teacher.update(made)
        plain.update(made)
    index = "rel_pos_bias.relative_position_index"
    got, want = teacher.module.state_dict(), plain.module.state_dict()
    assert torch.equal(got[index], made.state_dict()[index])
    assert not torch.equal(want.pop(index), got.pop(index))  # timm averages integers, and rounds down
    agree(got, want)
    teacher.set(made)
    assert all(torch.equal(x, made.state_dict()[name].to(x.dtype)) for name, x in teacher.module.state_dict().items())
    assert not result.fallbacks()


def test_ema_that_ours_does_not_know():
    made = model()
    teacher = ModelEmaV2(made)
    result = patch(teacher)
    teacher._update(made, lambda e, m: torch.minimum(e, m))
    teacher._update(made, lambda e, m: e * e)
    teacher.update(model().bfloat16())
    teacher.module.double()
    teacher.update(made)
    assert result.fallbacks() == {
        ("ModelEmaV2._update", "its update is no average of two numbers"): 2,
        ("ModelEmaV2._update", "the student is in another dtype than float32, and timm rounds its share to that"): 1,
        ("ModelEmaV2._update", "the averages are in another dtype than float32"): 1,
    }
    with pytest.raises(PatchError, match="no average of two numbers"), patch(ModelEmaV2(made), strict=True) as strict:
        strict.applied[0].owner._update(made, lambda e, m: e * e)


def test_other_teachers():
    made = model()
    with pytest.raises(PatchError, match=r"teacher must be one of .*ModelEmaV2.* got Linear"):
        patch(made, teacher=torch.nn.Linear(1, 1))
    assert not any("_d2v_fast" in module.__dict__ for module in made.modules())
    assert len(patch(made, teacher=copy.deepcopy(made)).applied) == 14
    other = torch.nn.Module()
    other.module = model()
    result = patch(other.module, teacher=other)
    assert [s.reason for s in result.skipped if not s.harmless] == ["ours knows the step of timm's ModelEmaV2 alone"]
    assert len(result.applied) == 7


def test_engine_functions():
    images, mask = data()
    made = model()
    results = made(images, None, True, "end")
    flat = mask.flatten(1)
    padded = [F.pad(x, (0, 0, 1, 0)) for x in results]  # with a class token
    want = vision_restated.targets(padded, 2)[flat]
    assert relative(beit_targets(results, mask, target_layers=[1, 2]), want) <= TOLERANCE
    assert relative(beit_targets(results, mask.long(), target_layers=[-2, -1]), want) <= TOLERANCE
    assert beit_targets(results).shape == (3, 36, 32)
    assert relative(beit_targets(torch.stack(results), mask, target_layers=[1, 2]), want) <= TOLERANCE
    with pytest.raises(ValueError, match=r"layer_results must be \[L, B, P, C\] if stacked, got \(3, 36, 32\)"):
        beit_targets(results[0])
    prediction = torch.randn_like(want).requires_grad_()
    loss = beit_loss(prediction, want)
    loss.backward()
    torch.testing.assert_close(loss, F.smooth_l1_loss(prediction, want, beta=2.0))
    torch.testing.assert_close(beit_loss(prediction, want, beta=0.0, scale=3.0), 3 * F.mse_loss(prediction, want))
    bad = [
        (ValueError, r"target_layers must be of 3 layers, got \[3\]", {"target_layers": [3]}),
        (ValueError, r"target_layers must be of 3 layers, got \[\]", {"target_layers": []}),
        (ValueError, r"mask must be \(3, 36\) patches, got \(3, 34\)", {"mask": flat[:, 2:]}),
        (TypeError, "mask must be a tensor, got list", {"mask": [1]}),
        (ValueError, "norm", {"norm": "other"}),
        (ValueError, r"mask must be \(3, 36\) patches, got \(108,\)", {"mask": flat.flatten()}),
        (ValueError, r"mask must be \(3, 36\) patches, got \(2, 6, 6\)", {"mask": mask[:2]}),
    ]
    for error, message, given in bad:
        with pytest.raises(error, match=message):
            beit_targets(results, **given)


def test_class_token_in_the_teacher_s_results():
    images, mask = data()
    results = [F.pad(x, (0, 0, 1, 0)) for x in model()(images, None, True, "end")]
    message = r"layer_results must be \[3, 36, C\] as mask is of 36 patches, got 37 positions: drop the class token, "
    for given in (mask, mask.flatten(1).long()):
        with pytest.raises(ValueError, match=message + r"x\[:, 1:\]"):
            beit_targets(results, given)
    with pytest.raises(ValueError, match=r"layer_results must be \[B, P, C\] of every layer, got none"):
        beit_targets([], mask)
    with pytest.raises(ValueError, match=r"layer_results must be \[B, P, C\] of every layer, got \(37, 32\)"):
        beit_targets([results[0][0]], mask)
    with pytest.raises(TypeError, match=r"layer_results\[1\] must be a tensor, got NoneType"):
        beit_targets([results[0], None], mask)

"""Twenty updates of the image model against the plain PyTorch of ``vision_restated``, which shares no code with it.

As in ``test_parity_steps.py``: the learning rate is small in float32, the recipe's in float64.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import vision_restated as restated
from parity import assert_equal, float64, gradients, relative
from vision_restated import renamed

from d2v_fast.nn import Data2Vec, Data2VecConfig, make_batch
from d2v_fast.train.optim import OptimConfig, build_optimizer
from d2v_fast.train.step import train_step

TINY = {"layers": 3, "dim": 64, "ffn_dim": 96, "heads": 4}
BASE = {"layers": 2, "dim": 768, "ffn_dim": 3072, "heads": 12}  # the published widths
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05}
SIZE, PATCH, TOP_K, SCALE, DECAY = 48, 8, 2, 0.1, 0.9


def pair(sizes, drop_path):
    """(restated student, its teacher, our model with their weights); student and teacher differ."""
    student = restated.Vision(SIZE, PATCH, sizes, scale=SCALE, drop_path=drop_path)
    teacher = copy.deepcopy(student).eval()
    with torch.no_grad():
        for p, average in zip(student.parameters(), teacher.parameters(), strict=True):
            p.add_(0.05 * torch.randn_like(p))
            average.copy_(p + 0.02 * torch.randn_like(p))
    config = Data2VecConfig.image(profile="fairseq")
    config = replace(
        config,
        frontend=replace(config.frontend, image_size=SIZE, patch_size=PATCH),
        encoder=replace(config.encoder, **sizes, layer_scale=SCALE, attention_dropout=0.0, drop_path=drop_path),
        mask=replace(config.mask, num_masked=20, min_block=4),
        targets=replace(config.targets, top_k=TOP_K),
        ema=replace(config.ema, decay=DECAY, end_decay=DECAY),
    )
    ours = Data2Vec(config)
    ours.load_state_dict(renamed(student.state_dict()) | teacher_weights(teacher))
    return student, teacher, ours.train()


def teacher_weights(teacher):
    """Our teacher has all but the head, which no target depends on."""
    weights = renamed(teacher.state_dict())
    return {f"teacher.module.{name}": x for name, x in weights.items() if not name.startswith("head.")}


def run(*, lr, tolerance, sizes=TINY, updates=20, drop_path=0.0, clip_norm=0.0):
    """Both sides through ``updates``; every difference is at most ``tolerance`` of the tensor."""
    student, teacher, ours = pair(sizes, drop_path)
    optimizer = build_optimizer(ours, OptimConfig(lr=lr, decay_vectors=False, **ADAM))
    groups = restated.parameter_groups(student, ADAM["weight_decay"])
    their_optimizer = torch.optim.AdamW(groups, lr=lr, betas=ADAM["betas"], eps=ADAM["eps"], foreach=False)
    kept = {}
    for name, p in ours.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p, name=name: kept.update({name: p.grad.clone()}))
    patches = ours.config.frontend.num_patches
    for update in range(updates):
        images = torch.randn(3, 3, SIZE, SIZE)
        mask = ours.config.mask.draw(np.random.default_rng(update), np.full(3, patches), patches)
        torch.manual_seed(update)
        want = restated.loss(student, teacher, images, torch.from_numpy(mask), TOP_K, 2.0)
        their_optimizer.zero_grad()
        want.backward()
        grads = {name: x.clone() for name, x in gradients(student).items()}
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(student.parameters(), clip_norm)
        for group in their_optimizer.param_groups:
            group["lr"] = lr * (1 + update % 3)
        their_optimizer.step()
        restated.follow(teacher, student, DECAY)

        torch.manual_seed(update)  # DropPath draws the same
        rate = lr * (1 + update % 3)
        metrics = train_step(ours, [make_batch(images, mask)], optimizer, lr=rate, update=update, clip_norm=clip_norm)
        assert relative(metrics.loss, want.detach()) <= tolerance
        assert_equal(kept, renamed(grads), tolerance)
        weights = renamed(student.state_dict()) | teacher_weights(teacher)
        assert_equal(dict(ours.named_parameters()), weights, tolerance)
    assert kept.keys() == renamed(grads).keys()


def test_float32():
    run(lr=2e-5, tolerance=1e-5)


def test_float32_at_the_published_widths():
    run(lr=2e-5, tolerance=1e-5, sizes=BASE, updates=2)


@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
def test_float64(clip_norm):
    with float64():
        run(lr=2e-3, tolerance=1e-10, clip_norm=clip_norm)


def test_drop_path():
    with float64():
        run(lr=2e-3, tolerance=1e-10, updates=5, drop_path=0.5)

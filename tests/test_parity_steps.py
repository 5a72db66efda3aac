"""Twenty updates of our training step against fairseq's, from the same weights, on new batches and masks each time.

fairseq's side is what its trainer does: teacher step at the start (``set_num_updates``), loss, gradients divided by the
number of masked positions, AdamW. Loss, every gradient, every weight and every weight of the teacher are compared at
every update. Every second batch has padding. In float32 the learning rate is small: Adam's first steps move
each weight by the learning rate times the sign of its gradient, and signs of the smallest gradients are rounding. In
float64 (fairseq's casts to float32 taken away) it is the recipe's, and nothing is left of the differences.
"""

import numpy as np
import pytest
import torch
from parity import assert_equal, float64, gradients, relative

pytest.importorskip("fairseq_peer")

import fairseq_peer as peer
from fairseq_pairs import BASE, VOCAB, speech_pair, text_pair

from d2v_fast.nn import make_batch
from d2v_fast.optim import AdamWEMA
from d2v_fast.train.optim import OptimConfig, build_optimizer
from d2v_fast.train.step import train_step

UPDATES = 20
ADAM = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01}  # of the speech and text recipes


class Speech:
    pair, weights, renamed = staticmethod(speech_pair), staticmethod(peer.speech_state), peer.renamed_speech
    teacher, loss_name = "encoder.", "regression"

    @staticmethod
    def tracked(model):
        return model.ema.fp32_params

    @staticmethod
    def batch(config, number):
        """Arguments of fairseq's forward, and our batch: 24 frames, with padding 24, 19 and 20."""
        samples = np.array([8000, 6400, 6800]) if number % 2 else np.full(3, 8000)
        frames = config.frontend.num_frames(samples)
        padding = torch.arange(8000) >= torch.from_numpy(samples)[:, None]
        waves = torch.randn(3, 8000).masked_fill(padding, 0)
        mask = config.mask.draw(np.random.default_rng(number), frames, 24)
        theirs = {"source": waves, "mask_indices": mask, "padding_mask": padding if number % 2 else None}
        return theirs, make_batch(waves, mask, frames)


class Text:
    pair, weights, renamed = staticmethod(text_pair), staticmethod(peer.text_state), peer.renamed_text
    teacher, loss_name = "encoder.sentence_encoder.", "main"

    @staticmethod
    def tracked(model):
        return model.encoder.ema.fp32_params

    @staticmethod
    def batch(config, number):
        """The same for rows of up to 37 tokens; the teacher reads the masked ones only."""
        lengths = np.array([37, 25, 30]) if number % 2 else np.full(3, 37)
        valid = torch.arange(37) < torch.from_numpy(lengths)[:, None]
        tokens = torch.randint(4, VOCAB - 1, (3, 37)).where(valid, 1)
        drawn = config.mask.draw(np.random.default_rng(number), lengths, 37)
        mask = torch.from_numpy(drawn)
        theirs = {"src_tokens": tokens.where(~mask, VOCAB - 1), "target_tokens": tokens.where(mask, 1)}
        return theirs, make_batch(tokens, drawn, lengths)


def fairseq_step(model, kind, update, batches, optimizer, clip_norm):
    """One update as fairseq's trainer makes it; loss per masked position, and the gradients before clipping."""
    loss, count = 0.0, 0
    optimizer.zero_grad()
    for index, batch in enumerate(batches):
        if index:
            model.set_num_updates(update)  # steps the teacher once more
        out = model(**batch)
        out["losses"][kind.loss_name].backward()
        loss, count = loss + out["losses"][kind.loss_name].detach(), count + out["sample_size"]
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad / count
    grads = {name: x.clone() for name, x in gradients(model).items()}
    if clip_norm:
        peer.fairseq.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return loss / count, grads


def adamw(theirs, ours, lr):
    """The optimizer that configurations build, and its unfused form."""
    mine = build_optimizer(ours, OptimConfig(lr=lr, **ADAM))
    return torch.optim.AdamW(theirs.parameters(), lr=lr, **ADAM, foreach=False), mine


def fairseq_adam(theirs, ours, lr):
    """fairseq's own Adam, and ours in one pass with the teacher's average and eps where fairseq has it."""
    from fairseq.optim.adam import Adam

    students = [p for p in ours.parameters() if p.requires_grad]
    mine = AdamWEMA(students, lr=lr, **ADAM, ema=ours.teacher.averages(), eps_mode="fairseq")
    return Adam(theirs.parameters(), lr=lr, **ADAM), mine


def teacher_match(theirs, ours, kind, tolerance):
    """fairseq's averages and copies against our teacher's."""
    state = {kind.teacher + name: x for name, x in kind.tracked(theirs).items()}
    want = kind.renamed({**dict(theirs.named_parameters()), **state}, ours.config.encoder.layers)
    assert_equal(ours.teacher.module.state_dict(), want, tolerance)


def keep_gradients(model):
    """A dictionary that each backward fills with the gradients by name, whatever the step does with them next."""
    kept = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p, name=name: kept.update({name: p.grad.clone()}))
    return kept


def run(kind, *, lr, tolerance, optimizers=adamw, updates=UPDATES, clip_norm=0.0, accumulate=1, **options):
    """Both sides through ``updates``; every difference is at most ``tolerance`` of the tensor."""
    theirs, ours = kind.pair(**options)
    layers = ours.config.encoder.layers
    their_optimizer, optimizer = optimizers(theirs, ours, lr)
    first = {name: p.detach().clone() for name, p in ours.named_parameters()}
    kept = keep_gradients(ours)
    for update in range(updates):
        theirs.set_num_updates(update)  # steps fairseq's teacher
        teacher_match(theirs, ours, kind, tolerance)
        numbers = range(update * accumulate, (update + 1) * accumulate)
        their_batches, batches = zip(*(kind.batch(ours.config, number) for number in numbers), strict=True)
        want, grads = fairseq_step(theirs, kind, update, their_batches, their_optimizer, clip_norm)
        metrics = train_step(ours, batches, optimizer, lr=lr, update=update, clip_norm=clip_norm)
        assert relative(metrics.loss, want) <= tolerance
        assert_equal(kept, kind.renamed(grads, layers), tolerance)
        assert_equal({name: ours.get_parameter(name) for name in kept}, kind.weights(theirs, layers), tolerance)
    assert kept.keys() == kind.weights(theirs, layers).keys()
    theirs.set_num_updates(updates)
    teacher_match(theirs, ours, kind, tolerance)
    still = [name for name, p in ours.named_parameters() if torch.equal(p, first[name])]
    assert not still


KINDS = pytest.mark.parametrize("kind", [Speech, Text])


@KINDS
def test_float32(kind):
    run(kind, lr=2e-5, tolerance=1e-5)


@KINDS
def test_float32_at_the_published_widths(kind):
    run(kind, lr=2e-5, tolerance=1e-5, updates=2, sizes=BASE)


@KINDS
@pytest.mark.parametrize("optimizers", [adamw, fairseq_adam])
def test_float64(kind, optimizers):
    with float64():
        run(kind, lr=5e-4, tolerance=1e-11, optimizers=optimizers)


@KINDS
def test_accumulated(kind):
    """Two micro-batches an update, each of which steps fairseq's teacher."""
    with float64():
        run(kind, lr=5e-4, tolerance=1e-11, updates=4, accumulate=2)


@KINDS
def test_clipped_with_fairseqs_adam(kind):
    """fairseq clips float32 gradients only."""
    run(kind, lr=2e-5, tolerance=1e-5, updates=5, optimizers=fairseq_adam, clip_norm=0.5)

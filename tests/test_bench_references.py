"""fairseq's steps as ``benchmarks/reference_*.py`` restate them, against fairseq: same numbers by the same operators.

Without dropout and with the same masks: loss, the gradient of every parameter, and after two updates every weight and
every average of the teacher. Operators are counted with dropout, forward, backward, norm, optimizer and teacher apart,
so that a restated step is neither slower nor faster than fairseq's.
"""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from parity import assert_equal
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("fairseq_peer")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import fairseq_peer as peer
import reference_fairseq
import step_peers
from fairseq_pairs import VOCAB, speech_pair, text_pair
from omegaconf import OmegaConf
from reference_speech import SpeechReference
from reference_text import TextReference
from tiny import tiny_batch, tiny_config

from d2v_fast.nn import Batch, Data2Vec, make_batch
from d2v_fast.train.optim import OptimConfig

TOLERANCE = 1e-5
ADAM = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01}
# reads of a flag that lies on the host anyway
HOST_READS = Counter({"_local_scalar_dense": 2})


class Speech:
    pair, reference, loss_name = staticmethod(speech_pair), SpeechReference, "regression"

    @staticmethod
    def batch(config, number: int) -> Batch:
        samples = (8_000, 7_600)[number]  # 24 frames, and 23, which are padded to 24
        frames = config.frontend.num_frames(samples)
        mask = config.mask.draw(np.random.default_rng(number), np.full(3, frames), frames)
        return make_batch(torch.randn(3, samples), mask)

    @staticmethod
    def theirs(batch: Batch, dtype: torch.dtype) -> dict:
        return {"source": batch.inputs.to(dtype), "mask_indices": batch.mask.numpy()}

    @staticmethod
    def restated(batch: Batch, dtype: torch.dtype) -> tuple:
        return batch.inputs.to(dtype), batch.mask

    @staticmethod
    def averages(model) -> dict:
        return model.ema.fp32_params


class Text:
    pair, reference, loss_name = staticmethod(text_pair), TextReference, "main"

    @staticmethod
    def batch(config, number: int) -> Batch:
        tokens = torch.randint(4, VOCAB - 1, (3, 37))
        lengths = np.array([37, 25, 30]) if number else np.full(3, 37)  # with padding, which attention leaves out
        tokens[torch.arange(37) >= torch.from_numpy(lengths)[:, None]] = config.frontend.pad_index
        return make_batch(tokens, config.mask.draw(np.random.default_rng(number), lengths, 37), lengths)

    @staticmethod
    def theirs(batch: Batch, dtype: torch.dtype) -> dict:
        return {
            "src_tokens": batch.inputs.where(~batch.mask, VOCAB - 1),
            "target_tokens": batch.inputs.where(batch.mask, 1),
        }

    @staticmethod
    def restated(batch: Batch, dtype: torch.dtype) -> tuple:
        return batch.inputs, batch.mask

    @staticmethod
    def averages(model) -> dict:
        return model.encoder.ema.fp32_params


def both(kind):
    """fairseq's model without dropout, its restatement with the same weights, and our configuration of it."""
    torch.manual_seed(0)
    theirs, ours = kind.pair()
    mine = kind.reference(ours.config).train()
    state = {name: x for name, x in theirs.state_dict().items() if "_ema" not in name}
    mine.load_state_dict(state)
    mine.make_teacher()
    return theirs, mine, ours.config


def named(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", [Speech, Text])
def test_two_updates_are_fairseqs(kind):
    from fairseq.optim.adam import Adam

    theirs, mine, config = both(kind)
    adams = Adam(theirs.parameters(), **ADAM), reference_fairseq.Adam(mine.parameters(), **ADAM)
    for update in (1, 2):
        batch = kind.batch(config, update - 1)
        out = theirs(**kind.theirs(batch, torch.float32))
        want, got = out["losses"][kind.loss_name], mine.loss(*kind.restated(batch, torch.float32))
        assert out["sample_size"] == batch.num_masked
        assert got.item() == pytest.approx(want.item(), rel=TOLERANCE)
        (want / batch.num_masked).backward()
        (got / batch.num_masked).backward()
        gradients = [{name: p.grad for name, p in named(model).items()} for model in (mine, theirs)]
        assert_equal(*gradients, TOLERANCE)
        most = 0.5 * peer.fairseq.utils.clip_grad_norm_(theirs.parameters(), 0).item()
        norms = [clip(model.parameters(), most) for clip, model in clips(theirs, mine)]
        assert norms[0].item() == pytest.approx(norms[1].item(), rel=TOLERANCE)
        assert_equal(*gradients, TOLERANCE)  # clipped
        for adam in adams:
            adam.step()
            adam.zero_grad()
        assert_equal(named(mine), named(theirs), TOLERANCE)
        theirs.set_num_updates(update)
        mine.follow(update)
        assert_equal(mine.teacher.averages, kind.averages(theirs), TOLERANCE)


def clips(theirs, mine):
    return (reference_fairseq.clip_grad_norm_, mine), (peer.fairseq.utils.clip_grad_norm_, theirs)


@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
@pytest.mark.parametrize("kind", [Speech, Text])
def test_the_flat_optimizer_is_fairseqs(kind, clip_norm):
    """A model in bfloat16 with float32 weights behind it, which fairseq keeps flat for float16 alone, on a GPU."""
    from fairseq.optim.adam import Adam
    from fairseq.optim.fp16_optimizer import FP16Optimizer

    theirs, mine, config = both(kind)
    theirs.bfloat16()
    holder = theirs if kind is Speech else theirs.encoder
    holder.ema = None
    theirs.set_num_updates(0)
    mine.bfloat16()
    mine.make_teacher()
    flat = reference_fairseq.FlatOptimizer(mine.parameters(), lambda params: reference_fairseq.Adam(params, **ADAM))
    common = {"bf16": True, "fp16_scale_window": 1}  # the window is not used
    settings = {"_name": "adam", "adam_betas": "(0.9, 0.98)", "adam_eps": 1e-6, "weight_decay": 0.01, "lr": [1e-3]}
    cfg = {"common": common, "optimizer": {**settings, "use_old_adam": True, "fp16_adam_stats": False, "tpu": False}}
    optimizer = FP16Optimizer.build_optimizer(OmegaConf.create(cfg), list(theirs.parameters()))
    assert isinstance(optimizer.fp32_optimizer.optimizer, Adam)
    # its norm is one of norms, which differs in the last digit, so that a weight may be rounded the other way: what
    # follows from that in bfloat16 is more than rounding
    updates, tolerance = ((1,), 1e-3) if clip_norm else ((1, 2), TOLERANCE)
    for update in updates:
        batch = kind.batch(config, update - 1)
        optimizer.backward(theirs(**kind.theirs(batch, torch.bfloat16))["losses"][kind.loss_name])
        optimizer.multiply_grads(1 / batch.num_masked)
        want = optimizer.clip_grad_norm(clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        theirs.set_num_updates(update)
        mine.loss(*kind.restated(batch, torch.bfloat16)).backward()
        got = flat.step(1 / batch.num_masked, clip_norm)
        flat.zero_grad()
        mine.follow(update)
        assert got.item() == pytest.approx(want.item(), rel=TOLERANCE)
        assert_equal(named(mine), named(theirs), tolerance)
        assert all(p.dtype == torch.bfloat16 for p in named(mine).values())
        assert_equal(mine.teacher.averages, kind.averages(theirs), tolerance)
        assert_equal(mine.teacher.module.state_dict(), holder.ema.model.state_dict(), tolerance)


class Operators(TorchDispatchMode):
    """Counts what runs below autograd, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.count[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def counted(modality: str, restated: bool, trained: bool) -> dict[str, Counter[str]]:
    """Operators of each part of a step, after one that allocates."""
    config = tiny_config(modality, "fairseq", layerdrop=0.0)
    batch, optim = tiny_batch(config), OptimConfig(clip_norm=5.0)
    side = step_peers.load(Data2Vec(config), restated=restated)
    assert side.name == ("fairseq, restated" if restated else "fairseq")
    if trained:
        step = side.as_trained(optim)
        step(batch)
        parts = {"step": lambda: step(batch)}
    else:
        step_peers.autocast_step(side, optim)(batch)
        optimizer, losses = side.optimizer(optim), []
        side.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        parts = {
            "forward": lambda: losses.append(side.loss(batch)),
            "backward": lambda: losses[0].backward(),
            "norm": lambda: side.norm(side.parameters, 5.0),
            "optimizer": optimizer.step,
            "teacher": lambda: side.follow(1),
        }
    found = {}
    for name, part in parts.items():
        with Operators() as operators:
            part()
        found[name] = operators.count
    return found


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("modality", ["speech", "text"])
def test_the_operators_are_fairseqs(modality, trained):
    want, got = counted(modality, False, trained), counted(modality, True, trained)
    for part, count in want.items():
        assert sum(got[part].values()) > 100 or part == "norm"
        assert count - got[part] <= (HOST_READS if modality == "text" else Counter()), part
        assert not got[part] - count, part


def test_other_recipes_are_refused():
    speech, text = tiny_config("speech", "fairseq"), tiny_config("text", "fairseq")
    with pytest.raises(
        ValueError, match=r"encoder.layerdrop must be 0.0 to be restated as fairseq writes it, got 0.05"
    ):
        SpeechReference(speech)
    config = replace(speech, encoder=replace(speech.encoder, layerdrop=0.0))
    with pytest.raises(ValueError, match="only the published recipe is restated"):
        SpeechReference(replace(config, targets=replace(config.targets, post_norm="layer")))
    with pytest.raises(ValueError, match="only the published recipe is restated"):
        TextReference(replace(text, targets=replace(text.targets, teacher_input="full")))

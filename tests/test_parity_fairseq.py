"""Our speech and text models against fairseq's own, on the same weights, inputs and masks.

Dropout and LayerDrop are off, so everything is deterministic; the teacher is moved away from the student first. A fused
bias of queries, keys and values counts as one tensor: the keys' part has no gradient in exact arithmetic.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from parity import TOLERANCE, assert_equal, gradients, relative

pytest.importorskip("fairseq_peer")

import fairseq_peer as peer
from fairseq_pairs import BASE, NORMS, TINY, VOCAB, move_students, speech_pair, text_pair

from d2v_fast.nn import Data2VecConfig, make_batch
from d2v_fast.ops import data2vec_loss

DIM, LAYERS = TINY["dim"], TINY["layers"]
SIZES = pytest.mark.parametrize("sizes", [TINY, BASE], ids=["tiny", "base"])


def gradients_match(ours, expected) -> None:
    """The student's gradients are those ``expected`` by our names."""
    got = {name: x for name, x in gradients(ours).items() if not name.startswith("teacher.")}
    assert got.keys() == expected.keys()
    assert_equal(got, expected)


@contextmanager
def hidden_states(layers):
    """Input of the first of fairseq's ``layers`` and output of each, [T, B, C], of the call made inside."""
    kept = []
    hooks = [layers[0].register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))]
    hooks += [layer.register_forward_hook(lambda _, inputs, output: kept.append(output[0])) for layer in layers]
    yield kept
    for hook in hooks:
        hook.remove()


def states_match(got, want, valid) -> None:
    """Hidden states [B, T, C] against fairseq's [T, B, C] at the ``valid`` [B, T] positions."""
    assert len(got) == len(want)
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        b = b.transpose(0, 1)[:, : a.shape[1]]  # without the frame that makes their number even
        assert relative(a[valid], b[valid]) <= TOLERANCE, index


@SIZES
@pytest.mark.parametrize("padded", [False, True])
def test_speech_hidden_states_and_gradients(sizes, padded):
    """A random gradient of the last hidden state; padded rows have 24 and 19 frames."""
    theirs, ours = speech_pair(sizes=sizes)
    samples = np.array([8000, 6400]) if padded else np.full(2, 8000)
    waves = torch.randn(2, 8000)
    padding = torch.arange(8000) >= torch.from_numpy(samples)[:, None]
    frames = torch.from_numpy(ours.config.frontend.num_frames(samples))
    valid = torch.arange(24) < frames[:, None]
    with hidden_states(theirs.encoder.layers) as want:
        x = theirs(waves, padding_mask=padding if padded else None, mask=False, features_only=True)["x"]
    got = ours.hidden_states(waves, ~valid if padded else None)
    states_match(got, want, valid)
    upstream = torch.randn_like(x) * valid[..., None]
    x.backward(upstream)
    got[-1].backward(upstream)
    gradients_match(ours, peer.renamed_speech(gradients(theirs), sizes["layers"]))


@SIZES
@pytest.mark.parametrize("padded", [False, True])
def test_text_hidden_states_and_gradients(sizes, padded):
    theirs, ours = text_pair(sizes=sizes)
    lengths = torch.tensor([37, 25]) if padded else torch.full((2,), 37)
    valid = torch.arange(37) < lengths[:, None]
    tokens = torch.randint(4, VOCAB - 1, (2, 37)).where(valid, 1)
    with hidden_states(theirs.encoder.sentence_encoder.layers) as want:
        x = theirs(tokens, features_only=True)[0]
    got = ours.hidden_states(tokens, ~valid if padded else None)
    states_match(got, want, valid)
    upstream = torch.randn_like(x) * valid[..., None]
    x.backward(upstream)
    got[-1].backward(upstream)
    gradients_match(ours, peer.renamed_text(gradients(theirs), sizes["layers"]))


@pytest.mark.parametrize(("norm", "sizes"), [*((norm, TINY) for norm in NORMS), ("instance", BASE)])
def test_speech_loss_metrics_and_gradients(norm, sizes):
    theirs, ours = speech_pair(norm, sizes=sizes)
    move_students(theirs, ours, peer.speech_state)
    waves = torch.randn(3, 8_320)  # 25 frames: odd, so fairseq pads one and masks it
    mask = ours.config.mask.draw(np.random.default_rng(0), np.full(3, 25), 25)
    want = theirs(waves, mask_indices=mask)
    got = ours(make_batch(waves, mask))
    assert got.num_masked == want["sample_size"]
    assert relative(got.loss, want["losses"]["regression"]) <= TOLERANCE
    assert relative(got.target_var, want["target_var"]) <= TOLERANCE
    assert relative(got.pred_var, want["pred_var"]) <= TOLERANCE
    want["losses"]["regression"].backward()
    got.loss.backward()
    gradients_match(ours, peer.renamed_speech(gradients(theirs), sizes["layers"]))


@pytest.mark.parametrize(("mode", "beta"), [("layer", 0.0), ("group", 0.5)])
def test_speech_with_padding(mode, beta):
    """Padded rows of 49, 37 and 27 frames; fairseq's statistics include the padding."""
    theirs, ours = speech_pair(mode=mode, beta=beta)
    move_students(theirs, ours, peer.speech_state)
    samples = np.array([16_000, 12_000, 9_000])
    frames = ours.config.frontend.num_frames(samples)
    assert frames.tolist() == [49, 37, 27]
    waves = torch.randn(3, 16_000)
    padding = torch.arange(16_000) >= torch.from_numpy(samples)[:, None]
    waves[padding] = 0
    mask = ours.config.mask.draw(np.random.default_rng(1), frames, 49)
    want = theirs(waves, padding_mask=padding, mask_indices=mask)
    got = ours(make_batch(waves, mask, frames))
    assert relative(got.loss, want["losses"]["regression"]) <= TOLERANCE
    assert relative(got.target_var, want["target_var"]) <= TOLERANCE
    want["losses"]["regression"].backward()
    got.loss.backward()
    gradients_match(ours, peer.renamed_speech(gradients(theirs), LAYERS))


def test_speech_padding_aware_statistics_differ():
    """The paper profile leaves padding out of the statistics: another loss with padding, the same without."""
    theirs, ours = speech_pair(profile="paper")
    waves = torch.randn(2, 16_000)
    mask = ours.config.mask.draw(np.random.default_rng(1), np.array([49, 20]), 49)
    padding = torch.zeros(2, 16_000, dtype=torch.bool)
    assert (
        relative(ours(make_batch(waves, mask)).loss, theirs(waves, mask_indices=mask)["losses"]["regression"]) <= 1e-5
    )
    padding[1, 6_800:] = True  # 20 frames are left
    want = theirs(waves.masked_fill(padding, 0), padding_mask=padding, mask_indices=mask)["losses"]["regression"]
    got = ours(make_batch(waves.masked_fill(padding, 0), mask, np.array([49, 20]))).loss
    assert relative(got, want) > 1e-3


def test_speech_features():
    """``encode`` against ``extract_features`` of fairseq, eval mode, unmasked."""
    theirs, ours = speech_pair()
    theirs.eval(), ours.eval()
    waves = torch.randn(2, 8_000)
    with torch.no_grad():
        want = theirs.extract_features(waves, None, mask=False)["x"]
        got = ours.encode(waves)
    assert relative(got, want) <= TOLERANCE


@pytest.mark.parametrize(
    ("profile", "padded", "sizes"),
    [
        *((profile, padded, TINY) for profile in ("fairseq", "paper") for padded in (False, True)),
        ("fairseq", True, BASE),
    ],
)
def test_text_loss_and_gradients(profile, padded, sizes):
    """Released behaviour: the teacher sees the masked tokens only; the paper's: all of them."""
    theirs, ours = text_pair(profile, sizes=sizes)
    move_students(theirs, ours, peer.text_state)
    lengths = np.array([37, 25, 30]) if padded else np.full(3, 37)
    tokens = torch.randint(4, VOCAB - 1, (3, 37))
    tokens[torch.arange(37) >= torch.from_numpy(lengths)[:, None]] = 1
    mask = ours.config.mask.draw(np.random.default_rng(0), lengths, 37)
    source = torch.where(torch.from_numpy(mask), VOCAB - 1, tokens)
    teacher = torch.where(torch.from_numpy(mask), tokens, 1) if profile == "fairseq" else tokens
    want = theirs(source, target_tokens=teacher)
    got = ours(make_batch(tokens, mask, lengths))
    assert got.num_masked == want["sample_size"]
    assert relative(got.loss, want["losses"]["main"]) <= TOLERANCE
    want["losses"]["main"].backward()
    got.loss.backward()
    gradients_match(ours, peer.renamed_text(gradients(theirs), sizes["layers"]))


def kept_output(module: torch.nn.Module) -> list[torch.Tensor]:
    """What ``module`` returns from now on, with its gradient."""
    kept = []

    def hook(_, inputs, output):
        output.retain_grad()
        kept.append(output)

    module.register_forward_hook(hook)
    return kept


def op_matches(pred, results, mask, loss, **options):
    """Our op on fairseq's predictions and layer results [T, B, C] against its loss: values, and gradient of pred."""
    assert all(x.dtype == torch.float32 and x.shape[:2] == mask.T.shape for x in results)
    positions = torch.from_numpy(mask).flatten().nonzero()[:, 0]
    leaf = pred.detach().clone().requires_grad_()
    got = data2vec_loss(leaf, results, positions, layout="TBC", **options)
    assert relative(got.loss, loss) <= 1e-6
    (loss * 0.37).backward()
    (got.loss * 0.37).backward()
    assert relative(leaf.grad, pred.grad) <= 2e-6
    return got


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("norm", NORMS.keys())
def test_op_on_the_tensors_of_the_speech_model(norm, beta, monkeypatch):
    theirs, _ = speech_pair(norm, beta=beta)
    predictions, teacher = kept_output(theirs.final_proj), theirs.ema.model
    results = []

    def extract_features(*args, **kwargs):
        x, layers = type(teacher).extract_features(teacher, *args, **kwargs)
        results.extend(layer[2] for layer in layers)
        return x, layers

    monkeypatch.setattr(teacher, "extract_features", extract_features, raising=False)
    mask = Data2VecConfig.speech().mask.draw(np.random.default_rng(0), np.full(3, 50), 50)
    want = theirs(torch.randn(3, 16_080), mask_indices=mask)
    assert len(results) == 2
    names = norm.split("+")
    options = {"norm": names[0], "post_norm": names[1] if len(names) > 1 else "none", "beta": beta, "scale": DIM**-0.5}
    got = op_matches(predictions[0], results, mask, want["losses"]["regression"], **options)
    assert relative(got.target_var, want["target_var"]) <= 1e-6
    assert relative(got.pred_var, want["pred_var"]) <= 1e-6


@pytest.mark.parametrize("beta", [0.0, 4.0])
def test_op_on_the_tensors_of_the_text_model(beta):
    theirs, _ = text_pair(beta=beta)
    predictions, results = kept_output(theirs.encoder.regression_head), []
    theirs.encoder.ema.model.register_forward_hook(lambda _, inputs, out: results.extend(out["fc_results"][-2:]))
    tokens = torch.randint(4, VOCAB - 1, (3, 37))
    mask = Data2VecConfig.text().mask.draw(np.random.default_rng(0), np.full(3, 37), 37)
    source = torch.where(torch.from_numpy(mask), VOCAB - 1, tokens)
    want = theirs(source, target_tokens=tokens)
    assert len(results) == 2
    op_matches(predictions[0], results, mask, want["losses"]["main"], norm="layer", beta=beta)


def test_text_features():
    theirs, ours = text_pair("paper")
    theirs.eval(), ours.eval()
    tokens = torch.randint(4, VOCAB - 1, (2, 20))
    with torch.no_grad():
        want = theirs(tokens, features_only=True)[0]
        got = ours.encode(tokens)
    assert relative(got, want) <= TOLERANCE


def test_teacher_weights_after_steps():
    """The teachers' weights, averaged and copied ones, after two steps of the schedule."""
    theirs, ours = speech_pair()
    move_students(theirs, ours, peer.speech_state)
    names = peer.speech_state(
        SimpleNamespace(state_dict=lambda: {**theirs.state_dict(), **_prefixed(theirs.ema.model)}), LAYERS
    )
    for name, mine in ours.teacher.module.state_dict().items():
        assert relative(mine, names[name]) <= 1e-6, name
    moved = ours.teacher.module["encoder"].layers[0].fc1.weight - ours.encoder.layers[0].fc1.weight
    assert moved.norm() > 1e-3  # averaged, so not equal to the student


def _prefixed(module) -> dict[str, torch.Tensor]:
    return {f"encoder.{k}": v for k, v in module.state_dict().items()}


def test_span_masks_have_fairseqs_distribution():
    """Share masked at every frame and count per row, against ``compute_mask_indices``: 4 standard errors."""
    from fairseq.data.data_utils import compute_mask_indices

    T, rows, draws = 120, 4, 500
    mask = Data2VecConfig.speech().mask
    rng = np.random.default_rng(0)
    got = np.concatenate([mask.draw(rng, np.full(rows, T), T) for _ in range(draws)])
    want = np.concatenate([compute_mask_indices((rows, T), None, 0.65, 10, min_masks=1) for _ in range(draws)])
    error = np.sqrt(2 * 0.25 / (rows * draws))
    # rows of a batch share their count, so the counts of different batches are the independent draws
    assert abs(got.sum(1).mean() - want.sum(1).mean()) < 4 * np.sqrt(2 * want.sum(1).var() / draws)
    assert np.abs(got.mean(0) - want.mean(0)).max() < 5 * error
    assert got.sum(1).reshape(draws, rows).std(1).max() == 0 == want.sum(1).reshape(draws, rows).std(1).max()


def test_one_teacher_step_is_ema_modules():
    """``ema_update_`` against ``EMAModule.step`` on the same tensors."""
    from fairseq.modules.ema_module import EMAModule, EMAModuleConfig

    from d2v_fast.ops import ema_update_

    student = torch.nn.Linear(7, 5)
    theirs = EMAModule(student, EMAModuleConfig(ema_decay=0.999))
    mine = [p.detach().clone() for p in student.parameters()]
    for _ in range(3):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(torch.randn_like(p))
        theirs.step(student)
        ema_update_(mine, [p.detach() for p in student.parameters()], 0.999)
    for a, b in zip(mine, theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)

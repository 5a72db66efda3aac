"""Our speech and text models against fairseq's own, on the same weights, inputs and masks.

Dropout and LayerDrop are off, so everything is deterministic; the teacher is moved away from the student first.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

peer = pytest.importorskip("fairseq_peer")

from d2v_fast.nn import Data2Vec, Data2VecConfig, make_batch  # noqa: E402
from d2v_fast.ops import data2vec_loss  # noqa: E402

LAYERS, DIM, FFN, HEADS, TOP_K = 3, 64, 96, 4, 2
SIZES = {"layers": LAYERS, "dim": DIM, "ffn_dim": FFN, "heads": HEADS}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0}
CONVS = ((32, 10, 5), *((32, 3, 2),) * 4, *((32, 2, 2),) * 2)
VOCAB = 60  # with <mask>, the last


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def speech_pair(norm: dict, mode: str = "layer", profile: str = "fairseq", **flags):
    """(fairseq model with a teacher that differs from its student, our model with the same weights)."""
    theirs = peer.audio.Data2VecAudioModel(
        peer.audio.Data2VecAudioConfig(
            extractor_mode={"layer": "layer_norm", "group": "default"}[mode],
            encoder_layers=LAYERS,
            encoder_embed_dim=DIM,
            encoder_ffn_embed_dim=FFN,
            encoder_attention_heads=HEADS,
            conv_feature_layers="[(32,10,5)]+[(32,3,2)]*4+[(32,2,2)]*2",
            conv_pos=95,
            pos_conv_depth=5,
            average_top_k_layers=TOP_K,
            dropout=0.0,
            attention_dropout=0.0,
            encoder_layerdrop=0.0,
            ema_decay=0.5,
            ema_end_decay=0.9,
            ema_anneal_end_step=10,
            max_update=10,
            **norm,
            **flags,
        )
    )
    config = Data2VecConfig.speech(profile=profile)
    names = {f"{n}_norm_target_layer": n for n in ("instance", "layer", "batch")}
    config = replace(
        config,
        frontend=replace(config.frontend, conv_layers=CONVS, conv_norm=mode),
        encoder=replace(config.encoder, **SIZES, **NO_DROPOUT),
        targets=replace(
            config.targets,
            top_k=TOP_K,
            norm=next((names[n] for n in norm if n in names), "none"),
            post_norm=next((n for n in ("layer", "instance") if f"{n}_norm_targets" in norm), "none"),
        ),
        loss=replace(config.loss, beta=flags.get("loss_beta", 0.0)),
        ema=replace(config.ema, decay=0.5, end_decay=0.9, anneal_updates=10),
    )
    ours = Data2Vec(config)
    theirs.set_num_updates(0)  # makes the teacher
    state = peer.speech_state(theirs, LAYERS)
    ours.load_state_dict({**state, **peer.teacher_state(ours, state)})
    return theirs, ours


def move_students(theirs, ours, to_state) -> None:
    """Change fairseq's student, copy it into ours, and let both teachers follow twice."""
    for update in (1, 2):
        with torch.no_grad():
            for p in theirs.parameters():
                p.add_(0.02 * torch.randn_like(p))
        ours.load_state_dict(to_state(theirs, LAYERS), strict=False)
        theirs.set_num_updates(update)
        ours.teacher.update_(update)


def gradients_match(theirs, ours, to_state, tolerance: float) -> None:
    """Compare gradients by putting fairseq's where its weights are and renaming them as weights."""
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(p.grad if p.grad is not None else torch.zeros_like(p))
    expected = to_state(theirs, LAYERS)
    for name, p in ours.named_parameters():
        if p.requires_grad:
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            scale = max(expected[name].norm().item(), 1e-3)
            assert (grad - expected[name]).norm().item() <= tolerance * scale, name


NORMS = {
    "instance": {"instance_norm_target_layer": True},  # the released LibriSpeech recipe
    "instance+layer": {"instance_norm_target_layer": True, "layer_norm_targets": True},  # AudioSet
    "instance+instance": {"instance_norm_target_layer": True, "instance_norm_targets": True},
    "layer": {"layer_norm_target_layer": True},
    "batch": {"batch_norm_target_layer": True},
    "none": {},
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_speech_loss_metrics_and_gradients(norm):
    theirs, ours = speech_pair(norm)
    theirs.train(), ours.train()
    move_students(theirs, ours, peer.speech_state)
    waves = torch.randn(3, 16_000)  # 49 frames: odd, so fairseq pads one and masks it
    mask = ours.config.mask.draw(np.random.default_rng(0), np.full(3, 49), 49)
    want = theirs(waves, mask_indices=mask)
    got = ours(make_batch(waves, mask))
    assert got.num_masked == want["sample_size"]
    assert relative(got.loss, want["losses"]["regression"]) <= 1e-5
    assert relative(got.target_var, want["target_var"]) <= 1e-5
    assert relative(got.pred_var, want["pred_var"]) <= 1e-5
    want["losses"]["regression"].backward()
    got.loss.backward()
    gradients_match(theirs, ours, peer.speech_state, 2e-4)


@pytest.mark.parametrize(("mode", "beta"), [("layer", 0.0), ("group", 0.5)])
def test_speech_with_padding(mode, beta):
    """Padded rows of 49, 37 and 27 frames; fairseq's statistics include the padding."""
    theirs, ours = speech_pair(NORMS["instance"], mode, loss_beta=beta)
    theirs.train(), ours.train()
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
    assert relative(got.loss, want["losses"]["regression"]) <= 1e-5
    assert relative(got.target_var, want["target_var"]) <= 1e-5


def test_speech_padding_aware_statistics_differ():
    """The paper profile leaves padding out of the statistics: another loss with padding, the same without."""
    theirs, ours = speech_pair(NORMS["instance"], profile="paper")
    theirs.train(), ours.train()
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
    theirs, ours = speech_pair(NORMS["instance"])
    theirs.eval(), ours.eval()
    waves = torch.randn(2, 8_000)
    with torch.no_grad():
        want = theirs.extract_features(waves, None, mask=False)["x"]
        got = ours.encode(waves)
    assert relative(got, want) <= 1e-5


def text_pair(profile: str, beta: float = 4.0):
    """(fairseq text model with its teacher, our model with the same weights)."""
    config = peer.text.Data2VecTextConfig()
    config.max_positions = 40
    config.head_layers, config.average_top_k_layers = 2, TOP_K
    config.layer_norm_target_layer, config.loss_beta, config.loss_scale = True, beta, 1.0
    config.ema_decay, config.ema_end_decay, config.ema_anneal_end_step = 0.5, 0.9, 10
    t = config.transformer
    t.dropout = t.attention_dropout = t.activation_dropout = 0.0
    t.activation_fn, t.layernorm_embedding, t.no_scale_embedding, t.max_source_positions = "gelu", True, True, 40
    t.encoder.embed_dim, t.encoder.ffn_embed_dim, t.encoder.layers, t.encoder.attention_heads = DIM, FFN, LAYERS, HEADS
    t.encoder.learned_pos, t.encoder.normalize_before = True, False

    dictionary = peer.fairseq.data.Dictionary()
    for i in range(VOCAB - 5):
        dictionary.add_symbol(f"w{i}")
    dictionary.add_symbol("<mask>")
    assert len(dictionary) == VOCAB
    task = SimpleNamespace(source_dictionary=dictionary, cfg=SimpleNamespace(data=""))
    theirs = peer.text.Data2VecTextModel.build_model(config, task)
    mine = Data2VecConfig.text(profile=profile)
    mine = replace(
        mine,
        frontend=replace(mine.frontend, vocab_size=VOCAB, max_positions=40, dropout=0.0),
        encoder=replace(mine.encoder, **SIZES, **NO_DROPOUT),
        targets=replace(mine.targets, top_k=TOP_K),
        loss=replace(mine.loss, beta=beta),
        ema=replace(mine.ema, decay=0.5, end_decay=0.9, anneal_updates=10),
    )
    ours = Data2Vec(mine)
    theirs.set_num_updates(0)
    state = peer.text_state(theirs, LAYERS)
    ours.load_state_dict({**state, **peer.teacher_state(ours, state)})
    return theirs, ours


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("profile", ["fairseq", "paper"])
def test_text_loss_and_gradients(profile, padded):
    """Released behaviour: the teacher sees the masked tokens only; the paper's: all of them."""
    theirs, ours = text_pair(profile)
    theirs.train(), ours.train()
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
    assert relative(got.loss, want["losses"]["main"]) <= 1e-5
    want["losses"]["main"].backward()
    got.loss.backward()
    gradients_match(theirs, ours, peer.text_state, 2e-4)


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
    theirs, _ = speech_pair(NORMS[norm], loss_beta=beta)
    theirs.train()
    predictions, teacher = kept_output(theirs.final_proj), theirs.ema.model
    results = []

    def extract_features(*args, **kwargs):
        x, layers = type(teacher).extract_features(teacher, *args, **kwargs)
        results.extend(layer[2] for layer in layers)
        return x, layers

    monkeypatch.setattr(teacher, "extract_features", extract_features, raising=False)
    mask = Data2VecConfig.speech().mask.draw(np.random.default_rng(0), np.full(3, 50), 50)
    want = theirs(torch.randn(3, 16_080), mask_indices=mask)
    assert len(results) == TOP_K
    names = norm.split("+")
    options = {"norm": names[0], "post_norm": names[1] if len(names) > 1 else "none", "beta": beta, "scale": DIM**-0.5}
    got = op_matches(predictions[0], results, mask, want["losses"]["regression"], **options)
    assert relative(got.target_var, want["target_var"]) <= 1e-6
    assert relative(got.pred_var, want["pred_var"]) <= 1e-6


@pytest.mark.parametrize("beta", [0.0, 4.0])
def test_op_on_the_tensors_of_the_text_model(beta):
    theirs, _ = text_pair("fairseq", beta)
    theirs.train()
    predictions, results = kept_output(theirs.encoder.regression_head), []
    theirs.encoder.ema.model.register_forward_hook(lambda _, inputs, out: results.extend(out["fc_results"][-TOP_K:]))
    tokens = torch.randint(4, VOCAB - 1, (3, 37))
    mask = Data2VecConfig.text().mask.draw(np.random.default_rng(0), np.full(3, 37), 37)
    source = torch.where(torch.from_numpy(mask), VOCAB - 1, tokens)
    want = theirs(source, target_tokens=tokens)
    assert len(results) == TOP_K
    op_matches(predictions[0], results, mask, want["losses"]["main"], norm="layer", beta=beta)


def test_text_features():
    theirs, ours = text_pair("paper")
    theirs.eval(), ours.eval()
    tokens = torch.randint(4, VOCAB - 1, (2, 20))
    with torch.no_grad():
        want = theirs(tokens, features_only=True)[0]
        got = ours.encode(tokens)
    assert relative(got, want) <= 1e-5


def test_teacher_weights_after_steps():
    """The teachers' weights, averaged and copied ones, after two steps of the schedule."""
    theirs, ours = speech_pair(NORMS["instance"])
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

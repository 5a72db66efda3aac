"""Front-ends: lengths, masking, gradients into the convolutions, positions, bad input; and configurations."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_batch, tiny_config

from d2v_fast.nn import Data2VecConfig, PatchEmbed, SpeechFrontEnd, TextEmbedding, make_batch
from d2v_fast.nn.config import (
    EMAConfig,
    EncoderConfig,
    LossConfig,
    SpeechFrontEndConfig,
    TargetConfig,
    TextFrontEndConfig,
)


def front(modality, **changes):
    config = tiny_config(modality)
    kind = {"speech": SpeechFrontEnd, "image": PatchEmbed, "text": TextEmbedding}[modality]
    return kind(replace(config.frontend, **changes), config.encoder)


def three_rows(lengths):
    mask = np.zeros((3, 5), bool)
    mask[1, 2] = True
    return make_batch(torch.zeros(3, 5), mask, np.array(lengths))


@pytest.mark.parametrize(
    ("samples", "frames"),
    [(399, 0), (400, 1), (16_000, 49), (160_000, 499), (249_600, 779), (250_000, 781), (320_000, 999)],
)
def test_speech_lengths(samples, frames):
    config = SpeechFrontEndConfig()
    assert config.num_frames(samples) == frames
    assert config.num_frames(np.array([samples, 400])).tolist() == [frames, 1]
    assert config.min_samples == 400
    if 0 < samples <= 16_000:
        assert front("speech").features(torch.randn(1, max(samples, 400))).shape[1] == max(frames, 1)


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_speech_masking_is_out_of_place(norm):
    frontend = front("speech", conv_norm=norm)
    waves, mask = torch.randn(2, 4000), torch.rand(2, 12) < 0.5
    features = frontend.features(waves)
    kept = features.clone()
    masked = frontend.apply_mask(features, mask)
    assert torch.equal(features, kept)
    assert torch.equal(masked[~mask], features[~mask])
    assert (masked[mask] == frontend.mask_embedding).all()


def test_masked_frames_get_no_gradient():
    frontend = front("speech")
    features = torch.randn(2, 12, 32, requires_grad=True)
    mask = torch.rand(2, 12) < 0.5
    masked = frontend.apply_mask(features, mask)
    upstream = torch.randn_like(masked)
    masked.backward(upstream)
    assert not features.grad[mask].any()
    assert torch.equal(features.grad[~mask], upstream[~mask])
    torch.testing.assert_close(frontend.mask_embedding.grad, upstream[mask].sum(0))


def test_feature_grad_mult():
    grads = {}
    for factor in (1.0, 0.25, 0.0):
        torch.manual_seed(0)
        frontend = front("speech", feature_grad_mult=factor)
        waves = torch.randn(1, 2000)
        out = frontend.features(waves)
        out.backward(torch.ones_like(out))
        grads[factor] = frontend.convs[0].conv.weight.grad
        assert frontend.proj.weight.grad is not None
    torch.testing.assert_close(grads[0.25], 0.25 * grads[1.0])
    assert grads[0.0] is None


def test_text_positions_skip_padding():
    """Positions count from 2 over the tokens that are there; padding gives zeros."""
    embedding = front("text", dropout=0.0)
    tokens = torch.tensor([[5, 6, 7, 1, 1], [1, 5, 1, 6, 7]])
    padding = tokens == 1
    ids = embedding._position_ids(tokens, padding)
    assert ids.tolist() == [[2, 3, 4, 1, 1], [1, 2, 1, 3, 4]]
    x = embedding(tokens, None, padding)
    assert not x[padding].any()
    torch.testing.assert_close(x[0, :3], x[1, [1, 3, 4]])
    torch.testing.assert_close(embedding(tokens[:1, :3]), x[:1, :3])


def test_text_mask_token():
    embedding = front("text", dropout=0.0).eval()
    tokens = torch.full((1, 4), 9)
    masked = embedding(tokens, torch.tensor([[False, True, False, False]]))
    assert torch.equal(masked, embedding(torch.tensor([[9, 49, 9, 9]])))


def test_image_patches_are_in_row_major_order():
    embed = front("image")
    images = torch.zeros(1, 3, 24, 24)
    images[0, :, 4:8, 8:12] = 1.0  # patch (1, 2) of a 6 x 6 grid
    x = embed(images)
    changed = (x[0, 1:] != embed(torch.zeros(1, 3, 24, 24))[0, 1:]).any(1)
    assert changed.nonzero().flatten().tolist() == [1 * 6 + 2]
    assert torch.equal(x[0, 0], embed.class_token)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: front("speech").features(torch.randn(2, 1, 500)), ValueError, r"waveforms must be \[B, S\]"),
        (
            lambda: front("speech").features(torch.ones(2, 500).long()),
            TypeError,
            "must be torch.float32, .* torch.int64",
        ),
        (
            lambda: front("speech").features(torch.randn(2, 500).double()),
            TypeError,
            "waveforms must be torch.float32, as the model's weights are, got torch.float64",
        ),
        (lambda: front("speech").features(torch.randn(2, 399)), ValueError, "at least 400 samples, got 399"),
        (lambda: front("image")(torch.randn(2, 3, 24, 20)), ValueError, r"images must be \[B, 3, 24, 24\]"),
        (lambda: front("image")(torch.randn(2, 1, 24, 24)), ValueError, r"got \(2, 1, 24, 24\)"),
        (lambda: front("image")(torch.ones(2, 3, 24, 24).byte()), TypeError, "images must be torch.float32, .*uint8"),
        (lambda: front("text")(torch.randn(2, 5)), TypeError, "tokens must be int64 or int32 ids, got torch.float32"),
        (lambda: front("text")(torch.full((2, 5), 50)), ValueError, r"tokens must be ids in 0\.\.49, got 50\.\.50"),
        (lambda: front("text")(torch.arange(-1, 4)[None]), ValueError, r"tokens must be ids in 0\.\.49, got -1\.\.3"),
        (lambda: front("text")(torch.ones(2, 31).long()), ValueError, r"tokens must be \[B, 1 <= T <= 30\], got \(2, 31\)"),
        (lambda: EncoderConfig(dim=30, heads=4), ValueError, "encoder.dim 30 must be a multiple of heads 4"),
        (lambda: EncoderConfig(dropout=1.0), ValueError, r"encoder.dropout must be in \[0, 1\), got 1.0"),
        (lambda: EncoderConfig(pos_conv_depth=-1), ValueError, "pos_conv_depth must be >= 0"),
        (lambda: EncoderConfig(layer_scale=-1.0), ValueError, "encoder.layer_scale must be >= 0, got -1.0"),
        (lambda: EncoderConfig(init_std=0), ValueError, "encoder.init_std must be positive, got 0"),
        (lambda: TextFrontEndConfig(position_init_std=0), ValueError, "frontend.position_init_std must be positive"),
        (lambda: EMAConfig(decay=1.5), ValueError, "ema.decay and end_decay"),
        (lambda: TextFrontEndConfig(vocab_size=5), ValueError, "frontend.vocab_size"),
        (lambda: Data2VecConfig.speech("huge"), ValueError, "speech size must be one of base, large, got 'huge'"),
        (lambda: Data2VecConfig.text("large"), ValueError, "text size must be one of base, got 'large'"),
        (lambda: Data2VecConfig.text(profile="papers"), ValueError, "profile must be 'paper' or 'fairseq'"),
        (
            lambda: replace(Data2VecConfig.text(), encoder=EncoderConfig(layers=3)),
            ValueError,
            "targets.top_k 10 must not exceed encoder.layers 3",
        ),
        (lambda: make_batch(torch.zeros(2, 5), np.zeros((3, 5), bool)), ValueError, r"mask must be \[2, T\]"),
        (lambda: make_batch(torch.zeros(3, 5), np.zeros((3, 5))), TypeError, "mask must be bool, got float64"),
        (lambda: three_rows(lengths=[5, 5]), ValueError, r"lengths must be \[3\], got \(2,\)"),
        (lambda: three_rows(lengths=[5, 0, 5]), ValueError, r"lengths must be in 1\.\.5, got \[5, 0, 5\]"),
        (lambda: three_rows(lengths=[5, 6, 5]), ValueError, r"lengths must be in 1\.\.5, got \[5, 6, 5\]"),
        (lambda: three_rows(lengths=[5.0, 4.0, 5.0]), TypeError, "lengths must be integers, got float64"),
        (lambda: three_rows(lengths=[5, 2, 5]), ValueError, "mask must be False in the padding"),
    ],
)
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: EncoderConfig(norm="Pre"), "encoder.norm must be one of 'post', 'pre', got 'Pre'"),
        (lambda: EncoderConfig(norm=None), "encoder.norm must be one of 'post', 'pre', got None"),
        (lambda: EncoderConfig(init="x"), "encoder.init must be one of 'bert', 'beit', got 'x'"),
        (lambda: EncoderConfig(layer_result="x"), "encoder.layer_result must be one of 'ffn', 'block'"),
        (lambda: SpeechFrontEndConfig(conv_norm="x"), "frontend.conv_norm must be one of 'layer', 'group'"),
        (lambda: TargetConfig(norm="x"), "targets.norm must be one of 'instance', 'layer', 'batch', 'none'"),
        (lambda: TargetConfig(post_norm="batch"), "targets.post_norm must be one of 'none', 'layer', 'instance'"),
        (lambda: TargetConfig(teacher_input="x"), "targets.teacher_input must be one of 'full', 'masked'"),
        (lambda: LossConfig(scale="x"), "loss.scale must be one of 'rsqrt_dim', 'mean', got 'x'"),
        (lambda: EMAConfig(per="x"), "ema.per must be one of 'update', 'micro_batch'"),
        (lambda: replace(Data2VecConfig.text(), modality="video"), "modality must be one of 'speech', 'image', 'text'"),
        (
            lambda: replace(Data2VecConfig.image(), mask=Data2VecConfig.text().mask),
            "mask must be a BlockMask for modality 'image', got TokenSpanMask",
        ),
        (
            lambda: replace(Data2VecConfig.speech(), frontend=Data2VecConfig.image().frontend),
            "frontend must be a SpeechFrontEndConfig for modality 'speech', got ImageFrontEndConfig",
        ),
    ],
)
def test_choices_are_checked(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_autocast_takes_any_precision_but_float64():
    frontend = front("speech")
    with torch.autocast("cpu", torch.bfloat16):
        assert frontend.features(torch.randn(1, 500).bfloat16()).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"got torch\.float64"):
            frontend.features(torch.randn(1, 500).double())


def test_profiles_differ_in_named_options_only():
    paper, released = Data2VecConfig.text(), Data2VecConfig.text(profile="fairseq")
    assert (paper.targets.teacher_input, released.targets.teacher_input) == ("full", "masked")
    assert released.with_profile("paper") == paper
    image = Data2VecConfig.image(profile="fairseq")
    assert not image.loss.token_weighted and image.ema.per == "update"
    assert Data2VecConfig.speech(profile="fairseq").ema.per == "micro_batch"


def test_batch_positions_and_padding():
    batch = tiny_batch(tiny_config("text"), padded=True)
    assert batch.positions.dtype == torch.int32
    assert torch.equal(batch.positions.long(), batch.mask.flatten().nonzero().flatten())
    assert batch.num_masked == int(batch.mask.sum())
    assert torch.equal((~batch.padding_mask).sum(1).int(), batch.lengths)
    assert tiny_batch(tiny_config("text")).padding_mask is None
    moved = batch.to("cpu")
    assert torch.equal(moved.inputs, batch.inputs) and moved.skipped == ()

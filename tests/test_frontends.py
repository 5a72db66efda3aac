"""Front-ends: lengths, masking, gradients into the convolutions, positions, bad input; and configurations."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_batch, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from d2v_fast.nn import Data2VecConfig, PatchEmbed, SpeechFrontEnd, TextEmbedding, make_batch
from d2v_fast.nn.config import (
    EMAConfig,
    EncoderConfig,
    ImageFrontEndConfig,
    LossConfig,
    SpeechFrontEndConfig,
    TargetConfig,
    TextFrontEndConfig,
)
from d2v_fast.nn.sequences import Sequences


def front(modality, **changes):
    config = tiny_config(modality)
    kind = {"speech": SpeechFrontEnd, "image": PatchEmbed, "text": TextEmbedding}[modality]
    return kind(replace(config.frontend, **changes), config.encoder)


def three_rows(lengths, **numbers):
    mask = np.zeros((3, 5), bool)
    mask[1, 2] = True
    return make_batch(torch.zeros(3, 5), mask, np.array(lengths), **numbers)


def packed_text(*lengths, tokens=None, token=9, ends=None):
    sequences = Sequences.from_lengths(lengths)
    if ends is not None:
        sequences = replace(sequences, cu_seqlens=torch.tensor(ends, dtype=torch.int32))
    return front("text")(torch.full((tokens or sum(lengths),), token), sequences=sequences)


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


def test_packed_text():
    """As in a batch; a sequence without tokens takes no rows."""
    embedding = front("text", dropout=0.0)
    tokens = torch.randint(4, 49, (3, 6))
    mask, padding = torch.rand(3, 6) < 0.5, torch.arange(6) >= torch.tensor([[4], [6], [1]])
    valid = Sequences.from_mask(~padding.numpy())
    rows, masked_rows = valid.take(tokens.flatten()), valid.take(mask.flatten())
    want = embedding(tokens, mask, padding)[~padding]
    assert torch.equal(embedding(rows, masked_rows, sequences=valid), want)
    gap = replace(valid, cu_seqlens=torch.tensor([0, 4, 4, 10, 11, 11], dtype=torch.int32))
    assert torch.equal(embedding(rows, masked_rows, sequences=gap), want)


@pytest.mark.parametrize("modality", ["text", "packed text", "image"])
def test_masked_and_clean(modality):
    """One pass instead of two, with all gradients of the masked one."""
    frontend = front(modality.split()[-1]).double()
    if modality == "image":
        mask = torch.rand(3, 36) < 0.5
        args, how, mask_argument = (torch.randn(3, 3, 24, 24).double(),), {}, mask
    else:
        frontend.config = replace(frontend.config, dropout=0.0)
        tokens, mask = torch.randint(4, 49, (3, 6)), torch.rand(3, 6) < 0.5
        padding = torch.arange(6) >= torch.tensor([[4], [6], [1]])
        mask, how = mask & ~padding, {"padding_mask": padding}
        args, mask_argument = (tokens,), Sequences.from_mask(mask.numpy())
        if modality == "packed text":
            valid = Sequences.from_mask(~padding.numpy())
            args, mask, how = (valid.take(tokens.flatten()),), valid.take(mask.flatten()), {"sequences": valid}
            mask_argument = Sequences.from_mask(mask.numpy()[None])
    masked, clean = frontend.masked_and_clean(*args, mask_argument, **how)
    want = frontend(*args, mask, **how)
    torch.testing.assert_close(masked, want)
    torch.testing.assert_close(clean, frontend(*args, None, **how))
    assert not clean.requires_grad
    upstream = torch.randn_like(want)
    for got, expected in zip(
        *(torch.autograd.grad(x, list(frontend.parameters()), upstream, allow_unused=True) for x in (masked, want)),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_patches_are_a_convolution():
    """The product over patches gives what the convolution gives that holds the parameters, gradients included."""
    embed = front("image").double()
    images = torch.randn(2, 3, 24, 24).double().to(memory_format=torch.channels_last).requires_grad_()
    got = embed(images)[:, 1:]
    want = embed.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(got, want)
    upstream, inputs = torch.randn_like(got), [images, embed.proj.weight, embed.proj.bias]
    for a, b in zip(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(want, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_patches_under_autocast(dtype):
    """They are made in the dtype of the product, which reads the same numbers; float64 stays as it is."""
    embed, images = front("image"), torch.randn(2, 3, 24, 24)
    made = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket == torch.ops.aten.new_empty:
                made.append(result.dtype)
            return result

    with torch.autocast("cpu", dtype), Made():
        got = embed(images)
        embed.double()(images.double())
    assert made == [dtype, torch.float64]
    windows = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(2, 36, 48)
    embed.float()
    want = F.linear(windows.to(dtype), embed.proj.weight.flatten(1).to(dtype), embed.proj.bias.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got[:, 1:], want)


def test_image_patches_are_in_row_major_order():
    embed = front("image")
    images = torch.zeros(1, 3, 24, 24)
    images[0, :, 4:8, 8:12] = 1.0  # patch (1, 2) of a 6 x 6 grid
    x = embed(images)
    changed = (x[0, 1:] != embed(torch.zeros(1, 3, 24, 24))[0, 1:]).any(1)
    assert changed.nonzero().flatten().tolist() == [1 * 6 + 2]
    assert torch.equal(x[0, 0], embed.class_token)


def test_image_mask():
    """The class token stays, masked patches become the mask embedding, and the others are as without a mask."""
    embed, images, mask = front("image"), torch.randn(3, 3, 24, 24), torch.rand(3, 36) < 0.5
    x, clean = embed(images, mask), embed(images)
    assert (x[:, 0] == embed.class_token).all()
    assert (x[:, 1:][mask] == embed.mask_embedding).all()
    assert torch.equal(x[:, 1:][~mask], clean[:, 1:][~mask])


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
        (
            lambda: front("text")(torch.ones(2, 31).long()),
            ValueError,
            r"be \[B, 1 <= T <= 30\], got \(2, 31\)",
        ),
        (
            lambda: front("text")(torch.ones(2, 0).long()),
            ValueError,
            r"be \[B, 1 <= T <= 30\], got \(2, 0\)",
        ),
        (lambda: packed_text(2, 4, tokens=5), ValueError, r"tokens must be \[6\], as packed, got \(5,\)"),
        (
            lambda: packed_text(31, 4),
            ValueError,
            "at most 30 tokens each, got one of max_length 31",
        ),
        (lambda: packed_text(2, 4, ends=[0, 4, 3, 6]), ValueError, r"rise from 0 to 6 by .* 30, got \[0, 4, 3, 6\]"),
        (lambda: packed_text(2, 4, ends=[1, 4, 6]), ValueError, r"cu_seqlens must rise from 0 to 6 .*\[1, 4, 6\]"),
        (lambda: packed_text(2, 4, ends=[0, 4, 5]), ValueError, r"cu_seqlens must rise from 0 to 6 .*\[0, 4, 5\]"),
        (lambda: packed_text(2, 4, token=50), ValueError, r"tokens must be ids in 0\.\.49, got 50\.\.50"),
        (lambda: front("image")(torch.randn(2, 3, 25, 25)), ValueError, "a grid of 6 x 6 patches of 4 pixels, got"),
        (
            lambda: ImageFrontEndConfig(image_size=25, patch_size=4),
            ValueError,
            "a multiple of patch_size, got 25",
        ),
        (lambda: EncoderConfig(dim=30, heads=4), ValueError, "encoder.dim 30 must be a multiple of heads 4"),
        (lambda: EncoderConfig(dropout=1.0), ValueError, r"encoder.dropout must be in \[0, 1\), got 1.0"),
        (lambda: EncoderConfig(pos_conv_depth=-1), ValueError, "pos_conv_depth must be >= 0"),
        (lambda: EncoderConfig(pos_conv_depth=1, pos_conv_groups=0), ValueError, "a multiple of pos_conv_groups 0"),
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
        (lambda: three_rows(lengths=[5, 4, 5], num_masked=0), ValueError, "num_masked must be from 1 to 14, .*got 0"),
        (
            lambda: three_rows(lengths=[5, 4, 5], num_masked=15),
            ValueError,
            "num_masked must be from 1 to 14, .*15",
        ),
        (lambda: three_rows(lengths=[5, 4, 5], num_valid=13), ValueError, "num_valid must be at least 14, .* got 13"),
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


def test_batch_sequences():
    """Masked positions among all, and among valid ones; also where their numbers are fixed."""
    mask = np.array([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0]], bool)
    plain = make_batch(torch.zeros(3, 5), mask)
    assert plain.valid is plain.masked_in_valid is plain.masked_alone is plain.padding_mask is None
    assert plain.masked.rows.tolist() == plain.positions.tolist() == [0, 2, 11, 12]
    lengths = np.array([4, 2, 5])
    batch = make_batch(torch.zeros(3, 5), mask, lengths)
    assert batch.valid.rows.tolist() == [0, 1, 2, 3, 5, 6, 10, 11, 12, 13, 14]
    assert batch.masked_in_valid.rows.tolist() == [0, 2, 7, 8]
    assert batch.masked_in_valid.cu_seqlens.tolist() == batch.masked.cu_seqlens.tolist() == [0, 2, 2, 4]

    fixed = make_batch(torch.zeros(3, 5), mask, lengths, num_masked=7, num_valid=13)
    assert fixed.num_masked == 4 and fixed.positions.tolist() == [0, -1, 2, -1, -1, 11, 12]
    assert fixed.masked.rows.tolist() == [0, 1, 2, 3, 5, 11, 12] and fixed.masked.real.sum() == 4
    assert fixed.masked_in_valid.rows.tolist() == [0, 1, 2, 3, 4, 7, 8]
    assert fixed.masked_in_valid.cu_seqlens.tolist() == [0, 4, 5, 7, 7, 7, 7]  # none in the three that only fill up
    assert fixed.valid.count == 6 and fixed.valid.num_rows == 13 and fixed.valid.real.sum() == 11
    assert fixed.masked_alone.rows[:4].tolist() == [0, 2, 11, 12] and fixed.masked_alone.num_rows == 7
    moved = fixed.to("meta")
    for name in ("masked", "masked_alone", "valid", "masked_in_valid"):
        assert getattr(moved, name).rows.is_meta and getattr(moved, name).max_length == 5
    unpadded = make_batch(torch.zeros(3, 5), mask, num_valid=15)
    assert not unpadded.padding_mask.any() and unpadded.lengths.tolist() == [5, 5, 5]

"""FLOPs from shapes, against what PyTorch counts while the step runs."""

from dataclasses import replace
from math import prod

import pytest
import torch
from tiny import NO_DROPOUT, tiny_batch, tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from d2v_fast.nn import Data2Vec, Data2VecConfig, make_batch
from d2v_fast.train.flops import batch_flops

OURS = torch.ops.d2v_fast


def _conv0(waveforms, weight) -> int:
    (B, S), (C, _, k) = waveforms, weight
    return 2 * B * ((S - k) // 5 + 1) * C * k


# our convolutions are one operator each to the counter
CONVOLUTIONS = {
    OURS.conv0_norm_gelu_fwd: lambda waveforms, weight, *_, **__: _conv0(waveforms, weight),
    OURS.conv0_norm_gelu_bwd: lambda grad, stats, waveforms, weight, *_, **__: _conv0(waveforms, weight),
    OURS.strided_conv_fwd: lambda x, weight, *_, out_shape, **__: 2 * prod(out_shape[:2]) * prod(weight),
    OURS.strided_conv_grad_x: lambda grad, weight, *_, **__: 2 * prod(grad[:2]) * prod(weight),
    OURS.strided_conv_grad_weight: lambda grad, x, weight, *_, **__: 2 * prod(grad[:2]) * prod(weight),
}


def counted(config: Data2VecConfig, batch) -> int:
    """FLOPs of forward and backward as PyTorch counts them, attention being plain products, none of them twice."""
    model = Data2Vec(config).train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=CONVOLUTIONS) as counter:
        model(batch).loss.backward()
    return counter.get_total_flops()


def plain(config: Data2VecConfig, **encoder) -> Data2VecConfig:
    """Without dropout, and without groups, for which PyTorch's counter is wrong in backward."""
    encoder = {**NO_DROPOUT, **encoder}
    if config.modality == "speech":
        encoder["pos_conv_groups"] = 1
    return replace(config, encoder=replace(config.encoder, **encoder))


def class_token(config: Data2VecConfig, images: int) -> int:
    """What is computed for the class token's empty patch: student forward and weight gradient, teacher forward."""
    frontend = config.frontend
    return 3 * 2 * images * frontend.channels * frontend.patch_size**2 * config.encoder.dim


def empty_queries(config: Data2VecConfig, batch) -> int:
    """With a bias, attention of a pruned layer has queries of 0 for the other rows (student 3 times, teacher once)."""
    size, positions = batch.mask.shape[0], batch.mask.shape[1] + 1
    others = size * positions - batch.num_masked
    return 4 * 2 * 2 * others * positions * config.encoder.dim


@pytest.mark.parametrize("prunes", [True, False])
@pytest.mark.parametrize("modality", ["speech", "image", "text"])
def test_as_pytorch_counts(modality, prunes):
    config = plain(tiny_config(modality))
    if not prunes:
        flags = dict.fromkeys(("student_rows", "teacher_rows", "unpad", "share_features"), False)
        config = replace(config, prune=replace(config.prune, **flags))
    batch = tiny_batch(config, size=1 if modality == "speech" else 3)  # one clip has no guard frames
    extra = 0
    if modality == "image":
        extra = class_token(config, 3) + (empty_queries(config, batch) if prunes else 0)
    found, wanted = batch_flops(config, batch) + extra, counted(config, batch)
    assert found == wanted


@pytest.mark.parametrize("profile", ["paper", "fairseq"])
def test_padded_text(profile):
    config = plain(tiny_config("text", profile=profile))
    batch = tiny_batch(config, padded=True)
    assert batch_flops(config, batch) == counted(config, batch)
    whole = replace(config, prune=replace(config.prune, unpad=False))
    assert batch_flops(whole, batch) > batch_flops(config, batch)


def test_rows_that_fill_up_do_not_count():
    config = plain(tiny_config("text"))
    batch = tiny_batch(config)
    filled = make_batch(batch.inputs, batch.mask.numpy(), num_masked=batch.num_masked + 5)
    assert batch_flops(config, filled) == batch_flops(config, batch) < counted(config, filled)


def test_several_clips_have_a_few_guard_frames():
    config = plain(tiny_config("speech"))
    batch = tiny_batch(config, size=3)
    assert 1 < counted(config, batch) / batch_flops(config, batch) < 1.08


def test_what_is_not_computed():
    """Frozen convolutions have no backward, shared features one forward less, and LayerDrop leaves fewer layers."""
    speech = tiny_config("speech")
    frozen = replace(speech, frontend=replace(speech.frontend, feature_grad_mult=0.0))
    batch = tiny_batch(plain(frozen), size=1)
    assert batch_flops(plain(frozen), batch) == counted(plain(frozen), batch) < batch_flops(plain(speech), batch)
    image = tiny_config("image")
    shared = replace(image, ema=replace(image.ema, skip=("frontend.",)))
    batch = tiny_batch(image)
    patches = batch.mask.numel() * 3 * 4 * 4 * 2 * image.encoder.dim
    assert batch_flops(image, batch) - batch_flops(shared, batch) == patches
    text = plain(tiny_config("text"))
    batch = tiny_batch(text)
    fewer = [batch_flops(plain(text, layerdrop=p), batch) for p in (0.0, 0.25, 0.5)]
    assert fewer[0] - fewer[1] == fewer[1] - fewer[2] > 0


def test_a_published_batch():
    """ViT-B on 2 images: 12 layers of 197 x 768 each way, by hand, without the last layer's pruning."""
    config = Data2VecConfig.image()
    config = replace(config, prune=replace(config.prune, student_rows=False, teacher_rows=False))
    mask = torch.zeros(2, 196, dtype=torch.bool)
    mask[:, :120] = True
    found = batch_flops(config, make_batch(torch.zeros(2, 3, 224, 224), mask.numpy()))
    layer = 2 * 197 * (3 * 768 * 768 + 768 * 768 + 2 * 768 * 3072) + 2 * 2 * 197 * 197 * 768
    assert found == 2 * (4 * 12 * layer + 3 * 2 * 196 * 768 * 768 + 3 * 2 * 120 * 768 * 768)

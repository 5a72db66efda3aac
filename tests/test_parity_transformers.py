"""Our three models against transformers' ``Data2Vec{Audio,Text,Vision}Model``: hidden states and every gradient.

Weights are copied, none of them at a trivial value; the gradient that comes from above is random. A fused bias of
queries, keys and values counts as one tensor: the keys' part has no gradient in exact arithmetic.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from parity import TOLERANCE, assert_equal, gradients, relative

transformers = pytest.importorskip("transformers", reason="needs transformers")

from d2v_fast.nn import Data2Vec, Data2VecConfig  # noqa: E402

TINY = {"layers": 3, "dim": 64, "ffn_dim": 96, "heads": 4}
BASE = {"layers": 2, "dim": 768, "ffn_dim": 3072, "heads": 12}  # the published widths
PADDED = pytest.mark.parametrize(
    ("padded", "sizes"), [(False, TINY), (True, TINY), (True, BASE)], ids=["tiny", "tiny-padded", "base-padded"]
)
VOCAB = 60
KINDS = ("weight", "bias")


def widths(sizes):
    """Names that the three configurations share."""
    return {
        "hidden_size": sizes["dim"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "intermediate_size": sizes["ffn_dim"],
    }


def with_weights(theirs, config, to_state):
    """(transformers' model, ours with its weights), without dropout."""
    theirs, ours = theirs.eval(), Data2Vec(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.02 * torch.randn_like(p))
    missing = ours.load_state_dict(to_state(theirs.state_dict(), config.encoder.layers), strict=False).missing_keys
    assert all(k.startswith(("teacher.", "head.", "frontend.mask_embedding")) for k in missing), missing
    return theirs, ours


def audio_pair(sizes, profile="paper"):
    width = 512 if sizes is BASE else 32
    theirs = transformers.Data2VecAudioModel(
        transformers.Data2VecAudioConfig(
            **widths(sizes), conv_dim=(width,) * 7, conv_pos_kernel_size=19, num_conv_pos_embeddings=5
        )
    )
    config = Data2VecConfig.speech(profile=profile)
    convs = tuple((width, kernel, stride) for _, kernel, stride in config.frontend.conv_layers)
    config = replace(
        config,
        frontend=replace(config.frontend, conv_layers=convs),
        encoder=replace(config.encoder, **sizes),
        targets=replace(config.targets, top_k=2),
    )
    return with_weights(theirs, config, audio_state)


def audio_state(state, layers):
    names = {"feature_projection.layer_norm": "frontend.norm", "feature_projection.projection": "frontend.proj"}
    names["encoder.layer_norm"] = "encoder.norm"
    for i in range(7):
        names[f"feature_extractor.conv_layers.{i}.conv"] = f"frontend.convs.{i}.conv"
        names[f"feature_extractor.conv_layers.{i}.layer_norm"] = f"frontend.convs.{i}.norm"
    for i in range(5):
        names[f"encoder.pos_conv_embed.layers.{i}.conv"] = f"encoder.pos_conv.convs.{i}"
    copied = {}
    for i in range(layers):
        old, new = f"encoder.layers.{i}", f"encoder.layers.{i}"
        names |= {
            f"{old}.attention.out_proj": f"{new}.attention.out",
            f"{old}.layer_norm": f"{new}.norm1",
            f"{old}.feed_forward.intermediate_dense": f"{new}.fc1",
            f"{old}.feed_forward.output_dense": f"{new}.fc2",
            f"{old}.final_layer_norm": f"{new}.norm2",
        }
        copied |= fused(state, f"{old}.attention.{{}}_proj", "qkv", new)
    return copied | renamed(state, names)


def text_pair(sizes):
    theirs = transformers.Data2VecTextModel(
        transformers.Data2VecTextConfig(
            **widths(sizes), vocab_size=VOCAB, max_position_embeddings=42, type_vocab_size=1, layer_norm_eps=1e-5
        )
    )
    config = Data2VecConfig.text()
    config = replace(
        config,
        frontend=replace(config.frontend, vocab_size=VOCAB, max_positions=40),
        encoder=replace(config.encoder, **sizes),
        targets=replace(config.targets, top_k=2),
    )
    theirs, ours = with_weights(theirs, config, text_state)
    with torch.no_grad():
        theirs.embeddings.token_type_embeddings.weight.zero_()  # fairseq and we have none
    return theirs, ours


def text_state(state, layers):
    names = {
        "embeddings.word_embeddings": "frontend.tokens",
        "embeddings.position_embeddings": "frontend.positions",
        "embeddings.LayerNorm": "frontend.norm",
    }
    copied = {}
    for i in range(layers):
        old, new = f"encoder.layer.{i}", f"encoder.layers.{i}"
        names |= {
            f"{old}.attention.output.dense": f"{new}.attention.out",
            f"{old}.attention.output.LayerNorm": f"{new}.norm1",
            f"{old}.intermediate.dense": f"{new}.fc1",
            f"{old}.output.dense": f"{new}.fc2",
            f"{old}.output.LayerNorm": f"{new}.norm2",
        }
        copied |= fused(state, f"{old}.attention.self.{{}}", ("query", "key", "value"), new)
    return copied | renamed(state, names)


def image_pair(sizes, shared=True):
    """``shared``: one table of relative positions, or one a layer, which then all hold the same values."""
    size, patch = (56, 8) if sizes is TINY else (96, 16)
    theirs = transformers.Data2VecVisionModel(
        transformers.Data2VecVisionConfig(
            **widths(sizes),
            image_size=size,
            patch_size=patch,
            layer_norm_eps=1e-6,
            layer_scale_init_value=0.1,
            use_shared_relative_position_bias=shared,
            use_relative_position_bias=not shared,
            use_mask_token=True,
            use_mean_pooling=False,
        )
    )
    config = Data2VecConfig.image()
    config = replace(
        config,
        frontend=replace(config.frontend, image_size=size, patch_size=patch),
        encoder=replace(config.encoder, **sizes, layer_scale=0.1),
        mask=replace(config.mask, num_masked=20, min_block=4),
        targets=replace(config.targets, top_k=2),
    )

    def to_state(state, layers):
        copied = image_state(state, layers)
        copied["encoder.relative_bias.table"] = state[tables(layers, shared)[0]]
        return copied

    theirs, ours = with_weights(theirs, config, to_state)
    with torch.no_grad():
        for name in tables(sizes["layers"], shared):
            theirs.get_parameter(name).copy_(ours.encoder.relative_bias.table)
    return theirs, ours


def tables(layers, shared):
    """Names of the tables of relative positions."""
    modules = [f"encoder.layer.{i}.attention.attention" for i in range(layers)]
    return [f"{m}.relative_position_bias.relative_position_bias_table" for m in (["encoder"] if shared else modules)]


def image_state(state, layers):
    names = {"embeddings.patch_embeddings.projection": "frontend.proj", "layernorm": "encoder.norm"}
    copied = {
        "frontend.class_token": state["embeddings.cls_token"].flatten(),
        "frontend.mask_embedding": state["embeddings.mask_token"].flatten(),
    }
    for i in range(layers):
        old, new = f"encoder.layer.{i}", f"encoder.layers.{i}"
        names |= {
            f"{old}.layernorm_before": f"{new}.norm1",
            f"{old}.layernorm_after": f"{new}.norm2",
            f"{old}.attention.output.dense": f"{new}.attention.out",
            f"{old}.intermediate.dense": f"{new}.fc1",
            f"{old}.output.dense": f"{new}.fc2",
        }
        attention = f"{old}.attention.attention"
        weights = [state[f"{attention}.{name}.weight"] for name in ("query", "key", "value")]
        copied[f"{new}.attention.qkv.weight"] = torch.cat(weights)
        copied[f"{new}.attention.q_bias"] = state[f"{attention}.query.bias"]
        copied[f"{new}.attention.v_bias"] = state[f"{attention}.value.bias"]
        copied[f"{new}.scale1"], copied[f"{new}.scale2"] = state[f"{old}.lambda_1"], state[f"{old}.lambda_2"]
    return copied | renamed(state, names)


def fused(state, old, parts, new):
    """Weight and bias of the one product for queries, keys and values."""
    return {
        f"{new}.attention.qkv.{kind}": torch.cat([state[f"{old.format(p)}.{kind}"] for p in parts]) for kind in KINDS
    }


def renamed(state, names):
    pairs = [(f"{old}.{kind}", f"{new}.{kind}") for old, new in names.items() for kind in KINDS]
    return {new: state[old] for old, new in pairs if old in state}  # some modules have no bias


def states_match(got, want, valid=None):
    """Hidden states [B, T, C], input of the first layer and output of every layer, at the ``valid`` [B, T] ones."""
    assert len(got) == len(want)
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        if valid is not None:
            a, b = a[valid], b[valid]
        assert relative(a, b) <= TOLERANCE, index


def gradients_match(ours, expected):
    """The student's gradients are those ``expected`` by our names; what was not used got none."""
    got = gradients(ours)
    unused = {name: x for name, x in got.items() if name not in expected}
    assert all(k.startswith(("teacher.", "head.", "frontend.mask_embedding")) for k in unused), unused.keys()
    assert not any(x.any() for x in unused.values())
    assert_equal({name: got[name] for name in expected}, expected)


def upstream(x, valid=None):
    """Random gradient of the last hidden state, none where nothing is ``valid``."""
    grad = torch.randn_like(x)
    return grad if valid is None else grad * valid[..., None]


@PADDED
def test_audio(padded, sizes):
    theirs, ours = audio_pair(sizes, "fairseq")  # transformers computes padded batches as fairseq does
    samples = torch.tensor([8000, 6400]) if padded else torch.full((2,), 8000)
    waves = torch.randn(2, 8000)
    kept = torch.arange(8000) < samples[:, None]
    frames = ours.config.frontend.num_frames(samples.numpy())
    valid = torch.arange(frames.max()) < torch.from_numpy(frames)[:, None]  # [B, T]
    want = theirs(waves, attention_mask=kept if padded else None, output_hidden_states=True)
    got = ours.hidden_states(waves, ~valid if padded else None)
    states_match(got, want.hidden_states, valid)
    grad = upstream(got[-1], valid)
    want.hidden_states[-1].backward(grad)
    got[-1].backward(grad)
    gradients_match(ours, audio_state(gradients(theirs), sizes["layers"]))


@PADDED
def test_text(padded, sizes):
    theirs, ours = text_pair(sizes)
    lengths = torch.tensor([20, 13]) if padded else torch.full((2,), 20)
    valid = torch.arange(20) < lengths[:, None]
    tokens = torch.randint(4, VOCAB - 1, (2, 20)).where(valid, 1)
    want = theirs(tokens, attention_mask=valid if padded else None, output_hidden_states=True)
    got = ours.hidden_states(tokens, ~valid if padded else None)
    states_match(got, want.hidden_states, valid)
    grad = upstream(got[-1], valid)
    want.last_hidden_state.backward(grad)
    got[-1].backward(grad)
    gradients_match(ours, text_state(gradients(theirs), sizes["layers"]))


@pytest.mark.parametrize(
    ("shared", "sizes"), [(True, TINY), (False, TINY), (True, BASE)], ids=["tiny", "tiny-per-layer", "base"]
)
def test_image(shared, sizes):
    theirs, ours = image_pair(sizes, shared)
    c = ours.config
    images = torch.randn(2, 3, c.frontend.image_size, c.frontend.image_size)
    mask = c.mask.draw(np.random.default_rng(0), np.full(2, c.frontend.num_patches), c.frontend.num_patches)
    mask = torch.from_numpy(mask)
    want = theirs(images, bool_masked_pos=mask, output_hidden_states=True)
    got = ours.encoder(ours.frontend(images, mask), hidden_states=True)
    states_match(got.hidden_states, want.hidden_states)
    assert relative(got.x, want.last_hidden_state) <= TOLERANCE
    grad = upstream(got.x)
    want.last_hidden_state.backward(grad)
    got.x.backward(grad)
    want = gradients(theirs)
    expected = image_state(want, sizes["layers"])
    expected["encoder.relative_bias.table"] = sum(want[name] for name in tables(sizes["layers"], shared))
    gradients_match(ours, expected)


def test_encode_is_the_final_output():
    theirs, ours = image_pair(TINY)
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        assert relative(ours.encode(images), theirs(images).last_hidden_state) <= TOLERANCE

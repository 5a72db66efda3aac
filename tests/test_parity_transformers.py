"""Our image model against transformers' ``Data2VecVisionModel`` on the same weights, inputs and masks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers")

from d2v_fast.nn import Data2Vec, Data2VecConfig  # noqa: E402

LAYERS, DIM, FFN, HEADS, SIZE, PATCH = 3, 64, 96, 4, 56, 8


def image_pair():
    """(transformers model, our model) with the same weights, none of them at a trivial value."""
    theirs = transformers.Data2VecVisionModel(
        transformers.Data2VecVisionConfig(
            hidden_size=DIM,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=FFN,
            image_size=SIZE,
            patch_size=PATCH,
            layer_norm_eps=1e-6,
            layer_scale_init_value=0.1,
            use_shared_relative_position_bias=True,
            use_mask_token=True,
            use_mean_pooling=False,
        )
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.05 * torch.randn_like(p))
    config = Data2VecConfig.image()
    config = replace(
        config,
        frontend=replace(config.frontend, image_size=SIZE, patch_size=PATCH),
        encoder=replace(config.encoder, layers=LAYERS, dim=DIM, ffn_dim=FFN, heads=HEADS, layer_scale=0.1),
        mask=replace(config.mask, num_masked=20, min_block=4),
        targets=replace(config.targets, top_k=2),
    )
    ours = Data2Vec(config).eval()
    missing = ours.load_state_dict(_renamed(theirs.state_dict()), strict=False).missing_keys
    assert all(k.startswith(("teacher.", "head.")) for k in missing), missing
    return theirs, ours


def _renamed(state):
    names = {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.output.dense": "attention.out",
        "intermediate.dense": "fc1",
        "output.dense": "fc2",
    }
    copied = {
        "frontend.class_token": state["embeddings.cls_token"].flatten(),
        "frontend.mask_embedding": state["embeddings.mask_token"].flatten(),
        "encoder.relative_bias.table": state["encoder.relative_position_bias.relative_position_bias_table"],
        "encoder.norm.weight": state["layernorm.weight"],
        "encoder.norm.bias": state["layernorm.bias"],
    }
    for kind in ("weight", "bias"):
        copied[f"frontend.proj.{kind}"] = state[f"embeddings.patch_embeddings.projection.{kind}"]
    for i in range(LAYERS):
        old, new = f"encoder.layer.{i}", f"encoder.layers.{i}"
        qkv = [state[f"{old}.attention.attention.{name}.weight"] for name in ("query", "key", "value")]
        copied[f"{new}.attention.qkv.weight"] = torch.cat(qkv)
        copied[f"{new}.attention.q_bias"] = state[f"{old}.attention.attention.query.bias"]
        copied[f"{new}.attention.v_bias"] = state[f"{old}.attention.attention.value.bias"]
        copied[f"{new}.scale1"], copied[f"{new}.scale2"] = state[f"{old}.lambda_1"], state[f"{old}.lambda_2"]
        for a, b in names.items():
            for kind in ("weight", "bias"):
                copied[f"{new}.{b}.{kind}"] = state[f"{old}.{a}.{kind}"]
    return copied


@pytest.mark.parametrize("masked", [False, True])
def test_hidden_states_and_output(masked):
    theirs, ours = image_pair()
    images = torch.randn(2, 3, SIZE, SIZE)
    patches = (SIZE // PATCH) ** 2
    mask = None
    if masked:
        mask = torch.from_numpy(ours.config.mask.draw(np.random.default_rng(0), np.full(2, patches), patches))
    with torch.no_grad():
        want = theirs(images, bool_masked_pos=mask, output_hidden_states=True)
        x = ours.frontend(images, mask)
        got = ours.encoder(x, hidden_states=True)
    assert len(got.hidden_states) == len(want.hidden_states) == LAYERS + 1
    for index, (a, b) in enumerate(zip(got.hidden_states, want.hidden_states, strict=True)):
        assert ((a - b).norm() / b.norm()).item() <= 1e-5, index
    assert ((got.x - want.last_hidden_state).norm() / want.last_hidden_state.norm()).item() <= 1e-5


def test_encode_is_the_final_output():
    theirs, ours = image_pair()
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        want, got = theirs(images).last_hidden_state, ours.encode(images)
    assert ((got - want).norm() / want.norm()).item() <= 1e-5

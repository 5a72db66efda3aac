"""The real fairseq model of data2vec 2.0, tiny, for each kind of data."""

import sys
from types import SimpleNamespace

import fairseq_peer  # noqa: F401  puts fairseq's folder on sys.path
import pytest
import timm_parts
import torch
from fairseq_multi_source import import_data2vec2
from parity import assert_equal, gradients
from torch import Tensor

import d2v_fast

KINDS = ("audio", "image", "text")
VOCAB = 40
SIZES = {"embed_dim": 32, "num_heads": 4, "depth": 2, "average_top_k_layers": 2, "clone_batch": 2}
NO_DROPOUT = {"encoder_dropout": 0.0, "post_mlp_drop": 0.0, "attention_dropout": 0.0}
PARTS = {
    "audio": {
        "feature_encoder_spec": "[(16, 10, 5), (16, 3, 2)]",
        "conv_pos_width": 15,
        "conv_pos_groups": 4,
        "conv_pos_depth": 2,
        "use_alibi_encoder": True,
        "learned_alibi_scale": True,
        "learned_alibi_scale_per_head": True,
    },
    "image": {"input_size": 32, "patch_size": 8, "embed_dim": 32, "num_extra_tokens": 1, "ema_local_encoder": True},
    "text": {"max_source_positions": 64, "dropout": 0.0, "learned_pos": False},
}
TARGETS = {
    "audio": {"instance_norm_target_layer": True, "layer_norm_targets": True},
    "image": {"layer_norm_target_layer": True, "cls_loss": 0.01},
    "text": {"layer_norm_target_layer": True, "loss_beta": 0.25},
}


data2vec2 = import_data2vec2()
base = sys.modules["examples.data2vec.models.modalities.base"]
modules = sys.modules["examples.data2vec.models.modalities.modules"]


def decoder_config(**options):
    """Options of a decoder: two layers of 32 channels, without dropout."""
    sizes = {"decoder_dim": 32, "decoder_groups": 4, "decoder_kernel": 3, "decoder_layers": 2, "input_dropout": 0.0}
    return modules.D2vDecoderConfig(**sizes | options)


def build(*kinds: str, part: dict | None = None, decoder: dict | None = None, **model):
    """A model for "audio", "image" or "text", or several, from seed 0; the teacher moved away from the student.

    ``part`` and ``decoder`` are options of each kind's encoder and decoder, ``model`` those of the whole; there is no
    dropout, and no noise in front of the decoder, unless they ask for it. Targets are those of the first kind.
    """
    torch.manual_seed(0)
    settings = {**SIZES, **NO_DROPOUT, **TARGETS[kinds[0]], "ema_encoder_only": kinds[0] == "text", **model}
    configs = {"audio": data2vec2.D2vAudioConfig, "image": data2vec2.D2vImageConfig, "text": data2vec2.D2vTextConfig}
    own = {"prenet_depth": 1, "mask_noise_std": 0.0, "mask_prob": 0.5, "mask_length": 2}
    sizes = {"num_alibi_heads": settings["num_heads"], "model_depth": settings["depth"]}
    own["decoder"] = decoder_config(**decoder or {})
    parts = {kind: configs[kind](**own | sizes | PARTS[kind] | (part or {})) for kind in kinds}
    modalities = [getattr(data2vec2.Modality, kind.upper()) for kind in kinds]
    cfg = data2vec2.Data2VecMultiConfig(
        modalities=data2vec2.D2vModalitiesConfig(**parts),
        supported_modality=modalities[0] if len(modalities) == 1 else None,
        ema_anneal_end_step=100,
        max_update=100,
        seed=1,
        **settings,
    )
    dictionary = type("Dictionary", (), {"pad": lambda self: 1, "__len__": lambda self: VOCAB})()
    with timm_parts.installed():
        built = data2vec2.Data2VecMultiModel(cfg, modalities, task=SimpleNamespace(source_dictionary=dictionary))
    with torch.no_grad():
        for p in built.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
        built.ema.step(built.blocks if cfg.ema_encoder_only else built)
        for p in built.ema.model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    return built.train()


def batch(kind: str, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of ``forward``: three samples with two masks each, half of the tokens masked."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "audio":
        source, tokens = torch.randn(3, 400, generator=generator), 39
    elif kind == "image":
        source, tokens = torch.randn(3, 3, 32, 32, generator=generator), 16
    else:
        source, tokens = torch.randint(4, VOCAB, (3, 20), generator=generator), 20
    order = torch.rand(6, tokens, generator=generator).argsort(1)
    return {"source": source, "precomputed_mask": (order < tokens // 2).float()}


def step(model, batch):
    """Sum of the losses, gradients, and what else forward returns, of one call."""
    model.zero_grad()
    result = model(**batch)
    losses = {name: loss.float().sum() for name, loss in result.pop("losses").items()}
    sum(losses.values()).backward()
    return {name: loss.detach() for name, loss in losses.items()}, gradients(model), result


def same(model, batch, tolerance=1e-5, **options):
    """``model`` gives the same patched and not; returns the patch, which is in place."""
    losses, grads, others = step(model, batch)
    patch = d2v_fast.patch(model, **options)
    got_losses, got_grads, got_others = step(model, batch)
    assert got_losses.keys() == losses.keys()
    assert got_others.keys() == others.keys()
    assert_equal(got_losses, losses, tolerance)
    assert_equal(got_grads, grads, tolerance)
    for name, value in others.items():
        assert float(got_others[name]) == pytest.approx(float(value), rel=1e-5), name
    return patch

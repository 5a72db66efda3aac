"""The real fairseq models to compare with: imports that need help on a current Python, and copies of their weights."""

import os
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

fairseq = pytest.importorskip("fairseq", reason="needs ve-fairseq (requirements/peers.txt)")


def _import_models():
    for name, kind in (("int", int), ("float", float), ("bool", bool), ("object", object)):
        if name not in np.__dict__:  # removed from NumPy, still used there
            setattr(np, name, kind)
    sys.path.insert(0, os.path.dirname(fairseq.__file__))
    from fairseq.models.transformer.transformer_config import TransformerConfig

    TransformerConfig.__hash__ = object.__hash__  # Python 3.11 refuses unhashable dataclass defaults
    from examples.data2vec.models import data2vec_audio, data2vec_text

    return data2vec_audio, data2vec_text


audio, text = _import_models()
ConvFeatureExtractionModel = audio.ConvFeatureExtractionModel


def _transformer_layer(state: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    copied = {
        f"{ours}.attention.qkv.{kind}": torch.cat([state[f"{theirs}.self_attn.{p}_proj.{kind}"] for p in "qkv"])
        for kind in ("weight", "bias")
    }
    names = {"self_attn.out_proj": "attention.out", "self_attn_layer_norm": "norm1", "final_layer_norm": "norm2"}
    for old, new in {**names, "fc1": "fc1", "fc2": "fc2"}.items():
        for kind in ("weight", "bias"):
            copied[f"{ours}.{new}.{kind}"] = state[f"{theirs}.{old}.{kind}"]
    return copied


def _rename(state: dict[str, Tensor], prefixes: dict[str, str]) -> dict[str, Tensor]:
    return {
        new + k.removeprefix(old): v for k, v in state.items() for old, new in prefixes.items() if k.startswith(old)
    }


def speech_state(model, layers: int) -> dict[str, Tensor]:
    """Student weights of a fairseq ``Data2VecAudioModel`` under our names."""
    return renamed_speech({k: v for k, v in model.state_dict().items() if not k.startswith("_ema")}, layers)


def renamed_speech(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Tensors of every parameter of the speech model, such as gradients, under our names."""
    copied = _rename(
        state,
        {
            "layer_norm.": "frontend.norm.",
            "post_extract_proj.": "frontend.proj.",
            "encoder.layer_norm.": "encoder.norm.",
            "final_proj.": "head.0.",
        },
    )
    copied["frontend.mask_embedding"] = state["mask_emb"]
    for key, value in state.items():
        parts = key.split(".")
        if key.startswith("feature_extractor.conv_layers."):
            kind = "conv" if parts[3] == "0" else "norm"
            copied[f"frontend.convs.{parts[2]}.{kind}.{parts[-1]}"] = value
        elif key.startswith("encoder.pos_conv."):
            copied[f"encoder.pos_conv.convs.{parts[2]}.{parts[-1]}"] = value
    for i in range(layers):
        copied |= _transformer_layer(state, f"encoder.layers.{i}", f"encoder.layers.{i}")
    return copied


def text_state(model, layers: int) -> dict[str, Tensor]:
    """Student weights of a fairseq ``Data2VecTextModel`` under our names."""
    return renamed_text({k: v for k, v in model.state_dict().items() if "._ema" not in k}, layers)


def renamed_text(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Tensors of every parameter of the text model, such as gradients, under our names."""
    root = "encoder.sentence_encoder."
    copied = _rename(
        state,
        {
            f"{root}embed_tokens.": "frontend.tokens.",
            f"{root}embed_positions.": "frontend.positions.",
            f"{root}layernorm_embedding.": "frontend.norm.",
            "encoder.regression_head.": "head.",
        },
    )
    for i in range(layers):
        copied |= _transformer_layer(state, f"{root}layers.{i}", f"encoder.layers.{i}")
    return copied


def teacher_state(model, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` as the weights of our model's teacher, for those parts that the teacher has."""
    expected = model.teacher.module.state_dict()
    return {f"teacher.module.{name}": state[name] for name in expected}

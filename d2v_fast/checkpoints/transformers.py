"""Hugging Face's Data2VecAudio, Data2VecText and Data2VecVision: the student's network, without teacher and head.

Directories are read and written without the package ``transformers``.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_fast.checkpoints.directories import CONFIG, read_json, read_weights, write_directory
from d2v_fast.checkpoints.options import losses
from d2v_fast.checkpoints.rules import (
    MASK,
    Loaded,
    Report,
    Rule,
    build,
    check_counts,
    distinct,
    gather,
    pairs,
    require,
    scatter,
)
from d2v_fast.checkpoints.transformers_config import NOT_KEPT, read_config, write_config
from d2v_fast.nn import Data2Vec, Data2VecConfig

PREFIXES = ("data2vec_audio.", "data2vec_text.", "data2vec_vision.")  # of the network in models with a task's head
TYPES, POSITIONS = "embeddings.token_type_embeddings.weight", "embeddings.position_embeddings.weight"
TABLE = "relative_position_bias.relative_position_bias_table"
SHARED_TABLE = f"encoder.{TABLE}"
OF_LAYERS = r"encoder\.layers?\.(\d+)\."
# poolers and heads; buffers that follow from the configuration
DROPPED = (
    r"(pooler|lm_head|classifier|projector|adapter|qa_outputs|decode_head|auxiliary_head|fpn[1-4])\b"
    r"|(tdnn|objective|feature_extractor_head|layer_weights)\b|.*\.relative_position_index$"
    r"|embeddings\.(position_ids|token_type_ids)$"
)
SPEECH_LAYER = {
    "attention.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attention.out": ("attention.out_proj",),
    "norm1": ("layer_norm",),
    "fc1": ("feed_forward.intermediate_dense",),
    "fc2": ("feed_forward.output_dense",),
    "norm2": ("final_layer_norm",),
}
TEXT_LAYER = {
    "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.out": ("attention.output.dense",),
    "norm1": ("attention.output.LayerNorm",),
    "fc1": ("intermediate.dense",),
    "fc2": ("output.dense",),
    "norm2": ("output.LayerNorm",),
}
IMAGE_LAYER = {
    "attention.out": ("attention.output.dense",),
    "norm1": ("layernorm_before",),
    "fc1": ("intermediate.dense",),
    "fc2": ("output.dense",),
    "norm2": ("layernorm_after",),
}


def rules_for(config: Data2VecConfig) -> list[Rule]:
    """Our tensors of the student and those of transformers' model of the modality."""
    return {"speech": _speech, "text": _text, "image": _image}[config.modality](config)


def _speech(config: Data2VecConfig) -> list[Rule]:
    rules = [Rule("frontend.mask_embedding", ("masked_spec_embed",), MASK)]
    kinds = ("weight", "bias") if config.frontend.conv_bias else ("weight",)
    for i in range(len(config.frontend.conv_layers)):
        theirs = f"feature_extractor.conv_layers.{i}."
        rules += pairs(f"frontend.convs.{i}.", theirs, {"conv": ("conv",)}, kinds=kinds)
        rules += pairs(f"frontend.convs.{i}.", theirs, {"norm": ("layer_norm",)})
    rules += pairs("frontend.", "feature_projection.", {"norm": ("layer_norm",), "proj": ("projection",)})
    depth = config.encoder.pos_conv_depth
    convs = {f"pos_conv.convs.{i}": (f"pos_conv_embed.layers.{i}.conv",) for i in range(depth)}
    rules += pairs("encoder.", "encoder.", {**convs, "norm": ("layer_norm",)})
    for i in range(config.encoder.layers):
        rules += pairs(f"encoder.layers.{i}.", f"encoder.layers.{i}.", SPEECH_LAYER)
    return rules


def _text(config: Data2VecConfig) -> list[Rule]:
    rules = [
        Rule("frontend.tokens.weight", ("embeddings.word_embeddings.weight",)),
        Rule("frontend.positions.weight", (POSITIONS,)),
        *pairs("frontend.", "embeddings.", {"norm": ("LayerNorm",)}),
    ]
    for i in range(config.encoder.layers):
        rules += pairs(f"encoder.layers.{i}.", f"encoder.layer.{i}.", TEXT_LAYER)
    return rules


def _image(config: Data2VecConfig) -> list[Rule]:
    rules = [
        Rule("frontend.class_token", ("embeddings.cls_token",), lead=2),
        Rule("frontend.mask_embedding", ("embeddings.mask_token",), MASK, lead=2),
        *pairs("frontend.", "embeddings.patch_embeddings.", {"proj": ("projection",)}),
        *pairs("encoder.", "", {"norm": ("layernorm",)}, "final norm"),
    ]
    if config.encoder.relative_bias:
        rules.append(Rule("encoder.relative_bias.table", (SHARED_TABLE,)))
    for i in range(config.encoder.layers):
        ours, theirs = f"encoder.layers.{i}.", f"encoder.layer.{i}."
        attention = f"{theirs}attention.attention."
        rules.append(
            Rule(f"{ours}attention.qkv.weight", tuple(f"{attention}{n}.weight" for n in ("query", "key", "value")))
        )
        rules += [Rule(f"{ours}attention.{n[0]}_bias", (f"{attention}{n}.bias",)) for n in ("query", "value")]
        if config.encoder.layer_scale > 0:
            rules += [Rule(f"{ours}scale{n}", (f"{theirs}lambda_{n}",)) for n in (1, 2)]
        rules += pairs(ours, theirs, IMAGE_LAYER)
    return rules


def is_transformers(config: dict[str, Any]) -> bool:
    """Whether a ``config.json`` is one of transformers'."""
    return "model_type" in config


def read(source: str | Path | Any, dtype: torch.dtype | None = torch.float32) -> Loaded:
    """A directory, or a model object of transformers, as our model, and the report; see :func:`load_transformers`."""
    if isinstance(source, (str, Path)):
        path, values = str(source), read_json(Path(source) / CONFIG)
        config = read_config(path, values)
        tensors = read_weights(Path(source))
    elif isinstance(source, torch.nn.Module) and hasattr(getattr(source, "config", None), "to_dict"):
        path, values = type(source).__name__, source.config.to_dict()
        config = read_config(path, values)
        tensors = {name: x.detach() for name, x in source.state_dict().items()}
        require(path, "tensors without memory or not dense", [n for n, x in tensors.items() if not _is_dense(x)])
        tensors = {name: x.cpu() for name, x in tensors.items()}
    else:
        raise TypeError(f"path_or_model must be a path or a model of transformers, got {type(source).__name__}")
    for prefix in PREFIXES:
        tensors = distinct(path, ((name.removeprefix(prefix), x) for name, x in tensors.items()))
    check_counts(path, config, tensors, OF_LAYERS)
    report = Report(f"transformers {config.modality}")
    if config.modality == "text":
        tensors = _without_types(tensors, report)
    if values.get("use_relative_position_bias"):
        tensors = _one_table(path, tensors, config.encoder.layers)
        report.notes.append("the relative-position tables of the layers are equal, and one here")
    state = gather(path, report, config, rules_for(config), tensors, DROPPED)
    if config.modality == "image" and "encoder.norm.weight" not in state:
        report.notes.append(
            "no final norm there (use_mean_pooling): hidden_states()[-1] is its output, encode() is not"
        )
    return build(path, config, state, report, dtype)


def _is_dense(x: Tensor) -> bool:
    return x.layout == torch.strided and not x.is_meta and not x.is_quantized


def _without_types(tensors: dict[str, Tensor], report: Report) -> dict[str, Tensor]:
    """Every token is of type 0 here: its embedding, which is zero in data2vec models, becomes part of the positions."""
    tensors = dict(tensors)
    types = tensors.pop(TYPES, None)
    positions = tensors.get(POSITIONS)
    if types is None or types.dim() != 2 or len(types) == 0 or positions is None:
        return tensors
    if types.shape[1:] == positions.shape[1:] and types[0].any():
        tensors[POSITIONS] = positions + types[0]
        report.notes.append("the embedding of token type 0 was added to those of the positions")
    report.dropped.append(TYPES)
    return tensors


def _one_table(path: str, tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The relative-position table of every layer as one; data2vec's conversion copied one table to all of them."""
    names = [f"encoder.layer.{i}.attention.attention.{TABLE}" for i in range(layers)]
    require(path, "the tensors do not fit the configuration", [f"{n} is missing" for n in names if n not in tensors])
    first = tensors[names[0]]
    other = [n for n in names if tensors[n].shape != first.shape or not torch.equal(tensors[n], first)]
    require(path, "layers share one relative-position table here", [f"{name} differs from layer 0's" for name in other])
    others = [(name, x) for name, x in tensors.items() if name not in names]
    return distinct(path, [*others, (SHARED_TABLE, first)])


def save_transformers(model: Data2Vec, folder: str | Path) -> Report:
    """Write the student as ``config.json`` and ``model.safetensors``; teacher and head have no place there.

    Raises:
        CheckpointError: a setting that decides what the weights compute and has no place there; the directory could not
            be written; or the package safetensors is not installed.
    """
    config = model.config
    values = write_config(config)
    what = "transformers has no place for this model"
    report = Report(f"transformers {config.modality}")
    report.notes += losses(folder, "transformers", config, read_config(folder, values, what), NOT_KEPT)
    tensors = scatter(rules_for(config), model, report)
    if config.modality == "text":
        tensors[TYPES] = torch.zeros_like(tensors[POSITIONS][:1])
    dtypes = {x.dtype for x in tensors.values()}
    values["dtype"] = str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else "float32"
    write_directory(folder, values, tensors)
    return report

"""The configurations of transformers' Data2VecAudio, Data2VecText and Data2VecVision, as ours and back.

They describe the network only: targets, loss, averages, masks and head of what is read are those of our recipes.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from d2v_fast.checkpoints.options import Options
from d2v_fast.checkpoints.rules import require
from d2v_fast.errors import CheckpointError
from d2v_fast.nn import Data2VecConfig

MODALITIES = {"data2vec-audio": "speech", "data2vec-text": "text", "data2vec-vision": "image"}
CLASSES = {"speech": "Data2VecAudioModel", "text": "Data2VecTextModel", "image": "Data2VecVisionModel"}
NOT_KEPT = ("targets.", "loss.", "ema.", "mask.", "head_layers")  # groups of settings without a place there
CONV_EPS = 1e-5  # of the norm behind the convolutions, here and in fairseq
TRANSFORMER = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
# the defaults of the three configuration classes, of what we read
AUDIO_DEFAULTS = TRANSFORMER | {
    "conv_dim": (512,) * 7,
    "conv_kernel": (10, 3, 3, 3, 3, 2, 2),
    "conv_stride": (5, 2, 2, 2, 2, 2, 2),
    "conv_bias": False,
    "feat_proj_dropout": 0.0,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "layerdrop": 0.1,
    "layer_norm_eps": 1e-5,
    "num_conv_pos_embeddings": 5,
    "conv_pos_kernel_size": 19,
    "num_conv_pos_embedding_groups": 16,
}
AUDIO_ONLY = {"hidden_act": "gelu", "feat_extract_activation": "gelu", "layer_norm_eps": CONV_EPS}
TEXT_DEFAULTS = TRANSFORMER | {
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12,
}
TEXT_ONLY = {
    "hidden_act": "gelu",
    "pad_token_id": 1,
    "is_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
}
VISION_DEFAULTS = TRANSFORMER | {
    "num_channels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.1,
    "layer_norm_eps": 1e-12,
    "layer_scale_init_value": 0.1,
    "use_relative_position_bias": False,
    "use_shared_relative_position_bias": False,
}
VISION_ONLY = {"hidden_act": "gelu", "use_absolute_position_embeddings": False}


def read_config(
    path: str | Path, values: dict[str, Any], what: str = "its configuration cannot be followed"
) -> Data2VecConfig:
    """Our configuration of a transformers ``config.json``.

    Raises:
        CheckpointError: another kind of model, or options that we cannot follow; all of them are listed.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in MODALITIES:
        raise CheckpointError(f"{path} must hold a model of type {', '.join(MODALITIES)}, got {kind!r}")
    modality = MODALITIES[kind]
    defaults, read = {
        "speech": (AUDIO_DEFAULTS, _speech),
        "text": (TEXT_DEFAULTS, _text),
        "image": (VISION_DEFAULTS, _image),
    }[modality]
    options = Options(values, defaults)
    try:
        config = read(getattr(Data2VecConfig, modality)(), options)
    except (TypeError, ValueError, ArithmeticError) as error:  # of our own configuration's checks
        require(path, what, [*options.problems, str(error)])
    require(path, what, options.problems)
    return config


def _encoder(o: Options) -> dict[str, Any]:
    names = ("layers", "num_hidden_layers"), ("dim", "hidden_size"), ("heads", "num_attention_heads")
    sizes = {ours: o[theirs] for ours, theirs in (*names, ("ffn_dim", "intermediate_size"))}
    return sizes | {"norm_eps": float(o["layer_norm_eps"])}


def _finished(base: Data2VecConfig, **parts: Any) -> Data2VecConfig:
    return replace(base, **parts, targets=replace(base.targets, top_k=min(base.targets.top_k, parts["encoder"].layers)))


def _speech(base: Data2VecConfig, o: Options) -> Data2VecConfig:
    o.only(AUDIO_ONLY)
    depth, kernel = o["num_conv_pos_embeddings"], o["conv_pos_kernel_size"]
    if depth < 2 or kernel < 3:
        o.problems.append(f"num_conv_pos_embeddings={depth} of conv_pos_kernel_size={kernel} must be at least 2 of 3")
    convs = [o[name] for name in ("conv_dim", "conv_kernel", "conv_stride")]
    if len({len(x) for x in convs}) > 1 or not all(type(n) is int for x in convs for n in x):
        o.problems.append("conv_dim, conv_kernel and conv_stride must be integers for the same number of layers")
        convs = [AUDIO_DEFAULTS[name] for name in ("conv_dim", "conv_kernel", "conv_stride")]
    frontend = replace(
        base.frontend,
        conv_layers=tuple(zip(*convs, strict=True)),
        conv_bias=o["conv_bias"],
        input_dropout=o["feat_proj_dropout"],
    )
    encoder = replace(
        base.encoder,
        **_encoder(o),
        dropout=o["hidden_dropout"],
        attention_dropout=o["attention_dropout"],
        activation_dropout=o["activation_dropout"],
        layerdrop=o["layerdrop"],
        pos_conv_depth=depth,
        pos_conv_width=kernel * depth,
        pos_conv_groups=o["num_conv_pos_embedding_groups"],
    )
    return _finished(base, frontend=frontend, encoder=encoder)


def _text(base: Data2VecConfig, o: Options) -> Data2VecConfig:
    o.only(TEXT_ONLY)
    frontend = replace(
        base.frontend,
        vocab_size=o["vocab_size"],
        max_positions=o["max_position_embeddings"] - 2,  # padding and the id before it have none
        dropout=o["hidden_dropout_prob"],
    )
    rates = {"dropout": o["hidden_dropout_prob"], "attention_dropout": o["attention_probs_dropout_prob"]}
    return _finished(base, frontend=frontend, encoder=replace(base.encoder, **_encoder(o), **rates))


def _image(base: Data2VecConfig, o: Options) -> Data2VecConfig:
    o.only(VISION_ONLY)
    sizes = {}
    for ours, default in (("image_size", 224), ("patch_size", 16)):
        size = o.values.get(ours, default)
        if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]:
            size = size[0]
        if type(size) is not int:
            o.problems.append(f"{ours} must be one integer, got {size!r}")
            size = default
        sizes[ours] = size
    frontend = replace(base.frontend, **sizes, channels=o["num_channels"])
    if o["use_relative_position_bias"] and o["use_shared_relative_position_bias"]:
        o.problems.append("use_relative_position_bias and use_shared_relative_position_bias together are not supported")
    encoder = replace(
        base.encoder,
        **_encoder(o),
        dropout=o["hidden_dropout_prob"],
        attention_dropout=o["attention_probs_dropout_prob"],
        drop_path=o["drop_path_rate"],
        layer_scale=max(0.0, o["layer_scale_init_value"]),
        relative_bias=o["use_relative_position_bias"] or o["use_shared_relative_position_bias"],
    )
    return _finished(base, frontend=frontend, encoder=encoder, mask=fitting_mask(base, frontend.num_patches))


def fitting_mask(base: Data2VecConfig, patches: int) -> Any:
    """The recipe's block mask, for fewer patches than it masks of 196 the same share of them."""
    mask = base.mask
    count = mask.num_masked if patches > mask.num_masked else max(1, patches * mask.num_masked // 196)
    return replace(mask, num_masked=count, min_block=min(mask.min_block, count))


def write_config(config: Data2VecConfig) -> dict[str, Any]:
    """The ``config.json`` of transformers for the student of a model with ``config``."""
    e, f = config.encoder, config.frontend
    values: dict[str, Any] = {
        "architectures": [CLASSES[config.modality]],
        "model_type": next(kind for kind, modality in MODALITIES.items() if modality == config.modality),
        "hidden_size": e.dim,
        "num_hidden_layers": e.layers,
        "num_attention_heads": e.heads,
        "intermediate_size": e.ffn_dim,
        "hidden_act": "gelu",
        "layer_norm_eps": e.norm_eps,
        "initializer_range": e.init_std,
    }
    if config.modality == "speech":
        channels, kernels, strides = zip(*f.conv_layers, strict=True)
        return values | {
            "conv_dim": list(channels),
            "conv_kernel": list(kernels),
            "conv_stride": list(strides),
            "conv_bias": f.conv_bias,
            "feat_extract_activation": "gelu",
            "feat_proj_dropout": f.input_dropout,
            "hidden_dropout": e.dropout,
            "attention_dropout": e.attention_dropout,
            "activation_dropout": e.activation_dropout,
            "layerdrop": e.layerdrop,
            "num_conv_pos_embeddings": e.pos_conv_depth,
            "conv_pos_kernel_size": max(3, e.pos_conv_width // max(1, e.pos_conv_depth)),
            "num_conv_pos_embedding_groups": e.pos_conv_groups,
        }
    values |= {"hidden_dropout_prob": e.dropout, "attention_probs_dropout_prob": e.attention_dropout}
    if config.modality == "text":
        ids = {"pad_token_id": f.pad_index, "bos_token_id": f.bos_index, "eos_token_id": f.eos_index}
        positions = {"max_position_embeddings": f.max_positions + 2, "vocab_size": f.vocab_size, "type_vocab_size": 1}
        return values | ids | positions
    return values | {
        "image_size": f.image_size,
        "patch_size": f.patch_size,
        "num_channels": f.channels,
        "use_mask_token": True,
        "use_mean_pooling": False,  # the final norm belongs to the model, not to a pooler
        "use_absolute_position_embeddings": False,
        "use_relative_position_bias": False,
        "use_shared_relative_position_bias": e.relative_bias,
        "layer_scale_init_value": e.layer_scale,
        "drop_path_rate": e.drop_path,
    }

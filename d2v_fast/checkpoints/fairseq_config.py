"""The configurations of fairseq's ``data2vec_audio`` and ``data2vec_text``, as ours and back."""

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from d2v_fast.checkpoints.options import Options, resolved
from d2v_fast.checkpoints.rules import require
from d2v_fast.checkpoints.safe_load import plain
from d2v_fast.errors import CheckpointError
from d2v_fast.nn import Data2VecConfig

AUDIO, TEXT = "data2vec_audio", "data2vec_text"
MAX_CONVS = 64
TARGETS = {
    "average_top_k_layers": 8,
    "layer_norm_target_layer": False,
    "instance_norm_target_layer": False,
    "batch_norm_target_layer": False,
    "layer_norm_targets": False,
    "instance_norm_targets": False,
    "loss_beta": 0.0,
    "loss_scale": None,
    "ema_decay": 0.999,
    "ema_end_decay": 0.9999,
    "ema_anneal_end_step": 0,
}
# fairseq's defaults (Data2VecAudioConfig, Wav2Vec2Config) of what we read
AUDIO_DEFAULTS = TARGETS | {
    "extractor_mode": "default",
    "conv_feature_layers": "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]",
    "conv_bias": False,
    "feature_grad_mult": 1.0,
    "dropout_input": 0.0,
    "encoder_layers": 12,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "pos_conv_depth": 1,
    "mask_prob": 0.65,
    "mask_length": 10,
    "require_same_masks": True,
    "ema_transformer_only": True,
    "ema_layers_only": True,
    "task.sample_rate": 16_000,
}
AUDIO_ONLY = {
    "layer_norm_first": False,
    "activation_fn": "gelu",
    "layer_type": "transformer",
    "attn_type": "",
    "pos_enc_type": "abs",
    "adp_num": -1,
    "skip_pos_conv": False,
    "group_norm_target_layer": False,
}
AUDIO_NOTED = {
    "mask_selection": "static",
    "mask_other": 0,
    "no_mask_overlap": False,
    "mask_dropout": 0.0,
    "mask_channel_prob": 0.0,
    "mask_channel_before": False,
    "required_seq_len_multiple": 2,
}
TEXT_DEFAULTS = TARGETS | {
    "head_layers": 1,
    "ema_transformer_layers_only": True,
    "mask_prob": 0.15,  # of the task
    "mask_multiple_length": 1,
    # of the group "transformer" (TransformerConfig), and of "encoder" within it
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "max_source_positions": 1024,
    "layers": 6,
    "embed_dim": 512,
    "ffn_embed_dim": 2048,
    "attention_heads": 8,
    "layerdrop": 0.0,
}
TEXT_DEVIATING = {  # fairseq's default of each is another value than the one we know: it has to be given
    "activation_fn": ("relu", "gelu"),
    "layernorm_embedding": (False, True),
    "no_scale_embedding": (False, True),
    "learned_pos": (False, True),
}
TEXT_NOTED = {  # of the task
    "leave_unmasked_prob": 0.0,
    "random_token_prob": 0.0,
    "mask_whole_words": False,
    "mask_stdev": 0.0,
    "freq_weighted_replacement": False,
}
TEXT_ONLY = {
    "normalize_before": False,
    "no_token_positional_embeddings": False,
    "adaptive_input": False,
    "layers_to_keep": None,
    "xformers_att_config": None,
    "base_layers": 0,
}


def read_config(
    path: str | Path,
    content: dict[str, Any],
    tensors: dict[str, Any],
    what: str = "its configuration cannot be followed",
) -> tuple[Data2VecConfig, list[str]]:
    """Our configuration of a fairseq file, and notes on options that have no counterpart here.

    ``tensors`` tell what the configuration leaves to the task: the size of the vocabulary. ``what`` begins the message
    of an error.

    Raises:
        CheckpointError: no configuration, another model, or options that we cannot follow; all of them are listed.
    """
    name, values, root = _model_options(path, content)
    if name not in (AUDIO, TEXT):
        raise CheckpointError(f"{path} must hold a {AUDIO} or {TEXT} model, got {name!r}")
    values = {"ema_anneal_end_step": "${optimization.max_update}", **values}
    options = Options(resolved(values, root), AUDIO_DEFAULTS if name == AUDIO else TEXT_DEFAULTS)
    try:
        if name == AUDIO:
            config, notes = _speech(options), options.notes(AUDIO_NOTED)
            if options.values.get("task.normalize") is False:
                notes.append("task.normalize=False: it knows waveforms as they are, not normalised ones")
        else:
            config, notes = _text(options, tensors), options.notes(TEXT_NOTED)
    except (TypeError, ValueError, ArithmeticError) as error:  # of our own configuration's checks
        require(path, what, [*options.problems, str(error)])
    require(path, what, options.problems)
    return config, notes


def _model_options(path: str | Path, content: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Name of the model, its options, and the whole configuration, from ``cfg`` or from the older ``args``."""
    cfg, args = plain(path, content.get("cfg")), plain(path, content.get("args"))
    if isinstance(cfg, dict) and isinstance(cfg.get("model"), dict):
        values, task = cfg["model"], cfg["task"] if isinstance(cfg.get("task"), dict) else {}
        if values.get("_name") == TEXT or "transformer" in values:
            inner = values.get("transformer")
            inner = inner if isinstance(inner, dict) else {}
            encoder = inner.get("encoder")
            masks = {key: task[key] for key in ("mask_prob", "mask_multiple_length", *TEXT_NOTED) if key in task}
            values = {**masks, **inner, **(encoder if isinstance(encoder, dict) else {}), **values}
        return values.get("_name"), {**values, **_of_waveforms(task)}, cfg
    if isinstance(args, dict):
        name = args.get("arch", args.get("_name"))
        if name == TEXT:
            args = {key.removeprefix("encoder_"): value for key, value in args.items()}
        return name, {**args, **_of_waveforms(args)}, {"optimization": args, "task": args}
    raise CheckpointError(f"{path} must hold a configuration under 'cfg' or 'args', got neither")


def _of_waveforms(task: dict[str, Any]) -> dict[str, Any]:
    return {f"task.{key}": task[key] for key in ("sample_rate", "normalize") if key in task}


def _conv_layers(options: Options) -> tuple[tuple[int, ...], ...]:
    """The value of the expression that fairseq evaluates: lists and tuples of integers, ``+`` and ``*``, no more."""

    def value(node: ast.AST) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, (ast.List, ast.Tuple)):
            kind = list if isinstance(node, ast.List) else tuple
            return kind(value(element) for element in node.elts)
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
                return left + right
            if not isinstance(node.op, ast.Mult) or not isinstance(left, list) or type(right) is not int:
                raise ValueError("not a list of layers")
            if len(left) * right <= MAX_CONVS:
                return left * right
        raise ValueError("not a list of layers")

    text = options["conv_feature_layers"]
    try:
        layers = value(ast.parse(text[:10_000], mode="eval").body)
        if not isinstance(layers, list) or not 0 < len(layers) <= MAX_CONVS:
            raise ValueError("not a list of layers")
        if not all(isinstance(x, tuple) and len(x) == 3 and all(type(n) is int for n in x) for x in layers):
            raise ValueError("not triples")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        options.problems.append(f"conv_feature_layers must be a list of (channels, kernel, stride), got {text!r}")
        layers = [(512, 10, 5)]
    return tuple(layers)


def _shared(base: Data2VecConfig, o: Options, layers: int, skip: tuple[str, ...]) -> dict[str, Any]:
    """Targets, loss and averages, which the two models have in common; ``skip`` is what is not averaged."""
    scale = o["loss_scale"]
    if scale is None or (base.modality == "text" and scale <= 0):
        scale = "rsqrt_dim"
    targets = replace(
        base.targets,
        top_k=min(o["average_top_k_layers"], layers),
        norm=o.one_of({norm: f"{norm}_norm_target_layer" for norm in ("instance", "batch", "layer")}),
        post_norm=o.one_of({norm: f"{norm}_norm_targets" for norm in ("layer", "instance")}),
    )
    ema = replace(
        base.ema,
        decay=o["ema_decay"],
        end_decay=o["ema_end_decay"],
        anneal_updates=o["ema_anneal_end_step"],
        skip=skip,
    )
    return {"targets": targets, "loss": replace(base.loss, beta=o["loss_beta"], scale=scale), "ema": ema}


def _speech(o: Options) -> Data2VecConfig:
    o.only(AUDIO_ONLY)
    if not (o["ema_transformer_only"] or o["ema_layers_only"]):
        o.problems.append("ema_transformer_only=False is not supported: the teacher reads the student's features here")
    if o["pos_conv_depth"] < 2:
        o.problems.append(f"pos_conv_depth={o['pos_conv_depth']!r} is not supported: a teacher needs 2 or more")
    if o["instance_norm_targets"] and not (o["instance_norm_target_layer"] or o["batch_norm_target_layer"]):
        o.problems.append("instance_norm_targets=True on its own is not supported: fairseq normalises over the batch")
    if o["extractor_mode"] not in ("layer_norm", "default"):
        o.problems.append(f"extractor_mode={o['extractor_mode']!r} is not supported, only 'layer_norm' and 'default'")
    if o["task.sample_rate"] < 1:
        o.problems.append(f"task.sample_rate must be positive, got {o['task.sample_rate']}")
    base = Data2VecConfig.speech(profile="fairseq")
    frontend = replace(
        base.frontend,
        conv_layers=_conv_layers(o),
        conv_norm="layer" if o["extractor_mode"] == "layer_norm" else "group",
        conv_bias=o["conv_bias"],
        feature_grad_mult=o["feature_grad_mult"],
        input_dropout=o["dropout_input"],
        sample_rate=o["task.sample_rate"],
    )
    encoder = replace(
        base.encoder,
        layers=o["encoder_layers"],
        dim=o["encoder_embed_dim"],
        ffn_dim=o["encoder_ffn_embed_dim"],
        heads=o["encoder_attention_heads"],
        dropout=o["dropout"],
        attention_dropout=o["attention_dropout"],
        activation_dropout=o["activation_dropout"],
        layerdrop=o["encoder_layerdrop"],
        pos_conv_depth=o["pos_conv_depth"],
        pos_conv_width=o["conv_pos"],
        pos_conv_groups=o["conv_pos_groups"],
    )
    mask = replace(base.mask, prob=o["mask_prob"], length=o["mask_length"], equalize=o["require_same_masks"])
    shared = _shared(base, o, encoder.layers, ("encoder.pos_conv.",) if o["ema_layers_only"] else ())
    return replace(base, frontend=frontend, encoder=encoder, mask=mask, **shared)


def _text(o: Options, tensors: dict[str, Any]) -> Data2VecConfig:
    o.only(TEXT_ONLY)
    for name, (default, known) in TEXT_DEVIATING.items():
        if (got := o.values.get(name, default)) != known:
            o.problems.append(f"{name}={got!r} is not supported, only {known!r}")
    base = Data2VecConfig.text(profile="fairseq")
    tokens = tensors.get("encoder.sentence_encoder.embed_tokens.weight")
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        o.problems.append("encoder.sentence_encoder.embed_tokens.weight [vocabulary, channels] is missing")
    else:
        base = replace(base, frontend=replace(base.frontend, vocab_size=len(tokens)))
    frontend = replace(base.frontend, max_positions=o["max_source_positions"], dropout=o["dropout"])
    encoder = replace(
        base.encoder,
        layers=o["layers"],
        dim=o["embed_dim"],
        ffn_dim=o["ffn_embed_dim"],
        heads=o["attention_heads"],
        dropout=o["dropout"],
        attention_dropout=o["attention_dropout"],
        activation_dropout=o["activation_dropout"],
        layerdrop=o["layerdrop"],
    )
    mask = replace(base.mask, prob=o["mask_prob"], length=o["mask_multiple_length"])
    shared = _shared(base, o, encoder.layers, ("frontend.",) if o["ema_transformer_layers_only"] else ())
    return replace(base, frontend=frontend, encoder=encoder, mask=mask, head_layers=o["head_layers"], **shared)


def write_config(config: Data2VecConfig) -> dict[str, Any]:
    """The ``cfg`` of a fairseq file, plain values only. The task's ``data`` has to be given when it is loaded."""
    t, loss, ema, e = config.targets, config.loss, config.ema, config.encoder
    shared = {
        "average_top_k_layers": t.top_k,
        **{f"{norm}_norm_target_layer": t.norm == norm for norm in ("instance", "batch", "layer")},
        **{f"{norm}_norm_targets": t.post_norm == norm for norm in ("instance", "layer")},
        "loss_beta": loss.beta,
        "loss_scale": None if loss.scale == "rsqrt_dim" else loss.scale_for(e.dim),
        "ema_decay": ema.decay,
        "ema_end_decay": ema.end_decay,
        "ema_anneal_end_step": ema.anneal_updates,
    }
    rates = {n: getattr(e, n) for n in ("dropout", "attention_dropout", "activation_dropout")}
    write = _write_speech if config.modality == "speech" else _write_text
    task, model = write(config)
    return {
        "_name": None,
        "common": {"_name": None, "seed": 1},
        "task": task,
        "model": {**model, **shared} if config.modality == "text" else {**model, **shared, **rates},
        "optimization": {"_name": None, "max_update": max(1, ema.anneal_updates)},
    }


def _write_speech(config: Data2VecConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    f, e, m = config.frontend, config.encoder, config.mask
    task = {"_name": "audio_pretraining", "data": ".", "sample_rate": f.sample_rate, "normalize": True}
    return task, {
        "_name": AUDIO,
        "extractor_mode": "layer_norm" if f.conv_norm == "layer" else "default",
        "conv_feature_layers": repr([tuple(layer) for layer in f.conv_layers]),
        "conv_bias": f.conv_bias,
        "feature_grad_mult": f.feature_grad_mult,
        "dropout_input": f.input_dropout,
        "encoder_layers": e.layers,
        "encoder_embed_dim": e.dim,
        "encoder_ffn_embed_dim": e.ffn_dim,
        "encoder_attention_heads": e.heads,
        "encoder_layerdrop": e.layerdrop,
        "conv_pos": e.pos_conv_width,
        "conv_pos_groups": e.pos_conv_groups,
        "pos_conv_depth": e.pos_conv_depth,
        "mask_prob": m.prob,
        "mask_length": m.length,
        "require_same_masks": m.equalize,
        "ema_transformer_only": True,
        "ema_layers_only": config.ema.skip == ("encoder.pos_conv.",),
        "max_update": max(1, config.ema.anneal_updates),
    }


def _write_text(config: Data2VecConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    f, e, m = config.frontend, config.encoder, config.mask
    encoder = {
        "layers": e.layers,
        "embed_dim": e.dim,
        "ffn_embed_dim": e.ffn_dim,
        "attention_heads": e.heads,
        "layerdrop": e.layerdrop,
        "normalize_before": False,
        "learned_pos": True,
    }
    transformer = {
        "activation_fn": "gelu",
        "dropout": e.dropout,
        "attention_dropout": e.attention_dropout,
        "activation_dropout": e.activation_dropout,
        "max_source_positions": f.max_positions,
        "layernorm_embedding": True,
        "no_scale_embedding": True,
        "encoder": encoder,
        # there is no decoder, but fairseq looks these up, by default where data2vec has nothing
        "decoder": {"embed_dim": e.dim, "input_dim": e.dim, "output_dim": e.dim},
    }
    task = {
        "_name": "masked_lm",
        "data": ".",
        "tokens_per_sample": f.max_positions,
        "mask_prob": m.prob,
        "mask_multiple_length": m.length,
        "leave_unmasked_prob": 0.0,
        "random_token_prob": 0.0,
        "include_target_tokens": True,
    }
    model = {"_name": TEXT, "max_positions": f.max_positions, "head_layers": config.head_layers}
    model |= {"transformer": transformer, "ema_transformer_layers_only": config.ema.skip == ("frontend.",)}
    return task, model

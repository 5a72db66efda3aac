"""Checkpoints of the BEiT fork that trained data2vec for images: ``model``, and the teacher as ``model_ema``."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_fast.checkpoints.fairseq import write_torch
from d2v_fast.checkpoints.options import Options, losses
from d2v_fast.checkpoints.rules import (
    HEAD,
    MASK,
    STUDENT,
    TEACHER,
    Loaded,
    Report,
    Rule,
    build,
    count_layers,
    distinct,
    gather,
    pairs,
    require,
    scatter,
)
from d2v_fast.checkpoints.safe_load import plain, read_torch
from d2v_fast.checkpoints.transformers_config import fitting_mask
from d2v_fast.errors import CheckpointError
from d2v_fast.nn import Data2Vec, Data2VecConfig

TABLE, INDEX = "rel_pos_bias.relative_position_bias_table", "rel_pos_bias.relative_position_index"
HEAD_DIM = 64  # of every model of the fork
LAYER = {
    "attention.out": ("attn.proj",),
    "norm1": ("norm1",),
    "norm2": ("norm2",),
    "fc1": ("mlp.fc1",),
    "fc2": ("mlp.fc2",),
}
# classifiers; the teacher's unused head; the index, which follows from the grid and which averaging may have damaged
DROPPED = r"(model|model_ema)\.(head|fc_norm)\.|model_ema\.lm_head\.|.*\.relative_position_index$"
# run_cyclical.py's options; the defaults are the published recipe's, for files without them
DEFAULTS = {
    "layer_scale_init_value": 1e-4,
    "drop_path": 0.25,
    "attn_drop_rate": 0.05,
    "num_mask_patches": 120,
    "min_mask_patches_per_block": 16,
    "layer_results": "end",
    "target_layer_norm_last": True,
    "target_batch_norm": False,
    "target_instance_norm": False,
    "post_target_layer_norm": True,
    "post_target_instance_norm": False,
    "l2_loss": False,
    "l1_beta": 2.0,
    "loss_scale": -1.0,
    "ema_decay_init": 0.9998,
    "ema_decay": 0.9998,
    "ema_start_at": 0,
}
NORMS = {"layer": "target_layer_norm_last", "batch": "target_batch_norm", "instance": "target_instance_norm"}
POST_NORMS = {"layer": "post_target_layer_norm", "instance": "post_target_instance_norm"}
ONLY = {"abs_pos_emb": False}
NOTED = {"var_w0": 0.0, "mask_dropout_prob": -1.0, "tri_phase_schedule": None}


def rules_for(config: Data2VecConfig) -> list[Rule]:
    """Our image tensors and those of the fork, flattened to ``model.<name>`` and ``model_ema.<name>``."""
    rules = []
    for ours, theirs, group in (("", "model.", STUDENT), ("teacher.module.", "model_ema.", TEACHER)):
        rules += [
            Rule(f"{ours}frontend.class_token", (f"{theirs}cls_token",), group, lead=2),
            Rule(f"{ours}frontend.mask_embedding", (f"{theirs}mask_token",), group or MASK, lead=2),
            *pairs(ours, theirs, {"frontend.proj": ("patch_embed.proj",)}, group),
            *pairs(ours, theirs, {"encoder.norm": ("norm",)}, group or "final norm"),
        ]
        if config.encoder.relative_bias:
            rules.append(Rule(f"{ours}encoder.relative_bias.table", (theirs + TABLE,), group))
        for i in range(config.encoder.layers):
            mine, block = f"{ours}encoder.layers.{i}.", f"{theirs}blocks.{i}."
            names = ("qkv.weight", "q_bias", "v_bias")
            rules += [Rule(f"{mine}attention.{name}", (f"{block}attn.{name}",), group) for name in names]
            if config.encoder.layer_scale > 0:
                rules += [Rule(f"{mine}scale{n}", (f"{block}gamma_{n}",), group) for n in (1, 2)]
            rules += pairs(mine, block, LAYER, group)
    heads = {f"head.{2 * i}": ("lm_head",) for i in range(config.head_layers)}
    return rules + pairs("", "model.", heads, HEAD)


def is_beit(content: Any) -> bool:
    """Whether ``content`` of a torch file is laid out as the fork does."""
    model = content.get("model") if isinstance(content, dict) else None
    return isinstance(model, Mapping) and "patch_embed.proj.weight" in model and "cfg" not in content


def from_content(path: str | Path, content: Any, dtype: torch.dtype | None = torch.float32) -> Loaded:
    """The model in what :func:`~d2v_fast.checkpoints.safe_load.read_torch` returned for ``path``."""
    if not is_beit(content):
        raise CheckpointError(f"{path} must be a checkpoint of the BEiT fork, with the patch embedding under 'model'")
    parts = {part: content[part] for part in ("model", "model_ema") if isinstance(content.get(part), Mapping)}
    tensors = distinct(path, ((f"{part}.{name}", x) for part in parts for name, x in parts[part].items()))
    args = plain(path, content.get("args"))
    config, notes = _config(path, args if isinstance(args, dict) else {}, tensors)
    report = Report("beit image", notes=notes)
    return build(path, config, gather(path, report, config, rules_for(config), tensors, DROPPED), report, dtype)


def read(path: str | Path, dtype: torch.dtype | None = torch.float32) -> Loaded:
    """A checkpoint of the fork as our model, and the report of it; see :func:`d2v_fast.load_beit`."""
    return from_content(path, read_torch(path), dtype)


def _sizes(path: str | Path, args: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """What the tensors' shapes say of the network; without a table, they do not tell the heads and the image size."""
    wanted = {"patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2, "blocks.0.attn.qkv.weight": 2}
    found = {name: tensors.get(f"model.{name}") for name in (*wanted, TABLE)}
    wrong = [n for n, dims in wanted.items() if not isinstance(found[n], Tensor) or found[n].dim() != dims]
    require(path, "the tensors do not fit together", [f"{name} is missing or of another rank" for name in wrong])
    patches, ffn = found["patch_embed.proj.weight"], found["blocks.0.mlp.fc1.weight"]
    dim, channels, patch_size, _ = patches.shape
    sizes = {"dim": dim, "channels": channels, "patch_size": patch_size, "ffn_dim": len(ffn)}
    table = found[TABLE]
    if isinstance(table, Tensor) and table.dim() == 2:
        grid = (round(max(1, len(table) - 3) ** 0.5) + 1) // 2  # (2 grid - 1)^2 offsets and 3 for the class token
        return sizes | {"heads": table.shape[1], "image_size": grid * patch_size, "relative_bias": True}
    size = args.get("input_size", 224)
    size = size if type(size) is int else 224
    return sizes | {"heads": dim // HEAD_DIM, "image_size": size, "relative_bias": False}


def _config(
    path: str | Path, args: dict[str, Any], tensors: dict[str, Any], what: str = "its options cannot be followed"
) -> tuple[Data2VecConfig, list[str]]:
    layers = count_layers(tensors, r"model\.blocks\.(\d+)\.")
    sizes = _sizes(path, args, tensors)
    o = Options({k: v for k, v in args.items() if v is not None}, DEFAULTS)
    o.only(ONLY)
    try:
        config = _settings(o, sizes, layers, "model.blocks.0.gamma_1" in tensors)
    except (TypeError, ValueError, ArithmeticError) as error:  # of our own configuration's checks
        o.problems.append(str(error))
    require(path, what, o.problems)
    return config, o.notes(NOTED)


def _settings(o: Options, sizes: dict[str, Any], layers: int, scaled: bool) -> Data2VecConfig:
    base = Data2VecConfig.image(profile="fairseq")
    frontend = replace(base.frontend, **{n: sizes[n] for n in ("image_size", "patch_size", "channels")})
    encoder = replace(
        base.encoder,
        **{n: sizes[n] for n in ("dim", "heads", "ffn_dim", "relative_bias")},
        layers=layers,
        attention_dropout=o["attn_drop_rate"],
        drop_path=o["drop_path"],
        layer_scale=(o["layer_scale_init_value"] or DEFAULTS["layer_scale_init_value"]) if scaled else 0.0,
        layer_result="block" if o["layer_results"] == "end" else "ffn",
    )
    targets = replace(
        base.targets,
        top_k=_top_k(o, layers),
        norm=o.one_of(NORMS),
        post_norm=o.one_of(POST_NORMS),
    )
    scale = o["loss_scale"] / sizes["dim"] if o["loss_scale"] > 0 else "mean"
    loss = replace(base.loss, beta=0.0 if o["l2_loss"] else o["l1_beta"], scale=scale)
    start = o["ema_start_at"]
    decay = o["ema_decay_init"] if start > 0 else o["ema_decay"]
    ema = replace(base.ema, decay=decay, end_decay=o["ema_decay"], anneal_updates=start)
    mask = fitting_mask(base, frontend.num_patches)
    if o["num_mask_patches"] < frontend.num_patches:
        smallest = min(o["min_mask_patches_per_block"], o["num_mask_patches"])
        mask = replace(mask, num_masked=o["num_mask_patches"], min_block=smallest)
    return replace(base, frontend=frontend, encoder=encoder, targets=targets, loss=loss, ema=ema, mask=mask)


def _top_k(o: Options, layers: int) -> int:
    """How many of the last layers ``target_layers``, a list or its text, names; another choice is a problem."""
    given = o.values.get("target_layers")
    if given in (None, [], "[]"):
        return min(6, layers)
    numbers = sorted(int(n) for n in re.findall(r"\d+", str(given)))
    if numbers != list(range(layers - len(numbers), layers)):
        o.problems.append(f"target_layers={given!r} is not supported, only the last ones of {layers}")
    return len(numbers) or 1


def save_beit(model: Data2Vec, path: str | Path) -> Report:
    """Write an image model as the fork does, without optimizer: ``model``, ``model_ema``, ``args``, ``epoch``.

    Raises:
        CheckpointError: no image model; a setting that decides what the weights compute and has no place there; or the
            file could not be written.
    """
    config = model.config
    if config.modality != "image":
        raise CheckpointError(f"{path}: BEiT files hold image models, got a {config.modality} model (see save_fairseq)")
    what = "the BEiT format has no place for this model"
    require(path, what, [] if config.head_layers == 1 else [f"head_layers={config.head_layers} would become 1"])
    report = Report("beit image")
    args = _args(config)
    tensors = scatter(rules_for(config), model, report)
    back, _ = _config(path, args, tensors, what)
    report.notes += losses(path, "BEiT", config, back)
    for kind in ("weight", "bias"):  # strict loading wants it, nothing uses it
        tensors[f"model_ema.lm_head.{kind}"] = tensors[f"model.lm_head.{kind}"].float()
    if config.encoder.relative_bias:
        tensors[f"model.{INDEX}"] = tensors[f"model_ema.{INDEX}"] = model.encoder.relative_bias.index.cpu().clone()
    parts = {
        part: {n.removeprefix(f"{part}."): x for n, x in tensors.items() if n.startswith(f"{part}.")}
        for part in ("model", "model_ema")
    }
    write_torch({**parts, "epoch": 0, "args": args}, path)
    return report


def _args(config: Data2VecConfig) -> dict[str, Any]:
    """The options of run_cyclical.py, as plain values instead of the fork's argparse.Namespace."""
    e, t, loss, ema, mask = config.encoder, config.targets, config.loss, config.ema, config.mask
    return {
        "model": "beit_large_patch16_224" if e.heads == 16 else "beit_base_patch16_224",
        "input_size": config.frontend.image_size,
        "rel_pos_bias": e.relative_bias,
        "abs_pos_emb": False,
        "layer_scale_init_value": e.layer_scale,
        "drop_path": e.drop_path,
        "attn_drop_rate": e.attention_dropout,
        "num_mask_patches": mask.num_masked,
        "min_mask_patches_per_block": mask.min_block,
        "target_layers": list(range(e.layers - t.top_k, e.layers)),
        "layer_results": "end" if e.layer_result == "block" else "fc",
        **{flag: t.norm == norm for norm, flag in NORMS.items()},
        **{flag: t.post_norm == norm for norm, flag in POST_NORMS.items()},
        "l2_loss": loss.beta == 0,
        "l1_beta": loss.beta,
        "loss_scale": -1 if loss.scale == "mean" else loss.scale_for(e.dim) * e.dim,
        "ema_decay_init": ema.decay,
        "ema_decay": ema.end_decay,
        "ema_start_at": ema.anneal_updates,
    }

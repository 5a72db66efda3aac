"""fairseq's data2vec 1.0 checkpoints: ``data2vec_audio`` and ``data2vec_text``, with the teacher under ``_ema``."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_fast.checkpoints.fairseq_config import read_config, write_config
from d2v_fast.checkpoints.options import losses
from d2v_fast.checkpoints.rules import (
    HEAD,
    MASK,
    STUDENT,
    TEACHER,
    Loaded,
    Report,
    Rule,
    build,
    check_counts,
    distinct,
    gather,
    pairs,
    scatter,
)
from d2v_fast.checkpoints.safe_load import read_torch
from d2v_fast.errors import CheckpointError
from d2v_fast.files import replace_file
from d2v_fast.nn import Data2Vec, Data2VecConfig

SENTENCE = "encoder.sentence_encoder."
LAYER = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.out_proj",),
    "norm1": ("self_attn_layer_norm",),
    "fc1": ("fc1",),
    "fc2": ("fc2",),
    "norm2": ("final_layer_norm",),
}
EMBEDDINGS = {"tokens": "embed_tokens.weight", "positions": "embed_positions.weight"}
RENAMED = (("decoder.", "encoder."), (".emb_layer_norm.", ".layernorm_embedding."), (".lm_head.", ".regression_head."))
# heads of other tasks; the teacher of the first text models; the version of the layout, which text models carry
DROPPED = r"classification_heads\.|encoder\.target_model\.|(encoder\.sentence_encoder|_ema)\.version$"


def _layers(ours: str, theirs: str, count: int, group: str) -> list[Rule]:
    return [rule for i in range(count) for rule in pairs(f"{ours}layers.{i}.", f"{theirs}layers.{i}.", LAYER, group)]


def _speech_encoder(config: Data2VecConfig, ours: str, theirs: str, group: str) -> list[Rule]:
    convs = {f"pos_conv.convs.{i}": (f"pos_conv.{i}.0",) for i in range(config.encoder.pos_conv_depth)}
    rules = pairs(ours, theirs, {**convs, "norm": ("layer_norm",)}, group)
    return rules + _layers(ours, theirs, config.encoder.layers, group)


def speech_rules(config: Data2VecConfig) -> list[Rule]:
    """Our speech tensors and those of ``Data2VecAudioModel``; the teacher's names are flattened to ``_ema.<name>``."""
    front = config.frontend
    rules = [Rule("frontend.mask_embedding", ("mask_emb",), MASK)]
    for i in range(len(front.conv_layers)):
        conv = f"feature_extractor.conv_layers.{i}"
        kinds = ("weight", "bias") if front.conv_bias else ("weight",)
        rules += pairs(f"frontend.convs.{i}.", f"{conv}.", {"conv": ("0",)}, kinds=kinds)
        if front.conv_norm == "layer" or i == 0:
            norm = "2.1" if front.conv_norm == "layer" else "2"
            rules += pairs(f"frontend.convs.{i}.", f"{conv}.", {"norm": (norm,)})
    rules += pairs("frontend.", "", {"norm": ("layer_norm",), "proj": ("post_extract_proj",)})
    rules += _speech_encoder(config, "encoder.", "encoder.", STUDENT)
    rules += pairs("", "", {"head.0": ("final_proj",)}, HEAD)
    return rules + _speech_encoder(config, "teacher.module.encoder.", "_ema.", TEACHER)


def text_rules(config: Data2VecConfig) -> list[Rule]:
    """Our text tensors and those of ``Data2VecTextModel``; the teacher's names are flattened to ``_ema.<name>``."""
    rules = []
    for ours, theirs, group in (("", SENTENCE, STUDENT), ("teacher.module.", "_ema.", TEACHER)):
        rules += [Rule(f"{ours}frontend.{mine}.weight", (theirs + name,), group) for mine, name in EMBEDDINGS.items()]
        rules += pairs(f"{ours}frontend.", theirs, {"norm": ("layernorm_embedding",)}, group)
        rules += _layers(f"{ours}encoder.", theirs, config.encoder.layers, group)
    heads = {f"head.{2 * i}": (f"encoder.regression_head.{2 * i}",) for i in range(config.head_layers)}
    return rules + pairs("", "", heads, HEAD)


def rules_for(config: Data2VecConfig) -> list[Rule]:
    """The rules of a speech or text model."""
    return speech_rules(config) if config.modality == "speech" else text_rules(config)


def is_fairseq(content: Any) -> bool:
    """Whether ``content`` of a torch file is laid out as fairseq's trainer does."""
    return (
        isinstance(content, dict)
        and isinstance(content.get("model"), Mapping)
        and ("cfg" in content or "args" in content)
    )


def _flat(path: str | Path, model: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by name, with today's names; the teacher's as ``_ema.<name>``."""

    def named() -> Iterator[tuple[str, Any]]:
        for name, value in model.items():
            if isinstance(value, Mapping) and str(name).rpartition(".")[2] == "_ema":
                yield from ((_renamed(f"_ema.{key}"), x) for key, x in value.items())
            else:
                yield _renamed(str(name)), value

    return distinct(path, _split_in_proj(distinct(path, named())))


def _renamed(name: str) -> str:
    for old, new in RENAMED:
        if old.startswith("."):
            name = name.replace(old, new)
        elif name.startswith(old):
            name = new + name.removeprefix(old)
    return name


def _split_in_proj(tensors: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Old files hold queries, keys and values as one ``in_proj_weight`` and ``in_proj_bias``, in this order."""
    for name, x in tensors.items():
        stem, _, kind = name.rpartition(".in_proj_")
        if stem and isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] % 3 == 0:
            yield from ((f"{stem}.{p}_proj.{kind}", part) for p, part in zip("qkv", x.chunk(3), strict=True))
        else:
            yield name, x


def from_content(path: str | Path, content: Any, dtype: torch.dtype | None = torch.float32) -> Loaded:
    """The model in what :func:`~d2v_fast.checkpoints.safe_load.read_torch` returned for ``path``."""
    if not is_fairseq(content):
        raise CheckpointError(f"{path} must be a fairseq checkpoint with 'model' and 'cfg' or 'args'")
    tensors = _flat(path, content["model"])
    config, notes = read_config(path, content, tensors)
    check_counts(path, config, tensors, r"encoder\.(?:sentence_encoder\.)?layers\.(\d+)\.")
    report = Report(f"fairseq {config.modality}", notes=notes)
    state = gather(path, report, config, rules_for(config), tensors, DROPPED)
    return build(path, config, state, report, dtype)


def read(path: str | Path, dtype: torch.dtype | None = torch.float32) -> Loaded:
    """A fairseq checkpoint as our model, and the report of it; see :func:`d2v_fast.load_fairseq`."""
    return from_content(path, read_torch(path), dtype)


def save_fairseq(model: Data2Vec, path: str | Path) -> Report:
    """Write ``model`` as fairseq's trainer does, without optimizer; ``load_model_ensemble_and_task`` reads it.

    Text models need ``arg_overrides={"data": ...}`` there, a folder with the dictionary.

    Raises:
        CheckpointError: images; a setting that decides what the weights compute and has no place there; or the file
            could not be written.
    """
    config = model.config
    if config.modality == "image":
        raise CheckpointError(f"{path}: fairseq files hold speech and text models, got an image model (see save_beit)")
    report = Report(f"fairseq {config.modality}")
    cfg = write_config(config)
    _check_kept(path, config, cfg, report)
    tensors = scatter(rules_for(config), model, report)
    teacher = {name.removeprefix("_ema."): tensors.pop(name) for name in list(tensors) if name.startswith("_ema.")}
    if config.modality == "text":
        teacher["version"] = torch.tensor([3.0])
        tensors[f"{SENTENCE}version"] = teacher["version"].to(model.head[0].weight.dtype)
    root = "" if config.modality == "speech" else "encoder."
    history = {"criterion_name": "ModelCriterion", "optimizer_name": "FairseqAdam", "lr_scheduler_state": {}}
    content = {
        "args": None,
        "cfg": cfg,
        "model": {**tensors, f"{root}_ema": teacher},
        "criterion": None,
        "optimizer_history": [{**history, "num_updates": 0}],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
        "last_optimizer_state": None,
    }
    write_torch(content, path)
    return report


def _check_kept(path: str | Path, config: Data2VecConfig, cfg: dict[str, Any], report: Report) -> None:
    """What reading it again would make of ``config``: an error if the weights would compute something else."""
    vocabulary = {}
    if config.modality == "text":
        tokens = torch.empty(config.frontend.vocab_size, 1, device="meta")
        vocabulary[f"{SENTENCE}embed_tokens.weight"] = tokens
    back, _ = read_config(path, {"cfg": cfg}, vocabulary, "fairseq has no place for this model")
    report.notes += losses(path, "fairseq", config, back)


def write_torch(content: dict[str, Any], path: str | Path) -> None:
    """``torch.save``, beside and renamed.

    Raises:
        CheckpointError: no space, no permission.
    """
    try:
        replace_file(Path(path), lambda file: torch.save(content, file))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise CheckpointError(f"could not write {path}: {error}") from error

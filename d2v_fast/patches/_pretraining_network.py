"""Transformers' data2vec encoders as parts of our Data2Vec: settings, rules, modules of ours around their tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from d2v_fast.checkpoints.options import COMPUTED
from d2v_fast.checkpoints.rules import Rule
from d2v_fast.checkpoints.transformers import POSITIONS, TYPES, rules_for
from d2v_fast.checkpoints.transformers_config import read_config
from d2v_fast.nn import Data2Vec, Data2VecConfig, EMATeacher, TransformerEncoder
from d2v_fast.nn.config import TextFrontEndConfig
from d2v_fast.nn.frontends import build_frontend
from d2v_fast.nn.heads import build_head
from d2v_fast.nn.positions import RelativePositionBias
from d2v_fast.patches._core import PatchError
from d2v_fast.patches._sharing import JoinedLinear, Shared, Slot

SUPPORTED = ("Data2VecAudioModel", "Data2VecTextModel", "Data2VecVisionModel")
RECIPE = ("targets", "loss", "ema", "mask", "prune", "head_layers")  # what a caller may set; the rest is the network's
OURS = ("torch.nn.modules.", "transformers.models.data2vec.", "transformers.activations")


@dataclass(frozen=True, kw_only=True)
class _Tokens(TextFrontEndConfig):
    """A vocabulary with ``<mask>`` anywhere."""

    mask_token: int

    @property
    def mask_index(self) -> int:
        return self.mask_token


def find_base(model: Any) -> tuple[str, nn.Module]:
    """The data2vec encoder in a model of transformers, and its name there, "" for the model itself.

    Raises:
        PatchError: there is none, or parts of it were replaced by others' (adapters, quantised or wrapped layers).
    """
    if isinstance(model, nn.Module):
        for path, module in model.named_modules():
            if any(kind.__name__ in SUPPORTED for kind in type(module).__mro__):
                _check_parts(module)
                return path, module
    raise PatchError(f"hf_model must be or contain one of {', '.join(SUPPORTED)}, got {type(model).__name__}")


def _check_parts(base: nn.Module) -> None:
    for path, module in base.named_modules():
        kind = type(module)
        if path and not kind.__module__.startswith(OURS):
            raise PatchError(f"hf_model.{path} must be a layer of transformers or torch, got {kind.__qualname__}")


def read_recipe(
    base: nn.Module,
    config: Data2VecConfig | None,
    profile: str,
    mask_token_id: int | None,
    overrides: dict[str, Any],
) -> Data2VecConfig:
    """The network's settings from the model, the recipe's from ``config`` or our preset, changed by ``overrides``.

    Raises:
        TypeError: ``config`` is none; an override is no part of the recipe, of another type, or has an unknown field.
        ValueError: ``config`` is of another network, a value is out of range, or ``mask_token_id`` no token.
        CheckpointError: the model has options that we cannot follow; all are named.
    """
    unknown = [name for name in overrides if name not in RECIPE]
    if unknown:
        raise TypeError(f"overrides must be of {', '.join(RECIPE)}, got {', '.join(map(repr, unknown))}")
    if config is not None and not isinstance(config, Data2VecConfig):
        raise TypeError(f"config must be a Data2VecConfig, got {type(config).__name__}")
    kind = type(base).__name__
    values = base.config.to_dict()
    if values.get("use_relative_position_bias"):
        raise PatchError(f"{kind}: pretraining needs use_shared_relative_position_bias, not a table in every layer")
    recipe = read_config(kind, values).with_profile(profile)
    if config is not None:
        _check_network(config, recipe)
        recipe = config
    recipe = replace(recipe, **{name: _part(recipe, name, value) for name, value in overrides.items()})
    if recipe.modality == "text":
        size = recipe.frontend.vocab_size
        token = size - 1 if mask_token_id is None else mask_token_id
        if not 0 <= token < size:
            raise ValueError(f"mask_token_id must be in 0..{size - 1}, got {mask_token_id}")
        named = {f.name: getattr(recipe.frontend, f.name) for f in fields(TextFrontEndConfig)}
        recipe = replace(recipe, frontend=_Tokens(**named, mask_token=token))
    elif mask_token_id is not None:
        raise ValueError(f"mask_token_id must be None for {recipe.modality}, got {mask_token_id}")
    return recipe


def _part(recipe: Data2VecConfig, name: str, value: Any) -> Any:
    """A part of the recipe: ``value`` itself, or where that is a mapping, what there is with these fields changed."""
    before = getattr(recipe, name)
    has_fields = is_dataclass(before)
    if has_fields and isinstance(value, Mapping):
        known = [field.name for field in fields(before)]
        unknown = [key for key in value if key not in known]
        if unknown:
            raise TypeError(f"{name} must have fields of {', '.join(known)}, got {', '.join(map(repr, unknown))}")
        return replace(before, **value)
    if not isinstance(value, type(before)) or isinstance(value, bool) != isinstance(before, bool):
        also = " or a mapping of its fields" if has_fields else ""
        raise TypeError(f"{name} must be {type(before).__name__}{also}, got {type(value).__name__}")
    return value


def _check_network(config: Data2VecConfig, expected: Data2VecConfig) -> None:
    if config.modality != expected.modality:
        raise ValueError(f"config must be for {expected.modality}, as hf_model is, got one for {config.modality}")
    wrong = []
    for name in (*COMPUTED, "encoder.pos_conv_width"):
        group, _, option = name.partition(".")
        mine, theirs = getattr(config, group), getattr(expected, group)
        if option and hasattr(theirs, option) and getattr(mine, option) != getattr(theirs, option):
            wrong.append(f"{name} is {getattr(theirs, option)!r} there, {getattr(mine, option)!r} in config")
    if wrong:
        raise ValueError(f"config must fit hf_model: {'; '.join(wrong)}")


def teacher_rules(recipe: Data2VecConfig, base: nn.Module) -> list[Rule]:
    """Ours of the teacher, and theirs in what :func:`tracked_parts` gives."""
    rules = []
    for rule in rules_for(recipe):
        if recipe.modality == "speech" and not rule.ours.startswith("encoder."):
            continue
        names = tuple(
            name.replace("layernorm.", "norm.", 1) if name.startswith("layernorm.") else name for name in rule.theirs
        )
        if rule.ours == "frontend.mask_embedding" and not _has_mask_token(base):
            names = ("embeddings.cls_token",)  # of the same shape, and not read: the teacher sees everything
        rules.append(replace(rule, theirs=names))
    return rules


def student_rules(recipe: Data2VecConfig, base: nn.Module, prefix: str) -> list[Rule]:
    """Ours, and theirs in :class:`~d2v_fast.patches.pretraining.Data2VecPretraining`, ``base`` being at ``prefix``."""
    rules = []
    for rule in rules_for(recipe):
        if rule.ours == "frontend.mask_embedding" and not _has_mask_token(base):
            rules.append(Rule(rule.ours, ("mask_embedding",)))
        elif rule.ours.startswith("encoder.norm.") and recipe.modality == "image" and not _has_norm(base):
            rules.append(Rule(rule.ours, (rule.ours.replace("encoder.norm", "final_norm"),)))
        else:
            rules.append(replace(rule, theirs=tuple(prefix + name for name in rule.theirs)))
    heads = [f"head.{2 * i}.{kind}" for i in range(recipe.head_layers) for kind in ("weight", "bias")]
    return rules + [Rule(name, (name,)) for name in heads]


def _has_mask_token(base: nn.Module) -> bool:
    owner = getattr(base, "embeddings", base)
    return isinstance(getattr(owner, "mask_token", getattr(owner, "masked_spec_embed", None)), Tensor)


def _has_norm(base: nn.Module) -> bool:
    return isinstance(base.layernorm, nn.LayerNorm)


def own_parts(recipe: Data2VecConfig, base: nn.Module) -> dict[str, nn.Module | nn.Parameter]:
    """What pretraining needs and ``base`` does not have, in its dtype and on its device."""
    like = next(base.parameters())
    dim = recipe.encoder.dim
    parts: dict[str, Any] = {"head": build_head(recipe).to(like)}
    if recipe.modality == "image" and not _has_norm(base):  # pooling by the mean: the norm is the pooler's there
        parts["final_norm"] = nn.LayerNorm(dim, eps=recipe.encoder.norm_eps).to(like)
    if recipe.modality != "text" and not _has_mask_token(base):
        values = torch.rand(dim) if recipe.modality == "speech" else nn.init.trunc_normal_(torch.empty(dim), std=0.02)
        parts["mask_embedding"] = nn.Parameter(values.to(like))
    return parts


def tracked_parts(recipe: Data2VecConfig, base: nn.Module, final_norm: nn.Module | None) -> nn.ModuleDict:
    """What the teacher averages: the encoder, and for images and text the embeddings too (paper section 3.2)."""
    parts = {"encoder": base.encoder}
    if recipe.modality != "speech":
        parts["embeddings"] = base.embeddings
    if recipe.modality == "image":
        parts["norm"] = base.layernorm if final_norm is None else final_norm
    return nn.ModuleDict(parts)


def skipped_names(recipe: Data2VecConfig, rules: Sequence[Rule]) -> tuple[str, ...]:
    """Names of theirs that the teacher copies, by ``recipe.ema.skip``, which has ours.

    Raises:
        ValueError: an entry matches nothing.
    """
    names: list[str] = []
    for prefix in recipe.ema.skip:
        start = f"{prefix.removesuffix('.')}."
        found = [name for rule in rules if f"{rule.ours}.".startswith(start) for name in rule.theirs]
        if not found:
            raise ValueError(f"ema.skip: nothing that the teacher averages starts with {prefix!r}")
        names += found
    return (*names, TYPES) if POSITIONS in names else tuple(names)


class SharedNetwork(Shared):
    """:class:`Shared` for whole networks, which also have tokens [1, 1, C] that are [C] here, and a table's index."""

    def __init__(self, ours: nn.Module, theirs: nn.Module, rules: Sequence[Rule], types: Sequence[Slot] = ()) -> None:
        self._tokens: list[tuple[nn.Module, str, Slot]] = []
        self._biases: list[RelativePositionBias] = []
        self.theirs = theirs
        for rule in (rule for rule in rules if rule.lead):
            path, _, name = rule.ours.rpartition(".")
            owner = ours.get_submodule(path)
            del owner._parameters[name]
            self._tokens.append((owner, name, self._slot(rule.theirs[0])))
        super().__init__(ours, theirs, [rule for rule in rules if not rule.lead])
        for module in (module for module in ours.modules() if isinstance(module, JoinedLinear)):
            for kind, slots in module._slots.items():  # among a layer's parameters: LayerDrop gives them gradients of 0
                self._aliases += [(module._parameters, f"{kind}_{i}", slot) for i, slot in enumerate(slots)]
                module._parameters.update((f"{kind}_{i}", slot.tensor) for i, slot in enumerate(slots))
        for module in list(ours.modules()):
            if isinstance(module, RelativePositionBias):
                module.index = RelativePositionBias(1, round((module.index.shape[0] - 1) ** 0.5)).index
                self._biases.append(module)
        if types:
            ours.frontend.positions = _TypedPositions(ours.frontend.positions, types[0])
        self._refresh()

    def _refresh(self) -> None:
        super()._refresh()
        for owner, name, slot in self._tokens:
            owner.__dict__[name] = slot.tensor.flatten()  # of the graph of this step
        for bias in self._biases:
            if bias.index.device != bias.table.device:
                bias.index = bias.index.to(bias.table.device)


class _TypedPositions(nn.Module):
    """Embeddings of positions with that of token type 0 added, as every token has it there."""

    def __init__(self, positions: nn.Embedding, types: Slot) -> None:
        super().__init__()
        self.positions, self._types = positions, types

    def forward(self, ids: Tensor) -> Tensor:
        return self.positions(ids) + self._types.tensor[0]


class Averages:
    """What :class:`~d2v_fast.nn.Data2Vec` asks of its teacher, of one in transformers' modules."""

    def __init__(self, teacher: EMATeacher, recipe: Data2VecConfig, rules: Sequence[Rule]) -> None:
        self._teacher, self._recipe, self._rules = teacher, recipe, rules
        # ours around the averages, made here as torch.compile could not trace that, and around their latest copies
        self._around = [(teacher.module, self._share(teacher.module))]

    def network(self, device_type: str) -> nn.Module:
        """Ours around the averages, or their low-precision copies."""
        theirs = self._teacher.network(device_type)
        for known, shared in self._around:
            if known is theirs:
                return shared.module
        self._around = [self._around[0], (theirs, self._share(theirs))]
        return self._around[1][1].module

    def _share(self, theirs: nn.Module) -> Shared:
        with torch.device("meta"):
            parts = {"encoder": TransformerEncoder(self._recipe.encoder, getattr(self._recipe.frontend, "grid", 0))}
            if self._recipe.modality != "speech":
                parts["frontend"] = build_frontend(self._recipe)
            ours = nn.ModuleDict(parts)
        types = [Slot(theirs["embeddings"].token_type_embeddings, "weight")] if self._recipe.modality == "text" else []
        return SharedNetwork(ours, theirs, self._rules, types)

    def shares(self, name: str) -> bool:
        """Whether the part ``name`` is the student's own memory."""
        return self._teacher.shares({"frontend": "embeddings"}.get(name, name))


class Network(Data2Vec):
    """Data2Vec whose teacher is kept elsewhere."""

    def __init__(self, recipe: Data2VecConfig, teacher: Averages) -> None:
        nn.Module.__init__(self)
        self.config, self.teacher = recipe, teacher
        self.frontend = build_frontend(recipe)
        self.encoder = TransformerEncoder(recipe.encoder, getattr(recipe.frontend, "grid", 0))
        self.head = build_head(recipe)

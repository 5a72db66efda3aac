"""All blocks of a BEiT-style model by our encoder around its parameters; the student's last at masked patches only.

Dims: B images, P patches, M masked patches, C channels.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.checkpoints.beit import LAYER
from d2v_fast.checkpoints.rules import Rule, pairs
from d2v_fast.nn import Sequences, TransformerEncoder
from d2v_fast.nn.config import EncoderConfig
from d2v_fast.patches._core import Options, Seam, fall_back
from d2v_fast.patches._sharing import Bypassed, Shared, plan_of
from d2v_fast.patches.beit.attention import PARTS as ATTENTION_PARTS
from d2v_fast.patches.beit.attention import try_attention, try_mlp
from d2v_fast.patches.beit.probe import Results, compare, random_like, trying

KINDS = ("ModuleList", "ModuleDict", "Block", "Attention", "Mlp", "RelativePositionBias")
KINDS += ("Linear", "LayerNorm", "Dropout", "DropPath", "Identity", "GELU", "timm.layers.norm.LayerNorm")
BLOCK = {"norm1", "attn", "norm2", "mlp"}
DROP_PATHS = ({"drop_path"}, {"drop_path1", "drop_path2"})
PRETRAINING = ("self", "x", "bool_masked_pos", "return_all_tokens", "layer_results")


class Unfit(Exception):
    """Why ours cannot take the place of these blocks."""


class TheirBias(nn.Module):
    """Bias [H, 1 + P, 1 + P] from a table and an index of theirs, as both are at the moment."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple, so that it is no part of ours

    def forward(self) -> Tensor:
        index, table = self._owner[0].relative_position_index, self._owner[0].relative_position_bias_table
        size = index.shape[0]
        index = F.pad(index, (0, -size % 16))  # attention reads rows of a multiple of 16 entries where they are
        return F.embedding(index, table).permute(2, 0, 1).contiguous()[..., :size]


class Stack(TransformerEncoder):
    """Our encoder with biases of theirs: one for all blocks, or one a block."""

    def __init__(self, config: EncoderConfig, shared: nn.Module | None, own: Sequence[nn.Module]) -> None:
        super().__init__(config)
        self.relative_bias = None if shared is None else TheirBias(shared)
        self.biases = nn.ModuleList(map(TheirBias, own))

    def _layer(self, index: int, stream: Any, next_norm: Any, scope: Any, *options: Any) -> Any:
        if self.biases:
            own = self.biases[index]()
            scope = replace(scope, bias=own if scope.bias is None else own + scope.bias)
        return super()._layer(index, stream, next_norm, scope, *options)

    def results(self, x: Tensor, kind: str) -> list[Tensor]:
        """Of every block [B, 1 + P, C]: its output ("end"), or what its MLP adds ("fc")."""
        for layer in self.layers:
            layer.ffn_result = kind == "fc"
        return self(x, top_k=len(self.layers), results_only=True).layer_results

    def last(self, x: Tensor) -> Tensor:
        """The last block's output [B, 1 + P, C], without a norm."""
        for layer in self.layers:
            layer.ffn_result = False
        return self(x, top_k=1, results_only=True).layer_results[0]


Try = Callable[[nn.Module, Stack, torch.Generator, bool], Results]  # of a method, in all its ways or in one


class Plan:
    """Ours around the blocks of ``model``, or the reason why not; with ``tries``, these are compared."""

    def __init__(self, model: nn.Module, tries: Try | None = None) -> None:
        self._bypassed, self._settings = Bypassed(model.blocks, KINDS, "blocks"), list(_settings(model))
        self.shared, self._reason = None, self._bypassed.misfit()
        if self._reason is None:
            try:
                self.shared = Shared(*_build(model))
            except (Unfit, KeyError, ValueError, AttributeError) as error:  # no place in ours, or no such part there
                self._reason = str(error.args[0])
        if self._reason is None and tries is not None:
            self._reason = compare(model, partial(_try, tries=tries))

    @property
    def stack(self) -> Stack:
        """Ours, with the parameters as they are."""
        return self.shared.module

    def valid(self) -> bool:
        """Whether the blocks and what was read of them are the same."""
        return self._bypassed.valid() and all(getattr(owner, name) == value for owner, name, value in self._settings)

    def reason(self, model: nn.Module) -> str | None:
        """Why this call has to be the original's."""
        if self._reason is not None or torch.compiler.is_compiling():
            return self._reason
        if getattr(model, "grad_checkpointing", False) or getattr(model, "use_checkpoint", False):
            return "its blocks are computed again in backward"
        return self._bypassed.watched()


def _drop_paths(block: nn.Module) -> list[nn.Module]:
    return [child for name, child in block._modules.items() if name.startswith("drop_path")]


def _settings(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """What may be changed in place, and ours has copied."""
    for block in model.blocks:
        dropouts = (module for module in block.modules() if type(module) is nn.Dropout)
        norms = (module for module in block.modules() if isinstance(module, nn.LayerNorm))
        yield from ((module, "p", module.p) for module in dropouts)
        yield from ((module, "eps", module.eps) for module in norms)
        yield from ((path, "drop_prob", path.drop_prob) for path in _drop_paths(block) if hasattr(path, "drop_prob"))


def _same(what: str, values: Sequence[Any]) -> Any:
    if any(value != values[0] for value in values):
        raise Unfit(f"{what} is not the same everywhere: {', '.join(map(str, dict.fromkeys(values)))}")
    return values[0]


def _build(model: nn.Module) -> tuple[Stack, nn.Module, list[Rule]]:
    blocks = list(model.blocks)
    for block in blocks:
        _check_block(block)
    attentions, mlps = [block.attn for block in blocks], [block.mlp for block in blocks]
    outputs = [_rate(attn, "proj_drop") for attn in attentions]
    outputs += [_rate(mlp, "drop2" if "drop2" in mlp._modules else "drop") for mlp in mlps]
    scaled = _same("LayerScale", [block.gamma_1 is not None for block in blocks])
    own = [attn for attn in attentions if getattr(attn, "relative_position_bias_table", None) is not None]
    if own and len(own) < len(blocks):
        raise Unfit("some blocks have a relative-position bias and others have none")
    config = EncoderConfig(
        layers=len(blocks),
        dim=_same("width", [mlp.fc1.in_features for mlp in mlps]),
        ffn_dim=_same("width of the MLP", [mlp.fc1.out_features for mlp in mlps]),
        heads=_same("number of heads", [attn.num_heads for attn in attentions]),
        norm="pre",
        dropout=_same("dropout", outputs),
        attention_dropout=_same("dropout of attention", [attn.attn_drop.p for attn in attentions]),
        activation_dropout=_same("dropout in the MLP", [_rate(mlp, "drop1") for mlp in mlps]),
        layer_scale=float(scaled),
        key_bias=False,
        layer_result="block",
    )
    with torch.device("meta"):
        ours = Stack(config, getattr(model, "rel_pos_bias", None), own)
    final = isinstance(getattr(model, "norm", None), nn.LayerNorm)
    for layer, block in zip(ours.layers, blocks, strict=True):
        layer.norm1.eps, layer.norm2.eps = block.norm1.eps, block.norm2.eps
        layer.drop_path = _same("DropPath", [getattr(path, "drop_prob", 0.0) or 0.0 for path in _drop_paths(block)])
    ours.norm.eps = model.norm.eps if final else 1e-6
    ours.train(model.training)  # now, not where a first call is compiled
    return ours, model, _rules(config, "norm" if final else "blocks.0.norm1")


def _rate(module: nn.Module, name: str) -> float:
    return getattr(module._modules.get(name), "p", 0.0)


def _check_block(block: nn.Module) -> None:
    children = set(block._modules)
    if (
        children - BLOCK not in DROP_PATHS
        or not children >= BLOCK
        or not set(block._parameters)
        <= {
            "gamma_1",
            "gamma_2",
        }
    ):
        raise Unfit(f"its blocks have other parts than BEiT's: {', '.join(sorted(children ^ BLOCK))}")
    if set(block.attn._modules) != ATTENTION_PARTS or block.attn.q_bias is None:
        raise Unfit("its attention has no biases of queries and values, or other parts than BEiT's")
    if not all(getattr(path, "scale_by_keep", True) for path in _drop_paths(block)):
        raise Unfit("its DropPath does not scale what it keeps")
    if any(getattr(norm, "_fast_norm", False) for norm in (block.norm1, block.norm2)):
        raise Unfit("its norms are timm's fast ones, which autocast rounds")
    activation = getattr(block.mlp, "act", None)
    if activation is not None and (type(activation) is not nn.GELU or activation.approximate != "none"):
        raise Unfit("its activation is not the exact GELU")


def _rules(config: EncoderConfig, norm: str) -> list[Rule]:
    rules = pairs("", "", {"norm": (norm,)})  # nothing reads what comes out of a norm that is not theirs
    for index in range(config.layers):
        mine, theirs = f"layers.{index}.", f"blocks.{index}."
        names = ("qkv.weight", "q_bias", "v_bias")
        rules += [Rule(f"{mine}attention.{name}", (f"{theirs}attn.{name}",)) for name in names]
        if config.layer_scale > 0:
            rules += [Rule(f"{mine}scale{n}", (f"{theirs}gamma_{n}",)) for n in (1, 2)]
        rules += pairs(mine, theirs, LAYER)
    return rules


def _try(model: nn.Module, generator: torch.Generator, *, tries: Try) -> Results:
    """One call through all blocks of a copy, and, as these take their time, the other calls through two."""
    found = [tries(model, _stack(model), generator, False)]
    model.blocks = model.blocks[:: max(len(model.blocks) - 1, 1)]
    found.append(tries(model, _stack(model), generator, True))
    for block in model.blocks:
        if any(each.p > 0 for each in block.modules() if isinstance(each, nn.Dropout)):
            found.append(try_attention(block.attn, generator, original=type(block.attn).forward))
            found.append(try_mlp(block.mlp, generator, original=type(block.mlp).forward))
    return [ours for ours, _ in found], [theirs for _, theirs in found]


def _stack(model: nn.Module) -> Stack:
    return Shared(*_build(model)).module


def _prepare(model: nn.Module) -> None:
    plan_of(model, "blocks", Plan)  # it was tried before


def embed(self: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Images to what the first block reads [B, 1 + P, C]; patches with ``mask`` [B, P] bool become the mask token."""
    x = self.patch_embed(x)
    if mask is not None:
        x = torch.where(mask[..., None], self.mask_token, x)
    x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
    if getattr(self, "pos_embed", None) is not None:
        x = x + self.pos_embed
    return self.pos_drop(x) if getattr(self, "pos_drop", None) is not None else x


def masked_outputs(stack: Stack, x: Tensor, mask: Tensor) -> Tensor:
    """The encoder's normed output [M, C] at the patches of ``mask`` [B, P]; finding these waits for the device."""
    if torch.compiler.is_compiling():
        return stack(x).x[:, 1:][mask]
    P = mask.shape[1]
    rows = mask.flatten().nonzero()[:, 0]
    if rows.numel() == 0:
        return stack(x).x[:, 1:][mask]
    ends = F.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    return stack(x, select=Sequences(ends, P, rows.numel(), rows + rows // P + 1)).x


def has_forward(kind: type) -> bool:
    """Whether a class has the ``forward`` of data2vec's pretraining."""
    return tuple(inspect.signature(kind.forward).parameters) == PRETRAINING


def make_forward(original: Callable, options: Options) -> Callable:
    """``forward`` of data2vec's pretraining; images [B, 3, S, S] and a mask [B, P].

    Gives the head's outputs [M, C] at masked patches, with ``return_all_tokens`` [B, P, C]; or, as the teacher's
    ``layer_results`` "end" or "fc", a list of [B, P, C], one for each block.
    """

    make_plan = partial(Plan, tries=partial(_try_forward, original=original))

    def forward(self, x, bool_masked_pos=None, return_all_tokens=False, layer_results=None):
        if trying():
            return original(self, x, bool_masked_pos, return_all_tokens, layer_results)
        plan = plan_of(self, "blocks", make_plan)
        reason = plan.reason(self)
        if layer_results not in (None, "end", "fc"):
            reason = f"ours does not know layer_results={layer_results!r}"
        if layer_results is None and bool_masked_pos is None and not return_all_tokens:
            reason = "there is no mask to choose outputs by"
        if reason is not None:
            fall_back(self, "forward", reason, options)
            return original(self, x, bool_masked_pos, return_all_tokens, layer_results)
        return pretrain(self, plan.stack, x, bool_masked_pos, return_all_tokens, layer_results)

    return forward


def pretrain(
    self: nn.Module, stack: Stack, x: Tensor, mask: Tensor | None, return_all_tokens: bool, layer_results: str | None
) -> Tensor | list[Tensor]:
    """What :func:`make_forward` gives."""
    mask = None if mask is None else mask.flatten(1).bool()
    x = embed(self, x, mask)
    if layer_results is not None:
        return [result[:, 1:] for result in stack.results(x, layer_results)]
    if return_all_tokens:
        return self.lm_head(stack(x).x[:, 1:])
    return self.lm_head(masked_outputs(stack, x, mask))


def has_features(kind: type) -> bool:
    """Whether a class has timm's ``forward_features`` of images alone."""
    method = getattr(kind, "forward_features", None)
    return method is not None and tuple(inspect.signature(method).parameters) == ("self", "x")


def features(self: nn.Module, stack: Stack, x: Tensor) -> Tensor:
    """What :func:`make_features` gives."""
    x = embed(self, x)
    if isinstance(self.norm, nn.LayerNorm):
        return stack(x).x
    return self.norm(stack.last(x))


def make_features(original: Callable, options: Options) -> Callable:
    """``forward_features`` of timm: images to [B, 1 + P, C]."""

    make_plan = partial(Plan, tries=partial(_try_features, original=original))

    def forward_features(self, x):
        if trying():
            return original(self, x)
        plan = plan_of(self, "blocks", make_plan)
        reason = plan.reason(self)
        if reason is not None:
            fall_back(self, "forward_features", reason, options)
            return original(self, x)
        return features(self, plan.stack, x)

    return forward_features


def _images(self: nn.Module, count: int, generator: torch.Generator) -> Tensor:
    size = self.patch_embed.img_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    weight = self.patch_embed.proj.weight
    return random_like(weight, (count, weight.shape[1], height, width), generator)


def _try_forward(
    self: nn.Module, stack: Stack, generator: torch.Generator, every: bool, *, original: Callable
) -> Results:
    """Every kind of call: code that looks the same may return something else."""
    if not every:
        call = (_images(self, 1, generator), None, True, "end")
        return pretrain(self, stack, *call), original(self, *call)
    images = _images(self, 2, generator)
    patches = embed(self, images).shape[1] - 1
    mask = torch.rand(2, patches, generator=generator) < 0.5
    calls = ((images, mask, False, None), (images[:1], mask[:1], True, None), (images[:1], None, True, "fc"))
    return [pretrain(self, stack, *call) for call in calls], [original(self, *call) for call in calls]


def _try_features(
    self: nn.Module, stack: Stack, generator: torch.Generator, every: bool, *, original: Callable
) -> Results:
    images = _images(self, 2 if every else 1, generator)
    return features(self, stack, images), original(self, images)


def _refuses_forward(owner: Any) -> str | None:
    return Plan(owner, partial(_try_forward, original=type(owner).forward)).reason(owner)


def _refuses_features(owner: Any) -> str | None:
    return Plan(owner, partial(_try_features, original=type(owner).forward_features)).reason(owner)


DOES = "all blocks in fused operators: relative positions in attention; norms, LayerScale, DropPath, residuals, GELU"
FORWARD = Seam(
    "encoder",
    "forward",
    make_forward,
    f"{DOES}; the student's last block at masked patches only",
    refuses=_refuses_forward,
    prepare=_prepare,
)
FEATURES = Seam("encoder", "forward_features", make_features, DOES, refuses=_refuses_features, prepare=_prepare)

"""``ModalitySpecificEncoder.contextualized_features`` of fairseq's data2vec 2.0 without its ALiBi tensors.

Upstream repeats the bias [B, H, T, T] for every clone and gathers it twice by the tokens that are left, in float32.
Here slopes and the positions of those tokens go to attention as an :class:`~.multi_attention.Alibi`.

Dims: B samples, M clones of each, T tokens, V tokens that are left, H heads, C channels.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from d2v_fast.patches._core import Options, Seam, fall_back, state_of
from d2v_fast.patches._fingerprint import fingerprint
from d2v_fast.patches.fairseq.multi_attention import Alibi
from d2v_fast.patches.fairseq.multi_decoder import positions

_KNOWN_BIAS = "ec719055cd798dea", "e17f7477fb8c900b"  # get_alibi_bias, and get_alibi that it calls


def _is_known(made: Callable) -> bool:
    """Whether this function makes the bias that ours was written from."""
    slopes = getattr(made, "__globals__", {}).get("get_alibi")
    return slopes is not None and (_fingerprint(made), _fingerprint(slopes)) == _KNOWN_BIAS


_fingerprint = cache(fingerprint)
# torch.compile runs it while tracing: what torch.compiler.assume_constant_result does, which imports the compiler
_is_known._dynamo_marked_constant = True


def concerns(encoder: nn.Module) -> bool:
    """Whether there is something to gain in this encoder."""
    return encoder.get_alibi_bias is not None or encoder.relative_positional_encoder is not None


def _unfit(self: nn.Module) -> str | None:
    """Why upstream has to make the bias."""
    made = self.get_alibi_bias
    if made is None:
        return None
    if not isinstance(made, partial) or not _is_known(made.func):
        return "its bias is learned, or made by code that ours was not written from"
    if made.keywords.get("dims", 1) != 1:
        return "ALiBi over two dimensions"
    if self.extra_tokens is not None:
        return "ALiBi with extra tokens, whose distances are 0"
    return None


def _slopes(self: nn.Module, device: torch.device) -> Tensor:
    """Upstream's slopes [H] float32, read off a bias of two tokens."""
    cache, key = state_of(self).cache, ("slopes", device)
    if key not in cache:
        made = self.get_alibi_bias
        heads = made.keywords.get("heads", self.modality_cfg.num_alibi_heads)
        with torch.inference_mode(False):  # the first call may be one without gradients, later ones are not
            found = made.func.__globals__["get_alibi"](2, heads)[:, 0, 1]
            cache[key] = -found.to(device=device, dtype=torch.float32)
    return cache[key]


def _alibi(self: nn.Module, x: Tensor, info: Any) -> tuple[Alibi | None, Tensor | None]:
    """The bias of x [B, T, C], or of what the mask leaves [B M, V, C], and the scales that layers multiply it by."""
    if self.get_alibi_bias is None:
        return None, self.alibi_scale
    slopes, scale = _slopes(self, x.device), self.alibi_scale
    if scale is not None:
        scale = scale.clamp_min(0)
        if scale.size(0) == 1:  # [1, 1, H or 1, 1, 1]: the same for all layers
            slopes, scale = slopes * scale.view(-1).type_as(slopes), None
    if info is None:
        where = torch.arange(x.shape[1], dtype=torch.int32, device=x.device).expand(x.shape[:2])
    else:
        where = info.ids_keep[..., 0].int()
    return Alibi(slopes, where), scale


def _clone(x: Tensor, padding_mask: Tensor | None, seeds: Any, clones: int) -> tuple[Tensor, Tensor | None, Any]:
    """Each sample ``clones`` times, with seeds of their own."""
    x = x.repeat_interleave(clones, 0)
    if padding_mask is not None:
        padding_mask = padding_mask.repeat_interleave(clones, 0)
    if seeds is not None:
        steps = [0, *(int(hash((seeds.seed, i)) % 1e10) for i in range(clones - 1))]
        ids = seeds.ids.view(-1, 1) + torch.tensor(steps).to(seeds.ids)
        seeds = seeds._replace(ids=ids.view(-1))
    return x, padding_mask, seeds


def _left(padding_mask: Tensor | None, info: Any) -> Tensor | None:
    """Padding [B M, V] among the tokens that are left; None where there is none, at upstream's price of two waits."""
    if padding_mask is None or not padding_mask.any():
        return None
    padding_mask = padding_mask.gather(1, info.ids_keep[..., 0])
    return padding_mask if padding_mask.any() else None


def _with_extra(self: nn.Module, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Extra tokens, such as CLS, in front."""
    if self.extra_tokens is None:
        return x, padding_mask
    count = self.extra_tokens.size(1)
    x = torch.cat([self.extra_tokens.expand(len(x), -1, -1), x], 1)
    return x, None if padding_mask is None else nn.functional.pad(padding_mask, (count, 0))


def _make(original: Callable, options: Options) -> Callable:
    def contextualized_features(
        self, x, padding_mask, mask, remove_masked, clone_batch=1, mask_seeds=None, precomputed_mask=None
    ):
        """x [B, T, C] -> upstream's dictionary; its ``alibi_bias`` is an Alibi."""
        reason = _unfit(self)
        if reason is not None:
            fall_back(self, "contextualized_features", reason, options)
            return original(self, x, padding_mask, mask, remove_masked, clone_batch, mask_seeds, precomputed_mask)
        if padding_mask is not None:
            padding_mask = self.convert_padding_mask(x, padding_mask)
        local = x.clone() if mask and clone_batch == 1 else x
        if self.fixed_positional_encoder is not None:
            x = x + self.fixed_positional_encoder(x, padding_mask)
        info = None
        if mask:
            if clone_batch > 1:
                x, padding_mask, mask_seeds = _clone(x, padding_mask, mask_seeds, clone_batch)
            apply = self.relative_positional_encoder is not None or not remove_masked
            x, info = self.compute_mask(
                x, padding_mask, mask_seed=mask_seeds, apply=apply, precomputed_mask=precomputed_mask
            )
        relative = None
        if self.relative_positional_encoder is not None:
            relative = positions(self.relative_positional_encoder, x)
        if mask and remove_masked:
            x, padding_mask = info.x_unmasked, _left(padding_mask, info)
            relative = None if relative is None else relative.gather(1, info.ids_keep)
        x = x if relative is None else x + relative
        alibi, scale = _alibi(self, x, info if remove_masked else None)
        x, padding_mask = _with_extra(self, x, padding_mask)
        depth = self.modality_cfg.prenet_depth
        x = self.context_encoder(x, padding_mask, alibi, None if scale is None else scale[:depth])
        return {
            "x": x,
            "local_features": local,
            "padding_mask": padding_mask,
            "alibi_bias": alibi,
            "alibi_scale": scale[depth:] if scale is not None and scale.size(0) > 1 else scale,
            "encoder_mask": info,
        }

    return contextualized_features


CONTEXT = Seam(
    "attention",
    "contextualized_features",
    _make,
    "ALiBi from the positions of the tokens that are left, without tensors [B, H, T, T]; positional convolutions fused",
    known=frozenset({"ba52acc2858dc1f8"}),
    refuses=_unfit,
)

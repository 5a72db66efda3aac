"""data2vec 1.0 for speech in fairseq: the pretraining call of ``Data2VecAudioModel``.

Same result as upstream's forward up to rounding, from the same masks and the same layers that LayerDrop keeps. The last
layer of the student is computed at masked frames only, the teacher's ends with its FFN, and targets, loss and the
spreads of both are one op. Nothing waits for the device if masks are drawn by :mod:`d2v_fast.patches.fairseq.masks`,
but for the lengths of a batch with a padding mask, once.

Dims: B batch, S samples, T frames, M masked frames, C channels.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2v_fast.nn.sequences import Sequences
from d2v_fast.ops import data2vec_loss
from d2v_fast.patches._core import Options, Patch, Seam, Site, fall_back
from d2v_fast.patches._sharing import too_precise
from d2v_fast.patches.fairseq.collapse import check_spread
from d2v_fast.patches.fairseq.masks import APPLY_MASK, hand_on, on_host, original_globals, to_device
from d2v_fast.patches.fairseq.sources import not_upstreams
from d2v_fast.patches.fairseq.targets import target_norms
from d2v_fast.patches.fairseq.wav2vec2 import kept_layers, shared_encoder

KNOWN = {"compute_var": frozenset({"193905bac5d4e682"})}  # what the op of ours has the result of


def _unfit(model: Any, mask: bool, layer: int | None) -> str | None:
    """Why upstream's code has to make this call, or None."""
    if not mask or model.mask_prob <= 0:
        return "nothing is masked"
    if layer is not None:
        return "the output of a layer was asked for"
    if model.ema is None:
        return "there is no teacher"
    if model.cfg.ema_transformer_only and _num_results(model) < 1:
        return "average_top_k_layers is 0"
    (norm, post_norm), problem = target_norms(model.cfg)
    if post_norm == "instance" and norm not in ("instance", "batch"):
        return "instance_norm_targets without such a norm of the layers is a norm over the batch upstream"
    return problem or too_precise(model.mask_emb) or not_upstreams(model, KNOWN)


def _num_results(model: Any) -> int:
    """Layer results that targets are averaged from, of a teacher that is an encoder."""
    first = max(model.cfg.encoder_layers - model.average_top_k_layers, 0)
    return len(model.ema.model.layers) - first


def _features(model: Any, source: Tensor, names: dict[str, Any]) -> Tensor:
    """Waveforms [B, S] to normalised features [B, T, C] of the convolutions."""
    if model.feature_grad_mult > 0:
        features = model.feature_extractor(source)
        if model.feature_grad_mult != 1.0:
            features = names["GradMultiply"].apply(features, model.feature_grad_mult)
    else:
        with torch.no_grad():
            features = model.feature_extractor(source)
    return model.layer_norm(features.transpose(1, 2))


@torch.compiler.disable
def _frame_padding(model: Any, padding_mask: Tensor | None, features: Tensor) -> Tensor | None:
    """Bool [B, T] of a padding mask [B, S] over samples, True = padding; None where there is none."""
    if padding_mask is None:
        return None
    lengths = (~padding_mask.bool()).sum(-1).cpu()  # waits for the device
    if bool((lengths == padding_mask.shape[-1]).all()):
        return None
    T = features.shape[1]
    frames = model._get_feat_extract_output_lengths(lengths).numpy()
    last = (frames - 1) % T  # a row without frames counts from the end upstream, and is whole then
    padding = np.arange(T) > last[:, None]
    found = to_device(padding, features.device)
    hand_on(model, "padding", found, padding)
    return found


@torch.compiler.disable
def _masked_frames(model: Any, mask: Tensor | np.ndarray, device: torch.device) -> Sequences:
    """The masked frames of every row, on ``device``."""
    return Sequences.from_mask(on_host(model, "mask", mask).astype(bool)).map(lambda x: to_device(x.numpy(), device))


@torch.compiler.disable
def _ours(encoder: nn.Module, options: Options) -> tuple[nn.Module, list[int]] | None:
    """Our encoder around the parameters of this one, and the layers to run; None where upstream's has to run."""
    found = shared_encoder(encoder, options)
    return None if found is None else (found, kept_layers(encoder))


def _student(model: Any, x: Tensor, padding: Tensor | None, masked: Sequences, options: Options) -> Tensor:
    """The encoder's output [M, C] at the masked frames of x [B, T, C]."""
    found = _ours(model.encoder, options) if masked.num_rows else None
    if found is None:
        x, _ = model.encoder(x, padding_mask=padding, layer=None)
        return masked.take(x.flatten(0, 1))
    ours, kept = found
    return ours(x, padding_mask=padding, select=masked, kept=kept).x


def _encoded(
    model: Any, x: Tensor, padding: Tensor | None, select: Sequences | None, options: Options
) -> tuple[list[Tensor], str]:
    """Results of the teacher's last layers for x [B, T, C], the last at the selected rows only; and their layout."""
    teacher, count = model.ema.model, _num_results(model)
    found = _ours(teacher, options)
    if found is None:
        _, layers = teacher.extract_features(x, padding_mask=padding, min_layer=len(teacher.layers) - count)
        return [result for _, _, result in layers], "TBC"
    ours, kept = found
    results = ours(x, padding_mask=padding, top_k=count, results_only=True, select=select, kept=kept).layer_results
    if select is not None:  # nothing reads the other rows
        B, T, C = x.shape
        results[-1] = results[-1].new_empty(B * T, C).index_copy_(0, select.rows, results[-1]).view(B, T, C)
    return results, "BTC"


def _pretrain(
    model: Any,
    source: Tensor,  # [B, S]
    padding_mask: Tensor | None,  # [B, S]
    masks: dict[str, Any],
    names: dict[str, Any],
    options: Options,
) -> dict[str, Any]:
    """What upstream's forward returns for pretraining."""
    cfg, ((norm, post_norm), _) = model.cfg, target_norms(model.cfg)
    features = _features(model, source, names)
    padding = _frame_padding(model, padding_mask, features)
    if model.post_extract_proj is not None:
        features = model.post_extract_proj(features)
    clean = features.detach().clone()  # masks may be put in place
    x, mask = model.apply_mask(model.dropout_input(features), padding, **masks)
    masked = _masked_frames(model, mask, x.device)
    pred = model.final_proj(_student(model, x, padding, masked, options))
    with torch.no_grad():
        model.ema.model.eval()
        if cfg.ema_transformer_only:
            over_time = norm in ("instance", "batch") or not masked.num_rows
            results, layout = _encoded(model, clean, padding, None if over_time else masked, options)
        else:  # the whole model; upstream takes the results of all layers then
            found = model.ema.model.extract_features(source=source, padding_mask=padding_mask, mask=False)
            results, layout = [result for _, _, result in found["layer_results"]], "TBC"
    out = data2vec_loss(
        pred,
        results,
        masked.rows,
        norm=norm,
        post_norm=post_norm,
        layout=layout,
        beta=model.loss_beta,
        scale=pred.shape[-1] ** -0.5 if model.loss_scale is None else model.loss_scale,
        all_reduce_variance=True,
    )
    check_spread(model, out, names["logger"])
    return {
        "losses": {"regression": out.loss},
        "sample_size": masked.num_rows,
        "target_var": out.target_var,
        "pred_var": out.pred_var,
        "ema_decay": model.ema.get_decay() * 1000,
    }


def _make_forward(original: Callable, options: Options) -> Callable:
    names = original_globals(original)

    def forward(
        self,
        source,
        padding_mask=None,
        mask=True,
        features_only=False,
        layer=None,
        mask_indices=None,
        mask_channel_indices=None,
        padding_count=None,
    ):
        """Upstream's forward; ours where it pretrains. Features for other uses (``features_only``) are upstream's."""
        masks = {"mask_indices": mask_indices, "mask_channel_indices": mask_channel_indices}
        reason = None if features_only else _unfit(self, mask, layer)
        if reason is not None:
            fall_back(self, "forward", reason, options)
        if features_only or reason is not None:
            return original(
                self, source, padding_mask, mask, features_only, layer, **masks, padding_count=padding_count
            )
        return _pretrain(self, source, padding_mask, masks, names, options)

    return forward


FORWARD = Seam(
    "loss",
    "forward",
    _make_forward,
    "targets, loss and spreads in one op; last layers at the rows that are read; no waiting for the device",
    frozenset({"ee3f15a4dd64d1d8"}),
    also=frozenset({"targets"}),
)


def sites(model: nn.Module, patch: Patch, options: Options) -> list[Site]:
    """The pretraining call of a ``Data2VecAudioModel``, and its masks."""
    found = []
    for path, module in model.named_modules():
        if "Data2VecAudioModel" not in {kind.__name__ for kind in type(module).__mro__}:
            continue
        found += [Site(path, module, APPLY_MASK), Site(path, module, FORWARD)]
    return found


def seams(kind: type) -> list[Seam]:
    """The same, at the class."""
    return [APPLY_MASK, FORWARD]

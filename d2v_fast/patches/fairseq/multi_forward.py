"""The pretraining call of fairseq's ``Data2VecMultiModel``.

Same result as upstream's forward up to rounding, from the same masks and the same layers that LayerDrop keeps. Targets
are not repeated for the clones of a sample, nor made where nothing is masked if their norms allow it; decoders project
the masked rows only; targets, loss and the spreads of both are one op.

Dims: B samples, M clones of each, T tokens, N masked tokens of all clones, C channels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2v_fast.ops import LossOutput, data2vec_loss
from d2v_fast.patches._core import Options, Seam, fall_back, is_ours
from d2v_fast.patches.fairseq.collapse import check_spread
from d2v_fast.patches.fairseq.masks import original_globals
from d2v_fast.patches.fairseq.multi_attention import plain
from d2v_fast.patches.fairseq.multi_decoder import trunk, unfit
from d2v_fast.patches.fairseq.multi_masks import masked_rows
from d2v_fast.patches.fairseq.targets import target_norms

_PARTS = ("make_targets", "d2v_loss", "compute_var", "forward_decoder")  # of the forward that ours takes the place of


def _decoders(model: Any, mode: str) -> list[nn.Module]:
    return [d for d in (model.shared_decoder, model.modality_encoders[mode].decoder) if d is not None]


def _unfit(model: Any, mode: str, mask: bool) -> str | None:
    """Why upstream's code has to make this call, or None."""
    if not mask:
        return "nothing is masked"
    if model.ema is None:
        return "there is no teacher"
    if model.cfg.recon_loss > 0:
        return "recon_loss: pixels are reconstructed too"
    decoders = [type(decoder).__name__ for decoder in _decoders(model, mode)]
    if not decoders or "EncDecTransformerDecoder" in decoders:
        return "there is no decoder, or one that computes masked tokens alone"
    others = _others(type(model))
    return f"{others} is not upstream's" if others else target_norms(model.cfg)[1]


def _others(kind: type) -> str:
    """Which of the methods that ours takes the place of is somebody else's in this class; ours keep upstream's name."""
    return next((name for name in _PARTS if getattr(kind, name).__qualname__ != f"Data2VecMultiModel.{name}"), "")


# torch.compile runs it while tracing: what torch.compiler.assume_constant_result does, which imports the compiler
_others._dynamo_marked_constant = True


def _run(
    blocks: Sequence[nn.Module], found: dict[str, Any], x: Tensor, layerdrop: float, targets: list[Tensor] | None
) -> Tensor:
    """x [B, T, C] after those of the ``blocks`` that LayerDrop keeps, by upstream's draws; fills ``targets``."""
    bias, scales = found.get("alibi_bias"), found.get("alibi_scale")
    for i, block in enumerate(blocks):
        if layerdrop > 0 and np.random.random() <= layerdrop:
            continue
        own = bias
        if bias is not None and scales is not None:
            own = bias * scales[i if scales.size(0) > 1 else 0].type_as(bias)
        x, target = block(x, padding_mask=found["padding_mask"], alibi_bias=own)
        if targets is not None:
            targets.append(target)
    return x


def _place_teacher(model: Any, x: Tensor) -> torch.dtype:
    """Bring the teacher to the device of ``x``, and to its dtype where upstream does; the teacher's dtype."""
    ema = model.ema
    now = next(ema.model.parameters())
    dtype = x.dtype if model.cfg.ema_same_dtype else now.dtype
    if (now.device, now.dtype) != (x.device, dtype):
        ema.model = ema.model.to(dtype=dtype, device=x.device)
        _move(ema.fp32_params, x.device)
    return dtype


def _move(averages: dict[str, Any], device: torch.device) -> None:
    for name, value in averages.items():
        if isinstance(value, dict):
            _move(value, device)
        else:
            averages[name] = value.to(device=device)


def _teacher(
    model: Any, mode: str, source: Tensor, target: Tensor | None, padding_mask: Tensor | None, local: Tensor, x: Tensor
) -> list[Tensor]:
    """Targets of the teacher's blocks for whole samples, [B, T, C] each, without extra tokens."""
    dtype, teacher = _place_teacher(model, x), model.ema.model
    teacher.eval()
    student = model.modality_encoders[mode]
    whole = {"mask": False, "remove_masked": False}
    if not model.cfg.ema_encoder_only and student.modality_cfg.ema_local_encoder:
        view = source if target is None else target
        found = teacher.modality_encoders[mode](view.to(dtype=dtype), padding_mask, **whole)
    else:
        encoder = student if model.cfg.ema_encoder_only else teacher.modality_encoders[mode]
        found = encoder.contextualized_features(local.to(dtype=dtype), padding_mask, **whole)
    blocks = teacher if model.cfg.ema_encoder_only else teacher.blocks
    extra = student.modality_cfg.num_extra_tokens
    results: list[Tensor] = []
    _run(blocks, found, found["x"], 0.0, results)
    return [y[:, extra:] for y in results]


def _predictions(encoder: nn.Module, decoder: nn.Module, x: Tensor, info: Any, rows: Tensor) -> Tensor:
    """[N, C] at the masked ``rows`` of all clones, from the encoder's output x [B M, V, C]."""
    inputs = encoder.decoder_input(x, info)
    known = plain(decoder, "Decoder1d", "Decoder2d") and is_ours(decoder.forward) and unfit(decoder.blocks) is None
    if known and plain(decoder.proj, "Linear", "Sequential"):
        return decoder.proj(trunk(decoder, inputs[0]).flatten(0, 1).index_select(0, rows))
    return decoder(*inputs).flatten(0, 1).index_select(0, rows)


def _regress(
    model: Any, predictions: list[Tensor], layers: list[Tensor], norms: tuple[str, str], rows: Tensor
) -> list[LossOutput]:
    """The loss of each decoder's predictions [N, C] against the targets of layer results [B, T, C]."""
    clones = model.cfg.clone_batch
    samples = None
    if clones > 1:
        samples = torch.arange(len(layers[0]) * clones, device=rows.device) // clones
    C = layers[0].shape[-1]
    return [
        data2vec_loss(
            pred,
            layers,
            rows,
            norm=norms[0],
            post_norm=norms[1],
            beta=model.loss_beta,
            scale=C**-0.5 if model.loss_scale is None else model.loss_scale,
            target_batch_index=samples,
            all_reduce_variance=True,
        )
        for pred in predictions
    ]


def _report(model: Any, result: dict[str, Any], info: Any, mode: str, outs: list[LossOutput], logger: Any) -> None:
    """What upstream logs, in its order."""
    suffix = "" if len(model.modalities) == 1 else f"_{mode}"
    result["masked_pct"] = 1 - info.ids_keep.size(1) / info.ids_restore.size(1)
    for i, out in enumerate(outs):
        result[f"pred_var{suffix}_{i}" if len(outs) > 1 else f"pred_var{suffix}"] = out.pred_var
    result.update(model.ema.logs)
    result[f"target_var{suffix}"] = outs[0].target_var
    for out in outs:
        check_spread(model, out, logger)
    result["ema_decay"] = model.ema.get_decay() * 1000


def _check(info: Any, rows: int, tokens: int) -> None:
    """The masked rows are counted through all masks, so one of another shape would take other tokens."""
    if info.mask.shape != (rows, tokens):
        expected = f"[samples * clone_batch, tokens] = [{rows}, {tokens}]"
        raise ValueError(f"precomputed_mask must be {expected}, got {list(info.mask.shape)}")


def _pretrain(
    model: Any,
    mode: str,
    inputs: dict[str, Any],  # of the encoder of this kind of data
    target: Tensor | None,
    names: dict[str, Any],
) -> dict[str, Any]:
    """What upstream's forward returns for pretraining."""
    cfg, encoder = model.cfg, model.modality_encoders[mode]
    found = encoder(**inputs, mask=True, remove_masked=True, clone_batch=cfg.clone_batch)
    x, info = found["x"], found["encoder_mask"]
    _check(info, len(found["local_features"]) * cfg.clone_batch, found["local_features"].shape[1])
    if model.dropout_input is not None:
        x = model.dropout_input(x)
    x = _run(model.blocks, found, x, cfg.layerdrop if model.training else 0.0, None)
    if model.norm is not None:
        x = model.norm(x)
    rows = masked_rows(encoder, info)
    predictions = [_predictions(encoder, decoder, x, info, rows) for decoder in _decoders(model, mode)]
    with torch.no_grad():
        layers = _teacher(model, mode, inputs["features"], target, inputs["padding_mask"], found["local_features"], x)[
            -model.average_top_k_layers :
        ]
    norms, _ = target_norms(cfg)
    result = {"losses": {}, "sample_size": info.mask.sum().long()}
    if cfg.cls_loss > 0:
        layers, norms = [model.make_targets(layers, len(layers))], ("none", "none")
        aim = layers[0].mean(dim=1).repeat_interleave(cfg.clone_batch, 0)
        of_class = model.d2v_loss(x[:, encoder.modality_cfg.num_extra_tokens - 1], aim)
        result["losses"]["cls"] = of_class * (cfg.cls_loss * result["sample_size"])
    outs = _regress(model, predictions, layers, norms, rows)
    if cfg.d2v_loss > 0:
        for i, out in enumerate(outs):
            name = f"{mode}_regression_{i}" if len(outs) > 1 else f"{mode}_regression"
            result["losses"][name] = out.loss * cfg.d2v_loss
    _report(model, result, info, mode, outs, names["logger"])
    return result


def _make(original: Callable, options: Options) -> Callable:
    names = original_globals(original)

    def forward(
        self,
        source,
        target=None,
        id=None,
        mode=None,
        padding_mask=None,
        mask=True,
        features_only=False,
        force_remove_masked=False,
        remove_extra_tokens=True,
        precomputed_mask=None,
    ):
        """Upstream's forward; ours where it pretrains. Features for other uses (``features_only``) are upstream's."""
        which = self.cfg.supported_modality if mode is None else mode
        which = getattr(which, "name", which)
        left = features_only or "targets" not in options.parts  # which are a part of ours
        reason = None if left else _unfit(self, which, mask)
        if reason is not None:
            fall_back(self, "forward", reason, options)
        if left or reason is not None:
            more = (features_only, force_remove_masked, remove_extra_tokens, precomputed_mask)
            return original(self, source, target, id, mode, padding_mask, mask, *more)
        seeds = None if id is None else names["MaskSeed"](seed=self.cfg.seed, update=self.num_updates, ids=id)
        inputs = {"features": source, "padding_mask": padding_mask}
        inputs |= {"mask_seeds": seeds, "precomputed_mask": precomputed_mask}
        return _pretrain(self, which, inputs, target, names)

    return forward


FORWARD = Seam(
    "loss",
    "forward",
    _make,
    "targets, loss and spreads in one op, no targets repeated for clones; projections at masked rows only",
    known=frozenset({"a9f2796eebcb4976"}),
    also=frozenset({"targets"}),
)

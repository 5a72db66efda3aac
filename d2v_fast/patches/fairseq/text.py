"""data2vec 1.0 for text in fairseq: the pretraining call of ``Data2VecTextEncoder`` (seam S11).

Same result as upstream's up to rounding. Padding is not computed, which for the teacher is every token that is not
masked: upstream shows it those alone, and so does this. The last layers are computed at masked tokens only, and
targets and loss are one op. A device is waited for once, for the tokens: where they are padding or masked is not known
on the host otherwise. Upstream waits in every layer and for each selection of masked tokens.

Dims: B batch, T tokens, N packed tokens, M masked tokens, C channels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2v_fast.nn.sequences import Sequences
from d2v_fast.ops import data2vec_loss
from d2v_fast.patches._core import Options, Patch, Seam, Site, fall_back
from d2v_fast.patches._sharing import too_precise
from d2v_fast.patches.fairseq.masks import to_device
from d2v_fast.patches.fairseq.sources import not_upstreams
from d2v_fast.patches.fairseq.targets import target_norms
from d2v_fast.patches.fairseq.text_stack import TextStack, text_stack
from d2v_fast.patches.fairseq.wav2vec2 import seams as seams_of_layers

KNOWN = {"extract_features": frozenset({"7a3731a28e5bee9a"})}  # what the student's encoder is called through


@dataclass(frozen=True)
class _Side:
    """What one of the two encoders reads and computes; on the device."""

    tokens: Tensor  # [B, T]
    valid: Sequences | None  # the tokens that are not padding; None: none are
    padding_mask: Tensor | None  # [B, T]
    masked: Sequences  # the masked tokens among all B * T
    masked_in_valid: Sequences  # the same among the valid ones

    @property
    def packed(self) -> Tensor:
        """Tokens without padding [N], or [B, T] where there is none."""
        return self.tokens if self.valid is None else self.valid.take(self.tokens.flatten())


def _side(tokens: Tensor, valid: np.ndarray, masked: Sequences) -> _Side:
    """``valid`` [B, T] and ``masked`` are on the host."""

    def there(x: Tensor) -> Tensor:
        return to_device(x.numpy(), tokens.device)

    if valid.all():
        masked = masked.map(there)
        return _Side(tokens, None, None, masked, masked)
    packed = torch.from_numpy(np.cumsum(valid) - 1)  # where a token is among the valid ones
    inside = replace(masked, rows=packed[masked.rows])
    sequences = Sequences.from_mask(valid).map(there)
    return _Side(tokens, sequences, to_device(~valid, tokens.device), masked.map(there), inside.map(there))


@torch.compiler.disable
def _sides(model: Any, src_tokens: Tensor, target_tokens: Tensor) -> tuple[_Side, _Side] | str:
    """What student and teacher compute, or why upstream's code has to."""
    source, target = torch.stack((src_tokens, target_tokens)).cpu().numpy()  # waits for the device
    pad = model.sentence_encoder.padding_idx
    mask, shown = source == model.mask_idx, target != pad
    if not mask.any():
        return "no token is masked"
    if (mask & ~shown).any():
        return "a masked token has no target"
    if target_norms(model.cfg)[0][0] == "batch" and not shown.any(1).all():
        return "a row without targets has a part in batch_norm_target_layer"
    masked = Sequences.from_mask(mask)
    return _side(src_tokens, source != pad, masked), _side(target_tokens, shown, masked)


def _unfit(model: Any, target_tokens: Tensor | None) -> str | None:
    """Why upstream's code has to make this call, or None."""
    if target_tokens is None:
        return "there are no target_tokens"
    if model.ema is None or model.regression_head is None:
        return "there is no teacher, or no head"
    if model.loss_scale is None:
        return "loss_scale is not set"
    if model.average_top_k_layers < 1:
        return "average_top_k_layers is 0"
    return target_norms(model.cfg)[1] or too_precise(next(model.regression_head.parameters()))


def _stack(model: Any, role: str, theirs: nn.Module, options: Options) -> TextStack | None:
    """Ours around ``theirs``, or None where upstream's has to run."""
    if "encoder" not in options.parts:
        return None
    found = not_upstreams(model, KNOWN) if role == "student" else None
    if found is None:
        found = text_stack(model, role, theirs)
    if isinstance(found, str):
        fall_back(model, "forward", f"the {role}'s encoder: {found}", options, whole=False)
        return None
    return found


def _student(model: Any, side: _Side, options: Options) -> Tensor:
    """The encoder's output [M, C] at the masked tokens."""
    ours = _stack(model, "student", model.sentence_encoder, options)
    if ours is None:
        x, _ = model.extract_features(side.tokens)
        return side.masked.take(x.flatten(0, 1))
    x = ours.frontend(side.packed, sequences=side.valid)
    return ours.encoder(x, sequences=side.valid, select=side.masked_in_valid, kept=ours.kept).x


def _results(model: Any, side: _Side, over_time: bool, options: Options) -> tuple[list[Tensor], Tensor, str]:
    """The teacher's last layer results, where in them the masked tokens are [M], and their layout."""
    teacher, count = model.ema.model, model.average_top_k_layers
    ours = _stack(model, "teacher", teacher, options)
    if ours is None:
        found = teacher(side.tokens, return_all_hiddens=True)["fc_results"]
        return found[-count:], side.masked.rows, "TBC"
    wanted = {"top_k": min(count, len(ours.kept)), "results_only": True, "kept": ours.kept}
    if over_time:  # statistics that padding has a part in
        x = ours.frontend(side.tokens, padding_mask=side.padding_mask)
        return ours.encoder(x, padding_mask=side.padding_mask, **wanted).layer_results, side.masked.rows, "BTC"
    x, masked = ours.frontend(side.packed, sequences=side.valid), side.masked_in_valid
    rows = x.shape[:-1].numel()
    select = masked if masked.num_rows < rows else None
    results = ours.encoder(x, sequences=side.valid, select=select, **wanted).layer_results
    if select is not None:  # nothing reads the other rows
        results[-1] = results[-1].new_empty(rows, x.shape[-1]).index_copy_(0, masked.rows, results[-1])
    return [result.reshape(1, rows, -1) for result in results], masked.rows, "BTC"


def _pretrain(model: Any, student: _Side, teacher: _Side, options: Options) -> dict[str, Any]:
    """What upstream's forward returns for pretraining."""
    (norm, post_norm), _ = target_norms(model.cfg)
    pred = model.regression_head(_student(model, student, options))
    with torch.no_grad():
        model.ema.model.eval()
        over_time = norm in ("instance", "batch") or post_norm == "instance"
        results, rows, layout = _results(model, teacher, over_time, options)
    scale = pred.shape[-1] ** -0.5 if model.loss_scale <= 0 else model.loss_scale
    beta = model.cfg.loss_beta
    out = data2vec_loss(pred, results, rows, norm=norm, post_norm=post_norm, layout=layout, beta=beta, scale=scale)
    return {
        "losses": {"main": out.loss},
        "sample_size": out.num_masked,
        "logs": {"ema_decay": model.ema.get_decay() * 1000},
    }


def _make_forward(original: Callable, options: Options) -> Callable:
    def forward(
        self,
        src_tokens,
        target_tokens=None,
        features_only=False,
        return_all_hiddens=False,
        masked_tokens=None,
        **unused,
    ):
        """Upstream's forward; ours where it pretrains. Features for other uses (``features_only``) are upstream's."""
        if not features_only:
            reason = _unfit(self, target_tokens)
            sides = _sides(self, src_tokens, target_tokens) if reason is None else reason
            if not isinstance(sides, str):
                return _pretrain(self, *sides, options)
            fall_back(self, "forward", sides, options)
        return original(self, src_tokens, target_tokens, features_only, return_all_hiddens, masked_tokens, **unused)

    return forward


FORWARD = Seam(
    "loss",
    "forward",
    _make_forward,
    "no padding, last layers at masked tokens, targets and loss in one op; waits for the device once",
    frozenset({"d3d5583578098d2a"}),
    also=frozenset({"targets"}),
)


def sites(model: nn.Module, patch: Patch, options: Options) -> list[Site]:
    """The pretraining call of a ``Data2VecTextModel``, and the attention of its layers, for calls that ours leaves."""
    found = []
    for path, module in model.named_modules():
        if "Data2VecTextEncoder" not in {kind.__name__ for kind in type(module).__mro__}:
            continue
        found.append(Site(path, module, FORWARD))
        found += _layers(f"{path}.sentence_encoder".lstrip("."), module.sentence_encoder)
        if module.ema is not None:
            found += _layers(f"{path}.ema.model".lstrip("."), module.ema.model)
    return found


def _layers(path: str, encoder: nn.Module) -> list[Site]:
    return [Site(name, part, seam) for name, part in encoder.named_modules(prefix=path) for seam in _at(part)]


def _at(part: nn.Module) -> list[Seam]:
    return seams_of_layers(type(part)) if type(part).__name__ == "MultiheadAttention" else []


def seams(kind: type) -> list[Seam]:
    """The pretraining call, at the class; attention's own class has its own seam."""
    return [FORWARD]

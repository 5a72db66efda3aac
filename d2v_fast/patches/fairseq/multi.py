"""fairseq's data2vec 2.0 (``Data2VecMultiModel``): speech, images and text, with several masks a sample.

The student's and the teacher's encoders are in ``multi_attention``, what feeds them in ``multi_context``, masks in
``multi_masks``, the decoders in ``multi_decoder``, the teacher's step in ``ema``. Here: targets and loss.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from d2v_fast.ops import layer_targets, masked_smooth_l1
from d2v_fast.patches._core import Options, Patch, Seam, Site, fall_back
from d2v_fast.patches.fairseq import multi_attention, multi_context, multi_decoder, multi_forward, multi_masks
from d2v_fast.patches.fairseq.targets import target_norms


def _unfit_targets(owner: nn.Module) -> str | None:
    return target_norms(owner.cfg)[1]


def _make_targets(original: Callable, options: Options) -> Callable:
    def make_targets(self, y: Sequence[Tensor], num_layers: int) -> Tensor:
        """Layer results [B, T, C] each -> targets [B, T, C] float32, of the last ``num_layers``."""
        (norm, post_norm), reason = target_norms(self.cfg)
        if y[-1].dtype == torch.float64:
            reason = "results are float64"
        if reason is not None:
            fall_back(self, "make_targets", reason, options)
            return original(self, y, num_layers)
        return layer_targets(y[-num_layers:], norm=norm, post_norm=post_norm)

    return make_targets


TARGETS = Seam(
    "targets",
    "make_targets",
    _make_targets,
    "norms and mean of the layers' results in one or two passes",
    known=frozenset({"42da031cf22076e7"}),
    refuses=_unfit_targets,
    op="layer_targets",
)


def _make_loss(original: Callable, options: Options) -> Callable:
    def d2v_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Predictions and targets [..., C] -> the loss of each row [N], where upstream gives that of each element.

        Its users add it up.
        """
        reason = "targets want a gradient" if y.requires_grad else None
        if {x.dtype, y.dtype} & {torch.float64}:
            reason = "predictions or targets are float64"
        if reason is not None:
            fall_back(self, "d2v_loss", reason, options)
            return original(self, x, y)
        C = x.shape[-1]
        scale = 1 / math.sqrt(C) if self.loss_scale is None else self.loss_scale
        return masked_smooth_l1(x.view(-1, C), y.view(-1, C), beta=self.loss_beta, scale=scale, reduction="none")

    return d2v_loss


LOSS = Seam(
    "loss",
    "d2v_loss",
    _make_loss,
    "the loss of a row in one pass, no tensors of all elements",
    known=frozenset({"a4db811e15091824"}),
    op="masked_smooth_l1",
)


SEAMS: dict[str, tuple[Seam, ...]] = {
    "Data2VecMultiModel": (TARGETS, LOSS, multi_forward.FORWARD),
    "ImageEncoder": (multi_masks.MASK_IMAGES,),
    "ModalitySpecificEncoder": (multi_context.CONTEXT, multi_masks.MASK, multi_masks.MASKINFO),
    "AltAttention": (multi_attention.ATTENTION,),
    "AltBlock": (multi_attention.BLOCK,),
    "Decoder1d": (multi_decoder.DECODER_1D,),
    "Decoder2d": (multi_decoder.DECODER_2D,),
}


def seams(kind: type) -> list[Seam]:
    """Those of one class of ``examples/data2vec/models``."""
    return list(SEAMS[kind.__name__])


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of ``model`` and of its teacher, which is registered nowhere."""
    yield from model.named_modules()
    teacher = getattr(getattr(model, "ema", None), "model", None)
    if teacher is not None:
        yield from ((f"ema.model.{name}".rstrip("."), module) for name, module in teacher.named_modules())


def _nearest(kind: type) -> list[Seam]:
    """The seams of a class and those it inherits from; of the same method, the one of the class that has it."""
    found: dict[str, Seam] = {}
    for name in (base.__name__ for base in kind.__mro__):
        for seam in SEAMS.get(name, ()):
            found.setdefault(seam.attribute, seam)
    return list(found.values())


def _concerns(seam: Seam, model: nn.Module, path: str, module: nn.Module) -> bool:
    if seam is multi_context.CONTEXT:
        return multi_context.concerns(module)
    if seam.part == "masks":
        return not path.startswith("ema.model.")  # the teacher masks nothing
    return module is model or seam not in SEAMS["Data2VecMultiModel"]  # the teacher has neither targets nor a loss


def sites(model: nn.Module, patch: Patch, options: Options) -> list[Site]:
    """Every seam of a ``Data2VecMultiModel`` and its teacher; none of other models."""
    if "Data2VecMultiModel" not in {kind.__name__ for kind in type(model).__mro__}:
        return []
    return [
        Site(path, module, seam)
        for path, module in _modules(model)
        for seam in _nearest(type(module))
        if _concerns(seam, model, path, module)
    ]

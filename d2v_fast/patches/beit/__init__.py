"""BEiT-style images: vision transformers whose blocks are ``norm1, attn, norm2, mlp`` with LayerScale and DropPath.

Recognised by their structure: ``blocks.N.attn`` has ``qkv``, ``q_bias``, ``v_bias`` and ``proj``, as in BEiT, the forks
that trained data2vec for images, and timm's ``Beit``. Ours is tried on a random image when it is put there, on a copy
with random parameters on the CPU, and taken where it computes the same. DropPath, which is off then, is taken to be at
the end of both branches; code that cannot run on a CPU stays.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from d2v_fast.patches._core import Options, Patch, PatchError, Seam, Site

SUPPORTED = ("VisionTransformerForCyclicalTraining", "Beit", "ModelEmaV2", "vision transformers built like BEiT's")
TAKES_TEACHER = True


def _is_model(module: Any) -> bool:
    """Whether ``module`` has blocks as BEiT's."""
    blocks = getattr(module, "blocks", None)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or len(blocks) == 0:
        return False
    return all(_is_attention(getattr(block, "attn", None)) for block in blocks)


def _is_attention(module: Any) -> bool:
    return all(hasattr(module, name) for name in ("qkv", "q_bias", "v_bias", "proj", "num_heads"))


def _is_teacher(module: Any) -> bool:
    return any(kind.__name__ == "ModelEmaV2" for kind in type(module).__mro__) and hasattr(module, "_update")


def matches(model: Any) -> bool:
    """Whether ``model`` is of the kind that this module knows."""
    return _is_teacher(model) or _is_model(model)


def sites(model: Any, patch: Patch, options: Options) -> list[Site]:
    """Attention, MLPs and the whole encoder of a model and its teacher, and the teacher's step.

    Raises:
        PatchError: a teacher of another kind.
    """
    found, teacher = list(_sites("", model)), options.teacher
    if teacher is None:
        return found
    inside = getattr(teacher, "module", None)
    if not matches(teacher) and _is_model(inside):
        patch.skip(f"teacher {type(teacher).__name__}", "ema", "ours knows the step of timm's ModelEmaV2 alone")
        return [*found, *_sites("teacher.module", inside)]
    if not matches(teacher):
        raise PatchError(f"teacher must be one of {', '.join(SUPPORTED)}, got {type(teacher).__name__}")
    return [*found, *_sites("teacher", teacher)]


def _sites(path: str, model: Any) -> Iterator[Site]:
    if _is_teacher(model):
        from d2v_fast.patches.beit.ema import STEP

        yield Site(path, model, STEP)
        path, model = f"{path}.module".lstrip("."), model.module
    if not _is_model(model):
        return
    for seam in _model_seams(type(model)):
        yield Site(path, model, seam)
    from d2v_fast.patches.beit.attention import ATTENTION, MLP

    for index, block in enumerate(model.blocks):
        at = f"{path}.blocks.{index}".lstrip(".")
        yield Site(f"{at}.attn", block.attn, ATTENTION)
        yield Site(f"{at}.mlp", block.mlp, MLP)


def _model_seams(kind: type) -> list[Seam]:
    """The whole encoder, where the class has one of the methods that ours knows."""
    from d2v_fast.patches.beit.encoder import FEATURES, FORWARD, has_features, has_forward

    return [seam for seam, fits in ((FORWARD, has_forward), (FEATURES, has_features)) if fits(kind)]


def _attention_seams(kind: type) -> list[Seam]:
    from d2v_fast.patches.beit.attention import ATTENTION

    return [ATTENTION]


def _mlp_seams(kind: type) -> list[Seam]:
    from d2v_fast.patches.beit.attention import MLP

    return [MLP]


def _teacher_seams(kind: type) -> list[Seam]:
    from d2v_fast.patches.beit.ema import STEP

    return [STEP]


CLASSES: dict[str, Callable[[type], list[Seam]]] = {
    "timm.utils.model_ema.ModelEmaV2": _teacher_seams,
    "timm.models.beit.Beit": _model_seams,
    "timm.models.beit.Attention": _attention_seams,
    "modeling_cyclical.VisionTransformerForCyclicalTraining": _model_seams,
    "modeling_finetune.Attention": _attention_seams,
    "modeling_finetune.Mlp": _mlp_seams,
}

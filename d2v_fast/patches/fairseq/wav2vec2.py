"""The speech stack of fairseq, which wav2vec 2.0, HuBERT and data2vec 1.0 share: seams S2 to S7 of its classes."""

from torch import nn

from d2v_fast.patches._core import Options, Patch, Seam, Site
from d2v_fast.patches.fairseq.attention import ATTENTION
from d2v_fast.patches.fairseq.convolutions import EXTRACTOR, POSITIONS
from d2v_fast.patches.fairseq.norms import FP32_GROUP_NORM, FP32_LAYER_NORM, LAYER_NORM
from d2v_fast.patches.fairseq.speech_encoder import ENCODER, is_checkpointing, kept_layers, shared_encoder

__all__ = ["kept_layers", "seams", "shared_encoder", "sites"]

SEAMS = {
    "ConvFeatureExtractionModel": EXTRACTOR,
    "TransformerEncoder": ENCODER,
    "TransformerSentenceEncoderLayer": LAYER_NORM,
    "MultiheadAttention": ATTENTION,
    "Fp32LayerNorm": FP32_LAYER_NORM,
    "Fp32GroupNorm": FP32_GROUP_NORM,
}
ROOTS = ("ConvFeatureExtractionModel", "TransformerEncoder")


def seams(kind: type) -> list[Seam]:
    """The seams of one of these classes; there are none in other classes of the same names, such as PyTorch's."""
    name = next((k.__name__ for k in kind.__mro__ if k.__name__ in SEAMS and _is_fairseqs(k)), None)
    return [] if name is None else [SEAMS[name]]


def _is_fairseqs(kind: type) -> bool:
    """Not PyTorch's attention, and of the two Transformers the one for speech."""
    speech = kind.__name__ != "TransformerEncoder" or hasattr(kind, "extract_features")
    return speech and kind.__module__.partition(".")[0] != "torch"


def sites(model: nn.Module, patch: Patch, options: Options) -> list[Site]:
    """All of these in ``model``, and in the teacher it has already: ``ema`` keeps that out of the model's modules."""
    found = _within(model, "", patch)
    teacher = getattr(getattr(model, "ema", None), "model", None)
    return found + (_within(teacher, "ema.model", patch) if isinstance(teacher, nn.Module) else [])


def _within(model: nn.Module, prefix: str, patch: Patch) -> list[Site]:
    found = []
    for root_path, root in model.named_modules(prefix=prefix):
        if not any(k.__name__ in ROOTS and _is_fairseqs(k) for k in type(root).__mro__):
            continue
        for path, module in root.named_modules(prefix=root_path):
            here = [Site(path, module, seam) for seam in seams(type(module))]
            if is_checkpointing(module.__dict__.get("forward")):
                for site in here:
                    patch.skip(site.name, site.seam.part, "is checkpointed: by the encoder's own path", harmless=True)
                continue
            found += here
            if path == f"{root_path}.pos_conv".removeprefix("."):
                found.append(Site(path, module, POSITIONS))
    return found

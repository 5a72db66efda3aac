"""transformers: Data2VecAudio, Data2VecText and Data2VecVision, Wav2Vec2 and HuBERT, with and without a task's head.

One file a group of upstream classes; none is imported, nor transformers itself, before there is such a class.
"""

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from d2v_fast.patches._core import Options, Patch, Seam, Site

MODELING = "transformers.models."
AUDIO, TEXT, VISION = (
    f"data2vec.modeling_data2vec_{kind}.Data2Vec{kind.title()}" for kind in ("audio", "text", "vision")
)
SPEECH = ("wav2vec2.modeling_wav2vec2.Wav2Vec2", "hubert.modeling_hubert.Hubert")
SUPPORTED = ("Data2VecAudioModel", "Data2VecTextModel", "Data2VecVisionModel", "Wav2Vec2Model", "HubertModel")
# class, without what is in front of its own name -> (file, seam); in the order of the report
OF_SPEECH = {
    "FeatureEncoder": ("conv", "FEATURES_SEAM"),
    "PositionalConvEmbedding": ("conv", "POSITIONS_SEAM"),
    "Encoder": ("speech_encoder", "ENCODER_SEAM"),
    "EncoderStableLayerNorm": ("speech_encoder", "ENCODER_SEAM"),
    "Attention": ("attention", "SPEECH_SEAM"),
    "EncoderLayer": ("speech", "LAYER_SEAM"),
    "EncoderLayerStableLayerNorm": ("speech", "STABLE_LAYER_SEAM"),
    "FeedForward": ("speech", "FFN_SEAM"),
}
OF_TEXT = {
    "Model": ("text", "MASKS_SEAM"),
    "Encoder": ("text", "ENCODER_SEAM"),
    "SelfAttention": ("attention", "TEXT_SEAM"),
    "SelfOutput": ("text", "OUTPUT_SEAM"),
    "Intermediate": ("text", "INTERMEDIATE_SEAM"),
    "Output": ("text", "OUTPUT_SEAM"),
}
OF_VISION = {
    "Encoder": ("vision", "ENCODER_SEAM"),
    "SelfAttention": ("attention", "VISION_SEAM"),
    "SdpaSelfAttention": ("attention", "VISION_SEAM"),
    "Layer": ("vision", "LAYER_SEAM"),
    "Intermediate": ("vision", "INTERMEDIATE_SEAM"),
}
STABLE = {"EncoderStableLayerNorm", "EncoderLayerStableLayerNorm"}  # pre-norm, which Data2VecAudio does not have
FAMILIES = [(AUDIO, {name: place for name, place in OF_SPEECH.items() if name not in STABLE})]
FAMILIES += [*((prefix, OF_SPEECH) for prefix in SPEECH), (TEXT, OF_TEXT), (VISION, OF_VISION)]
PLACES = {MODELING + prefix + name: place for prefix, family in FAMILIES for name, place in family.items()}


def _seam(place: str) -> Seam:
    file, name = PLACES[place]
    return getattr(importlib.import_module(f"{__name__}.{file}"), name)


def _place(kind: type) -> str | None:
    """The key in PLACES of a class or of the one that it was derived from."""
    names = (f"{base.__module__}.{base.__name__}" for base in kind.__mro__)
    return next((name for name in names if name in PLACES), None)


def _class_seams(kind: type) -> list[Seam]:
    return [_seam(f"{kind.__module__}.{kind.__name__}")]


def _names(kind: type) -> list[Seam]:
    """No seams; but models may ask for attention by name as soon as there is a class of models."""
    _register()
    return []


# needed with D2V_FAST_DISABLE=1 as well: the name is in other people's code
NAMES: dict[str, Callable[[type], list[Seam]]] = {"transformers.modeling_utils.PreTrainedModel": _names}
CLASSES: dict[str, Callable[[type], list[Seam]]] = {**NAMES, **dict.fromkeys(PLACES, _class_seams)}


def _register() -> None:
    importlib.import_module(f"{__name__}.attention").register_attention()


def matches(model: Any) -> bool:
    """Whether ``model`` is, or contains, one of these of transformers: encoders come with any task's head."""
    return isinstance(model, nn.Module) and any(_place(type(module)) for module in model.modules())


def sites(model: nn.Module, patch: Patch, options: Options) -> list[Site]:
    """The seams of everything below ``model`` that has one; ``attn_implementation="d2v_fast"`` is known afterwards."""
    _register()
    found = [(path, module, _place(type(module))) for path, module in model.named_modules()]
    return [Site(path, module, _seam(place)) for path, module, place in found if place]


def register_attention() -> None:
    """As :func:`d2v_fast.patches.transformers.attention.register_attention`."""
    _register()

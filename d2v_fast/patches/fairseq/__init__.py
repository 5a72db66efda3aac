"""fairseq: data2vec 1.0 and 2.0, wav2vec 2.0, HuBERT.

One file a group of upstream classes. Each has ``sites(model, patch, options)``, the seams of what it finds in a model,
and ``seams(kind)``, those of one class, for :func:`d2v_fast.patch_all`; none is imported before it is needed.
"""

import importlib
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from torch import nn

from d2v_fast.patches._core import Options, Patch, Seam, Site

SUPPORTED = (
    "Data2VecAudioModel",
    "Data2VecTextModel",
    "Data2VecMultiModel",
    "Wav2Vec2Model",
    "HubertModel",
)
# file -> the classes it has seams for: the end of their module's name, and their own
FILES: dict[str, tuple[str, ...]] = {
    "wav2vec2": (
        "fairseq.models.wav2vec.wav2vec2.ConvFeatureExtractionModel",
        "fairseq.models.wav2vec.wav2vec2.TransformerEncoder",
        "fairseq.models.wav2vec.wav2vec2.TransformerSentenceEncoderLayer",
        "fairseq.modules.multihead_attention.MultiheadAttention",
        "fairseq.modules.layer_norm.Fp32LayerNorm",
        "fairseq.modules.fp32_group_norm.Fp32GroupNorm",
    ),
    "ema": ("fairseq.modules.ema_module.EMAModule",),
    "audio": ("data2vec_audio.Data2VecAudioModel",),
    "masks": ("fairseq.models.wav2vec.wav2vec2.Wav2Vec2Model", "fairseq.models.hubert.hubert.HubertModel"),
    "block_masks": (
        "fairseq.data.audio.raw_audio_dataset.FileAudioDataset",
        "fairseq.data.audio.raw_audio_dataset.BinarizedAudioDataset",
        "data.mae_image_dataset.MaeImageDataset",
    ),
    "text": ("data2vec_text.Data2VecTextEncoder",),
    "criterion": ("fairseq.criterions.model_criterion.ModelCriterion",),
    "multi": (
        "models.data2vec2.Data2VecMultiModel",
        "modalities.base.ModalitySpecificEncoder",
        "modalities.images.ImageEncoder",
        "modalities.modules.AltAttention",
        "modalities.modules.AltBlock",
        "modalities.modules.Decoder1d",
        "modalities.modules.Decoder2d",
    ),
}


def _file(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def _seams(file: str, kind: type) -> list[Seam]:
    return _file(file).seams(kind)


CLASSES: dict[str, Callable[[type], list[Seam]]] = {
    name: partial(_seams, file) for file, names in FILES.items() for name in names
}


def matches(model: Any) -> bool:
    """Whether ``model`` is one of these, by the names of its classes; Transformers has classes of the same names."""
    names = {kind.__name__ for kind in type(model).__mro__}
    return "BaseFairseqModel" in names and not names.isdisjoint(SUPPORTED)


def sites(model: nn.Module, patch: Patch, options: Options) -> list[Site]:
    """Every seam of every file that ``model`` has a place for."""
    return [site for name in FILES for site in _file(name).sites(model, patch, options)]

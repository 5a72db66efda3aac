"""From raw inputs to encoder inputs, one front-end per modality."""

from torch import nn

from d2v_fast.nn.config import Data2VecConfig
from d2v_fast.nn.frontends.image import PatchEmbed
from d2v_fast.nn.frontends.lattice import PackedWaveforms, pack_waveforms
from d2v_fast.nn.frontends.speech import SpeechFrontEnd
from d2v_fast.nn.frontends.text import TextEmbedding
from d2v_fast.nn.frontends.waveforms import normalise

__all__ = [
    "PackedWaveforms",
    "PatchEmbed",
    "SpeechFrontEnd",
    "TextEmbedding",
    "build_frontend",
    "normalise",
    "pack_waveforms",
]


def build_frontend(config: Data2VecConfig) -> nn.Module:
    """The front-end of ``config.modality``, giving ``config.encoder.dim`` channels."""
    classes = {"speech": SpeechFrontEnd, "image": PatchEmbed, "text": TextEmbedding}
    return classes[config.modality](config.frontend, config.encoder)

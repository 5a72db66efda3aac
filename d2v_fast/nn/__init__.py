"""The data2vec model and its parts."""

from d2v_fast.nn.batch import Batch, make_batch
from d2v_fast.nn.config import Data2VecConfig
from d2v_fast.nn.data2vec import Data2Vec, LossOutput
from d2v_fast.nn.encoder import TransformerEncoder
from d2v_fast.nn.frontends import (
    PackedWaveforms,
    PatchEmbed,
    SpeechFrontEnd,
    TextEmbedding,
    normalise,
    pack_waveforms,
)
from d2v_fast.nn.sequences import Sequences
from d2v_fast.nn.teacher import EMATeacher

__all__ = [
    "Batch",
    "Data2Vec",
    "Data2VecConfig",
    "EMATeacher",
    "LossOutput",
    "PackedWaveforms",
    "PatchEmbed",
    "Sequences",
    "SpeechFrontEnd",
    "TextEmbedding",
    "TransformerEncoder",
    "make_batch",
    "normalise",
    "pack_waveforms",
]

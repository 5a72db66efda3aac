"""The dataset of a configuration."""

from d2v_fast.nn.config import Data2VecConfig
from d2v_fast.train.data.audio import SpeechData, SpeechDataConfig
from d2v_fast.train.data.base import PretrainData
from d2v_fast.train.data.binarized import BinarizedTextData, binarized_folders
from d2v_fast.train.data.image import ImageData, ImageDataConfig
from d2v_fast.train.data.text import TextData
from d2v_fast.train.data.text_config import TextDataConfig

DataConfig = SpeechDataConfig | ImageDataConfig | TextDataConfig

_CLASSES = {SpeechDataConfig: SpeechData, ImageDataConfig: ImageData, TextDataConfig: TextData}


def build_data(config: DataConfig, model: Data2VecConfig, seed: int, *, static_shapes: bool = False) -> PretrainData:
    """The dataset that belongs to the type of ``config``; ``static_shapes`` as in :class:`PretrainData`.

    Raises:
        TypeError: ``config`` is none of the three data configs.
        ConfigError: ``config`` does not fit ``model``.
        DataError: nothing usable under ``config.path``.
    """
    if type(config) not in _CLASSES:
        expected = ", ".join(c.__name__ for c in _CLASSES)
        raise TypeError(f"config must be one of {expected}, got {type(config).__name__}")
    cls = _CLASSES[type(config)]
    if cls is TextData and binarized_folders(config):
        cls = BinarizedTextData
    data = cls(config, model, seed)
    data.static_shapes = static_shapes
    return data

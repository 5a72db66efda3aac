"""Data loaders: audio, images or text to batches that depend only on the seed and their place in the run."""

import importlib as _importlib

_PUBLIC = {
    "BinarizedTextData": "data.binarized",
    "DataConfig": "data.build",
    "DataError": "errors",
    "ImageData": "data.image",
    "ImageDataConfig": "data.image",
    "PretrainData": "data.base",
    "SpeechData": "data.audio",
    "SpeechDataConfig": "data.audio",
    "TextData": "data.text",
    "TextDataConfig": "data.text_config",
    "UnreadableFile": "data.base",
    "batches": "data.base",
    "build_data": "data.build",
    "normalize_waveform": "data.audio",
    "read_image": "data.image",
    "read_waveform": "data.audio",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    # On first use, so that the probe can be had where what decodes audio is not installed.
    if name in _PUBLIC:
        return getattr(_importlib.import_module(f"d2v_fast.train.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'd2v_fast.train.data' has no attribute {name!r}")

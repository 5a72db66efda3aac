"""Imports fairseq's data2vec 2.0 on machines where timm and torchvision do not import, and on a current Python."""

import dataclasses
import os
import sys
from types import ModuleType

import fairseq
import timm_parts


def import_data2vec2() -> ModuleType:
    """``examples.data2vec.models.data2vec2``; fairseq's own folder has to be on ``sys.path``."""
    original = dataclasses.dataclass
    data = ModuleType("examples.data2vec.data")  # its own imports are data sets of images, which need torchvision
    data.__path__ = [os.path.join(os.path.dirname(fairseq.__file__), "examples", "data2vec", "data")]
    sys.modules[data.__name__] = data
    with timm_parts.installed():
        # Python 3.11 refuses unhashable dataclass defaults
        dataclasses.dataclass = lambda cls=None, /, **options: original(cls, **{**options, "unsafe_hash": True})
        try:
            from examples.data2vec.models import data2vec2
        finally:
            dataclasses.dataclass = original
            del sys.modules[data.__name__]
    return data2vec2

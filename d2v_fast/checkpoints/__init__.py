"""Weights from and to fairseq, Hugging Face's Transformers and the BEiT fork, and a format of our own.

None of those libraries has to be installed, and nothing that a file contains is executed. A format that lacks some of
our tensors leaves them freshly initialised; a format without a place for some of ours drops them; both are in the
report, which is logged when a file is read with a ``load_`` function, and returned when one is written.
"""

import logging
from pathlib import Path
from typing import Any

import torch

from d2v_fast.checkpoints import beit, fairseq, native, transformers
from d2v_fast.checkpoints.beit import save_beit
from d2v_fast.checkpoints.convert import averaged, check_target, read_any, write_as
from d2v_fast.checkpoints.fairseq import save_fairseq
from d2v_fast.checkpoints.native import save_pretrained
from d2v_fast.checkpoints.rules import Loaded, Report, Rule
from d2v_fast.checkpoints.safe_load import read_torch
from d2v_fast.checkpoints.transformers import save_transformers
from d2v_fast.nn import Data2Vec

__all__ = [
    "Loaded",
    "Report",
    "Rule",
    "averaged",
    "check_target",
    "load_beit",
    "load_fairseq",
    "load_pretrained",
    "load_transformers",
    "read_any",
    "read_torch",
    "save_beit",
    "save_fairseq",
    "save_pretrained",
    "save_transformers",
    "write_as",
]

logger = logging.getLogger(__name__)


def _logged(loaded: Loaded) -> Data2Vec:
    logger.info("read %s", loaded.report.table())
    return loaded.model


def load_fairseq(path: str | Path, *, dtype: torch.dtype | None = torch.float32) -> Data2Vec:
    """The model of a fairseq ``data2vec_audio`` or ``data2vec_text`` checkpoint, on the CPU and in eval mode.

    Student, head, and the averages under ``_ema``; a file without averages (or head) gets a teacher equal to the
    student (a random head). Configurations of hydra (``cfg``) and of argparse (``args``) are followed as far as they
    matter. ``<mask>`` must be the last token, as fairseq's task adds it.

    Args:
        path: the ``.pt`` file.
        dtype: of the student; None keeps the file's. The teacher is float32 in any case.

    Raises:
        CheckpointError: missing, damaged or not such a file; code instead of data; options that we cannot follow, or
            tensors that are missing, unknown or of another shape, all of them listed.
    """
    return _logged(fairseq.read(path, dtype))


def load_transformers(path_or_model: str | Path | Any, *, dtype: torch.dtype | None = torch.float32) -> Data2Vec:
    """The network of a Data2VecAudio, Data2VecText or Data2VecVision, on the CPU and in eval mode.

    They hold no teacher, which becomes a copy of the student, and no head, which is random; so is the mask embedding
    where they have none. Targets, loss, masks and averages are those of our recipes. Image models with their default
    ``use_mean_pooling`` have no final norm: their output is ``hidden_states()[-1]`` here, and ``encode()`` is not.

    Args:
        path_or_model: a directory with ``config.json`` and safetensors or ``pytorch_model.bin``, whole or in pieces;
            or a model object. The package ``transformers`` is not needed for directories.
        dtype: of the student; None keeps the file's.

    Raises:
        TypeError: neither a path nor such a model.
        CheckpointError: as :func:`load_fairseq`; or layers with different relative-position tables.
    """
    return _logged(transformers.read(path_or_model, dtype))


def load_beit(path: str | Path, *, dtype: torch.dtype | None = torch.float32) -> Data2Vec:
    """The image model of a ``.pth`` checkpoint of the BEiT fork, on the CPU and in eval mode.

    Student and head from ``model``, teacher from ``model_ema``; options from ``args`` where it is there, otherwise the
    published recipe's. Indices of relative positions are computed, not read.

    Args:
        path: the ``.pth`` file.
        dtype: of the student; None keeps the file's. The teacher is float32 in any case.

    Raises:
        CheckpointError: as :func:`load_fairseq`.
    """
    return _logged(beit.read(path, dtype))


def load_pretrained(folder: str | Path, *, dtype: torch.dtype | None = torch.float32) -> Data2Vec:
    """The model that :func:`save_pretrained` wrote, on the CPU and in eval mode; ``dtype`` as in the others.

    Raises:
        CheckpointError: as :func:`load_fairseq`.
    """
    return _logged(native.read(folder, dtype))

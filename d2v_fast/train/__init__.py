"""Pretraining: configuration, data, loop, checkpoints, probe. All but ``optim`` and ``step`` need the train extra."""

import importlib as _importlib

_PUBLIC = {
    "PretrainResult": "loop",
    "TrainConfig": "config",
    "load_config": "config",
    "load_model": "checkpoint",
    "pretrain": "loop",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    # On first use, so that the training step can be benchmarked where the train extra is not installed.
    if name in _PUBLIC:
        return getattr(_importlib.import_module(f"d2v_fast.train.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'd2v_fast.train' has no attribute {name!r}")

"""Pretraining: configuration, data, loop, checkpoints, probe. Needs the ``train`` extra."""

from d2v_fast.train.checkpoint import load_model
from d2v_fast.train.config import TrainConfig, load_config
from d2v_fast.train.loop import PretrainResult, pretrain

__all__ = ["PretrainResult", "TrainConfig", "load_config", "load_model", "pretrain"]

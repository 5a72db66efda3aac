"""Checkpoints of runs: a folder each, written by any number of ranks, read by any other.

A checkpoint is a folder ``checkpoint-00000100`` of safetensors files and ``manifest.json``. It is written beside under
a hidden name and renamed when every file of every rank is on the disk, so that what has this name is whole.
``folder`` names, lists and checks them, ``schema`` what they say of themselves; ``state`` gives a run's tensors names;
``shards`` lets torch.distributed.checkpoint write and read them; ``writer`` saves while the run goes on; ``reader``
finds, restores and opens; ``single_file`` reads the ``checkpoint-*.pt`` of earlier versions; ``together`` lets an error
reach all ranks.
"""

from d2v_fast.train.checkpoint.folder import Progress, checkpoint_path, checkpoints
from d2v_fast.train.checkpoint.reader import load_model, newest_valid, read, restore
from d2v_fast.train.checkpoint.writer import Writer, describe_data

__all__ = [
    "Progress",
    "Writer",
    "checkpoint_path",
    "checkpoints",
    "describe_data",
    "load_model",
    "newest_valid",
    "read",
    "restore",
]

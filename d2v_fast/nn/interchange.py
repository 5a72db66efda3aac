"""Models from and to files of ours and of others: where ``Data2Vec`` opens the door to ``d2v_fast.checkpoints``.

The only imports against the arrows of docs/architecture.md: made when a method is called.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from d2v_fast.nn.data2vec import Data2Vec


class Interchange:
    """The methods of :class:`~d2v_fast.nn.Data2Vec` that read and write files."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a directory that :meth:`from_pretrained` reads: ``model.safetensors`` and ``config.json``.

        Raises:
            CheckpointError: it could not be written.
        """
        from d2v_fast.checkpoints import save_pretrained

        save_pretrained(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Data2Vec":
        """The model that :meth:`save_pretrained` wrote, float32, on the CPU and in eval mode.

        Raises:
            CheckpointError: missing, damaged, or tensors that do not fit; all of them are listed.
        """
        from d2v_fast.checkpoints import load_pretrained

        return load_pretrained(folder)

    def save_transformers(self, folder: str | Path) -> None:
        """Write the student as a directory that transformers' ``Data2Vec*Model.from_pretrained`` reads.

        Raises:
            CheckpointError: a setting that the format has no place for, or it could not be written.
        """
        from d2v_fast.checkpoints import save_transformers

        save_transformers(self, folder)

    def save_fairseq(self, path: str | Path) -> None:
        """Write a fairseq ``data2vec_audio`` or ``data2vec_text`` checkpoint: student, head, and averages as ``_ema``.

        Raises:
            CheckpointError: as :meth:`save_transformers`.
        """
        from d2v_fast.checkpoints import save_fairseq

        save_fairseq(self, path)

    def save_beit(self, path: str | Path) -> None:
        """Write a checkpoint in the layout of the BEiT fork (images): ``model`` and ``model_ema``.

        Raises:
            CheckpointError: as :meth:`save_transformers`.
        """
        from d2v_fast.checkpoints import save_beit

        save_beit(self, path)

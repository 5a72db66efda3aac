"""What goes wrong on one rank ends the run on all, with the same words."""

from collections.abc import Sequence

from d2v_fast.train.errors import CheckpointError


def raise_first(errors: Sequence[CheckpointError | None]) -> None:
    """Raise the first of ``errors``, one of every rank, and say whose it is unless all have the same.

    Raises:
        CheckpointError: one of them is an error.
    """
    texts = [None if error is None else str(error) for error in errors]
    for rank, (text, error) in enumerate(zip(texts, errors, strict=True)):
        if error is not None:
            shared = error if len(set(texts)) == 1 else CheckpointError(f"rank {rank}: {text}")
            shared.everywhere = True
            raise shared


def reason(error: Exception) -> str:
    """The first line of what ``error`` says."""
    return (str(error).splitlines() or [type(error).__name__])[0]

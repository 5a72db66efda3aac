"""Errors that the user can mend; the command line prints these without a traceback."""


class UserError(ValueError):
    """Base of all errors whose message is meant for the user."""

    everywhere = False  # whether all ranks of a run raise it with these words, so that one of them prints it


class CheckpointError(UserError):
    """A file of weights that cannot be read, written or made sense of, or does not belong to this run."""

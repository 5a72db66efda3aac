"""What can go wrong in a way the user can mend; the command line prints these without a traceback."""

from d2v_fast.errors import CheckpointError, UserError

__all__ = ["CheckpointError", "ConfigError", "DataError", "TrainingStopped", "UserError"]


class ConfigError(UserError):
    """An unknown preset or key, or a value that does not fit."""


class DataError(UserError):
    """A data folder or file that is missing, empty or unreadable."""


class TrainingStopped(UserError):
    """A guard ended the run: the loss is not finite, or the representations collapsed."""

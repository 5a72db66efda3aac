"""What can go wrong in a way the user can mend; the command line prints these without a traceback."""

from d2v_fast.errors import CheckpointError, UserError

__all__ = ["CheckpointError", "ConfigError", "DataError", "RankLost", "TrainingStopped", "UserError"]


class ConfigError(UserError):
    """An unknown preset or key, or a value that does not fit."""


class DataError(UserError):
    """A data folder or file that is missing, empty or unreadable."""


class TrainingStopped(UserError):
    """All ranks end the run: a guard found that it went wrong, or one of them cannot go on."""

    everywhere = True


class RankLost(UserError):
    """Another rank has ended, or did not answer in time."""

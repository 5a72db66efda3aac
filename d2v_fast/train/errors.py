"""What can go wrong in a way the user can mend; the command line prints these without a traceback."""


class UserError(ValueError):
    """Base of all errors whose message is meant for the user."""


class ConfigError(UserError):
    """An unknown preset or key, or a value that does not fit."""


class DataError(UserError):
    """A data folder or file that is missing, empty or unreadable."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written, read, or does not belong to this run."""


class TrainingStopped(UserError):
    """A guard ended the run: the loss is not finite, or the representations collapsed."""

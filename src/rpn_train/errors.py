"""What a user can cause. The command line prints these as one line and exits with code 2.

Each message says what was expected, what was given and, where it is not obvious, what to do.
"""


class UserError(ValueError):
    """Base of the errors below; nothing else is turned into a one-line message."""


class ConfigError(UserError):
    """A key or a value of the configuration is not what it may be."""


class DataError(UserError):
    """An annotation file, a split or an image is missing or broken."""


class CheckpointError(UserError):
    """A run folder, a checkpoint or a weights file cannot be used."""


class LostProcessError(UserError):
    """Another process of several is gone or does not answer."""


class DivergedError(UserError):
    """The loss is not finite: training cannot go on."""

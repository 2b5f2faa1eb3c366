"""The exceptions that this project raises on purpose; those of HTTP requests are in service/errors.py.

UnperturbError
├── ConfigError (also ValueError)   an argument or setting out of its range, quoted in the message
├── DataError                       a data set or image file that cannot be used, named in the message
├── CheckpointError                 a checkpoint folder that is incomplete, altered or of another shape
└── WeightsUnavailableError         named weights that are not on this machine and cannot be fetched
"""


class UnperturbError(Exception):
    """Base of every error that this project raises on purpose."""


class ConfigError(UnperturbError, ValueError):
    """An argument or setting is out of its range; raised before any compute."""


class DataError(UnperturbError):
    """A data set or an image file cannot be used."""


class CheckpointError(UnperturbError):
    """A checkpoint is incomplete, altered, or does not fit what it claims to be."""


class WeightsUnavailableError(UnperturbError):
    """Named weights are not on this machine and could not be fetched."""

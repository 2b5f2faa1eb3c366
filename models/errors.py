"""The exceptions that this project raises on purpose.

UnperturbError
├── ConfigError (also ValueError)   an argument or setting out of its range, quoted in the message
├── DataError                       a data set or image file that cannot be used, named in the message
├── CheckpointError                 a checkpoint folder that is incomplete, altered or of another shape
├── WeightsUnavailableError         named weights that are not on this machine and cannot be fetched
└── RequestError                    an HTTP request that is refused, with its status
    ├── MalformedRequestError 400   ├── TooLargeError 413
    ├── UnsupportedTypeError  415   ├── UnprocessableError 422
    └── NotReadyError         503
"""

from http import HTTPStatus


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


class RequestError(UnperturbError):
    """An HTTP request is refused with `status`; the message is safe to show."""

    status = HTTPStatus.BAD_REQUEST


class MalformedRequestError(RequestError):
    """The request is not of the documented form."""


class TooLargeError(RequestError):
    """The body or the image is over a limit."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class UnsupportedTypeError(RequestError):
    """The bytes are not an image of an accepted type."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE


class UnprocessableError(RequestError):
    """The image is broken, or a parameter is out of its range."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY


class NotReadyError(RequestError):
    """The model is not loaded and warmed up yet, or the service is stopping."""

    status = HTTPStatus.SERVICE_UNAVAILABLE

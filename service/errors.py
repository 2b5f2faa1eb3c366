"""The HTTP refusals, each with its status.

UnperturbError
└── RequestError                    an HTTP request that is refused, with its status
    ├── MalformedRequestError 400   ├── UnauthorizedError     401
    ├── ForbiddenError        403   ├── NotFoundError         404
    ├── UploadTimeoutError    408   ├── TooLargeError         413
    ├── UnsupportedTypeError  415   ├── UnprocessableError    422
    ├── TooManyRequestsError  429   ├── NotReadyError         503
    └── DeadlineError         504
"""

from http import HTTPStatus

from unperturb.models.errors import UnperturbError


class RequestError(UnperturbError):
    """An HTTP request is refused with `status`; the message is safe to show.

    retry_after_s: whole seconds after which the same request may succeed, or None.
    """

    status = HTTPStatus.BAD_REQUEST
    retry_after_s: int | None = None


class MalformedRequestError(RequestError):
    """The request is not of the documented form."""


class UnauthorizedError(RequestError):
    """No API key, or one that is not known."""

    status = HTTPStatus.UNAUTHORIZED


class ForbiddenError(RequestError):
    """The API key does not allow this."""

    status = HTTPStatus.FORBIDDEN


class NotFoundError(RequestError):
    """No such model."""

    status = HTTPStatus.NOT_FOUND


class UploadTimeoutError(RequestError):
    """The body did not arrive in time."""

    status = HTTPStatus.REQUEST_TIMEOUT


class TooLargeError(RequestError):
    """The body or the image is over a limit."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class UnsupportedTypeError(RequestError):
    """The bytes are not an image of an accepted type."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE


class UnprocessableError(RequestError):
    """The image is broken, or a parameter is out of its range."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY


class TooManyRequestsError(RequestError):
    """One client has more images in progress than one client may."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    retry_after_s = 1


class NotReadyError(RequestError):
    """The model is not warmed up yet, the service is full, or it is stopping."""

    status = HTTPStatus.SERVICE_UNAVAILABLE

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(RequestError):
    """The request's deadline passed before its answer was there."""

    status = HTTPStatus.GATEWAY_TIMEOUT

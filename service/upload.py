"""The image bytes of a request, as multipart field `image` or as a raw body, within a limit on the whole body."""

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from models.errors import MalformedRequestError, TooLargeError, UnsupportedTypeError

_BINARY = {"type": "string", "format": "binary"}
BODY_SCHEMA: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {"schema": {"type": "object", "properties": {"image": _BINARY}, "required": ["image"]}},
        "image/*": {"schema": _BINARY},
    },
}


async def read_image(request: Request, *, max_bytes: int) -> bytes:
    """The bytes of the image.

    Raises TooLargeError past `max_bytes` of body (as announced, or as they come), UnsupportedTypeError for a body
    that is neither form, MalformedRequestError for a form that is broken or lacks the field.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise TooLargeError(f"the body has {int(length):,} bytes; at most {max_bytes:,} are accepted")
    try:
        if kind.startswith("image/"):
            return b"".join([chunk async for chunk in _limited(request, max_bytes)])
        if kind == "multipart/form-data":
            return await _image_field(request, max_bytes)
    except _PastLimit as error:
        raise TooLargeError(f"the body has more than {max_bytes:,} bytes; at most that many are accepted") from error
    raise UnsupportedTypeError(
        f"content type {kind or 'none'!r} is neither multipart/form-data with a field `image` nor image/*"
    )


class _PastLimit(MultiPartException):
    """The body is over the limit; of a kind on which the form's parser closes the files that it has opened."""

    def __init__(self) -> None:
        super().__init__("the body is over the limit")


async def _image_field(request: Request, max_bytes: int) -> bytes:
    try:
        form = await MultiPartParser(request.headers, _limited(request, max_bytes), max_files=1, max_fields=8).parse()
    except _PastLimit:
        raise
    except MultiPartException as error:
        raise MalformedRequestError(f"the multipart form cannot be read: {error.message}") from error
    except KeyError as error:
        raise MalformedRequestError("the multipart form names no boundary in its content type") from error
    try:
        image = form.get("image")
        if not isinstance(image, UploadFile):
            raise MalformedRequestError("the form has no file in a field `image`")
        return await image.read()
    finally:
        await form.close()


async def _limited(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body's chunks; _PastLimit once they are more than `max_bytes`."""
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > max_bytes:
            raise _PastLimit
        yield chunk

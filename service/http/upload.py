"""The images of a request: multipart files, a raw body, or base64 in JSON, within limits on size, number and time."""

import asyncio
import base64
import binascii
import math
import string
import sys
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from unperturb.service.errors import MalformedRequestError, TooLargeError, UnsupportedTypeError, UploadTimeoutError
from unperturb.service.http import json_body
from unperturb.service.http.inflate import inflated, is_compressed

FILES = ("image", "images")  # the fields of a form that hold files
MOST_FIELDS = 16
URL_SAFE = bytes.maketrans(b"-_", b"+/")
_BINARY = {"type": "string", "format": "binary"}


class JsonBody(BaseModel):
    """Images as base64; `parameters` are those of the query, each in one of the two places."""

    model_config = ConfigDict(extra="forbid")

    inputs: str | list[str] = Field(
        description="base64 of one file, or of each of several; also URL-safe, in lines, unpadded, or a data URL"
    )
    parameters: dict[str, Any] = Field(default_factory=dict)


class Upload(NamedTuple):
    """The files' bytes; whether they came as a list, and are so answered; the body's parameters, and where they are."""

    files: list[bytes]
    many: bool
    parameters: dict[str, Any]
    within: tuple[str, ...] = ("body",)


def body_schema(parameters: type[BaseModel], *, many: bool) -> dict[str, Any]:
    """Return the OpenAPI of the body, whose form may have the parameters too; `many` where a list is accepted."""
    properties: dict[str, Any] = {"image": _BINARY, **json_body.inlined(parameters)["properties"]}
    content: dict[str, Any] = {
        "multipart/form-data": {"schema": {"type": "object", "properties": properties, "required": ["image"]}},
        **{f"image/{kind}": {"schema": _BINARY} for kind in ("jpeg", "png", "webp")},
    }
    if many:
        properties["images"] = {"type": "array", "items": _BINARY, "description": "instead of `image`: several files"}
        del content["multipart/form-data"]["schema"]["required"]
        content["application/json"] = {"schema": (schema := json_body.inlined(JsonBody))}
        schema["properties"]["parameters"] = json_body.inlined(parameters)
    return {"required": True, "content": content}


def media_type(request: Request) -> str:
    """Return the media type of the body, without its parameters."""
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


def is_json(request: Request) -> bool:
    """Return whether the body is JSON."""
    return media_type(request) == "application/json"


async def read_images(request: Request, *, max_bytes: int, max_images: int, timeout_s: float) -> Upload:
    """Return the images of a request's body.

    Raises TooLargeError past `max_bytes` of body (as announced, or as they come) or `max_images`, UploadTimeoutError
    past `timeout_s`, UnsupportedTypeError for a body of no known form, MalformedRequestError for a broken one.
    """
    kind = media_type(request)
    if kind.startswith("image/"):
        body = await read_within(request, max_bytes=max_bytes, timeout_s=timeout_s)
        return Upload([body], many=False, parameters={})
    if kind == "application/json":
        body = await read_within(request, max_bytes=max_bytes, timeout_s=timeout_s)
        return await asyncio.to_thread(_from_json, body, max_images)
    if kind == "multipart/form-data":
        async with _in_time(timeout_s):
            return await _from_form(request, max_bytes, max_images)
    raise UnsupportedTypeError(
        f"content type {kind or 'none'!r} is not multipart/form-data with a field `image`, image/* or application/json"
    )


async def read_within(request: Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """Return the whole body; raise TooLargeError past `max_bytes`, UploadTimeoutError past `timeout_s`."""
    try:
        async with _in_time(timeout_s):
            return b"".join([chunk async for chunk in _limited(request, max_bytes)])
    except _PastLimit as error:
        raise too_large(max_bytes) from error
    except _Broken as error:
        raise MalformedRequestError(error.message) from error


@asynccontextmanager
async def _in_time(timeout_s: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise UploadTimeoutError(f"the body did not arrive within {timeout_s:.3g} s") from error


def too_large(max_bytes: int) -> TooLargeError:
    """Return the refusal of a body over the limit."""
    return TooLargeError(f"the body has more than {max_bytes:,} bytes; at most that many are accepted")


def too_many(count: int | None, max_images: int) -> TooLargeError:
    """Return the refusal of a list over the limit; `count` is None where it was not counted to its end."""
    shown = f"{count} images" if count is not None else "more images"
    return TooLargeError(f"the request has {shown}; at most {max_images} are accepted")


def _from_json(body: bytes, max_images: int) -> Upload:
    value = json_body.parse(body)
    if isinstance(value.get("inputs"), list) and len(value["inputs"]) > max_images:
        raise too_many(len(value["inputs"]), max_images)
    parsed = json_body.validate(JsonBody, value)
    many = not isinstance(parsed.inputs, str)
    texts = parsed.inputs if isinstance(parsed.inputs, list) else [parsed.inputs]
    files = []
    for i, text in enumerate(texts):
        try:
            files.append(from_base64(text))
        except (binascii.Error, ValueError) as error:
            where = f"inputs[{i}]" if many else "inputs"
            raise MalformedRequestError(f"{where} is not base64 (addresses are not fetched)") from error
    return _some(Upload(files, many, parsed.parameters, ("body", "parameters")))


async def _from_form(request: Request, max_bytes: int, max_images: int) -> Upload:
    body = _limited(request, max_bytes)
    try:
        form = await _CountingParser(request.headers, body, max_images=max_images).parse()
    except _PastLimit as error:
        raise too_large(max_bytes) from error
    except _TooManyFiles as error:
        raise too_many(None, max_images) from error
    except MultiPartException as error:
        raise MalformedRequestError(f"the multipart form cannot be read: {error.message}") from error
    except KeyError as error:
        raise MalformedRequestError("the multipart form names no boundary in its content type") from error
    try:
        one, several = ([f for f in form.getlist(name) if isinstance(f, UploadFile)] for name in FILES)
        parameters = _fields([(name, value) for name, value in form.multi_items() if name not in FILES])
        if len(one) == 1 and not several:
            return Upload([await one[0].read()], many=False, parameters=parameters)
        if one:
            raise MalformedRequestError("the form has more than a single field `image`; a list is fields `images`")
        if not several:
            raise MalformedRequestError("the form has no file in a field `image` or `images`")
        return Upload([await file.read() for file in several], many=True, parameters=parameters)
    finally:
        await form.close()


def _fields(items: list[tuple[str, UploadFile | str]]) -> dict[str, str]:
    """Return the form's other fields, which are parameters as in a query; each once, and none of them a file."""
    fields: dict[str, str] = {}
    for name, value in items:
        if isinstance(value, UploadFile):
            raise MalformedRequestError(f"the form has a file in the field {name!r}; images are in `image` or `images`")
        if name in fields:
            raise MalformedRequestError(f"the form has the field {name!r} twice")
        fields[name] = value
    return fields


def from_base64(text: str) -> bytes:
    """Return the bytes of base64 in the forms that clients send: plain, URL-safe, in lines, unpadded, or as a data URL.

    Raises ValueError for anything else.
    """
    if text[:5].lower() == "data:":
        head, _, text = text.partition(",")
        if not head.lower().endswith(";base64"):
            raise ValueError("a data URL that is not base64")
    plain = text.encode("ascii").translate(URL_SAFE, string.whitespace.encode()).rstrip(b"=")
    return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)


def _some(upload: Upload) -> Upload:
    if not upload.files:
        raise MalformedRequestError("`inputs` is empty: no image")
    return upload


class _PastLimit(MultiPartException):
    """The body is over the limit; of a kind on which the form's parser closes the parts that it has begun."""

    def __init__(self) -> None:
        super().__init__("the body is over the limit")


class _Broken(MultiPartException):
    """The body is not packed as it says; of that kind for the same reason."""


class _TooManyFiles(MultiPartException):
    """The form has more files than a request may; of that kind for the same reason."""

    def __init__(self) -> None:
        super().__init__("too many files")


class _CountingParser(MultiPartParser):
    """Starlette's parser with a count of files of our own, whose refusal has a type of its own; it opens no file."""

    spool_max_size = sys.maxsize  # bytes of a part in memory: a body is limited, and open files are for connections

    def __init__(self, headers: Headers, body: AsyncGenerator[bytes, None], *, max_images: int) -> None:
        super().__init__(headers, body, max_files=math.inf, max_fields=MOST_FIELDS)
        self.files, self.max_images = 0, max_images

    def on_headers_finished(self) -> None:
        """Take a part of a file's name as a file even where the client gives no file name."""
        part = self._current_part
        disposition, options = parse_options_header(part.content_disposition)
        if options.get(b"name", b"").decode("latin-1") in FILES and b"filename" not in options:
            part.content_disposition = (part.content_disposition or disposition) + b'; filename=""'
        super().on_headers_finished()

    def on_part_end(self) -> None:
        super().on_part_end()
        _, value = self.items[-1]
        self.files += isinstance(value, UploadFile)
        if self.files > self.max_images:
            raise _TooManyFiles


async def _limited(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """Yield the body's chunks, unpacked; raise _PastLimit once they are, or are announced to be, over `max_bytes`."""
    length, encoding = request.headers.get("content-length", ""), request.headers.get("content-encoding", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise _PastLimit
    chunks, received = _counted(request.stream(), max_bytes), 0
    try:
        async for chunk in inflated(chunks, encoding) if is_compressed(encoding) else chunks:
            received += len(chunk)
            if received > max_bytes:
                raise _PastLimit
            yield chunk
    except MalformedRequestError as error:
        raise _Broken(str(error)) from error


async def _counted(chunks: AsyncIterable[bytes], max_bytes: int) -> AsyncGenerator[bytes, None]:
    """Yield the chunks as they are; raise _PastLimit past `max_bytes` of them."""
    received = 0
    async for chunk in chunks:
        received += len(chunk)
        if received > max_bytes:
            raise _PastLimit
        yield chunk

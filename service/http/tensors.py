"""Tensors in the forms of the KServe v2 protocol: JSON lists, or raw little-endian bytes behind the JSON.

Open Inference Protocol, version 2, with the binary tensor data extension.
"""

import json
import math
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from unperturb.service.errors import MalformedRequestError, UnprocessableError
from unperturb.service.http import json_body
from unperturb.service.http.upload import from_base64

DTYPES: dict[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "UINT8": np.dtype("u1"), "INT64": np.dtype("<i8")}
INPUT = "image"
HEADER_LENGTH = "inference-header-content-length"


def _nullable(schema: dict[str, Any]) -> None:
    """Say in a member's schema that null is as good as absent."""
    inner = {name: schema.pop(name) for name in list(schema) if name not in ("title", "description", "default")}
    schema["anyOf"] = [inner, {"type": "null"}]


Parameters = Annotated[
    dict[str, Any],
    BeforeValidator(lambda value: {} if value is None else value),
    Field(json_schema_extra=_nullable),
]


class InputTensor(BaseModel):
    """One input; its values in `data`, or in so many bytes behind the JSON. Unknown members are ignored."""

    name: Literal["image"]
    shape: list[int] = Field(
        min_length=1, max_length=4, description="[batch, 3, size, size]; of BYTES [batch] or [batch, 1]"
    )
    datatype: Literal["FP32", "UINT8", "BYTES"] = Field(
        description="FP32 in [0, 1], or UINT8; or BYTES: image files, in JSON as base64"
    )
    parameters: Parameters = Field(default_factory=dict)
    data: list[Any] | None = Field(None, description="flat, or nested as `shape` says")


class OutputRequest(BaseModel):
    """One output that is asked for."""

    name: str = Field(max_length=json_body.MAX_NAME)
    parameters: Parameters = Field(default_factory=dict)


class InferRequest(BaseModel):
    """The JSON of POST /v2/models/<id>/infer; members that may be absent may be null, and unknown ones are ignored."""

    id: str | None = Field(None, max_length=json_body.MAX_NAME)
    parameters: Parameters = Field(default_factory=dict)
    inputs: list[InputTensor] = Field(min_length=1, max_length=1)
    outputs: Annotated[list[OutputRequest], BeforeValidator(lambda value: [] if value is None else value)] = Field(
        default_factory=list, max_length=16, json_schema_extra=_nullable
    )


def read_infer(
    body: bytes, header_length: str | None, *, max_numbers: int
) -> tuple[InferRequest, NDArray[Any] | list[bytes]]:
    """Return the request and its input: [batch, 3, size, size], uint8 or float32 in [0, 1]; or image files.

    max_numbers: that JSON may have as an input, up to a limit of its own (`json_body.MAX_STRUCTURAL`)

    Raises MalformedRequestError for what is not of the protocol's form, UnprocessableError for values out of range,
    TooLargeError for JSON of far too many numbers.
    """
    if header_length is None:
        head, rest = body, b""
    else:
        if not header_length.isdecimal() or len(header_length) > 12 or not 0 < int(header_length) <= len(body):
            raise MalformedRequestError(f"{HEADER_LENGTH}: {header_length[:20]!r} is not a length within the body")
        head, rest = body[: int(header_length)], body[int(header_length) :]
    try:
        request = InferRequest.model_validate(json_body.parse(head, unbounded="data", max_numbers=max_numbers))
    except ValidationError as error:
        fault = error.errors()[0]
        raise MalformedRequestError(f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}") from error
    names = [output.name for output in request.outputs]
    if len(set(names)) < len(names):
        raise MalformedRequestError("an output is asked for twice")
    tensor = request.inputs[0]
    values = _files(tensor, rest) if tensor.datatype == "BYTES" else _values(tensor, rest)
    request.inputs[0].data = None  # a list of numbers is many times as large as the array
    return request, values


def _files(tensor: InputTensor, rest: bytes) -> list[bytes]:
    """Return the elements of a BYTES tensor: base64 in JSON; behind it each after its length in 4 bytes."""
    if tensor.shape[1:] not in ([], [1]) or tensor.shape[0] < 1:
        raise MalformedRequestError(f"{INPUT}: shape {tensor.shape} of BYTES is neither [batch] nor [batch, 1]")
    size = tensor.parameters.get("binary_data_size")
    if (size is None) == (tensor.data is None):
        raise MalformedRequestError("an input has either `data` or the parameter `binary_data_size`")
    files: list[bytes] = []
    if tensor.data is not None:
        elements = [one[0] if isinstance(one, list) and len(one) == 1 else one for one in tensor.data]
        for number, one in enumerate(elements):
            try:
                files.append(from_base64(one if isinstance(one, str) else "?"))
            except ValueError as error:
                raise MalformedRequestError(f"{INPUT}: element {number} of `data` is not base64") from error
    else:
        at = 0
        while at < len(rest) and size == len(rest):
            length = int.from_bytes(rest[at : at + 4], "little")
            files.append(rest[at + 4 : at + 4 + length])
            at += 4 + length
        if at != len(rest) or size != len(rest):
            raise MalformedRequestError(
                f"{INPUT}: binary_data_size={size!r} does not fit {len(rest)} bytes of elements"
            )
    if len(files) != tensor.shape[0]:
        raise MalformedRequestError(f"{INPUT}: {len(files)} elements for shape {tensor.shape}")
    return files


def _values(tensor: InputTensor, rest: bytes) -> NDArray[Any]:
    dtype, count = DTYPES[tensor.datatype], math.prod(tensor.shape)
    if len(tensor.shape) != 4 or min(tensor.shape) < 1 or tensor.shape[1] != 3:
        raise MalformedRequestError(f"shape {tensor.shape} is not [batch, 3, size, size]")
    size = tensor.parameters.get("binary_data_size")
    if (size is None) == (tensor.data is None):
        raise MalformedRequestError("an input has either `data` or the parameter `binary_data_size`")
    if size is not None:
        if size != len(rest) or size != count * dtype.itemsize:
            raise MalformedRequestError(
                f"binary_data_size={size!r} does not fit shape {tensor.shape} of {tensor.datatype} "
                f"and the {len(rest)} bytes behind the JSON"
            )
        values = np.frombuffer(rest, dtype)
    else:
        try:
            values = np.asarray(tensor.data, dtype=np.float64)
        except (ValueError, TypeError, OverflowError) as error:
            raise MalformedRequestError(f"{INPUT}: `data` is not a list of numbers of one shape") from error
        elements: Iterable[Any] = tensor.data or ()
        for _ in values.shape[1:]:
            elements = chain.from_iterable(elements)
        if not set(map(type, elements)) <= {int, float}:  # NumPy takes "0.5", true and null for numbers
            raise MalformedRequestError(f"{INPUT}: `data` has elements that are not numbers")
        if values.size != count:
            raise MalformedRequestError(f"{INPUT}: `data` has {values.size} numbers for shape {tensor.shape}")
        if values.ndim > 1 and list(values.shape) != tensor.shape:
            raise MalformedRequestError(f"{INPUT}: `data` is nested as {list(values.shape)} under shape {tensor.shape}")
        if tensor.datatype == "UINT8" and not bool(np.all(np.floor(values) == values)):
            raise MalformedRequestError(f"{INPUT}: `data` of UINT8 has fractions; FP32 in [0, 1] may have them")
        values = values.reshape(-1)
    low, high = (0, 255) if tensor.datatype == "UINT8" else (0, 1)
    if not bool(np.all((values >= low) & (values <= high))):  # also false for NaN
        raise UnprocessableError(f"the image has values outside [{low}, {high}] (or that are not numbers)")
    return values.reshape(tensor.shape).astype(np.uint8 if tensor.datatype == "UINT8" else np.float32)


def write_infer(
    request: InferRequest, model: str, outputs: Mapping[str, NDArray[Any]], default: tuple[str, ...]
) -> tuple[bytes, int | None]:
    """Return the response's body, and the length of its JSON where tensors follow as bytes.

    `default` names the outputs of a request that names none; MalformedRequestError for an unknown one.
    """
    wanted = request.outputs or [OutputRequest(name=name) for name in default]
    everything_binary = bool(request.parameters.get("binary_data_output", False))
    described, raw = [], []
    for output in wanted:
        values = outputs[output.name]
        datatype = next(name for name, dtype in DTYPES.items() if dtype == values.dtype)
        entry: dict[str, Any] = {"name": output.name, "shape": list(values.shape), "datatype": datatype}
        binary = output.parameters.get("binary_data")
        if everything_binary if binary is None else binary:
            payload = values.tobytes()
            entry["parameters"] = {"binary_data_size": len(payload)}
            raw.append(payload)
        else:
            entry["data"] = values.reshape(-1).tolist()
        described.append(entry)
    answer: dict[str, Any] = {"model_name": model, "outputs": described}
    if request.id is not None:
        answer["id"] = request.id
    head = json.dumps(answer).encode()
    return b"".join((head, *raw)), len(head) if raw else None

"""JSON bodies that routes read by themselves: parsed, validated, and described in the OpenAPI document.

They are parsed only where they have few members, since every member may cost an error of its own.
"""

import json
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from unperturb.service.errors import MalformedRequestError

MAX_MEMBERS = 1000
M = TypeVar("M", bound=BaseModel)


def parse(body: bytes, *, unbounded: str = "") -> dict[str, Any]:
    """Return the object that the body holds; raise MalformedRequestError for anything else or past 1,000 members.

    What stands under a key `unbounded` is not counted.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedRequestError("the body is not JSON") from error
    if not isinstance(value, dict):
        raise MalformedRequestError("the body is not a JSON object")
    left: list[dict[str, Any] | list[Any]] = [value]
    members = 0
    while left:
        one = left.pop()
        inner = [v for k, v in one.items() if k != unbounded] if isinstance(one, dict) else one
        members += len(one)
        if members > MAX_MEMBERS:
            raise MalformedRequestError(f"the JSON has more than {MAX_MEMBERS:,} members")
        left += [v for v in inner if isinstance(v, dict | list)]
    return value


def validate(model: type[M], value: dict[str, Any], *, within: tuple[str, ...] = ("body",)) -> M:
    """Return the value as `model`; raise RequestValidationError, as FastAPI does, with faults located `within`."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise RequestValidationError([{**e, "loc": (*within, *e["loc"])} for e in error.errors()]) from error


def inlined(model: type[BaseModel]) -> dict[str, Any]:
    """Return a model's schema without references, which would be looked for at the root of the OpenAPI document."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolved(part: Any) -> Any:  # noqa: ANN401
        match part:
            case {"$ref": str(ref)}:
                return resolved(definitions[ref.rsplit("/", 1)[1]])
            case dict():
                return {key: resolved(value) for key, value in part.items()}
            case list():
                return [resolved(value) for value in part]
        return part

    without_references: dict[str, Any] = resolved(schema)
    return without_references

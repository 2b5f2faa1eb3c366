"""JSON bodies that routes read by themselves: parsed, validated, and described in the OpenAPI document.

They are validated only where they have few members, since every member may cost an error of its own; and parsed only
where they cannot have too many, since nothing else runs in this process while they are.
"""

import json
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from unperturb.service.errors import MalformedRequestError, TooLargeError

MAX_MEMBERS, MAX_NAME = 1000, 200  # of members, and of the characters of one's name
STRUCTURAL = (b",", b":", b"[")  # characters of RFC 8259, one before every value but the first, perhaps more in strings
FEW_STRUCTURAL = 10_000  # more than 1,000 members need, and parsed in milliseconds
MAX_STRUCTURAL = 600_000  # at most 0.3 s of one core
M = TypeVar("M", bound=BaseModel)


def parse(body: bytes, *, unbounded: str = "", max_numbers: int = 0) -> dict[str, Any]:
    """Return the object that the body holds; raise MalformedRequestError for anything else, past 1,000 members, or
    for a name of more than 200 characters.

    What stands under a key `unbounded` is not counted; it may have `max_numbers`, and lists around them. TooLargeError,
    before anything is parsed, where the text has far more values than that.
    """
    most = min(FEW_STRUCTURAL + 2 * max_numbers, MAX_STRUCTURAL)
    if sum(map(body.count, STRUCTURAL)) > most:
        raise TooLargeError(
            f"the JSON has more than {most:,} commas, colons and brackets; at most that many are accepted"
        )
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
        if isinstance(one, dict) and any(len(name) > MAX_NAME for name in one):
            raise MalformedRequestError(f"the JSON has a name of more than {MAX_NAME} characters")
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

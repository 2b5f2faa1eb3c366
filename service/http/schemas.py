"""JSON schemas of bodies that the routes read by themselves, for the OpenAPI description."""

from typing import Any

from pydantic import BaseModel


def inlined(model: type[BaseModel]) -> dict[str, Any]:
    """A model's schema without references, which would be looked for at the root of the OpenAPI document."""
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

    found: dict[str, Any] = resolved(schema)
    return found

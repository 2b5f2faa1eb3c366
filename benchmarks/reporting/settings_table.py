"""The table of the service's settings, from `Settings` itself."""

from typing import Any, Literal, get_args, get_origin

from pydantic_core import PydanticUndefined

from unperturb.service.settings import Settings


def settings_table() -> str:
    """Return a row for each setting: its environment variable, its default, and what it is."""
    rows = ["| setting | default | what it is |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = "none" if field.default in (PydanticUndefined, None) else f"`{_shown(field.default)}`"
        parts = [field.annotation] if get_origin(field.annotation) is Literal else get_args(field.annotation)
        choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
        words = [field.description or "", f"one of {', '.join(f'`{choice}`' for choice in choices)}" if choices else ""]
        rows.append(f"| `UNPERTURB_{name.upper()}` | {default} | {'; '.join(word for word in words if word)} |")
    return "\n".join(rows)


def _shown(value: Any) -> str:  # noqa: ANN401
    return str(value).lower() if isinstance(value, bool) else str(value)

"""Command-line flags from a frozen dataclass: `step_size: float` becomes `--step-size 2/255`, and a tuple of strings a
flag that may be given several times.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Config = TypeVar("Config")


def option(
    help: str,
    default: Any = dataclasses.MISSING,  # noqa: ANN401
    *,
    positional: bool = False,
    also: tuple[str, ...] = (),
) -> Any:  # noqa: ANN401
    """Return a dataclass field with its `--help` text; required where no default is given.

    positional: given by its place, without a flag
    also: other flags of the same option, as `--classifier`
    """
    return dataclasses.field(default=default, metadata={"help": help, "positional": positional, "also": also})


def parse(config_class: type[Config], arguments: Sequence[str], *, program: str) -> Config:
    """Return the configuration that `arguments` spell; exit with status 2 and the reason for an unknown or bad one."""
    parser = argparse.ArgumentParser(
        prog=program, description=config_class.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        help_text = (field.metadata["help"] + _default_text(field.default)).replace("%", "%%")
        reading = _reading(hints[field.name])
        if field.metadata["positional"]:
            parser.add_argument(field.name, metavar=field.name.upper(), help=help_text, **reading)
            continue
        required = field.default is dataclasses.MISSING
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            *field.metadata["also"],
            dest=field.name,
            required=required,
            default=None if required or get_origin(hints[field.name]) is tuple else field.default,
            help=help_text,
            **reading,
        )
    values = vars(parser.parse_args(arguments))
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        if get_origin(hints[field.name]) is tuple:  # argparse would append to the default
            values[field.name] = tuple(
                values[field.name] or (() if field.default is dataclasses.MISSING else field.default)
            )
    return config_class(**values)


def as_json(config: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return the resolved configuration as JSON-ready values."""
    values = dataclasses.asdict(config)
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def fraction(text: str) -> float:
    """Read `0.03`, or `8/255` as the field writes it."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a fraction like 8/255") from None


def _default_text(default: Any) -> str:  # noqa: ANN401
    """Return ` (default: 8/255)` as one would type it; nothing where there is no default, or an empty one."""
    if default is dataclasses.MISSING or default is None or default in ("", ()):
        return ""
    shown = str(default)
    if isinstance(default, tuple):
        shown = " ".join(map(str, default))
    elif isinstance(default, float):
        levels = round(255 * default)
        short = f"{default:g}"
        shown = short if float(short) == default or levels / 255 != default else f"{levels}/255"
    return f" (default: {shown})"


def _reading(hint: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return argparse's arguments for a type."""
    if isinstance(hint, UnionType):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is tuple:
        return {"action": "append"}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": fraction if hint is float else hint}

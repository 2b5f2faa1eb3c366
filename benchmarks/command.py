"""Share between the scripts of this folder the first options, and how one is run from the command line."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from unperturb.models import command
from unperturb.models.errors import ConfigError
from unperturb.models.options import option, parse


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """The options of every script that runs a checkpoint."""

    checkpoint: str = option("shipped name or folder", "default")
    device: str = option("cpu, cuda, cuda:N", "cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(CheckpointConfig):
    """The options of every measurement of a checkpoint."""

    seed: int = option("of everything that is drawn", 0)


Chosen = TypeVar("Chosen")


def run_command(
    config_class: type[Chosen],
    measure: Callable[[Chosen], int | None],
    *,
    script: str,
    arguments: Sequence[str] | None = None,
) -> int:
    """Read the command line's options, measure, and return the exit status of `models.command.run`."""
    given = sys.argv[1:] if arguments is None else arguments

    def run() -> int | None:
        config = parse(config_class, given, program=script)
        _refuse_folders(config)
        return measure(config)

    return command.run(script, run)


def _refuse_folders(config: object) -> None:
    """Raise ConfigError, before anything is measured, for a folder where an option wants a file to write."""
    for option_field in dataclasses.fields(config) if dataclasses.is_dataclass(config) else ():
        value, usual = getattr(config, option_field.name), option_field.default
        if isinstance(usual, Path) and usual.suffix and isinstance(value, Path) and value.is_dir():
            raise ConfigError(f"{option_field.name}={value} is a folder; name a file, such as {value / usual.name}")

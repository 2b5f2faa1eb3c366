"""Share between the scripts of this folder the first options, and how one is run from the command line."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from unperturb.models import command
from unperturb.models.options import option, parse


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """The options of every measurement of a checkpoint."""

    checkpoint: str = option("shipped name or folder", "default")
    seed: int = option("of everything that is drawn", 0)
    device: str = option("cpu, cuda, cuda:N", "cuda" if torch.cuda.is_available() else "cpu")


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
    return command.run(script, lambda: measure(parse(config_class, given, program=script)))

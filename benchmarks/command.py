"""Share between the scripts of this folder the first options, and how one is run from the command line."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from unperturb.models.errors import UnperturbError
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
    """Read the command line's options, measure, and return the exit status.

    2 with one line on standard error where an option or the data is refused, or the operating system refuses a file;
    130 where the run is interrupted.
    """
    try:
        config = parse(config_class, sys.argv[1:] if arguments is None else arguments, program=script)
        return measure(config) or 0
    except UnperturbError as error:
        print(f"{script}: {error}", file=sys.stderr)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"{script}: {where}{error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted", file=sys.stderr)
        return 130
    return 2

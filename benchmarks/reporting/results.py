"""A result file: what was measured, of what, by which commit, on which machine."""

import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from unperturb.models import provenance
from unperturb.models.accuracy import Z, wilson
from unperturb.models.files import write_whole

SCHEMA_VERSION = 2
PLACES = ("out", "cache", "against")  # where files lie on one machine: no part of a result
FOLDER = Path(__file__).resolve().parents[1] / "results"


def record(*, script: str, config: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """Return one result with its provenance."""
    config = {key: value for key, value in config.items() if key not in PLACES}
    if config.get("data"):
        config["data"] = Path(config["data"]).name  # the folder's name, not where it lies
    return {
        "schema_version": SCHEMA_VERSION,
        "script": script,
        "config": config,
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "machine": {
            "device": config["device"],
            "name": torch.cuda.get_device_name() if config["device"].startswith("cuda") else platform.machine(),
            "cpu_threads": torch.get_num_threads(),
        },
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "results": results,
    }


def write(path: Path, *, script: str, config: dict[str, Any], results: dict[str, Any]) -> None:
    """Write one result as JSON, with its provenance."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = record(script=script, config=config, results=results)
    write_whole(path, (json.dumps(whole, indent=1, allow_nan=False) + "\n").encode())


def accuracy(correct: list[bool]) -> dict[str, Any]:
    """Return a share with n and its 95% Wilson interval."""
    found = wilson(sum(correct), len(correct))
    return {"accuracy": found.value, "n": found.n, "interval": [found.low, found.high]}


def gain(after: Sequence[float], before: Sequence[float]) -> dict[str, Any]:
    """Return the mean difference of paired outcomes, with its 95% interval, in shares of 1.

    Of outcomes that are right or wrong the interval is Agresti and Min's (2005: half a pair is added to each of the
    four cells), which does not take a handful of pairs that all differ one way for certain; of others the normal one.
    """
    difference = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    mean, n = float(difference.mean()), len(difference)
    if all(value in (0, 1) for value in (*after, *before)):
        gained, lost = ((int((difference == sign).sum()) + 0.5) / (n + 2) for sign in (1, -1))
        middle, half = gained - lost, Z * ((gained + lost - (gained - lost) ** 2) / (n + 2)) ** 0.5
    else:
        middle, half = mean, Z * float(difference.std()) / n**0.5 if n > 1 else 1.0
    return {"mean": mean, "n": n, "interval": [max(-1.0, middle - half), min(1.0, middle + half)]}


def where(machine: dict[str, Any]) -> str:
    """Return a record's device by name."""
    if not machine["device"].startswith("cpu"):
        return str(machine["name"])
    threads = machine["cpu_threads"]
    return f"{threads} CPU thread{'s' * (threads != 1)}"

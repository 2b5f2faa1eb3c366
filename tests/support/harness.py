"""The harness's command line on a few images of three colours, and the records that it leaves."""

import json
from pathlib import Path
from typing import Any


def arguments(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    """Of a quick run on eight images in two chunks."""
    given = ["--model", str(model), "--dataset", "colours", "--data", str(data), "--cache", str(out.parent / "cache")]
    given += ["--n-examples", "8", "--chunk", "4", "--budget", "fast", "--device", "cpu", "--out", str(out)]
    return [*given, *more]


def records(folder: Path) -> dict[str, Any]:
    """By the file's name, without what differs from run to run."""
    return {file.name: without_times(json.loads(file.read_text())) for file in sorted(folder.glob("*.json"))}


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    record = {key: value for key, value in record.items() if key != "finished_at"}
    return {**record, "results": {key: value for key, value in record["results"].items() if key != "timings"}}

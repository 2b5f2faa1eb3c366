"""A Prometheus of one's own: it scrapes one address, evaluates rules, and answers queries."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

from unperturb.benchmarks.serving import open_loop
from unperturb.models.errors import UnperturbError

JOB = "unperturb"  # as deploy/ has it


@contextmanager
def running(folder: Path, *, target: str, rules: Path, interval_s: int) -> Iterator[str]:
    """Run Prometheus with its data in `folder`, from when it is ready; yield its URL."""
    program = shutil.which("prometheus")
    if program is None:
        raise UnperturbError("prometheus is not installed: apt-get install prometheus")
    interval = f"{interval_s}s"
    configuration = {
        "global": {"scrape_interval": interval, "evaluation_interval": interval},
        "rule_files": [str(rules.resolve())],
        "scrape_configs": [{"job_name": JOB, "static_configs": [{"targets": [target]}]}],
    }
    file = folder / "prometheus.yaml"
    file.write_text(json.dumps(configuration))  # which is YAML
    port = open_loop.free_port()
    command = [
        program,
        f"--config.file={file}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with open_loop.running(command, port=port, ready="/-/ready", log=folder / "prometheus.log"):
        yield f"http://127.0.0.1:{port}"


def ask(url: str, path: str, **parameters: str) -> Any:  # noqa: ANN401
    """Return the data of an answer of Prometheus's HTTP API."""
    with urlopen(f"{url}/api/v1/{path}?{urlencode(parameters)}", timeout=30) as answer:
        return json.loads(answer.read())["data"]


def instant(url: str, query: str) -> list[float]:
    """Return a query's values now, those that are finite: a quotient of nothing by nothing is no data."""
    found = ask(url, "query", query=query)
    samples = [found["result"]] if found["resultType"] == "scalar" else [one["value"] for one in found["result"]]
    return [value for value in (float(text) for _, text in samples) if math.isfinite(value)]


def alerts(url: str) -> list[dict[str, Any]]:
    """Return every alert's rule, with its health as Prometheus sees it."""
    return [rule for group in ask(url, "rules")["groups"] for rule in group["rules"] if rule["type"] == "alerting"]

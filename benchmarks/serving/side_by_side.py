"""`python benchmarks/serving/side_by_side.py`: this service, LitServe and Ray Serve around one purifier.

In turn, on one machine, the same checkpoint, the same largest batch, and the same open-loop arrivals of mixed presets.
All have the same deadline, and the peers a bound on their queues: what this service's capacity answers in half of it.
The peers need `pip install 'unperturb[peers]'`.
"""

import base64
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unperturb.benchmarks.command import run_command
from unperturb.benchmarks.reporting import results
from unperturb.benchmarks.serving import open_loop
from unperturb.benchmarks.serving.client import Prepared
from unperturb.benchmarks.serving.open_loop import Sent
from unperturb.models.errors import ConfigError
from unperturb.models.options import as_json, option
from unperturb.service.engine.stages import passes

Servers = dict[str, dict[str, list[dict[str, Any]]]]  # by name, by load, a summary for each round
PEERS = "unperturb.benchmarks.serving.peers"
MEASURES = ("goodput", "answered_within", "work", "work_within")

SCRIPT = "benchmarks/serving/side_by_side.py"


@dataclass(frozen=True, kw_only=True)
class SideBySideConfig(open_loop.ServiceBenchmarkConfig):
    """Measure three servers side by side."""

    published: int = option("of ten requests, how many ask for the preset `published`; the rest `default`", 1)
    max_batch: int = option("largest batch of every server; of this service, of all of its workers together", 16)
    loads: tuple[str, ...] = option("shares of this service's capacity; may be given several times", ("0.7", "1.5"))
    seconds: float = option("for each load", 30.0)
    within_s: float = option(
        "an answer counts towards goodput if it comes within so many seconds; every server's deadline", 10.0
    )
    patience: float = option("this service's UNPERTURB_PATIENCE: it refuses what would be late alone", 1000.0)
    execution: str = option(
        "how this service's steps run: auto is the fastest that is here, made before the first request", "auto"
    )
    rounds: int = option("times that each server is measured, in turn", 3)
    out: Path = option("result file", results.FOLDER / "side_by_side.json")

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        if not 0 <= self.published <= 10 or self.seconds <= 0 or self.rounds < 1:
            raise ConfigError(
                f"published={self.published} must be 0 to 10, seconds={self.seconds:g} above 0, "
                f"rounds={self.rounds} at least 1"
            )


def requests(config: SideBySideConfig, path: str) -> list[Prepared]:
    """JSON with an image and its preset; all three servers take the same."""
    made = []
    for i, file in enumerate(open_loop.photos(60, seed=config.seed)):
        preset = "published" if i % 10 < config.published else "default"
        body = {"inputs": base64.b64encode(file).decode(), "parameters": {"preset": preset}}
        made.append(Prepared(path, json.dumps(body).encode(), "application/json", preset))
    return made


def servers(port: int) -> dict[str, tuple[list[str], str, str]]:
    """Name -> command, path of a request, path that is ready."""
    peer = [sys.executable, "-m"]
    return {
        "unperturb": (open_loop.service(port), "/classify", "/readyz"),
        "LitServe": ([*peer, f"{PEERS}.litserve_server", str(port)], "/predict", "/health"),
        "Ray Serve, @serve.batch": (
            [*peer, f"{PEERS}.ray_batch_server", str(port)],
            "/",
            "/",
        ),
    }


def work(preset: str) -> float:
    """Return what an image costs, in images of the preset `default`: the passes of the engine's own account."""
    return passes(preset) / passes("default")


def mean_work(requests: Sequence[Prepared]) -> float:
    """Return the work of a request, in images of the preset `default`."""
    return statistics.fmean(work(one.name) for one in requests)


def figures(sent: list[Sent], config: SideBySideConfig) -> dict[str, Any]:
    """The summary, of all and by preset; the shares of the requests and of their work that were answered within the
    limit; and the work per second until the last answer.
    """
    summary = open_loop.summary(sent, seconds=config.seconds)
    good = [one for one in sent if one.status == 200]
    in_time = [one for one in good if one.seconds <= config.within_s]
    lasted_s = len(good) / summary["goodput"] if good else config.seconds
    return {
        **summary,
        "answered_within": len(in_time) / max(len(sent), 1),
        "work": sum(work(one.name) for one in good) / lasted_s,
        "work_within": sum(work(one.name) for one in in_time) / max(sum(work(one.name) for one in sent), 1),
        "presets": {
            name: open_loop.summary([one for one in sent if one.name == name], seconds=config.seconds)
            for name in sorted({one.name for one in sent})
        },
    }


def measure(config: SideBySideConfig) -> dict[str, Any]:
    """The capacity of this service, then every server under every load, `rounds` times in turn."""
    capacity, execution = 0.0, open_loop.execution(config.execution, config.device)
    found: Servers = {name: {load: [] for load in config.loads} for name in servers(0)}
    for turn in range(config.rounds):
        for name in found:
            port = open_loop.free_port()
            command, path, ready = servers(port)[name]
            environment = {
                "UNPERTURB_CHECKPOINT": config.checkpoint,
                "UNPERTURB_DEVICE": config.device,
                "UNPERTURB_MAX_BATCH": str(max(1, config.max_batch // len(config.device.split(",")))),
                "UNPERTURB_LOG_LEVEL": "warning",
                "UNPERTURB_PATIENCE": str(config.patience),
                "UNPERTURB_EXECUTION": execution,
                "UNPERTURB_TIMEOUT_S": str(config.within_s),
                "PEER_CHECKPOINT": config.checkpoint,
                "PEER_DEVICE": config.device.split(",")[0],  # all of its cores
                "PEER_MAX_BATCH": str(config.max_batch),
                "PEER_QUEUE": str(max(1, round(capacity * config.within_s / 2))),
                "PEER_WITHIN_S": str(config.within_s),
                "PYTHONPATH": str(open_loop.ROOT),
            }
            url, prepared = f"http://127.0.0.1:{port}", requests(config, path)
            with (
                tempfile.TemporaryDirectory() as folder,
                open_loop.running(command, port=port, ready=ready, log=Path(folder) / "log", environment=environment),
            ):
                lone = [request for request in prepared if request.name == "default"]
                warm = open_loop.run(
                    open_loop.capacity(url, lone, clients=config.max_batch, seconds=20.0, seed=config.seed)
                )
                capacity = capacity or warm / mean_work(prepared)
                for i, load in enumerate(config.loads):
                    sent = open_loop.run(
                        open_loop.offer(
                            url, prepared, rate=float(load) * capacity, seconds=config.seconds, seed=config.seed + i
                        )
                    )
                    row = figures(sent, config)
                    found[name][load].append(row)
                    print(f"{turn} {name} {load}: {json.dumps(row)}", file=sys.stderr, flush=True)
    return {"capacity": capacity, "servers": found, "times_the_peers": {key: times(found, key) for key in MEASURES}}


def times(found: Servers, key: str) -> dict[str, dict[str, float]]:
    """Return this service's median over the rounds, in multiples of each peer's, by load."""
    medians = {
        name: {load: statistics.median(row[key] for row in rows) for load, rows in loads.items()}
        for name, loads in found.items()
    }
    own = medians.pop("unperturb")
    return {
        name: {load: own[load] / max(value, 1e-9) for load, value in loads.items()} for name, loads in medians.items()
    }


def compare(config: SideBySideConfig) -> int:
    """Measure the servers in turn and write the result file."""
    results.write(config.out, script=SCRIPT, config=as_json(config), results=measure(config))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return run_command(SideBySideConfig, compare, script=SCRIPT, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())

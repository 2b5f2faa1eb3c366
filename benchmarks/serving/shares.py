"""`python benchmarks/serving/shares.py`: what two clients, and two presets, get of a service asked for too much.

clients: one offers two fifths of the capacity; the other nothing, then half of it, its share, then ten times its share
presets: one request in ten asks for `published`; all together one and a half times the capacity, by their work

With the service's own limits. The client runs on the same machine and takes part of its CPU.
"""

import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unperturb.benchmarks.command import run_command
from unperturb.benchmarks.reporting import results
from unperturb.benchmarks.reporting.service_tables import RATIO
from unperturb.benchmarks.serving import open_loop
from unperturb.benchmarks.serving.client import Prepared
from unperturb.benchmarks.serving.open_loop import Sent
from unperturb.benchmarks.serving.side_by_side import mean_work
from unperturb.benchmarks.serving.watch import RunningServer, metric
from unperturb.models.errors import ConfigError
from unperturb.models.options import as_json, option
from unperturb.service.engine.stages import passes, shape

OTHER = "127.0.0.2"  # without keys a client is its address
MODEST, SHARE = 0.4, 0.5  # of capacity
TIMES = (0.0, 1.0, 10.0)  # its share, that the other offers
ONE_IN = 10  # requests asks for `published`
CLIENTS = 32  # of the closed loops that find capacities; below UNPERTURB_MAX_PER_CLIENT

SCRIPT = "benchmarks/serving/shares.py"


@dataclass(frozen=True, kw_only=True)
class SharesConfig(open_loop.ServiceBenchmarkConfig):
    """Offer the service too much, by two clients and in two presets."""

    seconds: float = option("for each load", 30.0)
    calibration_seconds: float = option("for each closed loop that finds a capacity", 15.0)
    rounds: int = option("times that all of it is measured", 3)
    load: float = option("of mixed presets, in multiples of their capacity", 1.5)
    execution: str = option("how steps run: auto is the fastest that is here, made before the first request", "auto")
    out: Path = option("result file", results.FOLDER / "serving" / "shares.json")

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        if min(self.seconds, self.calibration_seconds, self.load) <= 0 or self.rounds < 1:
            raise ConfigError(
                f"seconds={self.seconds:g}, calibration_seconds={self.calibration_seconds:g} and load={self.load:g} "
                f"must be above 0, rounds={self.rounds} at least 1"
            )


def measure(config: SharesConfig) -> dict[str, Any]:
    """Every round of both parts, by one server."""
    files = open_loop.photos(60, seed=config.seed)
    plain = [Prepared("/classify", file, name="default") for file in files]
    mixed = [
        Prepared("/classify?preset=published", file, name="published") if i % ONE_IN == 0 else plain[i]
        for i, file in enumerate(files)
    ]
    port = open_loop.free_port()
    execution = open_loop.execution(config.execution, config.device)
    environment = {
        "UNPERTURB_CHECKPOINT": config.checkpoint,
        "UNPERTURB_DEVICE": config.device,
        "UNPERTURB_LOG_LEVEL": "warning",
        "UNPERTURB_EXECUTION": execution,
    }
    rounds = []
    with (
        tempfile.TemporaryDirectory() as folder,
        open_loop.running(
            open_loop.service(port), port=port, ready="/readyz", log=Path(folder) / "log", environment=environment
        ) as process,
    ):
        server = RunningServer(port, f"http://127.0.0.1:{port}", process)
        for turn in range(config.rounds):
            with_seed = replace(config, seed=config.seed + turn)
            rounds.append(
                {"clients": clients(server, plain, with_seed), "presets": presets(server, mixed, plain, with_seed)}
            )
            print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    return {"execution": execution, "rounds": rounds}


def capacity_of(server: RunningServer, requests: Sequence[Prepared], config: SharesConfig) -> float:
    """Return the answers a second of a closed loop."""
    seconds = config.calibration_seconds
    return open_loop.run(open_loop.capacity(server.url, requests, clients=CLIENTS, seconds=seconds, seed=config.seed))


def clients(server: RunningServer, requests: Sequence[Prepared], config: SharesConfig) -> dict[str, Any]:
    """What the modest client sees, and what the other gets, by how many times its share the other offers."""
    capacity = capacity_of(server, requests, config)

    async def both(times: float) -> tuple[list[Sent], list[Sent]]:
        modest = open_loop.offer(server.url, requests, rate=MODEST * capacity, seconds=config.seconds, seed=config.seed)
        if not times:
            return await modest, []
        other = open_loop.offer(
            server.url,
            requests,
            rate=times * SHARE * capacity,
            seconds=config.seconds,
            seed=config.seed + 1,
            address=OTHER,
        )
        of_modest, of_other = await asyncio.gather(modest, other)
        return of_modest, of_other

    rows: list[dict[str, Any]] = []
    for times in TIMES:
        modest, other = open_loop.run(both(times))
        rows.append(
            {
                "times_its_share": times,
                "modest": open_loop.summary(modest, seconds=config.seconds),
                "other": open_loop.summary(other, seconds=config.seconds),
            }
        )
    by_times = {row["times_its_share"]: row["modest"]["p99_ms"] for row in rows}
    return {
        "capacity": capacity,
        "rows": rows,
        RATIO: by_times[10.0] / by_times[1.0] if by_times[1.0] and by_times[10.0] else None,
    }


def presets(
    server: RunningServer, requests: Sequence[Prepared], plain: Sequence[Prepared], config: SharesConfig
) -> dict[str, Any]:
    """What each preset gets, and how many steps were taken for images that were never answered."""
    capacity = capacity_of(server, plain, config) / mean_work(requests)
    before = metric(server, "unperturb_steps_total")
    sent = open_loop.run(
        open_loop.offer(server.url, requests, rate=config.load * capacity, seconds=config.seconds, seed=config.seed)
    )
    steps = metric(server, "unperturb_steps_total") - before
    answered = [one for one in sent if one.status == 200]
    names = sorted({one.name for one in sent})
    work = {name: sum(passes(one.name) for one in answered if one.name == name) for name in names}
    return {
        "capacity": capacity,
        "presets": {
            name: {
                **open_loop.summary([one for one in sent if one.name == name], seconds=config.seconds),
                "share_of_work": work[name] / max(sum(work.values()), 1),
            }
            for name in names
        },
        "steps": steps,
        "steps_not_answered": steps - sum(shape(one.name)[0] for one in answered),
    }


def share_out(config: SharesConfig) -> int:
    """Measure and write the result file."""
    results.write(config.out, script=SCRIPT, config=as_json(config), results=measure(config))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return run_command(SharesConfig, share_out, script=SCRIPT, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())

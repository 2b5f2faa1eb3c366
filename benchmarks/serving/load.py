"""`python benchmarks/serving/load.py`: latency and rejections against offered load, from 10% to 300% of capacity.

Open-loop Poisson arrivals. The client runs on the same machine as the service and takes part of its CPU.
"""

import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unperturb.benchmarks.command import run_command
from unperturb.benchmarks.reporting import results
from unperturb.benchmarks.reporting.service_tables import medians
from unperturb.benchmarks.serving import open_loop
from unperturb.benchmarks.serving.client import Prepared
from unperturb.models.errors import ConfigError
from unperturb.models.files import write_whole
from unperturb.models.options import as_json, option

CLIENTS = (1, 2, 4, 8, 16, 32)  # of the closed loops; what the best of them answers is the capacity
PAUSE_S = 0.2  # between lone requests: at low load a request meets a server that has been idle
SHARES = (0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 3.0)

SCRIPT = "benchmarks/serving/load.py"


@dataclass(frozen=True, kw_only=True)
class LoadConfig(open_loop.ServiceBenchmarkConfig):
    """Offer the service more and more load."""

    seconds: float = option("for each load", 30.0)
    calibration_seconds: float = option("for the lone request, and for each closed loop that finds the capacity", 10.0)
    patience: float = option("the service's UNPERTURB_PATIENCE; 0 for its own default", 0.0)
    execution: str = option("how steps run: auto is the fastest that is here, made before the first request", "auto")
    precision: str = option("of the backbone in the steps: float32, bfloat16 or auto", "float32")
    rounds: int = option("times that all of it is measured, each with a server of its own", 3)
    out: Path = option("result file; a plot is written beside it", results.FOLDER / "load.json")

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        if min(self.seconds, self.calibration_seconds) <= 0 or self.rounds < 1:
            raise ConfigError(
                f"seconds={self.seconds:g} and calibration_seconds={self.calibration_seconds:g} must be above 0, "
                f"rounds={self.rounds} at least 1"
            )


def measure(config: LoadConfig) -> dict[str, Any]:
    """The medians of the rounds; refusals are of all of them."""
    rounds = [one_round(replace(config, seed=config.seed + turn * len(SHARES))) for turn in range(config.rounds)]
    loads: list[dict[str, Any]] = []
    for rows in zip(*(one["loads"] for one in rounds), strict=True):
        statuses = sum((Counter(row["statuses"]) for row in rows), Counter[str]())
        loads.append(
            {
                "share": rows[0]["share"],
                "requests": statuses.total(),
                "statuses": dict(statuses),
                "rejected": 1 - statuses["200"] / max(statuses.total(), 1),
                **medians(rows, "capacity", "offered", "goodput", "p50_ms", "p95_ms", "p99_ms", "client_cores"),
            }
        )
    return {
        **medians(rounds, "solo_ms", "back_to_back_ms", "capacity", "p99_at_80_over_solo", "goodput_at_300_over_best"),
        "loads": loads,
        "statuses": sorted({status for row in loads for status in row["statuses"]}),
        "rounds": rounds,
    }


def one_round(config: LoadConfig) -> dict[str, Any]:
    """The lone request, and every load as a share of the capacity right before it, of a server of its own.

    A machine that others share is a third faster at one time than at another.
    """
    requests = [Prepared("/classify", file) for file in open_loop.photos(64, seed=config.seed)]
    execution = open_loop.execution(config.execution, config.device)
    port = open_loop.free_port()
    url, environment = (
        f"http://127.0.0.1:{port}",
        {
            "UNPERTURB_CHECKPOINT": config.checkpoint,
            "UNPERTURB_DEVICE": config.device,
            "UNPERTURB_LOG_LEVEL": "warning",
            "UNPERTURB_EXECUTION": execution,
            "UNPERTURB_PRECISION": config.precision,
        },
    )
    if config.patience:
        environment["UNPERTURB_PATIENCE"] = str(config.patience)
    with (
        tempfile.TemporaryDirectory() as folder,
        open_loop.running(
            open_loop.service(port), port=port, ready="/readyz", log=Path(folder) / "log", environment=environment
        ),
    ):
        solo_ms, back_to_back_ms, closed = calibrate(
            url, requests, seconds=config.calibration_seconds, seed=config.seed
        )
        clients = max(closed, key=lambda count: closed[count])
        print(f"closed loops: {closed}", file=sys.stderr)
        print(
            f"a lone request takes {solo_ms:.0f} ms, {back_to_back_ms:.0f} ms right after another",
            file=sys.stderr,
        )
        rows = []
        for i, share in enumerate(SHARES):
            capacity = open_loop.run(
                open_loop.capacity(
                    url, requests, clients=clients, seconds=config.calibration_seconds, seed=config.seed + i
                )
            )
            started, cpu_s = time.perf_counter(), time.process_time()
            sent = open_loop.run(
                open_loop.offer(url, requests, rate=share * capacity, seconds=config.seconds, seed=config.seed + i)
            )
            cores = (time.process_time() - cpu_s) / (time.perf_counter() - started)
            summary = open_loop.summary(sent, seconds=config.seconds)
            rows.append({"share": share, "capacity": capacity, **summary, "client_cores": cores})
            print(json.dumps(rows[-1]), file=sys.stderr)
    best = max(row["goodput"] for row in rows)
    at_80, at_300 = (next(row for row in rows if row["share"] == share) for share in (0.8, 3.0))
    return {
        "execution": execution,
        "solo_ms": solo_ms,
        "back_to_back_ms": back_to_back_ms,
        "capacity": statistics.median(row["capacity"] for row in rows),
        "closed_loops": closed,
        "loads": rows,
        "p99_at_80_over_solo": at_80["p99_ms"] / solo_ms if at_80["p99_ms"] is not None else None,
        "goodput_at_300_over_best": at_300["goodput"] / best,
    }


def calibrate(
    url: str, requests: list[Prepared], *, seconds: float, seed: int
) -> tuple[float, float, dict[int, float]]:
    """Return the ms of a lone request to an idle server and right after another, and what each closed loop answers."""
    lone = open_loop.run(open_loop.saturate(url, requests, clients=1, seconds=seconds, seed=seed, pause_s=PAUSE_S))
    loops = {
        clients: open_loop.run(open_loop.saturate(url, requests, clients=clients, seconds=seconds, seed=seed))
        for clients in CLIENTS
    }
    solo_ms, back_to_back_ms = (statistics.median(one.seconds * 1000 for one in sent) for sent in (lone, loops[1]))
    closed = {clients: open_loop.answered_per_s(sent, seconds=seconds) for clients, sent in loops.items()}
    return solo_ms, back_to_back_ms, closed


def plot(found: dict[str, Any]) -> bytes:
    """Latency, and the share that is refused, against offered load."""
    from unperturb.benchmarks.reporting.drawing import LIGHT, open_figure, png

    plt, figure, axes = open_figure(8, 4.2)
    shares = [row["share"] * 100 for row in found["loads"]]
    for colour, name in zip(LIGHT.colours, ("p50", "p95", "p99"), strict=False):
        axes.plot(shares, [row[f"{name}_ms"] for row in found["loads"]], marker="o", color=colour, label=name)
    axes.axhline(found["solo_ms"], color="#8b949e", linestyle=":", label="a lone request")
    axes.set_xlabel("offered load, % of capacity")
    axes.set_ylabel("latency of answered requests, ms")
    axes.set_ylim(bottom=0)
    other = axes.twinx()
    other.plot(shares, [row["rejected"] * 100 for row in found["loads"]], color="#57606a", linestyle="--")
    other.set_ylabel("refused, % (dashed)")
    other.set_ylim(0, 100)
    other.spines[["top"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 0.1))
    return png(plt, figure)


def offer_loads(config: LoadConfig) -> int:
    """Measure, write the result file, and draw its plot."""
    found = measure(config)
    results.write(config.out, script=SCRIPT, config=as_json(config), results=found)
    write_whole(config.out.with_suffix(".png"), plot(found))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return run_command(LoadConfig, offer_loads, script=SCRIPT, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())

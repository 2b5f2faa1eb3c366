"""`python benchmarks/serving/http_cost.py`: what HTTP and decoding cost, at saturation.

The same images through the engine alone, which is handed pixels, and through the service, which is sent PNG files by
clients on the same machine; in turn, the median of several turns. Before that, one request at a time to an idle server.
"""

import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unperturb.benchmarks.command import run_command
from unperturb.benchmarks.reporting import results
from unperturb.benchmarks.serving import open_loop
from unperturb.benchmarks.serving.client import TIMEOUT_S, Prepared
from unperturb.models.errors import ConfigError
from unperturb.models.inference.captured import Execution
from unperturb.models.inference.folding import Precision
from unperturb.models.options import as_json, option
from unperturb.service.decoding.decode import decode
from unperturb.service.engine.engine import Engine
from unperturb.service.http.app import make_engine
from unperturb.service.settings import Settings
from unperturb.service.telemetry.metrics import Metrics

PATIENCE = 1000.0  # nobody is refused: the excess waits
WARM_UP_S = 900.0

SCRIPT = "benchmarks/serving/http_cost.py"


@dataclass(frozen=True, kw_only=True)
class HttpCostConfig(open_loop.ServiceBenchmarkConfig):
    """Saturate the engine and the service."""

    preset: str = option("of the purifier", "default")
    clients: int = option("requests in progress; 0: twice the slots", 0)
    seconds: float = option("for each turn", 15.0)
    turns: int = option("of each", 5)
    execution: Execution = option("how steps run", "eager")
    precision: Precision = option("of the backbone in the steps", "float32")
    out: Path | None = option("result file (default: results/http_cost/, named by these settings)", None)

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        if self.turns < 1 or self.clients < 0 or self.seconds <= 0:
            raise ConfigError(
                f"turns={self.turns} and seconds={self.seconds:g} must be above 0, clients={self.clients} at least 0"
            )

    @property
    def file(self) -> Path:
        """Return the result file."""
        name = "_".join((self.preset, *self.device.replace(":", "").split(","), self.execution, self.precision))
        return self.out or results.FOLDER / "http_cost" / f"{name}.json"


def measure(config: HttpCostConfig) -> dict[str, Any]:
    """Images a second of both, a figure for each turn."""
    changed: dict[str, Any] = {
        "checkpoint": config.checkpoint,
        "device": config.device,
        "preset": config.preset,
        "execution": config.execution,
        "precision": config.precision,
        "patience": PATIENCE,
        "log_level": "warning",
    }
    environment = {f"UNPERTURB_{name.upper()}": str(value) for name, value in changed.items()}
    settings, port = Settings(**changed), open_loop.free_port()
    clients = config.clients or 2 * settings.slots * len(settings.devices)
    files = open_loop.photos(64, seed=config.seed)
    engine = make_engine(settings, Metrics())
    alone: list[float] = []
    served: list[float] = []
    with contextlib.ExitStack() as stack:
        stack.callback(engine.stop, 10.0)
        engine.start()
        if not engine.lifecycle.wait_until_ready(WARM_UP_S):
            raise ConfigError(f"the engine has not warmed up: {engine.lifecycle.failure}")
        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "log"
        stack.enter_context(
            open_loop.running(open_loop.service(port), port=port, ready="/readyz", log=log, environment=environment)
        )
        lone = through_http(f"http://127.0.0.1:{port}", files, config, clients=1)
        for _ in range(config.turns):
            alone.append(asyncio.run(through_engine(engine, files, config, clients=clients)))
            served.append(through_http(f"http://127.0.0.1:{port}", files, config, clients=clients))
            print(f"engine {alone[-1]:.1f} images/s, service {served[-1]:.1f} images/s", file=sys.stderr)
    middle = statistics.median(one / other for one, other in zip(served, alone, strict=True))
    return {
        "clients": clients,
        "engine_images_per_s": alone,
        "service_images_per_s": served,
        "share": middle,
        "lone_ms": 1000 / lone,
    }


async def through_engine(engine: Engine, files: list[bytes], config: HttpCostConfig, *, clients: int) -> float:
    """Images a second without HTTP or decoding."""
    with engine.models.use(None) as model:
        pixels = [decode(file, model.card.pictures, max_pixels=1 << 20).pixels for file in files]
        started, done = time.perf_counter(), 0

        async def client(number: int) -> None:
            nonlocal done
            while time.perf_counter() - started < config.seconds:
                deadline = time.monotonic() + TIMEOUT_S
                image = pixels[(number + done) % len(pixels)]
                await engine.dispatcher.submit(model, [image], stage=config.preset, seeds=[0], deadline=deadline)
                done += 1

        await asyncio.gather(*(client(number) for number in range(clients)))
        return done / (time.perf_counter() - started)


def through_http(url: str, files: list[bytes], config: HttpCostConfig, *, clients: int) -> float:
    """Images a second of the service, to so many clients that each wait for their answer."""
    requests = [Prepared("/classify", file) for file in files]
    started = time.perf_counter()
    sent = asyncio.run(open_loop.saturate(url, requests, clients=clients, seconds=config.seconds, seed=config.seed))
    lasted = time.perf_counter() - started
    statuses = {one.status for one in sent}
    if statuses != {200}:
        raise ConfigError(f"the service answered {sorted(statuses)}: it was not measured")
    return len(sent) / lasted


def measure_cost(config: HttpCostConfig) -> int:
    """Measure and write the result file."""
    found = measure(config)
    results.write(config.file, script=SCRIPT, config=as_json(config), results=found)
    print(f"the service does {found['share']:.1%} of the engine's images a second")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return run_command(HttpCostConfig, measure_cost, script=SCRIPT, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())

"""`python benchmarks/serving/request_cpu.py`: CPU milliseconds that one request costs each kind of process.

Processor time, not the clock's: what else the machine does counts little. With `--against FOLDER`, another checkout of
this project, its service is measured too, in turns with this one's.
"""

import asyncio
import contextlib
import statistics
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unperturb.benchmarks.command import run_command
from unperturb.benchmarks.reporting import results
from unperturb.benchmarks.serving import open_loop
from unperturb.benchmarks.serving.client import Client, Prepared
from unperturb.benchmarks.serving.watch import RunningServer, tree
from unperturb.models.errors import ConfigError
from unperturb.models.options import as_json, option

SCRIPT = "benchmarks/serving/request_cpu.py"
KINDS = {"unperturb.service.engine.worker": "worker", "anyio.to_process": "decoders"}  # by their command line
SERVER = "server"
WARM_UP = 32  # requests, whose cost is not counted


@dataclass(frozen=True, kw_only=True)
class RequestCpuConfig(open_loop.ServiceBenchmarkConfig):
    """Send requests in a closed loop, and read the processes' CPU time before and after."""

    preset: str = option("of the purifier", "default")
    clients: int = option("requests in progress", 16)
    requests: int = option("of each body in each turn", 320)
    turns: int = option("of each checkout", 5)
    against: Path | None = option("folder of another checkout, measured in turns with this one", None)
    out: Path = option("result file", results.FOLDER / "serving" / "request_cpu.json")

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        if min(self.clients, self.requests, self.turns) < 1:
            raise ConfigError(
                f"clients={self.clients}, requests={self.requests} and turns={self.turns} must each be above 0"
            )


def measure(config: RequestCpuConfig) -> dict[str, Any]:
    """Return, for each checkout, body and kind of process, the milliseconds of each turn and their median."""
    checkouts = {"this": open_loop.ROOT, **({"against": config.against} if config.against is not None else {})}
    bodies = _bodies(config)
    found: dict[str, Any] = {name: {body: {} for body in bodies} for name in checkouts}
    with tempfile.TemporaryDirectory() as logs, contextlib.ExitStack() as started:
        servers = {
            name: started.enter_context(_serving(config, folder, Path(logs) / name))
            for name, folder in checkouts.items()
        }
        for server in servers.values():
            _send(server, bodies["raw"], config, count=WARM_UP)
        for turn in range(config.turns):
            for name, server in servers.items():
                for body, prepared in bodies.items():
                    for kind, cost_ms in _cost_ms(server, prepared, config).items():
                        found[name][body].setdefault(kind, []).append(cost_ms)
            print(f"turn {turn + 1} of {config.turns}", file=sys.stderr)
    for of_bodies in found.values():
        for body, kinds in of_bodies.items():
            of_bodies[body] = {k: {"ms": ms, "median_ms": statistics.median(ms)} for k, ms in kinds.items()}
    return found


@contextlib.contextmanager
def _serving(config: RequestCpuConfig, folder: Path, log: Path) -> Iterator[RunningServer]:
    environment = {
        "UNPERTURB_CHECKPOINT": config.checkpoint,
        "UNPERTURB_DEVICE": config.device,
        "UNPERTURB_PATIENCE": "1000",  # nobody is refused
        "UNPERTURB_DECODERS": "1",
        "UNPERTURB_THREADS": "1",
    }
    port = open_loop.free_port()
    with open_loop.running(
        open_loop.service(port), port=port, ready="/readyz", log=log, environment=environment, folder=folder
    ) as process:
        yield RunningServer(port, f"http://127.0.0.1:{port}", process)


def _bodies(config: RequestCpuConfig) -> dict[str, list[Prepared]]:
    """Return the same images as bodies of their own, and in multipart forms as curl and browsers send them."""
    path, files = f"/classify?preset={config.preset}", open_loop.photos(64, seed=config.seed)
    boundary = uuid.UUID(int=config.seed).hex
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n'
    head += "Content-Type: image/png\r\n\r\n"
    kind = f"multipart/form-data; boundary={boundary}"
    return {
        "raw": [Prepared(path, file) for file in files],
        "form": [Prepared(path, head.encode() + file + f"\r\n--{boundary}--\r\n".encode(), kind) for file in files],
    }


def _send(server: RunningServer, requests: list[Prepared], config: RequestCpuConfig, *, count: int) -> None:
    """Send so many requests, `clients` at a time; raise ConfigError where one is not answered with 200."""

    async def run() -> set[int]:
        left = iter(range(count))

        async def loop() -> set[int]:
            return {await client.post(requests[i % len(requests)]) for i in left}

        async with Client(server.url) as client:
            return set().union(*await asyncio.gather(*(loop() for _ in range(config.clients))))

    if (statuses := asyncio.run(run())) != {200}:
        raise ConfigError(f"the service answered {sorted(statuses)}: it was not measured")


def _cost_ms(server: RunningServer, requests: list[Prepared], config: RequestCpuConfig) -> dict[str, float]:
    """Return the milliseconds of each kind of process that a request costs."""
    before = _cpu_s(server)
    _send(server, requests, config, count=config.requests)
    after = _cpu_s(server)
    return {kind: (after[kind] - before[kind]) * 1000 / config.requests for kind in after}


def _cpu_s(server: RunningServer) -> dict[str, float]:
    """Return the seconds that the threads of each kind of process have run.

    From the scheduler's own nanoseconds: a process's user and system time is counted in ticks of 10 ms on many kernels,
    which miss most of what runs for less than one.
    """
    seconds = dict.fromkeys((SERVER, *KINDS.values()), 0.0)
    for process in tree(server.process.pid):
        command = process.cmdline()
        kind = next((kind for name, kind in KINDS.items() if name in command), SERVER)
        for thread in Path(f"/proc/{process.pid}/task").iterdir():
            seconds[kind] += int((thread / "schedstat").read_text().split()[0]) / 1e9
    return seconds


def measure_cpu(config: RequestCpuConfig) -> int:
    """Measure and write the result file."""
    found = measure(config)
    results.write(config.out, script=SCRIPT, config=as_json(config), results=found)
    for name, bodies in found.items():
        for body, kinds in bodies.items():
            print(f"{name}, {body}: " + ", ".join(f"{kind} {cost['median_ms']:.2f} ms" for kind, cost in kinds.items()))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return run_command(RequestCpuConfig, measure_cpu, script=SCRIPT, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())

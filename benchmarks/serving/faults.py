"""`python benchmarks/serving/faults.py`: what the service does when everything goes wrong, one part after the other.

killed:       a worker's process is killed under load: everybody is answered, the process ends with a status, and a
              new one serves
disconnects:  half of the clients leave before their answer
slow_loris:   connections that never end their head or body, while others are served
mutated:      damaged files of every format
bombs:        files that unpack to be very large
schemathesis: property-based requests over the whole OpenAPI
soak:         load over capacity for a long time, and the memory of all its processes
"""

import asyncio
import hashlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unperturb.benchmarks.command import run_command
from unperturb.benchmarks.reporting import results
from unperturb.benchmarks.serving import hostile, open_loop
from unperturb.benchmarks.serving.client import Client, Prepared
from unperturb.benchmarks.serving.open_loop import Sent
from unperturb.benchmarks.serving.watch import RunningServer, memory, metric, text_metrics, tree
from unperturb.models import provenance
from unperturb.models.errors import ConfigError
from unperturb.models.options import as_json, option

KILL_AT_S = 2.0  # after the load has begun
EXPECTED = {200, 400, 408, 413, 415, 422, 429, 503, 504}

SCRIPT = "benchmarks/serving/faults.py"


@dataclass(frozen=True, kw_only=True)
class FaultsConfig(open_loop.ServiceBenchmarkConfig):
    """Put the service under faults."""

    only: tuple[str, ...] = option("parts to run; all where none is named; may be given several times", ())
    files: int = option("damaged files of each format", 10_000)
    schemathesis_minutes: float = option("for the property-based requests", 10.0)
    soak_minutes: float = option("for the soak", 60.0)
    soak_share: float = option("of capacity that the soak offers", 1.2)
    out: Path = option("result file; parts that are run again replace those in it", results.FOLDER / "faults.json")

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        unknown = set(self.only) - set(PARTS)
        if unknown:
            raise ConfigError(f"only={sorted(unknown)[0]!r} is not one of {', '.join(PARTS)}")
        if min(self.files, self.schemathesis_minutes, self.soak_minutes, self.soak_share) <= 0:
            raise ConfigError(
                f"files={self.files}, schemathesis_minutes={self.schemathesis_minutes:g}, "
                f"soak_minutes={self.soak_minutes:g} and soak_share={self.soak_share:g} must be above 0"
            )


@contextmanager
def serving(config: FaultsConfig, **settings: str) -> Iterator[RunningServer]:
    """The service with short limits for stalled clients."""
    port = open_loop.free_port()
    environment = {
        "UNPERTURB_CHECKPOINT": config.checkpoint,
        "UNPERTURB_DEVICE": config.device,
        "UNPERTURB_LOG_LEVEL": "warning",
        "UNPERTURB_HEADER_TIMEOUT_S": "3",
        "UNPERTURB_UPLOAD_TIMEOUT_S": "3",
        "UNPERTURB_MAX_PER_CLIENT": "512",
        **settings,
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        open_loop.running(
            open_loop.service(port), port=port, ready="/readyz", log=Path(folder) / "log", environment=environment
        ) as process,
    ):
        yield RunningServer(port, f"http://127.0.0.1:{port}", process)


def pngs(config: FaultsConfig) -> list[Prepared]:
    """Ordinary requests."""
    return [Prepared("/classify", file) for file in open_loop.photos(32, seed=config.seed)]


def killed(config: FaultsConfig) -> dict[str, Any]:
    """SIGKILL to a worker's process in mid-batch."""

    async def run(server: RunningServer) -> list[Sent]:
        task = asyncio.create_task(open_loop.offer(server.url, pngs(config), rate=40.0, seconds=4.0, seed=config.seed))
        await asyncio.sleep(KILL_AT_S)
        workers = [one for one in tree(server.process.pid) if "unperturb.service.engine.worker" in one.cmdline()]
        workers[0].kill()
        return await task

    with serving(config) as server:
        sent = asyncio.run(run(server))
        status = server.process.wait(60)
    waiting = {one.status for one in sent if one.at < KILL_AT_S}
    with serving(config) as server:
        again = asyncio.run(open_loop.saturate(server.url, pngs(config), clients=1, seconds=2.0, seed=config.seed))
    return {
        "statuses": statuses(sent),
        "exit_status": status,
        "after_restart": statuses(again),
        "well": status == 1
        and waiting <= {200, 503}
        and {s.status for s in sent} <= {0, 200, 503}
        and {s.status for s in again} == {200},
    }


def disconnects(config: FaultsConfig) -> dict[str, Any]:
    """As many clients that leave as clients that stay."""
    (file,) = open_loop.photos(1, seed=config.seed)

    async def run(server: RunningServer) -> list[Sent]:
        leaving = asyncio.create_task(hostile.leave_early(server.port, file, count=100, after_s=0.3))
        sent = await open_loop.offer(server.url, pngs(config), rate=10.0, seconds=10.0, seed=config.seed)
        await leaving
        return sent

    with serving(config, UNPERTURB_PATIENCE="1000") as server:
        sent = asyncio.run(run(server))
        time.sleep(1.0)
        left = metric(server, "unperturb_slots_in_use") + metric(server, "unperturb_queue_length")
        alone = asyncio.run(open_loop.saturate(server.url, pngs(config), clients=1, seconds=3.0, seed=config.seed))
    return {
        "stayed": open_loop.summary(sent, seconds=10.0),
        "images_left_over": left,
        "after": statuses(alone),
        "well": {one.status for one in sent} <= EXPECTED and left == 0,
    }


def slow_loris(config: FaultsConfig) -> dict[str, Any]:
    """200 stalled connections beside ordinary requests; the limits are 3 s for the head and 3 s for the body."""

    async def run(server: RunningServer) -> tuple[Counter[str], list[Sent]]:
        stalled = asyncio.create_task(hostile.stall(server.port, count=200, seconds=12.0))
        sent = await open_loop.offer(server.url, pngs(config), rate=5.0, seconds=10.0, seed=config.seed)
        return await stalled, sent

    with serving(config, UNPERTURB_PATIENCE="1000") as server:
        ended, sent = asyncio.run(run(server))
    return {
        "stalled": dict(ended),
        "others": open_loop.summary(sent, seconds=10.0),
        "well": "still open" not in ended and {one.status for one in sent} == {200},
    }


def mutated(config: FaultsConfig) -> dict[str, Any]:
    """Damaged files, eight at a time, without purification."""

    async def run(server: RunningServer, kind: str) -> list[Sent]:
        files = hostile.mutated(kind, config.files, seed=config.seed)
        found: list[Sent] = []
        async with Client(server.url) as client:

            async def one() -> None:
                for file in files:
                    request = Prepared("/classify?purify=never", file, f"image/{kind}")
                    found.append(await open_loop.post(client, request, 0.0))

            await asyncio.gather(*(one() for _ in range(8)))
        return found

    with serving(config) as server:
        before = memory(server.process.pid)
        found = {kind: statuses(asyncio.run(run(server, kind))) for kind in hostile.FORMATS}
        after = memory(server.process.pid)
    return {
        "statuses": found,
        "memory_mb": [before, after],
        "well": all({int(s) for s in counts} <= EXPECTED for counts in found.values()),
    }


def bombs(config: FaultsConfig) -> dict[str, Any]:
    """Each bomb four times at once."""
    with serving(config) as server:
        found: dict[str, dict[str, Any]] = {}
        for name, file in hostile.bombs().items():
            request = Prepared("/classify?purify=never", file)
            sent = asyncio.run(open_loop.burst(server.url, [request] * 4))
            found[name] = {
                "bytes": len(file),
                "statuses": statuses(sent),
                "slowest_s": max(one.seconds for one in sent),
                "memory_mb": memory(server.process.pid),
            }
        after = asyncio.run(open_loop.saturate(server.url, pngs(config), clients=1, seconds=2.0, seed=config.seed))
    return {
        "bombs": found,
        "after": statuses(after),
        "well": all({int(s) for s in row["statuses"]} <= EXPECTED for row in found.values())
        and {one.status for one in after} == {200},
    }


def schemathesis(config: FaultsConfig) -> dict[str, Any]:
    """Requests made from the OpenAPI, by an administrator, until the time is over; 503 and 504 are no failures."""
    seconds, key = config.schemathesis_minutes * 60, "key"
    digest = hashlib.sha256(key.encode()).hexdigest()
    with tempfile.TemporaryDirectory() as folder, serving(config, UNPERTURB_ADMIN_KEYS=f"root:{digest}") as server:
        settings = Path(folder) / "schemathesis.toml"
        settings.write_text('[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", 503, 504]\n')
        done = subprocess.run(
            [
                str(Path(sys.executable).parent / "schemathesis"),
                "--config-file",
                str(settings),
                "run",
                f"{server.url}/openapi.json",
                "--seed",
                str(config.seed),
                "--max-time",
                str(math.ceil(seconds)),
                "--request-timeout",
                "60",
                "--header",
                f"Authorization: Bearer {key}",
                "--no-color",
                "--checks",
                "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds + 600,
            cwd=folder,
        )
        failures = done.stdout[-6000:] if done.returncode else ""
        alive = server.process.poll() is None
        answered = text_metrics(server)
    by_status: Counter[str] = Counter()
    for line in answered:
        if line.startswith("unperturb_requests_total"):
            by_status[line.split('status="')[1].split('"')[0]] += int(float(line.rsplit(" ", 1)[1]))
    return {
        "minutes": config.schemathesis_minutes,
        "requests": dict(by_status),
        "failures": failures,
        "alive": alive,
        "well": alive and not failures and "500" not in by_status,
    }


def soak(config: FaultsConfig) -> dict[str, Any]:
    """Over capacity for a long time; the memory is the sum of all its processes' own pages (USS)."""
    seconds, execution = config.soak_minutes * 60, open_loop.execution("auto", config.device)
    found: list[Sent] = []
    with serving(config, UNPERTURB_EXECUTION=execution) as server:
        full = asyncio.run(open_loop.saturate(server.url, pngs(config), clients=32, seconds=20.0, seed=config.seed))
        capacity = open_loop.answered_per_s(full, seconds=20.0)
        samples: list[dict[str, float]] = []
        slice_s, started = min(60.0, seconds), time.monotonic()
        while time.monotonic() - started < seconds:
            found += asyncio.run(
                open_loop.offer(
                    server.url,
                    pngs(config),
                    rate=config.soak_share * capacity,
                    seconds=slice_s,
                    seed=config.seed + len(samples),
                )
            )
            samples.append({"minute": (time.monotonic() - started) / 60, "memory_mb": memory(server.process.pid)})
            print(json.dumps({**samples[-1], **statuses(found)}), file=sys.stderr, flush=True)
        alive = server.process.poll() is None
        served = sum(
            float(line.rsplit(" ", 1)[1])
            for line in text_metrics(server)
            if line.startswith("unperturb_requests_total") and 'route="/classify"' in line
        )
    warm = next((s["memory_mb"] for s in samples if s["minute"] >= min(5.0, config.soak_minutes / 4)), 0.0)
    growth = samples[-1]["memory_mb"] / warm - 1 if warm else None
    good = sorted(one.seconds for one in found if one.status == 200)
    return {
        "minutes": (time.monotonic() - started) / 60,
        "capacity": capacity,
        "offered": config.soak_share * capacity,
        "requests": len(found),
        "statuses": statuses(found),
        "p99_s": good[int(0.99 * len(good))] if good else None,
        "answered_by_the_service": served - len(full),
        "memory": samples,
        "memory_growth_after_warm_up": growth,
        "well": alive
        and {one.status for one in found} <= {200, 429, 503}
        and served - len(full) == len(found)
        and growth is not None
        and growth < 0.05,
    }


PARTS: dict[str, Callable[[FaultsConfig], dict[str, Any]]] = {
    "killed": killed,
    "disconnects": disconnects,
    "slow_loris": slow_loris,
    "mutated": mutated,
    "bombs": bombs,
    "schemathesis": schemathesis,
    "soak": soak,
}


def statuses(sent: list[Sent]) -> dict[str, int]:
    """Return counts by status; 0 where there was no answer."""
    return {str(status): count for status, count in sorted(Counter(one.status for one in sent).items())}


def run_parts(config: FaultsConfig) -> int:
    """Run the parts and write each result; return 1 where one did not go well."""
    found = json.loads(config.out.read_text())["results"] if config.out.exists() else {}
    for name in config.only or PARTS:
        started = time.monotonic()
        found[name] = {**PARTS[name](config), "commit": provenance.commit()}
        print(
            f"{name}: {'well' if found[name]['well'] else 'NOT WELL'}, {time.monotonic() - started:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        results.write(config.out, script=SCRIPT, config=as_json(config), results=found)
    return int(not all(found[name]["well"] for name in config.only or PARTS))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return run_command(FaultsConfig, run_parts, script=SCRIPT, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())

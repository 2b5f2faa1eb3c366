"""An open-loop client: requests leave at times drawn beforehand, whether or not earlier ones have been answered.

A closed loop, which sends the next request after the last answer, slows down with the server and so hides its queue.
"""

import asyncio
import contextlib
import io
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.request import urlopen

import numpy as np
import torch
import uvloop
from PIL import Image

from unperturb.benchmarks.command import BenchmarkConfig
from unperturb.benchmarks.serving.client import Client, Prepared
from unperturb.models.errors import ConfigError
from unperturb.models.inference.captured import fastest
from unperturb.models.options import option
from unperturb.service.settings import automatic, cores

ROOT = Path(__file__).resolve().parents[2]
READY_S = 600.0  # compiled steps take minutes
# Nobody comes after its end, and its answers are the same from its start on.
PLAIN = {"UNPERTURB_DRAIN_S": "0", "UNPERTURB_EXECUTION": "eager", "UNPERTURB_PRECISION": "float32"}
BACK_OFF_S = 0.2

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ServiceBenchmarkConfig(BenchmarkConfig):
    """The options of every measurement of the service."""

    device: str = option("the service's UNPERTURB_DEVICE", ",".join(map(str, automatic(cores()))))


class Sent(NamedTuple):
    """One request: when it left, how long its answer took in seconds, and the status (0 where there was none)."""

    at: float
    seconds: float
    status: int
    name: str


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run it to its end, on uvloop: a client on the server's own cores is to take little of them."""
    return uvloop.run(work)


def photos(count: int, *, seed: int) -> list[bytes]:
    """Return PNG files of smooth random images, 32 x 32."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((32, 32), Image.Resampling.BICUBIC).save(buffer, "PNG")
        made.append(buffer.getvalue())
    return made


async def offer(
    url: str, requests: Sequence[Prepared], *, rate: float, seconds: float, seed: int, address: str = "127.0.0.1"
) -> list[Sent]:
    """POST requests, drawn from those, from a loopback address, at Poisson arrivals of `rate` a second.

    Raises ConfigError for a rate of 0: a share of a capacity at which nothing was answered.
    """
    if rate <= 0:
        raise ConfigError(f"rate={rate:g} must be above 0; it is 0 where a calibration had no answer of status 200")
    generator, tasks, moment = random.Random(seed), [], 0.0
    async with Client(url, address) as client:
        started = time.perf_counter()
        while (moment := moment + generator.expovariate(rate)) < seconds:
            chosen = generator.choice(requests)
            ahead = started + moment - time.perf_counter()
            await asyncio.sleep(max(0.0, ahead))  # when late, too: those before it are to leave first
            tasks.append(asyncio.create_task(post(client, chosen, moment)))
        return list(await asyncio.gather(*tasks))


async def saturate(
    url: str, requests: Sequence[Prepared], *, clients: int, seconds: float, seed: int, pause_s: float = 0.0
) -> list[Sent]:
    """Run a closed loop of so many clients, which finds the capacity.

    With one client that pauses between its requests, it finds the latency of a lone request to an idle server.
    """
    ends_at = time.perf_counter() + seconds

    async def loop(number: int) -> list[Sent]:
        generator, sent = random.Random(seed + number), []
        while (now := time.perf_counter()) < ends_at:
            sent.append(await post(client, generator.choice(requests), now))
            if sent[-1].status != 200:  # it is the server that is to be measured, not how fast it refuses
                await asyncio.sleep(BACK_OFF_S)
            await asyncio.sleep(pause_s)
        return sent

    async with Client(url) as client:
        return [one for found in await asyncio.gather(*(loop(i) for i in range(clients))) for one in found]


async def capacity(url: str, requests: Sequence[Prepared], *, clients: int, seconds: float, seed: int) -> float:
    """Return what a closed loop of so many clients answers a second."""
    return answered_per_s(await saturate(url, requests, clients=clients, seconds=seconds, seed=seed), seconds=seconds)


def answered_per_s(sent: Sequence[Sent], *, seconds: float) -> float:
    """Return the answers of status 200 a second of a closed loop, of those that came within `seconds` of its start.

    Its clients end one after another, with what each has begun: what comes then is not of a loop that is closed.
    """
    ends_at = min((one.at for one in sent), default=0.0) + seconds
    return sum(one.status == 200 and one.at + one.seconds <= ends_at for one in sent) / seconds


def summary(sent: Sequence[Sent], *, seconds: float) -> dict[str, Any]:
    """Return counts by status, goodput (answers of status 200 a second), and percentiles of their latency in ms."""
    good = sorted(one.seconds * 1000 for one in sent if one.status == 200)
    lasted = max((one.at + one.seconds for one in sent), default=seconds) if sent and sent[0].at < seconds else seconds
    return {
        "offered": len(sent) / seconds,
        "requests": len(sent),
        "statuses": {str(status): count for status, count in sorted(Counter(one.status for one in sent).items())},
        "goodput": len(good) / max(lasted, seconds),
        "rejected": 1 - len(good) / max(len(sent), 1),
        **{f"p{p}_ms": float(np.percentile(good, p)) if good else None for p in (50, 95, 99)},
    }


async def burst(url: str, requests: Sequence[Prepared]) -> list[Sent]:
    """Send all of the requests at once."""
    async with Client(url) as client:
        return list(await asyncio.gather(*(post(client, request, 0.0) for request in requests)))


async def post(client: Client, request: Prepared, at: float) -> Sent:
    """Send one request and read its answer."""
    started = time.perf_counter()
    status = await client.post(request)
    return Sent(at, time.perf_counter() - started, status, request.name)


@contextlib.contextmanager
def running(
    command: Sequence[str],
    *,
    port: int,
    ready: str,
    log: Path,
    environment: dict[str, str] | None = None,
    folder: Path = ROOT,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server in a process of its own, in that folder, from when `ready` answers 200; ended by SIGTERM."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=output,
            stderr=output,
            env={**os.environ, **PLAIN, **(environment or {})},
            start_new_session=True,
        )
    try:
        ends_at = time.monotonic() + READY_S
        while True:
            with contextlib.suppress(OSError), urlopen(f"http://127.0.0.1:{port}{ready}", timeout=5):
                break
            if process.poll() is not None or time.monotonic() > ends_at:
                raise SystemExit(f"the server did not become ready: {' '.join(command)}\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):  # what has outlived its parent would disturb the next
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def service(port: int) -> list[str]:
    """Return the command of this project's service."""
    return [sys.executable, "-m", "unperturb.service", "--port", str(port)]


def execution(asked: str, device: str) -> str:
    """Return how steps are to run from the first request on: for auto, the fastest that the first device has."""
    return fastest(torch.device(device.split(",")[0])) if asked == "auto" else asked


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

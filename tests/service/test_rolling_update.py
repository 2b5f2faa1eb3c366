"""Ending well: an instance that is replaced behind a balancer loses no request."""

import asyncio
import http.client
import itertools
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import aiohttp
import pytest

from tests.support.balancer import Balancer
from tests.support.engines import wait_until
from tests.support.serving import in_process, photo

CLIENTS = 4
NUMBERS = itertools.count()  # of the instances' logs


def start(stack: ExitStack, checkpoint: Path, folder: Path, **settings: str) -> tuple[int, subprocess.Popen[bytes]]:
    """An instance that is ready: its port and its process."""
    log = folder / f"{next(NUMBERS)}.log"
    server = stack.enter_context(in_process(checkpoint, log, {"UNPERTURB_DECODERS": "1", **settings}))
    return server.port, server.process


async def send(url: str, answered: "Counter[str]", stopped: Callable[[], bool], *, keep: bool) -> None:
    """One client, one request after the other, on one connection or on one for each."""
    while not stopped():
        async with aiohttp.ClientSession() as session:
            for _ in range(10_000 if keep else 1):
                try:
                    async with session.post(url, data=photo(), headers={"content-type": "image/png"}) as answer:
                        await answer.read()
                        answered[str(answer.status)] += 1
                except aiohttp.ClientError as error:
                    answered[type(error).__name__] += 1
                await asyncio.sleep(0.02)
                if stopped():
                    return


@pytest.mark.parametrize("replacements", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_rolling_replacements_under_load_lose_no_request(replacements: int, tiny_folder: Path, tmp_path: Path) -> None:
    answered: Counter[str] = Counter()
    ended = threading.Event()

    async def replace(stack: ExitStack) -> None:
        def instance() -> tuple[int, subprocess.Popen[bytes]]:
            return start(stack, tiny_folder, tmp_path, UNPERTURB_DRAIN_S="1", UNPERTURB_PATIENCE="1000")

        balancer = Balancer()
        running = [await asyncio.to_thread(instance), await asyncio.to_thread(instance)]
        balancer.instances = [port for port, _ in running]
        async with balancer.listening() as port:
            await balancer.until_ready(running[1][0], 30)
            url = f"http://127.0.0.1:{port}/classify"
            asked = [url, *[f"{url}?purify=never"] * (CLIENTS - 1)]  # one of them is purified
            clients = [
                asyncio.create_task(send(one, answered, ended.is_set, keep=i % 2 == 0)) for i, one in enumerate(asked)
            ]
            for _ in range(replacements):
                before = answered.total()
                running.append(await asyncio.to_thread(instance))
                balancer.instances = [port for port, _ in running]
                await balancer.until_ready(running[-1][0], 30)
                _, process = running.pop(0)
                process.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(process.wait, 30) == 0
                balancer.instances = [port for port, _ in running]
                assert answered.total() > before
            ended.set()
            await asyncio.gather(*clients)

    with ExitStack() as stack:
        asyncio.run(replace(stack))
    assert set(answered) == {"200"}, answered


def ask(port: int, path: str, body: bytes | None = None) -> tuple[int, str | None]:
    """An answer's status and its header `connection`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        headers = {} if body is None else {"content-type": "image/png"}
        connection.request("GET" if body is None else "POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.getheader("connection")
    finally:
        connection.close()


def test_after_sigterm_it_serves_unready_then_refuses_what_is_new_and_finishes_the_rest(
    tiny_folder: Path, tmp_path: Path
) -> None:
    with ExitStack() as stack, ThreadPoolExecutor(9) as pool:
        port, process = start(stack, tiny_folder, tmp_path, UNPERTURB_DRAIN_S="4", UNPERTURB_MAX_BATCH="1")
        one = "/classify?purify=never"
        assert ask(port, one, photo()) == (200, None)
        process.send_signal(signal.SIGTERM)
        late = time.monotonic() + 2.5
        wait_until(lambda: ask(port, "/readyz") == (503, "close"), 3.9)
        assert ask(port, "/healthz") == (200, "close")
        assert ask(port, one, photo()) == (200, "close")
        time.sleep(max(0.0, late - time.monotonic()))  # what is let in now is in progress when nothing is any more
        let_in = [pool.submit(ask, port, "/classify?preset=published", photo()) for _ in range(8)]
        refused = []
        with suppress(OSError):  # it has ended
            while not all(request.done() for request in let_in):
                refused += [ask(port, one, photo())]
                time.sleep(0.05)
        assert process.wait(40) == 0
    assert [request.result() for request in let_in] == [(200, "close")] * 8
    assert refused[-1] == (503, "close")
    assert set(refused) <= {(200, "close"), (503, "close")}

"""The service as a process: slow clients, clients that leave, SIGTERM, and a worker that dies."""

import asyncio
import json
import os
import resource
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import pytest

from tests.support.engines import wait_until
from tests.support.serving import in_process, photo
from unperturb.benchmarks.serving import hostile, open_loop
from unperturb.benchmarks.serving.watch import RunningServer, metric, tree
from unperturb.service.http.server import METRICS_CONNECTIONS, OTHER_FILES, allow_files
from unperturb.service.keys import digest

PUBLISHED = "/classify?preset=published"  # 40 steps
PNG = {"content-type": "image/png"}


@contextmanager
def serving(checkpoint: Path, log: Path, **more: str) -> Iterator[RunningServer]:
    limits = {"UNPERTURB_HEADER_TIMEOUT_S": "1", "UNPERTURB_UPLOAD_TIMEOUT_S": "1", "UNPERTURB_MAX_BATCH": "4"}
    with in_process(checkpoint, log, {**limits, **more}) as server:
        yield server


@pytest.fixture
def server(tiny_folder: Path, tmp_path: Path) -> Iterator[RunningServer]:
    with serving(tiny_folder, tmp_path / "log") as one:
        yield one


@pytest.fixture(scope="module")
def lasting_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="module")
def lasting(tiny_folder: Path, lasting_log: Path) -> Iterator[RunningServer]:
    """For tests that the server outlives."""
    with serving(tiny_folder, lasting_log, UNPERTURB_LOG_FORMAT="json") as one:
        yield one


def post(url: str) -> int:
    """The status of an answer."""
    request = Request(url + PUBLISHED, data=photo(), headers=PNG)
    try:
        with urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code


def named(server: RunningServer, module: str) -> list[psutil.Process]:
    """The server's processes that run this module."""
    found = []
    for one in tree(server.process.pid):
        with suppress(psutil.Error):  # it has just ended
            found += [one] * (module in one.cmdline())
    return found


def worker_of(server: RunningServer) -> psutil.Process:
    (worker,) = named(server, "unperturb.service.engine.worker")
    return worker


def kill(processes: list[psutil.Process]) -> None:
    for one in processes:
        with suppress(psutil.NoSuchProcess):
            one.kill()


def test_stalled_and_leaving_clients_cost_nothing_and_sigterm_drains(server: RunningServer, tmp_path: Path) -> None:
    ended = asyncio.run(hostile.stall(server.port, count=6, seconds=8.0))
    assert ended == {"closed": 3, "HTTP/1.1 408 Request Timeout": 3}

    worker = worker_of(server)
    worker.suspend()  # so that all leave before theirs is done
    leaving = [HTTPConnection("127.0.0.1", server.port) for _ in range(4)]
    for client in leaving:
        client.request("POST", PUBLISHED, photo(), PNG)
    wait_until(lambda: metric(server, "unperturb_slots_in_use") == 4)  # of one that waits, too
    for client in leaving:
        client.close()
    wait_until(lambda: metric(server, "unperturb_slots_in_use") == 0)
    worker.resume()
    assert post(server.url) == 200  # beside which theirs would be done, too
    assert metric(server, "unperturb_steps_total") < 2 * 40

    with ThreadPoolExecutor(8) as pool:
        worker.suspend()
        sent = [pool.submit(post, server.url) for _ in range(8)]
        wait_until(lambda: metric(server, "unperturb_queue_length") == 5)  # all have arrived: a later one is refused
        server.process.send_signal(signal.SIGTERM)
        worker.resume()
        statuses = [one.result() for one in sent]
    assert statuses == [200] * 8
    assert server.process.wait(30) == 0
    log = (tmp_path / "log").read_text()
    assert f"{server.url}/docs" in log
    assert "curl -F image=@" in log
    for line in log.splitlines():
        assert not line.startswith("Traceback"), line
        if line.startswith("{"):
            json.loads(line)


def test_dead_worker_is_answered_for_and_ends_the_process_with_a_status(server: RunningServer) -> None:
    worker = worker_of(server)
    with ThreadPoolExecutor(4) as pool:
        worker.suspend()  # it answers nobody before its end
        sent = [pool.submit(post, server.url) for _ in range(4)]
        wait_until(lambda: metric(server, "unperturb_queue_length") == 1)  # a slot of four is for short ones
        worker.kill()
        assert [one.result() for one in sent] == [503] * 4
    assert server.process.wait(30) == 1


def decoders(server: RunningServer) -> list[psutil.Process]:
    return named(server, "anyio.to_process")


def test_file_that_crashes_every_decoder_it_meets_answers_422_and_others_go_on(lasting: RunningServer) -> None:
    assert post(lasting.url) == 200
    with ThreadPoolExecutor(1) as pool:
        slow = hostile.bombs()["a PNG of 49 million black pixels"]
        request = Request(f"{lasting.url}/classify?purify=never", data=slow, headers={"content-type": "image/png"})
        sent = pool.submit(lambda: urlopen(request, timeout=60))
        while not sent.done():
            kill(decoders(lasting))
            time.sleep(0.02)
        with pytest.raises(HTTPError) as refused:
            sent.result()
    assert refused.value.code == 422
    assert "crashed the decoder" in json.load(refused.value)["detail"]
    assert post(lasting.url) == 200


def test_decoders_that_ended_while_idle_fail_no_request(lasting: RunningServer) -> None:
    killed = decoders(lasting)
    kill(killed)
    assert post(lasting.url) == 200
    assert not set(killed) & set(decoders(lasting))


def test_decoders_are_small_processes_without_torch(lasting: RunningServer) -> None:
    found = decoders(lasting)
    assert found
    for one in found:
        assert not [part.path for part in one.memory_maps() if "torch" in part.path]


def test_unused_connection_is_kept(lasting: RunningServer) -> None:
    """Longer than uvicorn's own 5 s: a balancer that keeps its own for longer sends into one that is being closed."""
    with closing(HTTPConnection("127.0.0.1", lasting.port)) as client:
        client.request("GET", "/healthz")
        client.getresponse().read()
        kept = client.sock
        assert not select.select([kept], [], [], 5.5)[0]
        client.request("GET", "/healthz")
        with client.getresponse() as answer:
            assert answer.status == 200
        assert client.sock is kept


@pytest.mark.parametrize("metrics", [False, True], ids=["of the service", "of the metrics"])
def test_port_in_use_ends_the_start(metrics: bool, tiny_folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [*open_loop.service(0 if metrics else port), "--checkpoint", str(tiny_folder), "--device", "cpu"],
            env={**os.environ, **({"UNPERTURB_METRICS_PORT": str(port)} if metrics else {})},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode not in (0, None)
    assert "Address already in use; something listens there already" in done.stderr
    assert ("UNPERTURB_METRICS_PORT" in done.stderr) == metrics
    assert "Traceback" not in done.stderr


def test_metrics_on_a_port_of_their_own_need_no_key_and_have_its_limits(tiny_folder: Path, tmp_path: Path) -> None:
    own = open_loop.free_port()
    keys = {"UNPERTURB_AUTHENTICATION": "on", "UNPERTURB_API_KEYS": f"ann:{digest('secret')}"}
    more = {"UNPERTURB_METRICS_PORT": str(own), "UNPERTURB_HEADER_TIMEOUT_S": "3"}
    with serving(tiny_folder, tmp_path / "log", **more, **keys) as server, ExitStack() as held:

        def assert_are_served() -> None:
            with urlopen(f"http://127.0.0.1:{own}/metrics", timeout=10) as answer:
                assert b"unperturb_slots 4.0" in answer.read()

        assert_are_served()
        with pytest.raises(HTTPError) as refused:
            urlopen(f"{server.url}/metrics", timeout=10)
        assert refused.value.code == 404
        refused.value.close()
        stalled = [
            held.enter_context(socket.create_connection(("127.0.0.1", own), timeout=10))
            for _ in range(METRICS_CONNECTIONS + 1)
        ]
        assert select.select(stalled, [], [], 10)[0] == stalled[-1:]  # one too many, and closed
        for client in stalled:
            with suppress(ConnectionResetError):
                assert client.recv(1) == b""
        assert_are_served()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0


def logged_client(server: RunningServer, log: Path) -> str:
    """Whom the log names as the client of a request that a proxy may have passed on."""
    headers = {"content-type": "image/png", "x-forwarded-for": "192.0.2.7"}
    with urlopen(Request(f"{server.url}/classify", photo(), headers), timeout=60) as answer:
        number = json.load(answer)["request_id"]

    def lines() -> list[Any]:
        return [json.loads(line) for line in log.read_text().splitlines() if '"route"' in line and number in line]

    wait_until(lambda: len(lines()) > 0, 10)
    (line,) = lines()
    return str(line["client"])


def test_address_in_a_header_counts_only_behind_a_proxy_that_the_operator_names(
    lasting: RunningServer, lasting_log: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    assert logged_client(lasting, lasting_log) == "127.0.0.1"
    more = {"FORWARDED_ALLOW_IPS": "127.0.0.1", "UNPERTURB_LOG_FORMAT": "json"}
    with serving(tiny_folder, tmp_path / "log", **more) as behind_a_proxy:
        assert logged_client(behind_a_proxy, tmp_path / "log") == "192.0.2.7"


@pytest.mark.parametrize(
    ("limits", "asked", "warned"), [((64, 4096), (1512, 4096), False), ((64, 256), (256, 256), True)]
)
def test_connections_get_the_open_files_that_they_need(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    limits: tuple[int, int],
    asked: tuple[int, int],
    warned: bool,
) -> None:
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: set_to.append(pair))
    allow_files(1000 + OTHER_FILES)
    assert set_to == [asked]
    assert ("UNPERTURB_MAX_CONNECTIONS" in caplog.text) == warned

"""The load, side-by-side and fault benchmarks: what they send, and how they count it."""

import asyncio
import io
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from PIL import Image

from tests.support.serving import in_thread
from unperturb.benchmarks.reporting import service_tables, speed_tables
from unperturb.benchmarks.serving import (
    faults,
    hostile,
    http_cost,
    load,
    open_loop,
    request_cpu,
    shares,
    side_by_side,
    watch,
)
from unperturb.benchmarks.serving.client import Prepared
from unperturb.benchmarks.serving.open_loop import Sent
from unperturb.benchmarks.serving.watch import RunningServer
from unperturb.models.errors import ConfigError
from unperturb.service.engine.engine import Engine
from unperturb.service.engine.lifecycle import EngineState
from unperturb.service.engine.stages import passes, shape


def test_summary_counts_by_status_and_takes_percentiles_of_the_good() -> None:
    sent = [Sent(i / 10, 0.01 * (i + 1), 200, "a") for i in range(100)] + [Sent(0.0, 9.0, 503, "a")]
    found = open_loop.summary(sent, seconds=10.0)
    assert found["statuses"] == {"200": 100, "503": 1}
    assert found["offered"] == 10.1
    assert found["rejected"] == pytest.approx(1 / 101)
    assert found["p50_ms"] == pytest.approx(np.percentile(np.arange(1, 101) * 10, 50))
    assert found["goodput"] == pytest.approx(100 / max(one.at + one.seconds for one in sent))
    assert open_loop.summary([], seconds=1.0)["p99_ms"] is None


def test_closed_loop_counts_what_is_answered_while_it_is_closed() -> None:
    sent = [Sent(100.0 + i, 1.5, 200, "a") for i in range(10)] + [Sent(100.0, 0.1, 503, "a")]
    assert open_loop.answered_per_s(sent, seconds=10.0) == 0.9  # the last one begins in time and ends late
    assert open_loop.answered_per_s([], seconds=10.0) == 0.0


def test_arrivals_do_not_wait_for_answers_and_are_the_same_for_a_seed() -> None:
    async def run() -> tuple[list[Sent], list[Sent], int]:
        seen = 0

        async def slow(request: web.Request) -> web.Response:
            nonlocal seen
            seen += 1
            status = 503 if seen % 2 else 200
            await request.read()
            await asyncio.sleep(0.5)
            return web.Response(status=status)

        server = web.Application()
        server.router.add_post("/classify", slow)
        runner = web.AppRunner(server)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port := open_loop.free_port())
        await site.start()
        url, requests = f"http://127.0.0.1:{port}", [Prepared("/classify", b"x", name="one")]
        first = await open_loop.offer(url, requests, rate=100.0, seconds=0.5, seed=3)
        second = await open_loop.offer(url, requests, rate=100.0, seconds=0.5, seed=3)
        await runner.cleanup()
        return first, second, seen

    first, second, seen = asyncio.run(run())
    assert [one.at for one in first] == [one.at for one in second]
    assert 30 <= len(first) <= 75  # 50 expected; a closed loop would send one
    assert seen == 2 * len(first)
    assert {one.status for one in first} == {200, 503}
    assert all(one.seconds >= 0.45 for one in first)  # a timer may be a little early


@pytest.mark.parametrize("kind", list(hostile.FORMATS))
def test_damaged_files_differ_and_are_the_same_for_a_seed(kind: str) -> None:
    files = list(hostile.mutated(kind, 50, seed=1))
    assert files == list(hostile.mutated(kind, 50, seed=1))
    assert len(set(files)) > 45
    assert len({file[:3] for file in files}) == 1


def test_bombs_are_small_and_claim_much() -> None:
    files = hostile.bombs()
    assert all(len(file) < 4_000_000 for file in files.values())
    Image.MAX_IMAGE_PIXELS, before = None, Image.MAX_IMAGE_PIXELS
    try:
        sizes = [Image.open(io.BytesIO(file)).size for name, file in files.items() if "pixels" in name]
    finally:
        Image.MAX_IMAGE_PIXELS = before
    assert min(width * height for width, height in sizes) >= 49_000_000


@pytest.mark.parametrize(
    ("config", "bad"),
    [
        (faults.FaultsConfig, {"only": ("floods",)}),
        (faults.FaultsConfig, {"files": 0}),
        (load.LoadConfig, {"seconds": 0.0}),
        (side_by_side.SideBySideConfig, {"published": 11}),
    ],
    ids=str,
)
def test_bad_option_is_refused(config: type, bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        config(**bad)


def test_processes_of_a_tree_are_found() -> None:
    code = "import subprocess, sys, time; subprocess.Popen(['sleep', '30']); print('up', flush=True); time.sleep(30)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    found = watch.tree(process.pid)
    try:
        assert [one.name() for one in found[1:]] == ["sleep"]
        assert found[0].pid == process.pid
        assert watch.memory(process.pid) > 1
    finally:
        for one in reversed(found):
            one.kill()
        process.wait()
        process.stdout.close()


def test_service_is_compared_with_its_engine_at_saturation(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "http.json"
    arguments = [
        "--checkpoint",
        str(tiny_folder),
        "--clients",
        "3",
        "--seconds",
        "0.5",
        "--turns",
        "2",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    assert http_cost.main(arguments) == 0
    record = json.loads(out.read_text())
    found = record["results"]
    assert len(found["engine_images_per_s"]) == len(found["service_images_per_s"]) == 2
    assert all(value > 0 for value in found["engine_images_per_s"])
    pairs = zip(found["service_images_per_s"], found["engine_images_per_s"], strict=True)
    ratios = [one / other for one, other in pairs]
    assert min(ratios) <= found["share"] <= max(ratios)
    assert found["lone_ms"] > 0
    (row,) = speed_tables.http_table([record]).splitlines()[2:]
    assert row.startswith("| `default` | `cpu`: ")
    assert "| eager, float32 |" in row
    assert f"{found['share']:.1%}" in row


def a_round(*, solo_ms: float, p99_ms: float | None, refused: int) -> dict[str, Any]:
    """Return what load.one_round does, with the same figures at every load."""
    latencies = {"p50_ms": 5.0, "p95_ms": 8.0, "p99_ms": p99_ms}
    rates = {"capacity": 20.0, "offered": 10.0, "goodput": 9.0, "client_cores": 0.1}
    statuses = {"200": 100 - refused, "503": refused}
    loads = [{"share": share, "statuses": statuses, **rates, **latencies} for share in load.SHARES]
    whole = {"back_to_back_ms": 4.0, "capacity": 20.0, "goodput_at_300_over_best": 0.9}
    return {"solo_ms": solo_ms, **whole, "p99_at_80_over_solo": p99_ms and p99_ms / solo_ms, "loads": loads}


def test_loads_are_medians_of_the_rounds_and_refusals_of_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = iter(
        [
            a_round(solo_ms=4.0, p99_ms=20.0, refused=0),
            a_round(solo_ms=5.0, p99_ms=None, refused=100),
            a_round(solo_ms=9.0, p99_ms=18.0, refused=2),
        ]
    )
    monkeypatch.setattr(load, "one_round", lambda _: next(rounds))
    found = load.measure(load.LoadConfig(device="cpu"))
    assert found["solo_ms"] == 5.0
    assert found["p99_at_80_over_solo"] == 3.5  # of the two rounds that answered anybody
    assert [row["share"] for row in found["loads"]] == list(load.SHARES)
    assert found["loads"][0]["statuses"] == {"200": 198, "503": 102}
    assert found["loads"][0]["rejected"] == pytest.approx(0.34)
    assert found["loads"][0]["p99_ms"] == 19.0
    assert len(found["rounds"]) == 3
    lines = service_tables.load_table({"results": found, "machine": {"cpu_threads": 2, "device": "cpu"}}).splitlines()
    assert "| 10% | 9.0 | 34.0% | 5 | 8 | 19 |" in lines


class StandIn:
    """Stands for the service: refuses as `refuses(client, name, number of its requests so far)` says.

    asked: requests by client and preset
    steps: that it says it has taken, for those that it refuses, too
    """

    def __init__(self, refuses: Callable[[str, str, int], bool] = lambda *_: False) -> None:
        self.refuses, self.steps = refuses, 0
        self.asked: Counter[tuple[str, str]] = Counter()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        status, body = 200, b""
        if scope["path"] == "/metrics":
            body = f"unperturb_steps_total {self.steps}\n".encode()
        else:
            name = scope["query_string"].decode().removeprefix("preset=") or "default"
            asked = scope["client"][0], name
            while (await receive()).get("more_body"):
                pass
            status = 503 if self.refuses(*asked, self.asked[asked]) else 200
            self.asked[asked] += 1
            self.steps += shape(name)[0]
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@contextmanager
def standing_in(service: StandIn) -> Iterator[RunningServer]:
    with in_thread(service, lifespan="off") as port:
        yield RunningServer(port, f"http://127.0.0.1:{port}", None)  # type: ignore[arg-type]  # it is no process


PLAIN = [Prepared("/classify", b"x", name="default")]
MIXED = [Prepared("/classify?preset=published", b"x", name="published"), *PLAIN]
CAPACITY = 100.0


def test_shares_are_of_the_two_clients_and_of_what_each_preset_was_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    config = shares.SharesConfig(device="cpu", seconds=1.0)
    monkeypatch.setattr(shares, "capacity_of", lambda *_: CAPACITY)
    service = StandIn(lambda client, _, number: client == shares.OTHER and number % 2 == 1)
    with standing_in(service) as server:
        of_clients = shares.clients(server, PLAIN, config)
    rows = of_clients["rows"]
    assert [row["times_its_share"] for row in rows] == [0.0, 1.0, 10.0]
    assert [row["modest"]["requests"] for row in rows] == [rows[0]["modest"]["requests"]] * 3  # the same arrivals
    assert 25 <= rows[0]["modest"]["requests"] <= 60  # 40 are expected, 50 of the other, and 500
    assert rows[0]["other"]["requests"] == 0
    assert 30 <= rows[1]["other"]["requests"] <= 75
    assert 400 <= rows[2]["other"]["requests"] <= 600
    assert all(row["modest"]["statuses"] == {"200": row["modest"]["requests"]} for row in rows)
    assert rows[2]["other"]["rejected"] == pytest.approx(0.5, abs=0.01)
    asked = Counter({client: count for (client, _), count in service.asked.items()})
    assert asked["127.0.0.1"] == sum(row["modest"]["requests"] for row in rows)
    assert asked[shares.OTHER] == sum(row["other"]["requests"] for row in rows)
    assert of_clients[service_tables.RATIO] == rows[2]["modest"]["p99_ms"] / rows[1]["modest"]["p99_ms"]

    service = StandIn(lambda _, name, number: name == "published" and number % 2 == 1)
    with standing_in(service) as server:
        of_presets = shares.presets(server, MIXED, PLAIN, replace(config, load=20.0))
    short, long = (of_presets["presets"][name] for name in ("default", "published"))
    answered = {name: one["statuses"]["200"] for name, one in of_presets["presets"].items()}
    work = {name: count * passes(name) for name, count in answered.items()}
    assert of_presets["capacity"] == pytest.approx(CAPACITY / ((1 + passes("published") / passes("default")) / 2))
    assert short["share_of_work"] == pytest.approx(work["default"] / sum(work.values()))
    assert long["share_of_work"] == pytest.approx(work["published"] / sum(work.values()))
    assert of_presets["steps"] == service.steps
    assert long["statuses"]["503"] > 10
    assert of_presets["steps_not_answered"] == long["statuses"]["503"] * shape("published")[0]

    record = {
        "results": {"rounds": [{"clients": of_clients, "presets": of_presets}]},
        "config": {"load": 20.0},
        "machine": {"cpu_threads": 2, "device": "cpu"},
    }
    lines = service_tables.shares_table(record).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| nothing", "| 1 times its share", "| 10 times its share"]
    assert [line.split(" | ")[0] for line in lines[8:10]] == ["| `default`", "| `published`"]
    for ratio, said in ((1.5, "makes the modest client's p99 1.50 times as long."), (None, "no answer.")):
        of_clients[service_tables.RATIO] = ratio
        assert said in service_tables.shares_table(record)


def test_capacity_counts_what_was_answered() -> None:
    config = shares.SharesConfig(device="cpu", calibration_seconds=0.5)
    service = StandIn(lambda *given: given[-1] % 2 == 1)
    with standing_in(service) as server:
        found = shares.capacity_of(server, PLAIN, config)
    answered = (service.asked.total() + 1) // 2
    assert (answered - shares.CLIENTS) / 0.5 <= found <= answered / 0.5  # the last ones came after its end


def test_calibration_that_nobody_answered_is_told_and_nothing_is_offered() -> None:
    config = shares.SharesConfig(device="cpu", seconds=0.1, calibration_seconds=0.1)
    with standing_in(StandIn(lambda *_: True)) as server:
        with pytest.raises(ConfigError, match=r"rate=0 .* no answer of status 200"):
            shares.clients(server, PLAIN, config)
        with pytest.raises(ConfigError, match=r"rate=0 .* no answer of status 200"):
            shares.presets(server, MIXED, PLAIN, config)


def test_engine_is_stopped_where_the_service_beside_it_fails(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Engine] = []
    starting = Engine.start

    def start(engine: Engine) -> None:
        started.append(engine)
        starting(engine)

    monkeypatch.setattr(Engine, "start", start)
    monkeypatch.setattr(open_loop, "service", lambda port: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(SystemExit, match="did not become ready"):
        http_cost.measure(http_cost.HttpCostConfig(checkpoint=str(tiny_folder), device="cpu"))
    (engine,) = started
    assert engine.lifecycle.state is EngineState.STOPPED
    assert not any(worker.process and worker.process.poll() is None for worker in engine.workers)


@pytest.mark.slow
def test_shares_of_two_clients_and_two_presets(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "shares.json"
    options = {
        "checkpoint": tiny_folder,
        "device": "cpu",
        "execution": "eager",
        "seconds": 10,
        "calibration-seconds": 5,
        "rounds": 1,
        "load": 10,
        "out": out,
    }
    assert shares.main([part for name, value in options.items() for part in (f"--{name}", str(value))]) == 0
    record = json.loads(out.read_text())
    (found,) = record["results"]["rounds"]
    rows = found["clients"]["rows"]
    assert [row["times_its_share"] for row in rows] == [0.0, 1.0, 10.0]
    assert rows[0]["other"]["requests"] == 0
    assert rows[2]["other"]["requests"] > 4 * rows[1]["other"]["requests"] > 0
    assert rows[0]["modest"]["statuses"].get("200", 0) > 0
    assert sum(one["share_of_work"] for one in found["presets"]["presets"].values()) == pytest.approx(1.0)
    assert 0 <= found["presets"]["steps_not_answered"] < found["presets"]["steps"]
    assert service_tables.shares_table(record).count("\n") > 10


def test_results_of_the_service_beside_its_engine_are_named_by_how_both_ran() -> None:
    one = http_cost.HttpCostConfig(device="cpu,cpu", preset="vote", precision="bfloat16")
    assert one.file.name == "vote_cpu_cpu_eager_bfloat16.json"


def test_cpu_time_of_a_request_is_told_apart_by_process_and_checkout(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    options = {
        "checkpoint": tiny_folder,
        "preset": "vote",
        "requests": 20,
        "turns": 2,
        "clients": 4,
        "against": open_loop.ROOT,
        "out": out,
    }
    assert request_cpu.main([part for name, value in options.items() for part in (f"--{name}", str(value))]) == 0
    record = json.loads(out.read_text())
    assert list(record["results"]) == ["this", "against"]
    for bodies in record["results"].values():
        assert list(bodies) == ["raw", "form"]
        for kinds in bodies.values():
            assert list(kinds) == ["server", "worker", "decoders"]
            assert len(kinds["server"]["ms"]) == 2
            assert 0 < kinds["server"]["median_ms"] < 1000

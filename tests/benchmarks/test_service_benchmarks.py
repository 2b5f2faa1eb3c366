"""The load, side-by-side and fault benchmarks: what they send, and how they count it."""

import asyncio
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web
from PIL import Image

from unperturb.benchmarks.reporting import speed_tables
from unperturb.benchmarks.serving import faults, hostile, http_cost, load, open_loop, request_cpu, side_by_side, watch
from unperturb.benchmarks.serving.open_loop import Prepared, Sent
from unperturb.models.errors import ConfigError


def test_summary_counts_by_status_and_takes_percentiles_of_the_good() -> None:
    sent = [Sent(i / 10, 0.01 * (i + 1), 200, "a") for i in range(100)] + [Sent(0.0, 9.0, 503, "a")]
    found = open_loop.summary(sent, seconds=10.0)
    assert found["statuses"] == {"200": 100, "503": 1}
    assert found["offered"] == 10.1
    assert found["rejected"] == pytest.approx(1 / 101)
    assert found["p50_ms"] == pytest.approx(np.percentile(np.arange(1, 101) * 10, 50))
    assert found["goodput"] == pytest.approx(100 / max(one.at + one.seconds for one in sent))
    assert open_loop.summary([], seconds=1.0)["p99_ms"] is None


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


def test_results_of_the_service_beside_its_engine_are_named_by_how_both_ran() -> None:
    one = http_cost.HttpCostConfig(device="cpu,cpu", preset="vote", precision="bfloat16")
    assert one.file.name == "vote_cpu_cpu_eager_bfloat16.json"


def test_cpu_time_of_a_request_is_told_apart_by_process_and_checkout(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    options = {
        "checkpoint": tiny_folder,
        "requests": 40,
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

"""Ray Serve: a real local cluster with two replicas, one of which is killed under load."""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch

from tests.support.manifests import environment, standing, the
from tests.support.serving import photo
from unperturb.benchmarks.serving.open_loop import free_port
from unperturb.models.errors import ConfigError
from unperturb.service.settings import MAX_BATCH

pytest.importorskip("ray", reason="Ray is not installed: pip install 'unperturb[ray]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own
ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, time
import ray
from ray import serve
ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
from unperturb.service.ray_app import app
serve.run(app, blocking=False)
print("running", flush=True)
sys.stdin.readline()
replicas = [actor for actor in ray.util.list_named_actors(all_namespaces=True) if "unperturb" in actor["name"]]
ray.kill(ray.get_actor(replicas[0]["name"], namespace=replicas[0]["namespace"]), no_restart=True)
print(f"killed one of {len(replicas)}", flush=True)
sys.stdin.readline()
serve.shutdown()
ray.shutdown()
"""


def post(url: str) -> int:
    """The status of an answer; 0 where there was none."""
    request = Request(f"{url}/classify?preset=published", data=photo(), headers={"content-type": "image/png"})
    try:
        with urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.fixture
def cluster(tiny_folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    port = free_port()
    environment = {
        **os.environ,
        "UNPERTURB_CHECKPOINT": str(tiny_folder),
        "UNPERTURB_DEVICE": "cpu",
        "UNPERTURB_REPLICAS": "2",
        "UNPERTURB_THREADS": "1",
        "UNPERTURB_PATIENCE": "1000",
        "UNPERTURB_AUTHENTICATION": "off",
        "UNPERTURB_MAX_BATCH": "4",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "running"
        yield f"http://127.0.0.1:{port}", process
        process.communicate("\n", timeout=60)
    finally:
        process.kill()  # its cluster ends with it
        process.wait()


@pytest.mark.slow
def test_replica_killed_under_load_loses_no_request_without_an_answer(
    cluster: tuple[str, subprocess.Popen[str]],
) -> None:
    url, process = cluster
    assert process.stdin is not None
    assert process.stdout is not None
    ends_at = time.monotonic() + 120
    while post(url) != 200:  # one replica is warm; the other follows
        assert time.monotonic() < ends_at
        time.sleep(0.2)
    time.sleep(3)
    with ThreadPoolExecutor(12) as pool:
        sent = [pool.submit(post, url) for _ in range(80)]
        time.sleep(1.5)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline().strip() == "killed one of 2"
        statuses = Counter(one.result() for one in sent)
    assert set(statuses) <= {200, 429, 500, 503}, statuses  # 500: Ray's own answer for what the dead replica had
    assert statuses[200] >= 50
    assert statuses[500] <= 12
    ends_at = time.monotonic() + 60
    while Counter(post(url) for _ in range(4))[200] < 4:
        assert time.monotonic() < ends_at, "it is not served again"


def options_of_the_deployment(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What Ray is asked for, in this environment."""
    monkeypatch.setenv("UNPERTURB_AUTHENTICATION", "off")
    from ray import serve

    from unperturb.service.ray_app import build

    given: dict[str, Any] = {}
    deployment = serve.deployment

    def noted(target: Any, **options: Any) -> Any:
        given.update(options)
        return deployment(target, **options)

    monkeypatch.setattr(serve, "deployment", noted)
    build()
    return given


def test_kuberays_target_is_of_the_slots_of_one_gpu_though_the_head_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = the("RayService", standing())["spec"]["rayClusterConfig"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    for name, value in environment(head).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("UNPERTURB_THREADS", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert options_of_the_deployment(monkeypatch)["autoscaling_config"]["target_ongoing_requests"] == 0.75 * MAX_BATCH


@pytest.mark.parametrize(
    ("device", "reserved"),
    [("auto", 1), ("cuda", 1), ("cpu", 0), ("cpu,cpu", 0)],
)
def test_a_gpu_is_reserved_where_one_is_used(device: str, reserved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNPERTURB_DEVICE", device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert options_of_the_deployment(monkeypatch)["ray_actor_options"].get("num_gpus", 0) == reserved


@pytest.mark.parametrize("text", ["0", "3-2", "two", "1-", ""])
def test_bad_number_of_replicas_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNPERTURB_AUTHENTICATION", "off")
    from unperturb.service.ray_app import build, replicas

    with pytest.raises(ConfigError, match="UNPERTURB_REPLICAS"):
        replicas(text)
    assert replicas("3") == (3, 3)
    assert replicas("1-8") == (1, 8)
    monkeypatch.setenv("UNPERTURB_AUTHENTICATION", "auto")
    with pytest.raises(ConfigError, match="UNPERTURB_API_KEYS"):
        build()

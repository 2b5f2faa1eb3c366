"""The compose file's optional Prometheus and Grafana, and the image's arguments, as far as the files tell."""

import json
import re
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import yaml

from tests.support.manifests import DEPLOY, ROOT

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
WATCHING = ("prometheus", "grafana")


def mounts(service: str) -> dict[str, str]:
    """Return the files of the checkout that a container has, by their place in it."""
    pairs = [volume.split(":") for volume in COMPOSE["services"][service]["volumes"]]
    return {place: source for source, place, *_ in pairs if source.startswith("./")}


@pytest.mark.parametrize("name", WATCHING)
def test_watching_is_optional_on_loopback_and_without_rights(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["profiles"] == ["monitoring"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert re.search(r":v?\d+\.\d+\.\d+\}$", service["image"])
    assert mounts(name)
    for source in mounts(name).values():
        assert (ROOT / source).is_file(), source


def test_prometheus_reads_the_alerts_and_the_port_that_are_there() -> None:
    configuration = yaml.safe_load((DEPLOY / "compose" / "prometheus.yaml").read_text())
    assert set(configuration["rule_files"]) <= mounts("prometheus").keys()
    (job,) = configuration["scrape_configs"]
    port = COMPOSE["services"]["unperturb"]["environment"]["UNPERTURB_METRICS_PORT"]
    assert job["static_configs"] == [{"targets": [f"unperturb:{port}"]}]
    assert not [one for one in COMPOSE["services"]["unperturb"]["ports"] if str(port) in one]


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    (source,) = yaml.safe_load((DEPLOY / "compose" / "grafana-datasource.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((DEPLOY / "compose" / "grafana-dashboards.yaml").read_text())["providers"]
    shown = [place for place in mounts("grafana") if place.startswith(provider["options"]["path"])]
    environment = COMPOSE["services"]["grafana"]["environment"]
    assert shown == [environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]]


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_image_is_healthy_as_readyz_says_whatever_proxy_the_host_has(status: int, healthy: bool) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/readyz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    found = re.search(r"^HEALTHCHECK .*\\\n +CMD (\[.*\])$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert found is not None
    _, *arguments = json.loads(found[1])
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        environment = {"UNPERTURB_PORT": str(server.server_port), "http_proxy": "http://127.0.0.1:9"}
        done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, check=False)
        with suppress(OSError):  # where it was not asked
            socket.create_connection(("127.0.0.1", server.server_port), timeout=1).close()
        thread.join()
    assert (done.returncode == 0) is healthy
    assert healthy or b"HTTP Error 503" in done.stderr


def test_image_takes_a_digest_and_extras_that_exist() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert "FROM ${BASE_IMAGE}${BASE_DIGEST:+@${BASE_DIGEST}}\n" in text
    arguments = COMPOSE["services"]["unperturb"]["build"]["args"]
    assert arguments.keys() == set(re.findall(r"^ARG (\w+)=", text, re.MULTILINE))
    named = re.search(r"# Optional parts, with spaces between: (.+)\.", text)
    assert named is not None
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in named[1].split(", "))

"""What is asked of Prometheus in the place of deploy/'s queries, and what a real one answers."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge, start_http_server

from unperturb.benchmarks.reporting.service_tables import dashboard_queries_table
from unperturb.benchmarks.serving import dashboard_queries, prometheus
from unperturb.benchmarks.serving.dashboard_queries import DashboardQueriesConfig, Query, answering
from unperturb.benchmarks.serving.open_loop import free_port
from unperturb.models.errors import ConfigError, UnperturbError

RULES = """
groups:
  - name: one
    rules:
      - alert: High
        expr: level{job="unperturb",kind!="c"} > 5 and level == 7
      - alert: Missing
        expr: sum(no_such_metric) > 0
"""


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("a > 1", "a > bool 1"),
        ("a >= 1 and b == 0", "a >= bool 1 and b == bool 0"),
        ('a{x!="1",y=~"<3"} / b{z!~">"} < 1', 'a{x!="1",y=~"<3"} / b{z!~">"} < bool 1'),
        ("a != bool 2", "a != bool 2"),
        ("a / b", "a / b"),
    ],
)
def test_condition_is_asked_so_that_it_always_answers(condition: str, expected: str) -> None:
    assert answering(condition) == expected


def test_queries_of_the_dashboard_have_no_variables_left_and_names_of_their_own() -> None:
    queries = [*dashboard_queries.of_dashboard(), *dashboard_queries.of_autoscaler()]
    assert len({(query.user, query.name) for query in queries}) == len(queries) > 30
    assert not [query.asked for query in queries if "$" in query.asked or "label_values" in query.asked]
    by_name = {query.name: query for query in queries}
    assert by_name["variable model"].asked == 'count by (model) (unperturb_images_total{job="unperturb"})'
    assert by_name["Latency: p95"].asked.endswith('/v2/models/.+/infer",status="200"}[1m])))')
    assert {query.name for query in queries if query.user == "autoscaler"} == {"slots", "refusals"}


def test_load_that_no_scrape_would_see_is_refused() -> None:
    with pytest.raises(ConfigError, match="seconds=5"):
        DashboardQueriesConfig(seconds=5.0)


def test_without_prometheus_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(UnperturbError, match="apt-get install prometheus"),
        prometheus.running(tmp_path, target="127.0.0.1:1", rules=tmp_path / "rules", interval_s=1),
    ):
        pass


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prometheus that has scraped two series of one gauge, and evaluated the rules."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed: apt-get install prometheus")
    registry, port = CollectorRegistry(), free_port()
    level = Gauge("level", "a level", ["kind"], registry=registry)
    level.labels("a").set(7)
    level.labels("b").set(3)
    server, thread = start_http_server(port, "127.0.0.1", registry)
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "rules.yaml").write_text(RULES)
    try:
        with prometheus.running(
            folder, target=f"127.0.0.1:{port}", rules=folder / "rules.yaml", interval_s=1
        ) as running:
            ends_at = time.monotonic() + 60
            while not (
                prometheus.instant(running, "level")
                and all(rule["health"] == "ok" for rule in prometheus.alerts(running))
            ):
                assert time.monotonic() < ends_at, (folder / "prometheus.log").read_text()[-2000:]
                time.sleep(0.2)
            yield running
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("query", "values"),
    [
        ("level", [3.0, 7.0]),
        ('level{kind="a"} > 10', []),
        (answering('level{kind="a"} > 10'), [0.0]),
        (answering('level{kind!="b"} > 5 and level == 7'), [1.0]),
        ("no_such_metric", []),
        ("sum(level - level) / sum(level - level)", []),  # NaN
        ("scalar(sum(level))", [10.0]),
        ('up{job="unperturb"}', [1.0]),
    ],
)
def test_values_are_those_of_prometheus(query: str, values: list[float], url: str) -> None:
    assert sorted(prometheus.instant(url, query)) == values


def test_query_without_data_is_not_well_except_that_of_a_gpu_on_a_cpu(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [
        Query("dashboard", "there", "level", "level"),
        Query("dashboard", "gone", "no_such_metric", "no_such_metric"),
        Query("dashboard", "GPU", "unperturb_gpu_memory_bytes", "unperturb_gpu_memory_bytes"),
    ]
    monkeypatch.setattr(dashboard_queries, "of_dashboard", lambda: asked)
    monkeypatch.setattr(dashboard_queries, "of_autoscaler", list)
    rows = {row["name"]: row for row in dashboard_queries.evaluate(DashboardQueriesConfig(device="cpu"), url)}
    assert {name for name, row in rows.items() if row["well"]} == {"there", "GPU", "High"}
    assert (rows["there"]["series"], rows["there"]["least"], rows["there"]["most"]) == (2, 3.0, 7.0)
    assert rows["High"]["health"] == "ok"
    on_a_gpu = dashboard_queries.evaluate(DashboardQueriesConfig(device="cuda"), url)
    assert "GPU" not in {row["name"] for row in on_a_gpu if row["well"]}


def test_table_says_what_has_no_data() -> None:
    row: dict[str, Any] = {"user": "dashboard", "name": "n", "series": 0, "least": None, "most": None}
    record = {
        "config": {"seconds": 60.0},
        "results": {
            "prometheus": "2.42.0",
            "load": {"requests": 1200, "statuses": {"200": 1100, "503": 100}},
            "queries": [
                {**row, "well": False},
                {**row, "name": "gpu", "well": True},
                {**row, "name": "some", "series": 2, "least": 0.5, "most": 1234.5, "well": True},
            ],
        },
    }
    lines = dashboard_queries_table(record).splitlines()
    assert lines[2:5] == [
        "| dashboard | n | **none** |  |  |",
        "| dashboard | gpu | none: no GPU here |  |  |",
        "| dashboard | some | 2 | 0.5 | 1.23e+03 |",
    ]
    assert lines[-1] == (
        "3 queries, 1 of them without an answer that should have one; 1,200 requests in 60 s: 200: 1,100, 503: 100."
    )

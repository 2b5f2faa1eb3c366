"""The alerts, by promtool's own unit tests; the dashboard; and the autoscaler's queries."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.routing import APIRoute
from prometheus_client import Counter, Gauge, Histogram

from tests.support.manifests import DEPLOY, ROOT, read, the
from unperturb.service.http.routes import classify, kserve
from unperturb.service.telemetry.metrics import Metrics

FOLDER = DEPLOY / "monitoring"
(RULES,) = read(FOLDER / "alerts.yaml")
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
SCALED = the("ScaledObject", read(DEPLOY / "scaling" / "scaled-object.yaml"))
TRIGGERS = {one["name"]: one["metadata"] for one in SCALED["spec"]["triggers"]}


def promtool(*arguments: str | Path) -> str:
    """Run promtool, which Debian's package prometheus has; return what it says, or fail with it."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_alerts_are_rules() -> None:
    assert f"SUCCESS: {len(ALERTS)} rules found" in promtool("check", "rules", FOLDER / "alerts.yaml")


def test_alerts_fire_when_they_should_and_else_not() -> None:
    assert "SUCCESS" in promtool("test", "rules", FOLDER / "alerts.test.yaml")


def test_every_alert_is_tested_both_ways() -> None:
    (tests,) = read(FOLDER / "alerts.test.yaml")
    cases = [case for test in tests["tests"] for case in test["alert_rule_test"]]
    names = {alert["alert"] for alert in ALERTS}
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == names
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == names


def test_alerts_say_what_is_wrong_and_how_bad_it_is() -> None:
    for alert in ALERTS:
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert alert["annotations"].keys() == {"summary", "description"}
    assert len({alert["alert"] for alert in ALERTS}) == len(ALERTS)


def test_the_operator_has_the_same_alerts() -> None:
    assert the("PrometheusRule", read(FOLDER / "prometheus-rule.yaml"))["spec"] == RULES


def test_configuration_of_prometheus_in_compose_is_sound(tmp_path: Path) -> None:
    text = (DEPLOY / "compose" / "prometheus.yaml").read_text()
    (tmp_path / "prometheus.yaml").write_text(text.replace("/etc/prometheus/alerts.yaml", str(FOLDER / "alerts.yaml")))
    assert "SUCCESS" in promtool("check", "config", tmp_path / "prometheus.yaml")
    (job,) = yaml.safe_load(text)["scrape_configs"]
    assert job["job_name"] == "unperturb"


def queries() -> Iterator[tuple[str, str]]:
    """Yield where each query is, and its text."""
    for panel in PANELS:
        yield from ((panel["title"], target["expr"]) for target in panel["targets"])
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["definition"]
    yield from ((one["name"], one["expr"]) for one in DASHBOARD["annotations"]["list"])
    yield from ((alert["alert"], alert["expr"]) for alert in ALERTS)
    yield from ((name, trigger["query"]) for name, trigger in TRIGGERS.items())


def test_every_metric_is_one_of_the_service() -> None:
    """By its name in the source; a client adds the ending of its kind to a counter's, histogram's or info's name, and
    what it measures to a process's.
    """
    source = "\n".join(file.read_text() for file in sorted((ROOT / "service").rglob("*.py")))
    for place, query in queries():
        for name in re.findall(r"\bunperturb_\w+", query):
            bare = re.sub(r"_(total|bucket|sum|count|info|process_\w+)$", "", name)
            assert f'"{name}"' in source or f'"{bare}"' in source, f"{place}: {name}"


def test_every_query_names_the_job() -> None:
    for place, query in queries():
        selectors = re.findall(r"\b(?:unperturb|process)_\w+|\bup\b", re.sub(r"\{[^}]*\}", "", query))
        assert selectors, place
        assert query.count('job="unperturb"') == len(selectors), place


def test_every_query_of_requests_asks_for_all_routes_of_images() -> None:
    routes = {route for _, query in queries() for route in re.findall(r'\broute=(~?"[^"]*")', query)}
    assert routes == {'~"/classify|/purify|/v2/models/.+/infer"'}
    served = {
        route.path for family in (classify, kserve) for route in family.router.routes if isinstance(route, APIRoute)
    }
    computing = {path for path in served if path.endswith(("/classify", "/purify", "/infer"))}
    assert len(computing) == 4
    assert all(re.fullmatch("/classify|/purify|/v2/models/.+/infer", path) for path in computing)


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    every = DASHBOARD["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    for one, other in combinations([panel["gridPos"] for panel in every], 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y, (one, other)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in every)


def test_panels_ask_the_chosen_prometheus_and_use_known_variables() -> None:
    known = {one["name"] for one in DASHBOARD["templating"]["list"]} | {"__rate_interval"}
    for panel in PANELS:
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps([PANELS, DASHBOARD["annotations"]])))
    assert used == known


def test_panels_heed_the_chosen_model_and_preset_where_a_metric_has_those_labels() -> None:
    wrapped = [one for one in vars(Metrics()).values() if isinstance(one, Counter | Gauge | Histogram)]
    labels = {one._name: set(one._labelnames) for one in wrapped} | {"unperturb_loss_drift": {"model", "preset"}}
    seen: set[str] = set()
    for panel in PANELS:
        for target in panel["targets"]:
            for name, selector in re.findall(r"\b(unperturb_\w+)\{([^}]*)\}", target["expr"]):
                bare = re.sub(r"_(total|bucket|sum|count)$", "", name)
                chosen = labels.get(name, labels.get(bare, set())) & {"model", "preset"}
                assert {label for label in chosen if f'{label}=~"${label}"' in selector} == chosen, panel["title"]
                seen |= {bare} if chosen else set()
    asked = {"requests", "request_seconds", "rejected", "queue_wait_seconds", "images", "loss_drift"}
    assert {f"unperturb_{name}" for name in asked} <= seen


BUSY: dict[str, str] = {
    'unperturb_slots{job="unperturb",instance="a"}': "16x10",
    'unperturb_slots{job="unperturb",instance="b"}': "16x10",
    'unperturb_slots_in_use{job="unperturb",instance="a"}': "16x10",
    'unperturb_slots_in_use{job="unperturb",instance="b"}': "8x10",
}


def answered(instance: str, status: int, each_minute: int) -> dict[str, str]:
    series = f'unperturb_requests_total{{job="unperturb",instance="{instance}",route="/classify",status="{status}"}}'
    return {series: f"0+{each_minute}x10"}


@pytest.mark.parametrize(
    ("trigger", "series", "replicas"),
    [
        ("slots", BUSY, 1.5),
        ("refusals", {**answered("a", 200, 600), **answered("b", 200, 600), **answered("b", 503, 2400)}, 6.0),
        ("refusals", {**answered("a", 200, 600), **answered("a", 503, 0), **answered("b", 503, 600)}, 2.0),
        ("refusals", {**answered("a", 200, 6000), **answered("a", 503, 3)}, 0.0),
        ("refusals", answered("a", 200, 600), 0.0),
        ("refusals", {}, 0.0),
    ],
    ids=["two of which one is full", "thrice what two can", "b warms up", "one in two thousand", "none", "no series"],
)
def test_autoscaler_asks_for_the_replicas_that_the_load_keeps_busy(
    trigger: str, series: dict[str, str], replicas: float, tmp_path: Path
) -> None:
    test: dict[str, Any] = {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {"expr": TRIGGERS[trigger]["query"], "eval_time": "2m", "exp_samples": [{"value": replicas}]},
        ],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"evaluation_interval": "15s", "tests": [test]}))
    assert "SUCCESS" in promtool("test", "rules", tmp_path / "test.yaml")


def test_autoscaler_does_not_take_lost_metrics_for_no_load(tmp_path: Path) -> None:
    """Where a query has no answer KEDA takes 0 for it, unless told not to; then it falls back."""
    test: dict[str, Any] = {
        "interval": "15s",
        "input_series": [],
        "promql_expr_test": [{"expr": TRIGGERS["slots"]["query"], "eval_time": "2m", "exp_samples": []}],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"evaluation_interval": "15s", "tests": [test]}))
    assert "SUCCESS" in promtool("test", "rules", tmp_path / "test.yaml")
    assert TRIGGERS["slots"]["ignoreNullValues"] == "false"
    assert SCALED["spec"]["fallback"]["behavior"] == "currentReplicasIfHigher"

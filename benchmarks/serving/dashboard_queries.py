"""`python benchmarks/serving/dashboard_queries.py`: Prometheus's answer to every query of deploy/, after load.

It starts the service and a Prometheus that scrapes it, offers load below capacity and then far over it, and evaluates
the dashboard's queries, the alerts and the autoscaler's triggers. Without an answer to one of them it ends with 1.
"""

import asyncio
import json
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from unperturb.benchmarks.command import run_command
from unperturb.benchmarks.reporting import results
from unperturb.benchmarks.serving import open_loop, prometheus
from unperturb.benchmarks.serving.client import Prepared
from unperturb.benchmarks.serving.open_loop import Sent
from unperturb.models.errors import ConfigError
from unperturb.models.options import as_json, option

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARD, ALERTS = DEPLOY / "monitoring" / "dashboard.json", DEPLOY / "monitoring" / "alerts.yaml"
AUTOSCALER = DEPLOY / "scaling" / "scaled-object.yaml"
SCRAPES_EVERY_S = 2
VARIABLES = {"$__rate_interval": "1m", '"$instance"': '".*"', '"$model"': '".*"', '"$preset"': '".*"'}
COMPARISON = re.compile(r"(?:==|!=|>=|<=|>|<)(?!\s*bool)")
ONLY_ON_A_GPU = "unperturb_gpu_"

SCRIPT = "benchmarks/serving/dashboard_queries.py"


@dataclass(frozen=True, kw_only=True)
class DashboardQueriesConfig(open_loop.ServiceBenchmarkConfig):
    """Ask a Prometheus that watches the service under load everything that deploy/ asks."""

    seconds: float = option("of load: two thirds at 60% of capacity, one third at 300%", 60.0)
    out: Path = option("result file", results.FOLDER / "serving" / "dashboard_queries.json")

    def __post_init__(self) -> None:
        """Raise ConfigError for a load that no scrape would see."""
        if self.seconds < 10 * SCRAPES_EVERY_S:
            raise ConfigError(f"seconds={self.seconds:g} must be at least {10 * SCRAPES_EVERY_S}: ten scrapes")


class Query(NamedTuple):
    """A query of deploy/: whose it is, its name there, its text, and what is asked instead of it."""

    user: str
    name: str
    text: str
    asked: str


def of_dashboard() -> list[Query]:
    """Return the queries of the dashboard's panels, variables and annotations, with every variable at All."""
    dashboard = json.loads(DASHBOARD.read_text())
    found = [
        Query("dashboard", named(panel["title"], target["legendFormat"]), target["expr"], target["expr"])
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
    ]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            text = variable["definition"]
            asked = re.sub(r"^label_values\((.*), (\w+)\)$", r"count by (\2) (\1)", text)
            found.append(Query("dashboard", f"variable {variable['name']}", text, asked))
    for one in dashboard["annotations"]["list"]:
        found.append(Query("dashboard", f"annotation {one['name']}", one["expr"], answering(one["expr"])))
    return [query._replace(asked=filled(query.asked)) for query in found]


def named(title: str, legend: str) -> str:
    """Return the name of a panel's query: the panel's, and the legend where it is more than labels."""
    words = re.sub(r"\{\{\w+\}\}", "", legend).strip(", ")
    return f"{title}: {words}" if words else title


def of_autoscaler() -> list[Query]:
    """Return the queries of KEDA's triggers."""
    triggers = yaml.safe_load(AUTOSCALER.read_text())["spec"]["triggers"]
    return [Query("autoscaler", one["name"], one["metadata"]["query"], one["metadata"]["query"]) for one in triggers]


def filled(query: str) -> str:
    """Return a query of the dashboard with its variables' values."""
    for variable, value in VARIABLES.items():
        query = query.replace(variable, value)
    return query


def answering(condition: str) -> str:
    """Return a condition that answers 0 or 1, where it would answer nothing when it does not hold."""
    parts = re.split(r"(\{[^}]*\})", condition)  # labels are matched by signs of the same look
    return "".join(part if part.startswith("{") else COMPARISON.sub(r"\g<0> bool", part) for part in parts)


def load(config: DashboardQueriesConfig, url: str) -> list[Sent]:
    """Offer images by three presets, some of them damaged: below capacity, then over it, so that some are refused."""
    photos = open_loop.photos(64, seed=config.seed)
    paths = ("/classify", "/classify", "/classify?preset=transfer", "/classify?preset=vote")
    requests = [Prepared(paths[i % len(paths)], file) for i, file in enumerate(photos)]
    capacity = asyncio.run(open_loop.capacity(url, requests, clients=16, seconds=5.0, seed=config.seed))
    requests.append(Prepared("/classify", b"no picture"))
    sent: list[Sent] = []
    for share, part in ((0.6, 2 / 3), (3.0, 1 / 3)):
        seconds = config.seconds * part
        sent += asyncio.run(
            open_loop.offer(url, requests, rate=share * capacity, seconds=seconds, seed=config.seed + len(sent))
        )
    return sent


def evaluate(config: DashboardQueriesConfig, url: str) -> list[dict[str, Any]]:
    """Return each query's answer: how many series, their least and largest value, and whether that is well."""
    rules = prometheus.alerts(url)
    conditions = [Query("alert", rule["name"], rule["query"], answering(rule["query"])) for rule in rules]
    healths = {rule["name"]: {"health": rule["health"], "state": rule["state"]} for rule in rules}
    rows = []
    for query in (*of_dashboard(), *conditions, *of_autoscaler()):
        values = prometheus.instant(url, query.asked)
        missing_gpu = config.device.startswith("cpu") and ONLY_ON_A_GPU in query.text
        rule = healths[query.name] if query.user == "alert" else {}
        rows.append(
            {
                **query._asdict(),
                "series": len(values),
                "least": min(values, default=None),
                "most": max(values, default=None),
                **rule,
                "needs_gpu": ONLY_ON_A_GPU in query.text,
                "well": (bool(values) or missing_gpu) and rule.get("health", "ok") == "ok",
            }
        )
    return rows


def measure(config: DashboardQueriesConfig) -> dict[str, Any]:
    """Run the service, Prometheus and the load; ask while all of them still run."""
    port, metrics_port = open_loop.free_port(), open_loop.free_port()
    environment = {
        "UNPERTURB_CHECKPOINT": config.checkpoint,
        "UNPERTURB_DEVICE": config.device,
        "UNPERTURB_LOG_LEVEL": "warning",
        "UNPERTURB_METRICS_PORT": str(metrics_port),
        "UNPERTURB_MAX_PER_CLIENT": "512",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            open_loop.running(
                open_loop.service(port), port=port, ready="/readyz", log=folder / "log", environment=environment
            ),
            prometheus.running(
                folder, target=f"127.0.0.1:{metrics_port}", rules=ALERTS, interval_s=SCRAPES_EVERY_S
            ) as url,
        ):
            sent = load(config, f"http://127.0.0.1:{port}")
            time.sleep(2 * SCRAPES_EVERY_S)  # the last of it is scraped, too
            return {
                "prometheus": prometheus.ask(url, "status/buildinfo")["version"],
                "load": open_loop.summary(sent, seconds=config.seconds),
                "queries": evaluate(config, url),
            }


def ask_everything(config: DashboardQueriesConfig) -> int:
    """Measure, write the result file, and name what has no answer; return 1 where there is such a query."""
    found = measure(config)
    results.write(config.out, script=SCRIPT, config=as_json(config), results=found)
    bad = [row for row in found["queries"] if not row["well"]]
    for row in bad:
        print(f"no answer: {row['user']}, {row['name']}: {row['asked']}", file=sys.stderr)
    print(f"{len(found['queries'])} queries, {len(bad)} without an answer", file=sys.stderr)
    return int(bool(bad))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return run_command(DashboardQueriesConfig, ask_everything, script=SCRIPT, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())

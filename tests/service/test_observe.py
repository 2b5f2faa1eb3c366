"""Metrics, logs and traces."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient

from tests.conftest import make_checkpoint
from tests.support.engines import ThreadHandle
from tests.support.serving import photo, settings, wait_until_ready
from unperturb.models.checkpoints import store
from unperturb.models.errors import ConfigError
from unperturb.models.purifiers.reverse_attack import PRESETS
from unperturb.service.engine.lifecycle import EngineState
from unperturb.service.http.app import create_app
from unperturb.service.telemetry import drift, tracing
from unperturb.service.telemetry.logs import JsonLines, Text
from unperturb.service.telemetry.metrics import MAX_MODELS, OTHER, Metrics

CLEAN = {"clean_mean": 1.5, "clean_std": 0.25}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A service whose checkpoint's card says what clean images have, for one preset."""
    folder = tmp_path_factory.mktemp("observed")
    card = store.save(folder, make_checkpoint())
    gate = {"loss": 9.0, "weights_sha256": card.weights_sha256, **CLEAN}
    store.write_card(folder, dataclasses.replace(card, gates={"transfer": gate}))
    with TestClient(create_app(settings(folder), handle=ThreadHandle)) as opened:
        wait_until_ready(opened)
        yield opened


def value(client: TestClient, sample: str) -> float:
    """A sample of /metrics; 0 where it is not there yet."""
    for line in client.get("/metrics").text.splitlines():
        if line.startswith(f"{sample} "):
            return float(line.rsplit(" ", 1)[1])
    return 0.0


def test_metrics_count_what_happened(client: TestClient) -> None:
    names = {
        "requests": 'unperturb_requests_total{model="tiny",preset="default",route="/classify",status="200"}',
        "refused": 'unperturb_rejected_total{model="tiny",preset="default",reason="UnsupportedType"}',
        "images": 'unperturb_images_total{model="tiny",preset="default"}',
        "steps": "unperturb_steps_total",
        "waits": 'unperturb_queue_wait_seconds_count{model="tiny",preset="default"}',
        "linf": 'unperturb_purification_linf_count{model="tiny",preset="default"}',
        "drops": 'unperturb_purification_loss_drop_count{model="tiny",preset="default"}',
        "batches": "unperturb_batch_slots_count",
    }
    before = {key: value(client, name) for key, name in names.items()}
    body = client.post("/classify", files=[("images", photo(i)) for i in range(3)])
    assert body.status_code == 200
    assert client.post("/classify", content=b"GIF89a", headers={"content-type": "image/png"}).status_code == 415
    added = {key: value(client, name) - before[key] for key, name in names.items()}
    assert added["requests"] == 1
    assert added["refused"] == 1
    assert added["images"] == added["waits"] == added["linf"] == added["drops"] == 3
    steps = PRESETS["default"].loop.steps
    assert added["steps"] == 3 * steps
    assert added["batches"] >= steps
    assert value(client, "unperturb_queue_length") == value(client, "unperturb_slots_in_use") == 0
    assert client.get("/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")


def test_metrics_say_what_runs_and_how_much_of_the_machine_it_takes(client: TestClient, tiny_folder: Path) -> None:
    text = client.get("/metrics").text
    (line,) = [line for line in text.splitlines() if line.startswith("unperturb_build_info{")]
    for fact in (f'torch="{torch.__version__}"', 'devices="cpu"', 'execution="eager"', 'precision="float32"'):
        assert fact in line
    assert value(client, "process_resident_memory_bytes") > 1e7
    assert value(client, "unperturb_slots") == settings(tiny_folder).slots


def test_workers_processes_are_measured_as_the_main_one_is_and_one_that_has_ended_is_left_out() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    metrics = Metrics()
    metrics.watch(
        slots=1,
        ready=lambda: True,
        queue_length=lambda: 0,
        slots_in_use=lambda: 0,
        memory=dict,
        executions=dict,
        workers=lambda: {"0": os.getpid(), "1": ended.pid},
    )
    lines = metrics.page().decode().splitlines()
    of_workers = {line.partition("{")[0] for line in lines if line.startswith("unperturb_worker_process_")}
    of_main = {line.partition(" ")[0] for line in lines if line.startswith("process_")}
    assert of_workers == {f"unperturb_worker_{name}" for name in of_main}
    (memory,) = [line for line in lines if line.startswith("unperturb_worker_process_resident_memory_bytes")]
    assert memory.startswith('unperturb_worker_process_resident_memory_bytes{worker="0"}')
    assert float(memory.split()[1]) > 1e7


def test_readiness_is_that_of_the_probe(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    assert value(client, "unperturb_ready") == 1
    lifecycle = client.app.state.engine.lifecycle  # type: ignore[attr-defined]
    for state in EngineState:
        monkeypatch.setattr(lifecycle, "state", state)
        assert value(client, "unperturb_ready") == (client.get("/readyz").status_code == 200), state
        assert "unperturb_ready " in client.get("/metrics").text


def test_execution_of_each_model_is_the_one_that_its_steps_have_now(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told() -> list[str]:
        return [line for line in client.get("/metrics").text.splitlines() if line.startswith("unperturb_execution{")]

    models = client.app.state.engine.models  # type: ignore[attr-defined]
    assert told() == ['unperturb_execution{execution="eager",model="tiny"} 1.0']
    monkeypatch.setattr(models.get("tiny"), "execution", "compiled")  # as the engine does on Upgraded
    assert told() == ['unperturb_execution{execution="compiled",model="tiny"} 1.0']
    many = {f"{i}": models.get("tiny") for i in range(MAX_MODELS + 2)}
    monkeypatch.setattr(models, "by_id", many)
    assert len(set(told())) == len(told()) <= MAX_MODELS + 1


def test_drift_is_the_latest_losses_distance_from_the_clean_mean_in_clean_deviations(client: TestClient) -> None:
    name = 'unperturb_loss_drift{model="tiny",preset="transfer"}'
    losses: list[float] = []
    for i in range(drift.WINDOW):
        assert name not in client.get("/metrics").text
        body = client.post("/inspect?preset=transfer&attack=false", files={"image": photo(i)}).json()
        losses.append(body["losses"][0])
    expected = (sum(losses) / len(losses) - CLEAN["clean_mean"]) / CLEAN["clean_std"]
    assert value(client, name) == pytest.approx(expected, abs=1e-3)
    client.post("/classify?preset=transfer&seed=1", files={"image": photo()})  # other views: not comparable
    client.post("/classify?preset=published", files={"image": photo()})  # no clean loss on the card
    assert value(client, name) == pytest.approx(expected, abs=1e-3)


def test_what_the_page_attacks_itself_counts_in_no_figure_of_what_comes(client: TestClient) -> None:
    def counted() -> list[str]:
        names = ("unperturb_images_total{", "unperturb_loss_drift{", "unperturb_label_changes_total{")
        return [line for line in client.get("/metrics").text.splitlines() if line.startswith(names)]

    client.post("/inspect?attack=false", files={"image": photo()})
    before = counted()
    assert client.post("/inspect?attack=true", files={"image": photo()}).json()["attacked"] is not None
    assert counted() == before


def test_drift_forgets_old_images_and_models_that_are_served_no_more() -> None:
    served = {("a", 1), ("b", 2)}
    gauge = drift.LossDrift(lambda: served)
    for model, loss in ((("a", 1), 5.0), (("b", 2), 0.0)):
        for _ in range(drift.WINDOW):
            gauge.observe(model, "default", loss, (1.0, 2.0))
    for _ in range(drift.WINDOW // 2):
        gauge.observe(("a", 1), "default", 1.0, (1.0, 2.0))
    served.remove(("b", 2))
    (family,) = gauge.collect()
    assert [(sample.labels, sample.value) for sample in family.samples] == [({"model": "a", "preset": "default"}, 1.0)]


def test_drift_of_a_model_that_replaces_another_has_nothing_of_the_other() -> None:
    served = {("a", 1)}
    gauge = drift.LossDrift(lambda: served)
    for _ in range(drift.WINDOW):
        gauge.observe(("a", 1), "default", 5.0, (1.0, 2.0))
    served = {("a", 2)}
    for _ in range(drift.WINDOW - 1):
        gauge.observe(("a", 2), "default", 1.0, (1.0, 2.0))
    gauge.observe(("a", 1), "default", 5.0, (1.0, 2.0))  # a request that began before
    (family,) = gauge.collect()
    assert not family.samples
    gauge.observe(("a", 2), "default", 1.0, (1.0, 2.0))
    (family,) = gauge.collect()
    assert [(sample.labels, sample.value) for sample in family.samples] == [({"model": "a", "preset": "default"}, 0.0)]


def test_there_is_a_bound_to_the_values_of_the_label_model() -> None:
    metrics = Metrics()
    labels = [metrics.label(f"model-{i}") for i in range(MAX_MODELS + 10)]
    assert len(set(labels)) == MAX_MODELS + 1
    assert labels[-1] == OTHER
    assert metrics.label("model-0") == "model-0"


def test_gpu_memory_and_utilisation_are_read_and_a_gpu_that_tells_none_fails_no_scrape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By its number: to ask which one `cuda` is now would take memory of it for the main process."""

    def utilization(device: int) -> int:
        if device == 1:
            raise ModuleNotFoundError("nvidia-ml-py is not installed")
        return {0: 40}[device]

    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    metrics = Metrics()
    metrics.watch(
        slots=2,
        ready=lambda: True,
        queue_length=lambda: 0,
        slots_in_use=lambda: 0,
        memory=lambda: {"cuda": 7, "cuda:1": 8},
        executions=dict,
        workers=dict,
    )
    text = metrics.page().decode()
    assert 'unperturb_gpu_memory_bytes{device="cuda:1"} 8.0' in text
    assert 'unperturb_gpu_utilization_ratio{device="cuda"} 0.4' in text
    assert 'unperturb_gpu_utilization_ratio{device="cuda:1"}' not in text


def test_log_has_a_line_for_each_request_and_nothing_of_the_image(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="unperturb.access"):
        answer = client.post("/classify", files={"image": photo()}, headers={"x-request-id": "my-id_1"})
    (record,) = [r for r in caplog.records if r.name == "unperturb.access"]
    line = json.loads(JsonLines().format(record))
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == line["request_id"] == "my-id_1"
    assert (line["method"], line["route"], line["status"], line["preset"]) == ("POST", "/classify", 200, "default")
    assert line["ms"] > 0
    assert line["level"] == "info"
    assert set(line) == {
        "time",
        "level",
        "logger",
        "message",
        "request_id",
        "method",
        "route",
        "status",
        "ms",
        "client",
        "model",
        "preset",
    }
    assert "route=/classify" in Text().format(record)


def test_exception_is_in_the_log_and_an_odd_id_is_replaced(client: TestClient) -> None:
    try:
        raise ValueError("inside")
    except ValueError as error:
        record = logging.LogRecord("x", logging.ERROR, "file", 1, "it failed", (), (ValueError, error, None))
    assert "ValueError: inside" in json.loads(JsonLines().format(record))["exception"]
    for odd in ("a b", "x" * 65, 'a"b', "<script>"):
        answer = client.get("/healthz", headers={"x-request-id": odd})
        assert answer.headers["x-request-id"] != odd


def test_requests_become_spans_under_the_callers_own(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    monkeypatch.setattr(tracing, "set_up", lambda: tracing.Tracing(exporter))
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with TestClient(create_app(settings(tiny_folder), handle=ThreadHandle)) as traced:
        wait_until_ready(traced)
        traced.post("/classify", files={"image": photo()}, headers={"traceparent": parent})
        assert traced.get("/readyz").status_code == 200  # a probe's, every few seconds, is none
    assert len(exporter.get_finished_spans()) == 3
    spans = {span.name: span for span in exporter.get_finished_spans()}
    request = spans["POST /classify"]
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == "b7ad6b7169203331"
    assert request.attributes is not None
    assert request.attributes["http.response.status_code"] == 200
    for name in ("decode", "default"):
        child = spans[name]
        assert child.parent is not None
        assert child.parent.span_id == request.context.span_id
        assert child.start_time is not None
        assert child.end_time is not None
        assert child.end_time > child.start_time


@pytest.mark.parametrize(
    ("variable", "value", "name"),
    [
        (None, "", "unperturb"),
        ("OTEL_SERVICE_NAME", "purifier-eu", "purifier-eu"),
        ("OTEL_RESOURCE_ATTRIBUTES", "service.name=purifier-eu", "purifier-eu"),
    ],
    ids=["none", "name", "attributes"],
)
def test_spans_are_of_the_service_that_the_standard_variables_name(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, value: str, name: str
) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    for other in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES"):
        monkeypatch.delenv(other, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, value)
    traced = tracing.Tracing(InMemorySpanExporter())
    try:
        assert traced.provider.resource.attributes["service.name"] == name
    finally:
        traced.close()


def test_tracing_is_off_without_an_endpoint_and_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tracing.ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    assert tracing.set_up() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"unperturb\[tracing\]"):
        tracing.set_up()

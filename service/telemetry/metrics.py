"""Keep the metrics that Prometheus reads at /metrics; one registry for each app."""

import logging
from collections.abc import Callable, Collection, Iterable
from functools import partial

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from unperturb.service.engine.messages import Outcome
from unperturb.service.telemetry.drift import LossDrift

log = logging.getLogger("unperturb.service")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_MODELS = 64  # different ids in labels; every later one is OTHER
OTHER = "other"
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
LEVELS = tuple(level / 255 for level in (0, 1, 2, 4, 6, 8, 10, 12, 16, 24, 32))
DROPS = (-1, -0.5, -0.2, -0.1, 0, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5)


class Metrics:
    """A rise of the loss, its drift, the purifier's distance or the label changes over their usual is a sign of attack.

    served: the id and the number of each model that is served
    """

    def __init__(self, served: Callable[[], Collection[tuple[str, int]]] = tuple) -> None:
        self.registry = CollectorRegistry()
        self._ids: set[str] = set()
        self._of_requests: dict[tuple[str, int, str, str], tuple[Counter, Histogram]] = {}  # finding them is most of it
        ProcessCollector(registry=self.registry)
        self.drift = LossDrift(served)
        self.registry.register(self.drift)
        self.requests = Counter(
            "unperturb_requests", "Answered requests", ["route", "status", "model", "preset"], registry=self.registry
        )
        self.duration = Histogram(
            "unperturb_request_seconds",
            "From the request's head to its answer",
            ["route", "status", "model", "preset"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.in_progress = Gauge("unperturb_requests_in_progress", "Requests in progress", registry=self.registry)
        self.rejected = Counter(
            "unperturb_rejected", "Refused requests", ["reason", "model", "preset"], registry=self.registry
        )
        self.images = Counter("unperturb_images", "Images answered", ["model", "preset"], registry=self.registry)
        self.wait = Histogram(
            "unperturb_queue_wait_seconds",
            "From the queue to a slot",
            ["model", "preset"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.steps = Counter("unperturb_steps", "Steps of images; its rate is steps per second", registry=self.registry)
        self.step_time = Histogram(
            "unperturb_step_seconds", "One step of a batch", buckets=SECONDS, registry=self.registry
        )
        self.fill = Histogram(
            "unperturb_batch_slots",
            "Slots in use in a step",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            registry=self.registry,
        )
        self.linf = Histogram(
            "unperturb_purification_linf",
            "Largest change of a channel of a pixel, in [0, 1]",
            ["model", "preset"],
            buckets=LEVELS,
            registry=self.registry,
        )
        self.loss_drop = Histogram(
            "unperturb_purification_loss_drop",
            "InfoNCE before purification minus after",
            ["model", "preset"],
            buckets=DROPS,
            registry=self.registry,
        )
        self.changed = Counter(
            "unperturb_label_changes",
            "Images whose label purification changed",
            ["model", "preset"],
            registry=self.registry,
        )

    def label(self, model: str) -> str:
        """Return a model's id as a label's value: there is a bound to how many."""
        if len(self._ids) < MAX_MODELS:
            self._ids.add(model)
        return model if model in self._ids else OTHER

    def describe(self, **facts: str) -> None:
        """Show facts of the process, as labels of unperturb_build_info."""
        Info("unperturb_build", "Versions, and how it runs", registry=self.registry).info(facts)

    def watch(
        self,
        *,
        slots: int,
        ready: Callable[[], bool],
        queue_length: Callable[[], int],
        slots_in_use: Callable[[], int],
        memory: Callable[[], dict[str, int]],
        executions: Callable[[], dict[str, str]],
        workers: Callable[[], dict[str, int]],
    ) -> None:
        """Read these values at every scrape.

        `slots` is how many there are, `ready` whether requests should come here, `memory` the bytes in use by device,
        `executions` how each model's steps run now, `workers` the ids of their processes.
        """
        Gauge("unperturb_slots", "Images at a time on all devices", registry=self.registry).set(slots)
        for name, help, read in (
            ("unperturb_ready", "1 where requests should come here, as /readyz says", ready),
            ("unperturb_queue_length", "Images that wait for a slot", queue_length),
            ("unperturb_slots_in_use", "Slots that have an image, or are wanted by one that waits", slots_in_use),
        ):
            Gauge(name, help, registry=self.registry).set_function(read)
        self.registry.register(_Devices(memory))
        self.registry.register(_Executions(executions, self.label))
        self.registry.register(_Workers(workers))

    def stepped(self, slots: int, seconds: float) -> None:
        """Count one step of a batch."""
        self.steps.inc(slots)
        self.step_time.observe(seconds)
        self.fill.observe(slots)

    def finished(self, route: str, status: int, model: str, preset: str, *, seconds: float) -> None:
        """Count one request that has its answer; `model` is a value that `label` gave."""
        labels = route, status, model, preset
        if labels not in self._of_requests:
            self._of_requests[labels] = self.requests.labels(*labels), self.duration.labels(*labels)
        count, duration = self._of_requests[labels]
        count.inc()
        duration.observe(seconds)

    def answered(self, outcome: Outcome, *, model: str, preset: str | None) -> None:
        """Count one answered image."""
        labels = self.label(model), preset or "none"
        self.images.labels(*labels).inc()
        self.wait.labels(*labels).observe(outcome.queue_ms / 1000)
        if preset is None or outcome.linf is None:
            return
        self.linf.labels(*labels).observe(outcome.linf)
        if outcome.loss_before is not None and outcome.loss_after is not None:
            self.loss_drop.labels(*labels).observe(outcome.loss_before - outcome.loss_after)
        if int(outcome.scores.argmax()) != int(outcome.unpurified_scores.argmax()):
            self.changed.labels(*labels).inc()

    def page(self) -> bytes:
        """Return the text of the exposition format."""
        return generate_latest(self.registry)


class _Devices(Collector):
    """Read each GPU's memory, and its utilisation where NVIDIA's library (`nvidia-ml-py`) is installed."""

    def __init__(self, memory: Callable[[], dict[str, int]]) -> None:
        self.memory = memory

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Return both gauges."""
        memory = GaugeMetricFamily("unperturb_gpu_memory_bytes", "Memory in use by tensors", labels=["device"])
        busy = GaugeMetricFamily(
            "unperturb_gpu_utilization_ratio", "Share of the last second in which it worked", labels=["device"]
        )
        for device, used in self.memory().items():
            memory.add_metric([device], used)
            if (share := _utilization(device)) is not None:
                busy.add_metric([device], share)
        return memory, busy


class _Executions(Collector):
    """Read how the steps of each model run: eagerly at first, perhaps, and by faster ones as soon as they are made."""

    def __init__(self, executions: Callable[[], dict[str, str]], label: Callable[[str], str]) -> None:
        self.executions, self.label = executions, label

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Return the gauge."""
        family = GaugeMetricFamily(
            "unperturb_execution", "1 for how the steps of a model run now", labels=["model", "execution"]
        )
        for labels in dict.fromkeys((self.label(model), how) for model, how in self.executions().items()):
            family.add_metric(labels, 1)
        yield family


class _Workers(Collector):
    """Read of each worker's process what `process_*` are of this one."""

    def __init__(self, workers: Callable[[], dict[str, int]]) -> None:
        self.workers = workers

    def collect(self) -> Iterable[Metric]:
        """Return `unperturb_worker_process_cpu_seconds_total`, …, by worker; of one that has ended nothing."""
        families: dict[str, Metric] = {}
        for worker, pid in self.workers().items():
            of_process = ProcessCollector("unperturb_worker", partial(int, pid), registry=None)
            for found in of_process.collect():
                family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
                for sample in found.samples:
                    family.add_sample(sample.name, {"worker": worker}, sample.value)
        return families.values()


def _utilization(device: str) -> float | None:
    try:
        return torch.cuda.utilization(torch.device(device).index or 0) / 100  # `cuda` itself would begin CUDA here
    except Exception as error:  # whatever NVIDIA's library raises: a scrape goes on without it
        log.debug("the utilisation of %s is not known: %s", device, error)
        return None

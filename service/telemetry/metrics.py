"""Keep the metrics that Prometheus reads at /metrics; one registry for each app."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from unperturb.service.engine.messages import Outcome

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
LEVELS = tuple(level / 255 for level in (0, 1, 2, 4, 6, 8, 10, 12, 16, 24, 32))
DROPS = (-1, -0.5, -0.2, -0.1, 0, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5)


class Metrics:
    """A rise of the purifier's distance, loss drop or label changes over their usual level is a sign of attack."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "unperturb_requests", "Answered requests", ["route", "status", "preset"], registry=self.registry
        )
        self.duration = Histogram(
            "unperturb_request_seconds",
            "From the request's head to its answer",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.in_progress = Gauge("unperturb_requests_in_progress", "Requests in progress", registry=self.registry)
        self.rejected = Counter("unperturb_rejected", "Refused requests", ["reason"], registry=self.registry)
        self.images = Counter("unperturb_images", "Images answered", ["preset"], registry=self.registry)
        self.wait = Histogram(
            "unperturb_queue_wait_seconds", "From the queue to a slot", buckets=SECONDS, registry=self.registry
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
            ["preset"],
            buckets=LEVELS,
            registry=self.registry,
        )
        self.loss_drop = Histogram(
            "unperturb_purification_loss_drop",
            "InfoNCE before purification minus after",
            ["preset"],
            buckets=DROPS,
            registry=self.registry,
        )
        self.changed = Counter(
            "unperturb_label_changes", "Images whose label purification changed", ["preset"], registry=self.registry
        )

    def watch(
        self, *, queue_length: Callable[[], int], slots_in_use: Callable[[], int], memory: Callable[[], dict[str, int]]
    ) -> None:
        """Read these values at every scrape."""
        for name, help, read in (
            ("unperturb_queue_length", "Images that wait for a slot", queue_length),
            ("unperturb_slots_in_use", "Images in slots", slots_in_use),
        ):
            Gauge(name, help, registry=self.registry).set_function(read)
        self.registry.register(_DeviceMemory(memory))

    def stepped(self, slots: int, seconds: float) -> None:
        """Count one step of a batch."""
        self.steps.inc(slots)
        self.step_time.observe(seconds)
        self.fill.observe(slots)

    def answered(self, outcome: Outcome, preset: str | None) -> None:
        """Count one answered image."""
        self.images.labels(preset or "none").inc()
        self.wait.observe(outcome.queue_ms / 1000)
        if preset is None or outcome.linf is None:
            return
        self.linf.labels(preset).observe(outcome.linf)
        if outcome.loss_before is not None and outcome.loss_after is not None:
            self.loss_drop.labels(preset).observe(outcome.loss_before - outcome.loss_after)
        if int(outcome.scores.argmax()) != int(outcome.unpurified_scores.argmax()):
            self.changed.labels(preset).inc()

    def page(self) -> bytes:
        """Return the text of the exposition format."""
        return generate_latest(self.registry)


class _DeviceMemory(Collector):
    def __init__(self, memory: Callable[[], dict[str, int]]) -> None:
        self.memory = memory

    def collect(self) -> Iterable[GaugeMetricFamily]:
        family = GaugeMetricFamily("unperturb_gpu_memory_bytes", "Memory in use by tensors", labels=["device"])
        for device, used in self.memory().items():
            family.add_metric([device], used)
        yield family

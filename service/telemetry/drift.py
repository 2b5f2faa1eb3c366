"""Compare the first losses of the images that come with those of clean images: a lasting rise is a sign of attack."""

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

WINDOW = 256  # images; the mean of so many clean ones stays within 0.2 of their own at 3 standard errors


class LossDrift(Collector):
    """Mean of the latest first losses minus the clean mean, in clean standard deviations, by model and preset.

    There is no sample before WINDOW images have come, and none of a model that is not among those `served`, each as its
    id and its number: one that replaces another of its id begins anew.
    """

    def __init__(self, served: Callable[[], Collection[tuple[str, int]]]) -> None:
        self._served = served
        self._latest: dict[tuple[tuple[str, int], str], deque[float]] = {}
        self._lock = threading.Lock()

    def observe(self, model: tuple[str, int], preset: str, loss: float, clean: tuple[float, float]) -> None:
        """Take in one image's loss; `clean` is the mean and the standard deviation on the checkpoint's card."""
        mean, deviation = clean
        with self._lock:
            self._latest.setdefault((model, preset), deque(maxlen=WINDOW)).append((loss - mean) / deviation)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Return the gauge."""
        family = GaugeMetricFamily(
            "unperturb_loss_drift",
            f"Mean InfoNCE of the latest {WINDOW} images before the first step, minus that of clean images, in their "
            "standard deviations",
            labels=["model", "preset"],
        )
        served = self._served()
        with self._lock:
            self._latest = {key: latest for key, latest in self._latest.items() if key[0] in served}
            for ((id, _), preset), latest in self._latest.items():
                if len(latest) == WINDOW:
                    family.add_metric((id, preset), sum(latest) / len(latest))
        yield family

"""One thread that owns the model: it batches jobs that arrive together, and hands their outcomes back.

The event loop never runs model code, and a job's outcome does not depend on the jobs that shared its batch.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from models.checkpoint import Checkpoint
from models.defended import DefendedClassifier, defend
from models.errors import ConfigError, NotReadyError
from models.reverse_attack import PRESETS, to_uint8
from models.shapes import Float, UInt8

log = logging.getLogger("unperturb.engine")


class Outcome(NamedTuple):
    """One image's scores (softmax) with and without purification, what the purifier did, and timings in ms.

    Without purification `scores` and `unpurified_scores` are the same, and the rest of the purifier's fields None.
    """

    scores: Float[Tensor, " classes"]
    unpurified_scores: Float[Tensor, " classes"]
    image: UInt8[Tensor, "3 size size"] | None
    loss_before: float | None
    loss_after: float | None
    linf: float | None
    queue_ms: float
    purify_ms: float
    classify_ms: float


@dataclass(eq=False)
class Job:
    """One image; `preset` None to classify it as it is."""

    pixels: UInt8[Tensor, "3 size size"]
    preset: str | None
    seed: int
    done: "asyncio.Future[Outcome]"
    queued_at: float = field(default_factory=time.perf_counter)


class Engine:
    """The model behind a bounded queue; `start` it before submitting, `stop` it at the end."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        max_batch: int,
        batch_wait_s: float,
        max_queue: int,
    ) -> None:
        self.checkpoint, self.device = checkpoint, device
        self.max_batch, self.batch_wait_s = max_batch, batch_wait_s
        self.defended: dict[str, DefendedClassifier] = {
            name: defend(checkpoint, config) for name, config in PRESETS.items()
        }
        self.ready = threading.Event()
        self.failure: str | None = None
        self.max_queue = max_queue
        self._jobs: deque[Job] = deque()
        self._stopping = False
        self._changed = threading.Condition()  # guards the two above
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to warm up, then to work."""
        self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> None:
        """Take no more jobs, finish what is queued and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    async def submit(self, pixels: UInt8[Tensor, "3 size size"], *, preset: str | None, seed: int) -> Outcome:
        """Purify (unless `preset` is None) and classify one image.

        Raises ConfigError for an unknown preset, NotReadyError before warm-up, when the queue is full, and at the end.
        """
        if preset is not None and preset not in self.defended:
            raise ConfigError(f"preset {preset!r} is not one of {', '.join(self.defended)}")
        if not self.ready.is_set():
            raise NotReadyError(self.failure or "the model is still warming up")
        job = Job(pixels, preset, seed, asyncio.get_running_loop().create_future())
        with self._changed:
            if self._stopping:
                raise NotReadyError("the service is stopping")
            if len(self._jobs) >= self.max_queue:
                raise NotReadyError(f"{self.max_queue} images are waiting already; try again shortly")
            self._jobs.append(job)
            self._changed.notify_all()
        return await job.done

    def _work(self) -> None:
        try:
            self._warm_up()
        except Exception:
            log.exception("warm-up failed")
            self.failure = "the model failed to warm up; see the service's log"
            return
        self.ready.set()
        while (batch := self._next_batch()) is not None:
            self._run(batch)
        self.ready.clear()

    def _warm_up(self) -> None:
        """One image through every preset, so that the first request pays for no set-up."""
        size = self.checkpoint.classifier.image_size
        pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8)
        for name in self.defended:
            started = time.perf_counter()
            self._compute(pixels, torch.zeros(1, dtype=torch.int64), name)
            log.info("warmed up preset %s in %.2f s", name, time.perf_counter() - started)

    def _next_batch(self) -> list[Job] | None:
        """The oldest job and those like it that are here or come within the wait; None when stopped and done."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._stopping)
            if not self._jobs:
                return None
            preset = self._jobs[0].preset

            def full() -> bool:
                return self._stopping or sum(job.preset == preset for job in self._jobs) >= self.max_batch

            self._changed.wait_for(full, timeout=self.batch_wait_s)
            batch = [job for job in self._jobs if job.preset == preset][: self.max_batch]
            taken = set(batch)
            self._jobs = deque(job for job in self._jobs if job not in taken)
        return batch

    def _run(self, batch: list[Job]) -> None:
        batch = [job for job in batch if not job.done.cancelled()]  # a client that has gone costs nothing
        if not batch:
            return
        started = time.perf_counter()
        try:
            pixels = torch.stack([job.pixels for job in batch])
            seeds = torch.tensor([job.seed for job in batch], dtype=torch.int64)
            outcomes = self._compute(pixels, seeds, batch[0].preset)
        except Exception as error:
            log.exception("a batch of %d failed", len(batch))
            for job in batch:
                _deliver(job, error)
            return
        for job, outcome in zip(batch, outcomes, strict=True):
            _deliver(job, outcome._replace(queue_ms=(started - job.queued_at) * 1000))

    def _compute(self, pixels: Tensor, seeds: Tensor, preset: str | None) -> list[Outcome]:
        """The outcomes of one batch; the only place that runs the model."""
        x = pixels.to(self.device).float() / 255
        seeds = seeds.to(self.device)
        classifier = self.checkpoint.classifier
        with torch.no_grad():
            started = time.perf_counter()
            if preset is None:
                scores = classifier(x).softmax(1).cpu()
                spent_ms = (time.perf_counter() - started) * 1000
                return [Outcome(s, s, None, None, None, None, 0.0, 0.0, spent_ms) for s in scores]
            defended = self.defended[preset]
            image, trace = defended.purify(x, seed=seeds)
            epsilon = defended.purifier.loop.epsilon
            images = to_uint8(image, x, epsilon=epsilon).cpu()
            before, after, linf = (v.tolist() for v in (trace.loss_before, trace.loss_after, trace.linf))
            purify_ms = (time.perf_counter() - started) * 1000
            started = time.perf_counter()
            scores, unpurified = classifier(torch.cat((image, x))).softmax(1).cpu().chunk(2)
            classify_ms = (time.perf_counter() - started) * 1000
        return [
            Outcome(scores[i], unpurified[i], images[i], before[i], after[i], linf[i], 0.0, purify_ms, classify_ms)
            for i in range(len(x))
        ]


def _deliver(job: Job, result: Outcome | Exception) -> None:
    """Resolve the job's future on its own event loop, unless its client has gone."""

    def resolve() -> None:
        if job.done.done():
            return
        if isinstance(result, Exception):
            job.done.set_exception(result)
        else:
            job.done.set_result(result)

    try:
        job.done.get_loop().call_soon_threadsafe(resolve)
    except RuntimeError:  # the loop has closed: nobody waits any more
        log.debug("an outcome came after its event loop had closed")

"""A thread that owns one device: it fills free slots from the queue between steps, and hands outcomes back."""

import logging
import threading
import time
from collections.abc import Callable

import torch

from models.errors import DeadlineError, NotReadyError
from service.job_queue import JobQueue
from service.jobs import Job
from service.lane import Done, Lane
from service.loaded import LoadedModel, Replica, bucket
from service.metrics import Metrics

log = logging.getLogger("unperturb.engine")


class Worker:
    """Steps the slots of every model on its device, one model after the other.

    number:     its place among the workers, and of its replica in every model
    models:     to be warmed up before it is `warm`
    threads:    torch's CPU threads in it
    on_failure: called once, from this thread, with what broke
    """

    def __init__(
        self, number: int, queue: JobQueue, models: list[LoadedModel], *, max_batch: int, pad: bool, threads: int,
        metrics: Metrics, on_failure: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.number, self.queue, self.models = number, queue, models
        self.max_batch, self.pad, self.threads = max_batch, pad, threads
        self.warm = False
        self.metrics, self.on_failure = metrics, on_failure
        self.stepping_since: float | None = None  # time.monotonic() of the tick that it is in
        self._lanes: dict[LoadedModel, Lane] = {}
        self.thread = threading.Thread(target=self._work, name=f"worker-{number}", daemon=True)

    @property
    def active(self) -> int:
        """Slots in use."""
        return sum(len(lane.slots) for lane in list(self._lanes.values()))

    def _work(self) -> None:
        torch.set_num_threads(self.threads)
        try:
            for model in self.models:
                warm_up(model, model.replicas[self.number], max_batch=self.max_batch, pad=self.pad)
            self.warm = True
            while (jobs := self.queue.take(self.max_batch - self.active, busy=self.active > 0)) is not None:
                self.stepping_since = time.monotonic()
                self._admit(jobs)
                for model, lane in list(self._lanes.items()):
                    self._tick(model, lane)
                    self.stepping_since = time.monotonic()
                self.stepping_since = None
        except Exception as error:
            log.exception("worker %d failed", self.number)
            for lane in self._lanes.values():
                self._deliver(lane.drop_all(NotReadyError("the worker failed; the service is restarting")))
            self.on_failure(f"worker {self.number}: {type(error).__name__}")

    def _admit(self, jobs: list[Job]) -> None:
        for job in jobs:
            if job.over:
                self._deliver([Done(job, DeadlineError("the deadline passed while the image was waiting"))])
        by_model: dict[LoadedModel, list[Job]] = {}
        for job in jobs:
            if not job.over:
                by_model.setdefault(job.model, []).append(job)
        for model, wanted in by_model.items():
            lane = self._lanes.setdefault(model, Lane(model.replicas[self.number], pad=self.pad))
            self._deliver(lane.admit(wanted))

    def _tick(self, model: LoadedModel, lane: Lane) -> None:
        steps = sum(not slot.finished for slot in lane.slots)
        passes = sum(slot.job.passes_left for slot in lane.slots)
        started = time.perf_counter()
        done = lane.tick()
        if lane.replica.device.type == "cuda":  # admission is between steps: launch no further than the device is
            torch.cuda.synchronize(lane.replica.device)
        seconds = time.perf_counter() - started
        passes -= sum(slot.job.passes_left for slot in lane.slots)
        if steps:
            self.metrics.stepped(steps, seconds)
            if 2 * steps >= self.max_batch:  # what full batches cost is what a newcomer behind them waits for
                model.observe(seconds / max(passes, 1))
        self._deliver(done)
        if not lane.slots:
            del self._lanes[model]

    def _deliver(self, done: list[Done]) -> None:
        self.queue.finished(job for job, _ in done)
        for job, result in done:
            job.answer(result)


def warm_up(model: LoadedModel, replica: Replica, *, max_batch: int, pad: bool) -> None:
    """Every bucket through every stage, and what a pass costs in the fullest."""
    started, lane, spent = time.perf_counter(), Lane(replica, pad=pad), 0.0
    for size in sorted({bucket(n) for n in range(1, max_batch)} | {max_batch}):
        spent = lane.rehearse(model, size)
    model.observe(spent)
    log.info("warmed up %s on %s in %.1f s", model.id, replica.device, time.perf_counter() - started)

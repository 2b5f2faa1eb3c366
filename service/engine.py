"""The engine: models by id, one worker per device behind one bounded queue, and whether all of it is well.

The event loop never runs model code, and an image's outcome does not depend on the images that share its batch.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from models.errors import ConfigError, NotFoundError, NotReadyError
from service.job_queue import JobQueue
from service.jobs import Job, Outcome
from service.loaded import LoadedModel
from service.metrics import Metrics
from service.worker import Worker, warm_up

log = logging.getLogger("unperturb.engine")
WATCH_EVERY_S = 0.1


class Engine:
    """Start it before submitting; `drain`, then `stop`, at the end.

    on_failure is called, from a thread of the engine, when it can never serve again: a device has failed, or a worker
    has not finished a step for `stall_s`. Everybody who waits has been answered with NotReadyError by then.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        devices: Sequence[torch.device],
        max_batch: int,
        max_queue: int,
        max_wait_s: float,
        stall_s: float,
        pad: bool,
        threads: int,
        metrics: Metrics,
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        self.devices, self.max_batch, self.stall_s, self.pad = list(devices), max_batch, stall_s, pad
        self.models: dict[str, LoadedModel] = {model.id: model}
        self.default_id = model.id
        self.queue = JobQueue(max_jobs=max_queue, max_wait_s=max_wait_s, workers=len(self.devices))
        self.workers = [
            Worker(
                i, self.queue, [model], max_batch=max_batch, pad=pad, threads=threads, metrics=metrics,
                on_failure=self.fail,
            )
            for i in range(len(self.devices))
        ]  # fmt: skip
        self.failure: str | None = None
        self.draining = False
        self.warm = threading.Event()
        self._on_failure = on_failure
        self._failing = threading.Lock()

    @property
    def not_ready(self) -> str | None:
        """Why no request can be served now, or None."""
        if self.failure is not None:
            return f"the service has failed and must be restarted ({self.failure})"
        if self.draining:
            return "the service is stopping"
        return None if self.warm.is_set() else "the model is still warming up"

    def start(self) -> None:
        """Warm up in the background, then serve."""
        for worker in self.workers:
            worker.thread.start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def drain(self) -> None:
        """Take no more jobs; what is here is finished."""
        self.draining = True
        self.queue.close("the service is stopping")

    def stop(self, timeout_s: float) -> None:
        """Drain, and wait at most `timeout_s` for what is in progress; what is left then is refused."""
        self.drain()
        ends_at = time.monotonic() + timeout_s
        for worker in self.workers if self.failure is None else ():  # one that has stalled never ends
            if worker.thread.is_alive():
                worker.thread.join(max(0.0, ends_at - time.monotonic()))
        self.queue.fail_all(NotReadyError("the service has stopped"))

    def model(self, id: str | None) -> LoadedModel:
        """The model with that id, or the default one; NotFoundError lists the ids."""
        found = self.models.get(self.default_id if id is None else id)
        if found is None:
            raise NotFoundError(f"model {id!r} is not loaded; {', '.join(sorted(self.models))} is")
        return found

    def add(self, model: LoadedModel) -> None:
        """Warm a model up beside those that serve, then serve it, in place of one with the same id.

        Requests that are in progress end on the model that they began with.
        """
        for replica in model.replicas:
            warm_up(model, replica, max_batch=self.max_batch, pad=self.pad)
        self.models = {**self.models, model.id: model}

    def remove(self, id: str) -> None:
        """Serve a model no more; ConfigError for the default one."""
        self.model(id)
        if id == self.default_id:
            raise ConfigError(f"model {id!r} is the default one; it can be replaced but not removed")
        self.models = {name: model for name, model in self.models.items() if name != id}

    def refuse_if_full(self) -> None:
        """NotReadyError where not even one image could be taken now."""
        if (reason := self.not_ready) is not None:
            raise NotReadyError(reason)
        self.queue.refuse_if_full(1)

    async def submit(
        self, model: LoadedModel, images: Sequence[Tensor], *, stage: str | None, seeds: Sequence[int],
        deadline: float, wants_image: bool = False,
    ) -> list[Outcome]:  # fmt: skip
        """The outcomes of one request's images (uint8, or float32 in [0, 1]), each with its seed; all, or an error.

        Raises NotReadyError where they cannot be taken, DeadlineError past `deadline` (time.monotonic's clock),
        and what the model raised. Cancelling it frees the slots at the next step.
        """
        if not self.warm.is_set() or self.failure is not None:
            raise NotReadyError(self.not_ready or "the service is not ready")
        futures: list[asyncio.Future[Outcome]] = []
        jobs = []
        for image, seed in zip(images, seeds, strict=True):
            future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
            futures.append(future)
            jobs.append(Job(model, image, stage, seed, deadline, partial(_resolve, future), wants_image))
        self.queue.put(jobs)
        try:
            return list(await asyncio.gather(*futures))
        finally:
            for job in jobs:
                job.gone = True

    def fail(self, reason: str) -> None:
        """Serve never again, answer everybody who waits, and say so once."""
        with self._failing:
            if self.failure is not None:
                return
            self.failure = reason
        log.critical("the engine has failed: %s", reason)
        self.queue.fail_all(NotReadyError("the service has failed and is restarting"))
        if self._on_failure is not None:
            self._on_failure(reason)

    def _watch(self) -> None:
        while not self.draining and self.failure is None:
            if all(worker.warm for worker in self.workers):
                self.warm.set()
            for worker in self.workers:
                since = worker.stepping_since
                if since is not None and time.monotonic() - since > self.stall_s:
                    self.fail(f"worker {worker.number} has not finished a step for {self.stall_s:g} s")
            time.sleep(WATCH_EVERY_S)


def _resolve(future: "asyncio.Future[Outcome]", result: Outcome | Exception) -> None:
    """Set the future on its own event loop, unless its client has gone; from any thread."""

    def resolve() -> None:
        if future.done():
            return
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

    try:
        future.get_loop().call_soon_threadsafe(resolve)
    except RuntimeError:  # the loop has closed: nobody waits any more
        log.debug("an outcome came after its event loop had closed")

"""The engine: one worker per device behind one bounded queue, and whether all of it is well.

An image's outcome does not depend on the images that share its batch.
"""

import asyncio
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

from unperturb.models.errors import CheckpointError
from unperturb.service.engine.admission import Admission
from unperturb.service.engine.handle import WorkerHandle
from unperturb.service.engine.messages import (
    Cancel,
    Failed,
    Load,
    Loaded,
    LoadProgress,
    Outcome,
    StepReport,
    Unload,
    Work,
)
from unperturb.service.engine.registry import Model, ModelRegistry
from unperturb.service.engine.requests import ImageRequest
from unperturb.service.engine.worker import WorkerConfig
from unperturb.service.errors import DeadlineError, NotReadyError
from unperturb.service.telemetry.metrics import Metrics

log = logging.getLogger("unperturb.engine")
WATCH_EVERY_S = 0.1
LOAD_TIMEOUT_S = 900.0  # for one piece of a warm-up: a batch size of a stage, compiled or not


class Engine:
    """Start it before submitting; `stop` it at the end.

    admission:  which requests are let in
    stall_s:    for how long a worker that has work may say nothing
    on_failure: called, from a thread, when it can never serve again; everybody who waits has been answered with
                NotReadyError by then
    """

    def __init__(
        self,
        name: str,
        *,
        workers: Sequence[WorkerConfig],
        admission: Admission,
        stall_s: float,
        metrics: Metrics,
        on_failure: Callable[[str], None] | None = None,
        handle: Callable[..., WorkerHandle] = WorkerHandle,
    ) -> None:
        self.admission, self.stall_s, self.metrics = admission, stall_s, metrics
        self._ids = itertools.count(1)
        self.models = ModelRegistry(name, self._unload)
        self.workers = [handle(config, self._heard) for config in workers]
        self.failure: str | None = None
        self.draining = False
        self.warm = threading.Event()
        self._on_failure = on_failure
        self._jobs: dict[int, ImageRequest] = {}  # all that are not answered
        self._waiting: deque[ImageRequest] = deque()
        self._changed = threading.Condition(threading.RLock())  # guards the two above, and what workers have

    # -- its state -----------------------------------------------------------------------------------------------------

    @property
    def not_ready(self) -> str | None:
        """Why no request can be served now, or None."""
        if self.failure is not None:
            return "the service has failed and must be restarted"
        if self.draining:
            return "the service is stopping"
        return None if self.warm.is_set() else "the model is still warming up"

    @property
    def not_ready_ever(self) -> bool:
        """Whether it has ended, or is about to."""
        return self.failure is not None or self.draining

    @property
    def waiting(self) -> int:
        """Images that wait for a slot."""
        return len(self._waiting)

    @property
    def in_slots(self) -> int:
        """Images that workers have."""
        return sum(len(worker.busy) for worker in self.workers)

    def start(self) -> None:
        """Start the workers, warm up in the background, then serve."""
        for worker in self.workers:
            worker.start()
        threading.Thread(target=self._warm_up, name="warm-up", daemon=True).start()

    def stop(self, timeout_s: float) -> None:
        """Take no more, and wait at most `timeout_s` for what is in progress; what is left then is refused."""
        self.draining = True
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs or self.failure is not None, timeout_s)
        self.refuse_rest()
        for worker in self.workers:
            worker.hang_up()
        for worker in self.workers:
            worker.wait(1.0 if self.failure is not None else 5.0)

    def refuse_rest(self) -> None:
        """Answer everybody who still waits with NotReadyError: the time is over."""
        self._refuse_all(NotReadyError("the service has stopped"))

    def fail(self, reason: str) -> None:
        """Serve never again, answer everybody who waits, and say so once."""
        with self._changed:
            if self.failure is not None:
                return
            self.failure = reason
            self._changed.notify_all()
        log.critical("the engine has failed: %s", reason)
        self._refuse_all(NotReadyError("the service has failed and is restarting"))
        if self._on_failure is not None:
            self._on_failure(reason)

    # -- its models ----------------------------------------------------------------------------------------------------

    def add(self, name: str, id: str | None, *, digest: str | None = None, default: bool = False) -> Model:
        """Load a checkpoint and warm it up beside those that serve, then serve it, in place of one with the same id.

        Requests that are in progress end on the model that they began with. Raises CheckpointError for one that cannot
        be served or has another digest, NotReadyError where the service ends meanwhile.
        """
        model = self.models.check(name, id, digest=digest)
        self._load(model)
        self.models.put(model, default=default)
        return model

    def _load(self, model: Model) -> None:
        with self._changed:
            for worker in self.workers:
                worker.load(Load(model.number, model.name, model.card.weights_sha256))

        def loaded() -> bool:
            return self.not_ready_ever or all(model.number in worker.loaded for worker in self.workers)

        with self._changed:
            while not self._changed.wait_for(loaded, WATCH_EVERY_S):
                now = time.monotonic()
                silent = [now - worker.last_heard for worker in self.workers if model.number in worker.loading]
                if max(silent, default=0.0) > LOAD_TIMEOUT_S:
                    self.fail(f"the loading of model {model.id} has not gone on for {LOAD_TIMEOUT_S:g} s")
            if self.not_ready_ever:
                raise NotReadyError(self.not_ready or "the service is stopping")
            found = [worker.loaded.pop(model.number) for worker in self.workers]
        for one in found:
            if one.refused is not None:
                self._unload(model)
                raise CheckpointError(one.refused)
        model.cost = max((one.cost for one in found), key=lambda cost: cost.alone(self.admission.default_stage))

    def _unload(self, model: Model) -> None:
        for worker in self.workers:
            worker.say(Unload(model.number))

    def _warm_up(self) -> None:
        try:
            self._load(self.models.get(None))
        except (CheckpointError, NotReadyError) as error:
            if not self.draining:
                self.fail(f"warm-up: {error}")
            return
        self.warm.set()
        while not self.draining and self.failure is None:
            time.sleep(WATCH_EVERY_S)
            for worker in self.workers:
                with self._changed:  # a large model's warm-up may take longer than a step
                    silent_s = time.monotonic() - worker.last_heard if worker.busy and not worker.loading else 0.0
                if silent_s > self.stall_s:
                    self.fail(f"worker {worker.config.device} has not finished a step for {self.stall_s:g} s")

    # -- its queue -----------------------------------------------------------------------------------------------------

    def refuse_if_full(self, model: Model | None, stage: str | None) -> None:
        """NotReadyError, with the seconds after which to try again, where one more image cannot be taken now.

        model: None where it is not known yet which model and stage it will be
        """
        if (reason := self.not_ready) is not None:
            raise NotReadyError(reason)
        with self._changed:
            self._refuse(model, stage, 1, math.inf)

    async def submit(
        self,
        model: Model,
        images: Sequence[NDArray[Any]],
        *,
        stage: str | None,
        seeds: Sequence[int],
        deadline: float,
        wants_image: bool = False,
        begun: bool = False,
        gate: float | None = None,
    ) -> list[Outcome]:
        """The outcomes of one request's images (uint8, or float32 in [0, 1]), each with its seed; all, or an error.

        begun: work has been done for this request already, so that it is not refused for the work of others.
        gate: a first loss up to which an image is left as it is.
        Raises NotReadyError where they cannot be taken, DeadlineError past `deadline` (time.monotonic's clock),
        and what the model raised. Cancelling it frees the slots at the next step.
        """
        if not self.warm.is_set():
            raise NotReadyError(self.not_ready or "the service is not ready")
        loop = asyncio.get_running_loop()
        jobs = [
            ImageRequest(next(self._ids), model, image, stage, seed, wants_image, loop, loop.create_future(), gate)
            for image, seed in zip(images, seeds, strict=True)
        ]
        with self._changed:
            if self.failure is not None:
                raise NotReadyError(self.not_ready or "")
            if not begun:
                self._refuse(model, stage, len(jobs), deadline - time.monotonic())
            self._jobs.update((job.id, job) for job in jobs)
            self._waiting.extend(jobs)
            self._hand_out()
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return list(await asyncio.gather(*(job.future for job in jobs)))
        except TimeoutError as error:
            raise DeadlineError("the deadline passed before the answer was there") from error
        finally:
            self._forget(jobs)

    def _refuse(self, model: Model | None, stage: str | None, images: int, left_s: float) -> None:
        """Under the lock."""
        jobs = self._jobs.values()
        self.admission.check_queue_length(self.workers, jobs, waiting=self.waiting, stage=stage, images=images)
        if model is not None:
            self.admission.check_added_time(self.workers, jobs, model=model, stage=stage, left_s=left_s)

    def _hand_out(self) -> None:
        """Give waiting images to the workers with the most free slots; under the lock.

        First come, first served, of those with steps and of those without: these hold a slot for one step only.
        """
        left: deque[ImageRequest] = deque()
        for job in self._waiting:
            worker = min(self.workers, key=lambda worker: len(worker.busy))
            if worker.room(job.stage) <= 0:
                left.append(job)
                continue
            job.worker = worker
            worker.give(
                Work(job.id, job.model.number, job.image, job.stage, job.seed, job.wants_image, job.queued_at, job.gate)
            )
        self._waiting = left

    def _forget(self, jobs: Sequence[ImageRequest]) -> None:
        """Nobody waits for these any more: take back those that are not answered."""
        with self._changed:
            for job in jobs:
                if self._jobs.pop(job.id, None) is None:
                    continue
                if job.worker is None:
                    self._waiting.remove(job)
                else:
                    job.worker.take_back([job.id])
                    job.worker.say(Cancel((job.id,)))
            self._hand_out()
            self._changed.notify_all()

    def _heard(self, worker: WorkerHandle, message: StepReport | LoadProgress | Loaded | Failed) -> None:
        """From a worker's thread."""
        match message:
            case Failed(reason):
                self.fail(f"worker {worker.config.device}: {reason}")
            case Loaded(number):
                with self._changed:
                    worker.loaded[number] = message
                    worker.loading.discard(number)
                    worker.last_heard = time.monotonic()
                    self._changed.notify_all()
            case StepReport():
                self._stepped(worker, message)

    def _stepped(self, worker: WorkerHandle, message: StepReport) -> None:
        worker.memory = message.memory
        with self._changed:
            if message.pace is not None:
                for model in {job.model for job in self._jobs.values() if job.model.number == message.model}:
                    model.observe(message.pace)
            answered = [(self._jobs.pop(id, None), result) for id, result in message.ended]
            worker.take_back(id for id, _ in message.ended)
            self._hand_out()
            self._changed.notify_all()
        for job, result in answered:
            if job is not None:
                job.answer(result)
        if message.slots:
            self.metrics.stepped(message.slots, message.seconds)

    def _refuse_all(self, error: Exception) -> None:
        with self._changed:
            left = list(self._jobs.values())
            self._jobs.clear()
            self._waiting.clear()
            for worker in self.workers:
                worker.take_back(worker.busy)
            self._changed.notify_all()
        for job in left:
            job.answer(error)

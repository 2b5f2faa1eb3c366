"""Let images in, send them to the workers that the scheduler chooses, and answer those who wait for them."""

import asyncio
import functools
import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from unperturb.service.engine.admission import Admission
from unperturb.service.engine.handle import WorkerHandle
from unperturb.service.engine.lifecycle import NOT_READY, OPEN, EngineState, Lifecycle
from unperturb.service.engine.messages import (
    Admit,
    Cancel,
    Cancelled,
    Loaded,
    LoadProgress,
    Outcome,
    StepReport,
    Threads,
    Upgraded,
    Work,
)
from unperturb.service.engine.registry import Model
from unperturb.service.engine.requests import ImageRequest, resolve
from unperturb.service.engine.scheduled_worker import WorkerState
from unperturb.service.engine.scheduler import Scheduler
from unperturb.service.errors import DeadlineError, NotReadyError

LATE = "the deadline passed before the answer was there, or would have"
QUIET_S = 1.0  # of silence of every other worker, past which one that is busy has their threads


class Dispatcher:
    """Carry images between those who submit them, the scheduler and the workers, under the lifecycle's lock."""

    def __init__(
        self, scheduler: Scheduler, workers: Sequence[WorkerHandle], lifecycle: Lifecycle, admission: Admission
    ) -> None:
        self.scheduler, self.workers, self.lifecycle, self.admission = scheduler, workers, lifecycle, admission
        self._ids = itertools.count(1)
        self._threads = [worker.config.threads for worker in workers]  # that each has now

    def refuse_if_full(
        self,
        model: Model | None,
        stage: str | None,
        client: str = "",
        *,
        left_s: float = math.inf,
        patient: bool = False,
    ) -> None:
        """Raise NotReadyError, with the seconds after which to try again, where one more image cannot be taken now.

        model: None where it is not known yet which model and stage it will be
        left_s, patient: as in `Admission.check_added_time`
        """
        if self.lifecycle.state is not EngineState.LEAVING:
            self.lifecycle.require_ready()
        with self.lifecycle.changed:
            self._refuse_if_full(model, stage, client, 1, left_s, patient)

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
        client: str = "",
        patient: bool = False,
    ) -> list[Outcome]:
        """Return the outcomes of one request's images (uint8, or float32 in [0, 1]), each with its seed; all, or raise.

        client: whose it is; every client gets an equal share of the devices' time
        patient: it chose its deadline itself, and is refused for the work of others only where that cannot be kept
        begun: work has been done for this request already, so that it is not refused for the work of others.
        gate: a first loss up to which an image is left as it is.
        Raises NotReadyError where they cannot be taken, DeadlineError past `deadline` (time.monotonic's clock),
        and what the model raised. Cancelling it frees the slots at the next step.
        """
        loop, now = asyncio.get_running_loop(), time.monotonic()
        futures: list[asyncio.Future[Outcome]] = [loop.create_future() for _ in images]
        requests = [
            ImageRequest(
                Work(next(self._ids), model.number, image, stage, seed, wants_image, now, gate),
                model,
                functools.partial(resolve, future),
                client,
                deadline,
            )
            for image, seed, future in zip(images, seeds, futures, strict=True)
        ]
        with self.lifecycle.changed:
            if self.lifecycle.state not in (*OPEN, EngineState.DRAINING):
                raise NotReadyError(NOT_READY[self.lifecycle.state])
            if not begun:
                self._refuse_if_full(model, stage, client, len(requests), deadline - now, patient)
            self.scheduler.add(requests)
            self._schedule()
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return list(await asyncio.gather(*futures))
        except TimeoutError as error:
            raise DeadlineError(LATE) from error
        finally:
            self._finish(requests)

    def update(self, index: int, report: StepReport | Cancelled | LoadProgress | Loaded | Upgraded) -> None:
        """Take in what a worker reports, answer what it has ended, and fill its slots."""
        with self.lifecycle.changed:
            answered = self.scheduler.update(index, report)
            self._schedule()
            self.lifecycle.changed.notify_all()
        for request, result in answered:
            request.answer(result)

    def refuse_all(self, error: Exception) -> None:
        """Answer everybody who waits with that error."""
        with self.lifecycle.changed:
            dropped = self.scheduler.clear()
            self.lifecycle.changed.notify_all()
        for request in dropped:
            request.answer(error)

    def _refuse_if_full(
        self, model: Model | None, stage: str | None, client: str, images: int, left_s: float, patient: bool
    ) -> None:
        """Raise NotReadyError where images cannot be taken; under the lock."""
        self.admission.check_queue_length(self.scheduler, stage=stage, images=images)
        if model is not None:
            self.admission.check_added_time(
                self.scheduler, model=model, stage=stage, client=client, left_s=left_s, patient=patient
            )

    def _schedule(self) -> None:
        """Send waiting images to workers that have free slots, and refuse those that are too late; under the lock."""
        given, late = self.scheduler.schedule()
        self._share_threads()
        for index, worker in enumerate(self.workers):
            if works := tuple(request.work for its, request in given if its == index):
                worker.send(Admit(works))
        for request in late:
            request.answer(DeadlineError(LATE))

    def _share_threads(self) -> None:
        """Give a worker the others' threads while they have had nothing to do for some time; under the lock.

        Between requests that follow one another soon it keeps its own: a batch on all of them, begun an instant before
        another worker's, is slower than on half. A warm-up has none of them either: what it measures is what work costs
        beside others.
        """
        for index, (worker, handle) in enumerate(zip(self.scheduler.workers, self.workers, strict=True)):
            if worker.state is WorkerState.IDLE:
                continue  # it is told with its next image
            alone = worker.state is WorkerState.STEPPING and self.scheduler.is_alone(index, QUIET_S)
            count = handle.config.alone if alone and handle.config.alone else handle.config.threads
            if count != self._threads[index]:
                self._threads[index] = count
                handle.send(Threads(count))

    def _finish(self, requests: Sequence[ImageRequest]) -> None:
        """Drop those of a request's images that are not answered: nobody waits for them any more."""
        with self.lifecycle.changed:
            for index, id in self.scheduler.finish(requests):
                self.workers[index].send(Cancel((id,)))
            self._schedule()
            self.lifecycle.changed.notify_all()

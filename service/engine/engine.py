"""Run the engine: one worker per device behind one bounded queue, and whether all of it is well.

An image's outcome does not depend on the images that share its batch.
"""

import asyncio
import functools
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

from numpy.typing import NDArray

from unperturb.models.errors import CheckpointError
from unperturb.service.engine.admission import Admission
from unperturb.service.engine.handle import WorkerHandle
from unperturb.service.engine.messages import (
    Cancel,
    Failed,
    FromWorker,
    Load,
    Loaded,
    LoadProgress,
    Outcome,
    StepReport,
    Unload,
    Upgraded,
    Work,
    WorkerConfig,
)
from unperturb.service.engine.registry import Model, ModelRegistry
from unperturb.service.engine.requests import ImageRequest, resolve
from unperturb.service.engine.scheduler import Scheduler, WorkerState
from unperturb.service.errors import DeadlineError, NotReadyError
from unperturb.service.telemetry.metrics import Metrics

log = logging.getLogger("unperturb.engine")
WATCH_EVERY_S = 0.1
LATE = "the deadline passed before the answer was there, or would have"
LOAD_TIMEOUT_S = 900.0  # for one piece of a warm-up: a batch size of a stage, compiled or not


class EngineState(Enum):
    """The states of the engine: what it does with requests."""

    WARMING_UP = "warming up"
    SERVING = "serving"
    LEAVING = "leaving"  # as SERVING, but it says that it will not serve for long
    DRAINING = "draining"  # what was let in before is still taken
    STOPPED = "stopped"
    FAILED = "failed"


NOT_READY = {
    EngineState.WARMING_UP: "the model is still warming up",
    EngineState.LEAVING: "the service is stopping",
    EngineState.DRAINING: "the service is stopping",
    EngineState.STOPPED: "the service is stopping",
    EngineState.FAILED: "the service has failed and must be restarted",
}
OPEN = (EngineState.SERVING, EngineState.LEAVING)  # new requests are taken


class Engine:
    """Serve images on workers; start it before submitting, and `stop` it at the end.

    admission:  which requests are let in
    stall_s:    for how long a worker that has work may say nothing
    on_failure: called, from a thread, when it can never serve again; everybody who waits has been answered with
                NotReadyError by then
    failure:    why it can never serve again, or None
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
        self.models = ModelRegistry(name, self._unload)
        self.scheduler = Scheduler([config.slots for config in workers])
        self.workers = [
            handle(config, functools.partial(self._on_message, index)) for index, config in enumerate(workers)
        ]
        self.state = EngineState.WARMING_UP
        self.failure: str | None = None
        self.progress = ""  # of the warm-up, in words
        self._on_failure = on_failure
        self._ids = itertools.count(1)
        self._changed = threading.Condition(threading.RLock())  # guards the scheduler and the state

    # -- its state -----------------------------------------------------------------------------------------------------

    @property
    def not_ready(self) -> str | None:
        """Return why requests should not be sent here now, or None."""
        reason = NOT_READY.get(self.state)
        return f"{reason}: {self.progress}" if self.state is EngineState.WARMING_UP and self.progress else reason

    def require_ready(self) -> None:
        """Raise NotReadyError, with the reason, where requests should not be sent here now."""
        if (reason := self.not_ready) is not None:
            raise NotReadyError(reason)

    @property
    def ending(self) -> bool:
        """Return whether it has been told to end."""
        return self.state in (EngineState.LEAVING, EngineState.DRAINING, EngineState.STOPPED)

    def require_alive(self) -> None:
        """Raise NotReadyError where it can never serve again."""
        if self.state is EngineState.FAILED:
            raise NotReadyError(NOT_READY[self.state])

    def wait_until_ready(self, timeout_s: float) -> bool:
        """Wait for the end of the warm-up, and return whether it serves."""
        with self._changed:
            self._changed.wait_for(lambda: self.state is not EngineState.WARMING_UP, timeout_s)
        return self.state is EngineState.SERVING

    @property
    def waiting(self) -> int:
        """Return how many images wait for a slot."""
        return len(self.scheduler.waiting)

    @property
    def in_slots(self) -> int:
        """Return how many images workers have."""
        return self.scheduler.running

    @property
    def gpu_memory(self) -> dict[str, int]:
        """Return the bytes in use by tensors on each GPU."""
        every = zip(self.workers, self.scheduler.workers, strict=True)
        return {
            handle.config.device: worker.memory for handle, worker in every if handle.config.device.startswith("cuda")
        }

    def start(self) -> None:
        """Start the workers, warm up in the background, then serve."""
        for worker in self.workers:
            worker.start()
        threading.Thread(target=self._warm_up, name="warm-up", daemon=True).start()

    def leave(self) -> None:
        """Be ready no more, so that balancers send no more, but take what they still send; for signal handlers."""
        with self._changed:
            if self.state is EngineState.WARMING_UP:
                self.state = EngineState.STOPPED
            elif self.state is EngineState.SERVING:
                self.state = EngineState.LEAVING

    def drain(self) -> None:
        """Take no new requests; what was let in before is still finished."""
        with self._changed:
            self.leave()
            if self.state is EngineState.LEAVING:
                self.state = EngineState.DRAINING

    def stop(self, timeout_s: float) -> None:
        """Take no more, and wait at most `timeout_s` for what is in progress; what is left then is refused."""
        self.drain()
        with self._changed:
            self._changed.wait_for(lambda: self.scheduler.empty or self.state is EngineState.FAILED, timeout_s)
            if self.state is EngineState.DRAINING:
                self.state = EngineState.STOPPED
        self.refuse_rest()
        for worker in self.workers:
            worker.close()
        for worker in self.workers:
            worker.wait(1.0 if self.state is EngineState.FAILED else 5.0)

    def refuse_rest(self) -> None:
        """Answer everybody who still waits with NotReadyError: the time is over."""
        self._refuse_all(NotReadyError("the service has stopped"))

    def fail(self, reason: str) -> None:
        """Serve never again, answer everybody who waits, and say so once."""
        with self._changed:
            if self.state is EngineState.FAILED:
                return
            self.state, self.failure = EngineState.FAILED, reason
            self._changed.notify_all()
        log.critical("the engine has failed: %s", reason)
        self._refuse_all(NotReadyError("the service has failed and is restarting"))
        if self._on_failure is not None:
            self._on_failure(reason)

    def _refuse_all(self, error: Exception) -> None:
        with self._changed:
            dropped = self.scheduler.clear()
            self._changed.notify_all()
        for request in dropped:
            request.answer(error)

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
            self.scheduler.load(model)
            for worker in self.workers:
                worker.send(Load(model.number, model.name, model.card.weights_sha256))
        answers = self._wait_until_loaded(model)
        for answer in answers:
            if answer.refused is not None:
                self._unload(model)
                raise CheckpointError(answer.refused)
        model.execution = self.workers[0].config.execution
        default_stage = self.admission.default_stage
        model.cost = max((answer.cost for answer in answers), key=lambda cost: cost.alone(default_stage))

    def _wait_until_loaded(self, model: Model) -> list[Loaded]:
        """Wait for every worker's answer; fail where one has been silent for too long, raise where the service ends."""

        def loading() -> bool:
            return self.state in (EngineState.WARMING_UP, *OPEN)

        def decided() -> bool:
            return not loading() or self.scheduler.is_loaded(model)

        with self._changed:
            while not self._changed.wait_for(decided, WATCH_EVERY_S):
                if self.scheduler.stalled(WorkerState.LOADING, LOAD_TIMEOUT_S) is not None:
                    self.fail(f"the loading of model {model.id} has not gone on for {LOAD_TIMEOUT_S:g} s")
            if not loading():
                raise NotReadyError(NOT_READY[self.state])
            return self.scheduler.take_loaded(model)

    def _unload(self, model: Model) -> None:
        for worker in self.workers:
            worker.send(Unload(model.number))

    def _warm_up(self) -> None:
        """Load the first model, then watch for workers that stall."""
        try:
            self._load(self.models.get(None))
        except (CheckpointError, NotReadyError) as error:
            if self.state is EngineState.WARMING_UP:
                self.fail(f"warm-up: {error}")
            return
        with self._changed:
            if self.state is EngineState.WARMING_UP:
                self.state = EngineState.SERVING
                self._changed.notify_all()
        while self.state in OPEN:
            time.sleep(WATCH_EVERY_S)
            with self._changed:  # a large model's warm-up may take longer than a step
                index = self.scheduler.stalled(WorkerState.STEPPING, self.stall_s)
            if index is not None:
                device = self.workers[index].config.device
                self.fail(f"worker {device} has not finished a step for {self.stall_s:g} s")

    # -- its queue -----------------------------------------------------------------------------------------------------

    def refuse_if_full(self, model: Model | None, stage: str | None, client: str = "") -> None:
        """Raise NotReadyError, with the seconds after which to try again, where one more image cannot be taken now.

        model: None where it is not known yet which model and stage it will be
        """
        if self.state is not EngineState.LEAVING:
            self.require_ready()
        with self._changed:
            self._refuse_if_full(model, stage, client, 1, math.inf)

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
    ) -> list[Outcome]:
        """Return the outcomes of one request's images (uint8, or float32 in [0, 1]), each with its seed; all, or raise.

        client: whose it is; every client gets an equal share of the devices' time
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
        with self._changed:
            if self.state not in (*OPEN, EngineState.DRAINING):
                raise NotReadyError(NOT_READY[self.state])
            if not begun:
                self._refuse_if_full(model, stage, client, len(requests), deadline - now)
            self.scheduler.add(requests)
            self._schedule()
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return list(await asyncio.gather(*futures))
        except TimeoutError as error:
            raise DeadlineError(LATE) from error
        finally:
            self._finish(requests)

    def _refuse_if_full(self, model: Model | None, stage: str | None, client: str, images: int, left_s: float) -> None:
        """Raise NotReadyError where images cannot be taken; under the lock."""
        self.admission.check_queue_length(self.scheduler, stage=stage, images=images)
        if model is not None:
            self.admission.check_added_time(self.scheduler, model=model, stage=stage, client=client, left_s=left_s)

    def _schedule(self) -> None:
        """Send waiting images to workers that have free slots, and refuse those that are too late; under the lock."""
        given, late = self.scheduler.schedule()
        for index, request in given:
            self.workers[index].send(request.work)
        for request in late:
            request.answer(DeadlineError(LATE))

    def _finish(self, requests: Sequence[ImageRequest]) -> None:
        """Drop those of a request's images that are not answered: nobody waits for them any more."""
        with self._changed:
            for index, id in self.scheduler.finish(requests):
                self.workers[index].send(Cancel((id,)))
            self._schedule()
            self._changed.notify_all()

    def _on_message(self, index: int, message: FromWorker) -> None:
        """Take in what a worker says, from a thread of its handle."""
        if isinstance(message, Failed):
            self.fail(f"worker {self.workers[index].config.device}: {message.reason}")
            return
        with self._changed:
            answered = self.scheduler.update(index, message)
            self._schedule()
            self._changed.notify_all()
        for request, result in answered:
            request.answer(result)
        if isinstance(message, Upgraded):
            for model in self.models.by_id.values():
                if model.number == message.model:
                    model.cost, model.pace, model.execution = message.cost, 1.0, message.execution
        if isinstance(message, LoadProgress) and self.state is EngineState.WARMING_UP:
            self.progress = f"piece {message.done + 1} of {message.pieces}"
            log.info("warming up on %s: %s", self.workers[index].config.device, self.progress)
        if isinstance(message, StepReport) and message.slots:
            self.metrics.stepped(message.slots, message.seconds)

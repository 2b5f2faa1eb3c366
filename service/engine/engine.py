"""Run the engine: one worker per device behind one bounded queue, and whether all of it is well.

An image's outcome does not depend on the images that share its batch.
"""

import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence

from unperturb.models.errors import CheckpointError
from unperturb.service.engine.admission import Admission
from unperturb.service.engine.dispatch import Dispatcher
from unperturb.service.engine.handle import WorkerHandle
from unperturb.service.engine.lifecycle import OPEN, EngineState, Lifecycle
from unperturb.service.engine.loading import ModelLoader
from unperturb.service.engine.messages import (
    Failed,
    FromWorker,
    Loaded,
    LoadProgress,
    StepReport,
    Upgraded,
    WorkerConfig,
)
from unperturb.service.engine.registry import Model, ModelRegistry
from unperturb.service.engine.scheduled_worker import WorkerState
from unperturb.service.engine.scheduler import Scheduler
from unperturb.service.errors import NotReadyError
from unperturb.service.telemetry.metrics import Metrics

log = logging.getLogger("unperturb.engine")
WATCH_EVERY_S = 0.1


class Engine:
    """Serve images on workers; start it before submitting, and `stop` it at the end.

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
        self.stall_s, self.metrics, self._on_failure = stall_s, metrics, on_failure
        self.lifecycle = Lifecycle()
        self.scheduler = Scheduler([config.slots for config in workers])
        self.workers = [
            handle(config, functools.partial(self._on_message, index)) for index, config in enumerate(workers)
        ]
        self.loader = ModelLoader(
            self.scheduler, self.workers, self.lifecycle, stage=admission.default_stage, fail=self.fail
        )
        self.models = ModelRegistry(name, self.loader.unload)
        self.dispatcher = Dispatcher(self.scheduler, self.workers, self.lifecycle, admission)

    # -- what it has ---------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Return how many images wait for a slot."""
        return len(self.scheduler.waiting)

    @property
    def in_slots(self) -> int:
        """Return how many slots have an image, or are wanted by one that waits: some are kept for short ones."""
        workers = self.scheduler.workers
        taken = sum(min(worker.slots, worker.running) for worker in workers)
        return min(sum(worker.slots for worker in workers), taken + self.waiting)

    @property
    def gpu_memory(self) -> dict[str, int]:
        """Return the bytes in use by tensors on each GPU."""
        every = zip(self.workers, self.scheduler.workers, strict=True)
        return {
            handle.config.device: worker.memory for handle, worker in every if handle.config.device.startswith("cuda")
        }

    @property
    def worker_processes(self) -> dict[str, int]:
        """Return the id of each worker's process, by the worker's number."""
        return {str(index): one.process.pid for index, one in enumerate(self.workers) if one.process is not None}

    def add(self, name: str, id: str | None, *, digest: str | None = None, default: bool = False) -> Model:
        """Load a checkpoint and warm it up beside those that serve, then serve it, in place of one with the same id.

        Requests that are in progress end on the model that they began with. Raises CheckpointError for one that cannot
        be served or has another digest, NotReadyError where the service ends meanwhile.
        """
        model = self.models.check(name, id, digest=digest)
        self.loader.load(model)
        self.models.put(model, default=default)
        return model

    # -- from its start to its end -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the workers, warm up in the background, then serve."""
        for worker in self.workers:
            worker.start()
        threading.Thread(target=self._warm_up, name="warm-up", daemon=True).start()

    def stop(self, timeout_s: float) -> None:
        """Take no more, and wait at most `timeout_s` for what is in progress; what is left then is refused."""
        life = self.lifecycle
        life.drain()
        with life.changed:
            life.changed.wait_for(lambda: self.scheduler.empty or life.state is EngineState.FAILED, timeout_s)
        self.refuse_rest()
        for worker in self.workers:
            worker.close()
        for worker in self.workers:
            worker.wait(1.0 if life.state is EngineState.FAILED else 5.0)

    def refuse_rest(self) -> None:
        """Answer everybody who still waits, or still comes, with NotReadyError: the time is over."""
        self.lifecycle.stop()
        self.dispatcher.refuse_all(NotReadyError("the service has stopped"))

    def fail(self, reason: str) -> None:
        """Serve never again, answer everybody who waits, and say so once."""
        if not self.lifecycle.fail(reason):
            return
        log.critical("the engine has failed: %s", reason)
        self.dispatcher.refuse_all(NotReadyError("the service has failed and is restarting"))
        if self._on_failure is not None:
            self._on_failure(reason)

    def _warm_up(self) -> None:
        """Load the first model, then watch for workers that stall."""
        life = self.lifecycle
        try:
            self.loader.load(self.models.get(None))
        except (CheckpointError, NotReadyError) as error:
            if life.state is EngineState.WARMING_UP:
                self.fail(f"warm-up: {error}")
            return
        life.serve()
        while life.state in OPEN:
            time.sleep(WATCH_EVERY_S)
            with life.changed:  # a large model's warm-up may take longer than a step
                index = self.scheduler.stalled(WorkerState.STEPPING, self.stall_s)
            if index is not None:
                device = self.workers[index].config.device
                self.fail(f"worker {device} has not finished a step for {self.stall_s:g} s")

    def _on_message(self, index: int, message: FromWorker) -> None:
        """Take in what a worker says, from a thread of its handle."""
        device = self.workers[index].config.device
        if isinstance(message, Failed):
            self.fail(f"worker {device}: {message.reason}")
            return
        if isinstance(message, Loaded | Upgraded):
            self.loader.update(index, message)
        self.dispatcher.update(index, message)
        if isinstance(message, LoadProgress) and self.lifecycle.state is EngineState.WARMING_UP:
            self.lifecycle.progress = f"piece {message.done + 1} of {message.pieces}"
            log.info("warming up on %s: %s", device, self.lifecycle.progress)
        if isinstance(message, StepReport) and message.stepped:
            self.metrics.stepped(len(message.stepped), message.seconds)

"""Load models on every worker, and wait for their warm-up."""

from collections.abc import Callable, Sequence
from typing import get_args

from unperturb.models.errors import CheckpointError
from unperturb.models.inference.captured import Execution
from unperturb.service.engine.handle import WorkerHandle
from unperturb.service.engine.lifecycle import NOT_READY, OPEN, EngineState, Lifecycle
from unperturb.service.engine.messages import Load, Loaded, Unload, Upgraded
from unperturb.service.engine.registry import Model
from unperturb.service.engine.scheduled_worker import WorkerState
from unperturb.service.engine.scheduler import Scheduler
from unperturb.service.errors import NotReadyError

POLL_S = 0.1
LOAD_TIMEOUT_S = 900.0  # for one piece of a warm-up: a batch size of a stage, compiled or not


class ModelLoader:
    """Load and unload models on all workers together.

    stage: the one whose cost says which worker is the slowest
    fail:  called where a worker has been silent for too long
    """

    def __init__(
        self,
        scheduler: Scheduler,
        workers: Sequence[WorkerHandle],
        lifecycle: Lifecycle,
        *,
        stage: str,
        fail: Callable[[str], None],
    ) -> None:
        self.scheduler, self.workers, self.lifecycle = scheduler, workers, lifecycle
        self.stage, self._fail = stage, fail
        self._models: dict[int, Model] = {}  # by number, from when workers are asked to load them

    def load(self, model: Model) -> None:
        """Load a model and warm it up.

        Raises CheckpointError where a worker cannot serve it, NotReadyError where the service ends meanwhile.
        """
        with self.lifecycle.changed:
            self._models[model.number] = model
            self.scheduler.load(model)
            for worker in self.workers:
                worker.send(Load(model.number, model.name, model.card.weights_sha256))
        answers = self._wait_until_loaded(model)
        for answer in answers:
            if answer.refused is not None:
                self.unload(model)
                raise CheckpointError(answer.refused)

    def update(self, index: int, message: Loaded | Upgraded) -> None:
        """Note how a model runs on one worker now, and what it costs there; what is shown of it is the slowest's."""
        first = self.workers[index].config.execution
        with self.lifecycle.changed:
            if (model := self._models.get(message.model)) is None:
                return
            model.workers[index] = message.execution if isinstance(message, Upgraded) else first, message.cost
            executions, costs = zip(*model.workers.values(), strict=True)
            model.execution = min(executions, key=get_args(Execution).index)
            model.cost, model.pace = max(costs, key=lambda cost: cost.alone(self.stage)), 1.0

    def unload(self, model: Model) -> None:
        """Tell every worker that no more work comes for a model."""
        self._models.pop(model.number, None)
        for worker in self.workers:
            worker.send(Unload(model.number))

    def _wait_until_loaded(self, model: Model) -> list[Loaded]:
        """Wait for every worker's answer; fail where one has been silent for too long, raise where the service ends."""

        def loading() -> bool:
            return self.lifecycle.state in (EngineState.WARMING_UP, *OPEN)

        def decided() -> bool:
            return not loading() or self.scheduler.is_loaded(model)

        while True:
            with self.lifecycle.changed:
                if self.lifecycle.changed.wait_for(decided, POLL_S):
                    if not loading():
                        raise NotReadyError(NOT_READY[self.lifecycle.state])
                    return self.scheduler.take_loaded(model)
                stalled = self.scheduler.stalled(WorkerState.LOADING, LOAD_TIMEOUT_S) is not None
            if stalled:  # without the lock, which everybody needs who is answered then
                self._fail(f"the loading of model {model.id} has not gone on for {LOAD_TIMEOUT_S:g} s")

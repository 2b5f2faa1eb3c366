"""Own what waits and what runs: which image goes to which worker, and from when a worker's silence counts.

It has no threads, no processes and no lock: the engine sends what it schedules, and guards it with a lock of its own.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from unperturb.service.engine.fair_queue import FairQueue
from unperturb.service.engine.messages import Cancelled, Loaded, LoadProgress, Outcome, StepReport, Upgraded
from unperturb.service.engine.registry import Model
from unperturb.service.engine.requests import ImageRequest
from unperturb.service.engine.stages import shape

KEPT = 4  # one slot in so many is for images of one step: those of many steps hold theirs for long
MARGIN = 1.25  # of an estimated time left: an image that is late by little is work for nobody


class WorkerState(Enum):
    """The states of a worker."""

    IDLE = "idle"
    STEPPING = "stepping"
    LOADING = "loading"  # and perhaps stepping, between the pieces of a warm-up


@dataclass(eq=False)
class ScheduledWorker:
    """Hold what one worker has been given and has not reported on.

    slots:      images with steps that it takes at a time, of many steps a quarter fewer, and as many without, which
                hold a slot for one step only
    staged:     the images with steps by id
    stageless:  the images without
    begun:      the ids of those of both that are in the step that it takes now; the others begin with the next
    leaving:    the ids of those that it was told to leave, and has not said to have left
    loading:    the models that it loads, by number, in order
    loaded:     its answers that nobody has read
    last_heard: seconds on the scheduler's clock
    memory:     bytes in use on its device
    """

    slots: int
    last_heard: float
    staged: dict[int, ImageRequest] = field(default_factory=dict)
    stageless: dict[int, ImageRequest] = field(default_factory=dict)
    begun: set[int] = field(default_factory=set)
    leaving: set[int] = field(default_factory=set)
    loading: dict[int, Model] = field(default_factory=dict)
    loaded: dict[int, Loaded] = field(default_factory=dict)
    memory: int = 0

    @property
    def running(self) -> int:
        """Return how many images it has."""
        return len(self.staged) + len(self.stageless)

    @property
    def state(self) -> WorkerState:
        """Return what it is busy with."""
        if self.loading:
            return WorkerState.LOADING
        return WorkerState.STEPPING if self.running or self.leaving else WorkerState.IDLE

    @property
    def images(self) -> Iterator[ImageRequest]:
        """Iterate over its images."""
        yield from self.staged.values()
        yield from self.stageless.values()

    def competing(self, stage: str | None) -> dict[int, ImageRequest]:
        """Return its images that compete with one in a stage for slots."""
        return self.stageless if stage is None else self.staged

    def begin(self) -> None:
        """Note that it takes a step, with all the images that it has a slot for."""
        every = (itertools.islice(images, self.slots) for images in (self.staged, self.stageless))
        self.begun = set(itertools.chain.from_iterable(every))

    def take_back(self, id: int) -> ImageRequest | None:
        """Return an image that it has no more, or None for one that it had not."""
        self.begun.discard(id)
        return self.staged.pop(id, None) or self.stageless.pop(id, None)

    def ends_now(self, request: ImageRequest) -> bool:
        """Return whether the step that it takes now is the image's last: the next one may have its slot."""
        return request.work.id in self.begun and steps_left(request) == 1

    def free_slots(self, stage: str | None) -> int:
        """Return how many more images in a stage it can take into its next step."""
        staying = [request for request in self.competing(stage).values() if not self.ends_now(request)]
        free = self.slots - len(staying)
        if not is_long(stage):
            return free
        return min(free, self.slots - self.slots // KEPT - sum(is_long(one.work.stage) for one in staying))

    def step_s(self) -> float:
        """Estimate the seconds of the step that it takes now, and of the ends that come with it."""
        begun = [request for request in self.images if request.work.id in self.begun]
        batches = {request.model: 1 + any(self.ends_now(one) for one in begun) for request in begun}
        return math.fsum(
            (
                *(request.model.step_s(request.work.stage) for request in begun),
                *(count * model.batch_s() for model, count in batches.items()),
            )
        )

    def left_s(self, request: ImageRequest) -> float:
        """Estimate the seconds until an image is answered that is here, or comes here now, if nobody else comes.

        One that is not in the step of now waits for all of that. Batches of different models follow one another.
        """
        steps, begun = steps_left(request), request.work.id in self.begun
        others = [
            (other, steps_left(other) - (not begun and other.work.id in self.begun))
            for other in self.images
            if other is not request
        ]
        together = {request.model: steps + 1}
        for other, left in others:
            if other.model is not request.model:
                together[other.model] = max(together.get(other.model, 0), min(steps, left))
        return math.fsum(
            (
                0.0 if begun else self.step_s(),
                steps * request.model.step_s(request.work.stage),
                *(min(steps, left) * other.model.step_s(other.work.stage) for other, left in others),
                *(count * model.batch_s() for model, count in together.items()),
            )
        )


class Schedule(NamedTuple):
    """Say which images get a slot of which worker, and which would be late with one: they have left the queue."""

    given: list[tuple[int, ImageRequest]]
    late: list[ImageRequest]


def is_long(stage: str | None) -> bool:
    """Return whether an image in a stage takes more than one step."""
    return shape(stage)[0] > 1


def steps_left(request: ImageRequest) -> int:
    """Return how many more steps an image is there for: one, where only its end is left."""
    return max(1, shape(request.work.stage)[0] - request.step)


def added_s(other: ImageRequest, steps: int) -> float:
    """Estimate the seconds that one image adds to another's next steps."""
    return min(steps, steps_left(other)) * other.model.step_s(other.work.stage)


class Scheduler:
    """Queue images, in equal shares for every client, for workers with so many slots each.

    A worker is known by its index. A slot is given only where everybody in the others can still keep their deadline.
    """

    def __init__(self, slots: Sequence[int], *, clock: Callable[[], float] = time.monotonic) -> None:
        self.workers = [ScheduledWorker(count, clock()) for count in slots]
        self.waiting = FairQueue()
        self._clock = clock

    @property
    def running(self) -> int:
        """Return how many images workers have."""
        return sum(worker.running for worker in self.workers)

    @property
    def empty(self) -> bool:
        """Return whether nothing waits or runs."""
        return not self.waiting and not self.running

    def unanswered(self) -> Iterator[ImageRequest]:
        """Iterate over all that run or wait."""
        for worker in self.workers:
            yield from worker.images
        yield from self.waiting

    def ahead_of(self, client: str | None, cost_s: float) -> Iterator[ImageRequest]:
        """Iterate over those that run, or wait and would go before a new image of a client; over all for None."""
        for worker in self.workers:
            yield from worker.images
        yield from self.waiting.ahead_of(client, cost_s)

    # -- images --------------------------------------------------------------------------------------------------------

    def add(self, requests: Iterable[ImageRequest]) -> None:
        """Put images into the queue."""
        for request in requests:
            self.waiting.add(request)

    def schedule(self) -> Schedule:
        """Give waiting images free slots of the workers that would answer them first.

        A worker is given its next step's images while it takes one, so that it need not ask. An image does not wait
        behind one of another length that finds no slot. One that would miss its deadline gets none, except where a
        worker has nothing else to do: an estimate may be wrong, and only work that is done corrects it.
        """
        given: list[tuple[int, ImageRequest]] = []
        late: list[ImageRequest] = []
        spare_s: dict[int, list[tuple[ImageRequest, float]]] = {}
        idle = {i for i, worker in enumerate(self.workers) if not (worker.running or worker.leaving)}
        full: set[tuple[bool, bool]] = set()
        for request in self.waiting:
            stage = request.work.stage
            if (kind := (stage is None, is_long(stage))) in full:
                continue
            free = [index for index, worker in enumerate(self.workers) if worker.free_slots(stage) > 0]
            if not free:
                full.add(kind)
                continue
            index = min(free, key=lambda i: (self._answered_in_s(request, i), self.workers[i].running))
            worker = self.workers[index]
            if worker.running and self._clock() + MARGIN * worker.left_s(request) > request.deadline:
                late.append(request)
            elif not self._makes_late(request, index, spare_s):
                spare_s.pop(index, None)
                self._end_silence(worker)
                worker.competing(stage)[request.work.id] = request
                if index in idle:
                    worker.begin()
                given.append((index, request))
        self.waiting.take([request for _, request in given])
        self.waiting.remove(late)
        return Schedule(given, late)

    def _answered_in_s(self, newcomer: ImageRequest, index: int) -> float:
        """Estimate when an image would be answered that a worker is given now, which is some way into its step."""
        worker = self.workers[index]
        done_s = min(self._clock() - worker.last_heard, worker.step_s()) if worker.running else 0.0
        return worker.left_s(newcomer) - done_s

    def _makes_late(
        self, newcomer: ImageRequest, index: int, spare_s: dict[int, list[tuple[ImageRequest, float]]]
    ) -> bool:
        """Return whether an image of a worker keeps its deadline now and would not beside a newcomer.

        spare_s: of each worker's images that are in time, as estimated before; filled in where it is not there
        """
        if index not in spare_s:
            worker, now = self.workers[index], self._clock()
            left = [(other, other.deadline - now, worker.left_s(other)) for other in worker.staged.values()]
            spare_s[index] = [(other, had_s - MARGIN * left_s) for other, had_s, left_s in left if left_s <= had_s]
        for other, spare in spare_s[index]:
            steps = min(steps_left(other), steps_left(newcomer))
            batches = 0.0 if newcomer.model is other.model else steps * newcomer.model.batch_s()
            if MARGIN * (added_s(newcomer, steps) + batches) > spare:
                return True
        return False

    def update(
        self, index: int, report: StepReport | Cancelled | LoadProgress | Loaded | Upgraded
    ) -> list[tuple[ImageRequest, Outcome | Exception]]:
        """Take in what a worker reports, and return the images that it has answered, without those finished before."""
        worker = self.workers[index]
        worker.last_heard = self._clock()
        match report:
            case Cancelled(ids):
                worker.leaving.difference_update(ids)
            case Loaded(number):
                worker.loading.pop(number, None)
                worker.loaded[number] = report
            case StepReport():
                worker.memory = report.memory
                for id in report.stepped:
                    if (stepped := worker.staged.get(id)) is not None:
                        stepped.step += 1
                if report.pace is not None:
                    for model in {request.model for request in self.unanswered()}:
                        if model.number == report.model:
                            model.observe(report.pace)
                answered = [(worker.take_back(id), result) for id, result in report.ended]
                worker.begin()  # it goes on with all that it has
                return [(request, result) for request, result in answered if request is not None]
        return []

    def finish(self, requests: Iterable[ImageRequest]) -> list[tuple[int, int]]:
        """Drop images that nobody waits for any more; return the worker and the id of each that one still works on."""
        running: list[tuple[int, int]] = []
        gone = list(requests)
        for request in gone:
            for index, worker in enumerate(self.workers):
                if worker.take_back(request.work.id) is not None:
                    worker.leaving.add(request.work.id)
                    running.append((index, request.work.id))
        self.waiting.remove(gone)
        return running

    def clear(self) -> list[ImageRequest]:
        """Drop all images, and return them."""
        dropped = list(self.unanswered())
        self.finish(dropped)
        return dropped

    # -- models --------------------------------------------------------------------------------------------------------

    def load(self, model: Model) -> None:
        """Note that every worker has been asked to load a model."""
        for worker in self.workers:
            self._end_silence(worker)
            worker.loading[model.number] = model

    def is_loaded(self, model: Model) -> bool:
        """Return whether every worker has answered for a model."""
        return all(model.number in worker.loaded for worker in self.workers)

    def take_loaded(self, model: Model) -> list[Loaded]:
        """Return every worker's answer for a model, once."""
        return [worker.loaded.pop(model.number) for worker in self.workers]

    # -- silence -------------------------------------------------------------------------------------------------------

    def stalled(self, state: WorkerState, limit_s: float) -> int | None:
        """Return the index of a worker that has been in a state, and silent, for longer than `limit_s`, or None."""
        now = self._clock()
        for index, worker in enumerate(self.workers):
            if worker.state is state and now - worker.last_heard > limit_s:
                return index
        return None

    def is_alone(self, index: int, seconds: float) -> bool:
        """Return whether every other worker has had nothing to do for so long."""
        now = self._clock()
        return all(
            worker.state is WorkerState.IDLE and now - worker.last_heard >= seconds
            for i, worker in enumerate(self.workers)
            if i != index
        )

    def _end_silence(self, worker: ScheduledWorker) -> None:
        """Count a worker's silence from now on, if until now it was no stall: it had nothing to do."""
        if worker.state is WorkerState.IDLE:
            worker.last_heard = self._clock()

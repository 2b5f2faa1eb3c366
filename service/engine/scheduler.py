"""Own what waits and what runs: which image goes to which worker, and from when a worker's silence counts.

It has no threads, no processes and no lock: the engine sends what it schedules, and guards it with a lock of its own.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from unperturb.service.engine.fair_queue import FairQueue
from unperturb.service.engine.messages import Cancelled, Loaded, LoadProgress, Outcome, StepReport, Upgraded
from unperturb.service.engine.registry import Model
from unperturb.service.engine.requests import ImageRequest
from unperturb.service.engine.scheduled_worker import ScheduledWorker, WorkerState, added_s, is_long, steps_left

LEAD_S = 0.03  # before the end of a worker's step, from when on it is given the next: it need not ask then
MARGIN = 1.25  # of an estimated time left: an image that is late by little is work for nobody


class Schedule(NamedTuple):
    """Say which images get a slot of which worker, and which would be late with one: they have left the queue."""

    given: list[tuple[int, ImageRequest]]
    late: list[ImageRequest]


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

    # -- images --------------------------------------------------------------------------------------------------------

    def add(self, requests: Iterable[ImageRequest]) -> None:
        """Put images into the queue."""
        for request in requests:
            self.waiting.add(request)

    def schedule(self) -> Schedule:
        """Give waiting images free slots of the workers that would answer them first.

        A worker whose images all end with its step is given the next ones shortly before that: until then who has had
        less may still come and go first. One that goes on with some is given others at once. What is soon to go to
        another worker counts there already, so that not all of the queue waits for that one. An image does not wait
        behind one of another length that finds no slot. One that would miss its deadline gets none, except where a
        worker has nothing else to do: an estimate may be wrong, and only work that is done corrects it.
        """
        given: list[tuple[int, ImageRequest]] = []
        late: list[ImageRequest] = []
        idle = {i for i, worker in enumerate(self.workers) if not (worker.running or worker.leaving)}
        going_on = {i for i, worker in enumerate(self.workers) if worker.goes_on}
        promised: list[tuple[int, ImageRequest]] = []
        spare_s: dict[int, list[tuple[ImageRequest, float]]] = {}
        takers: dict[tuple[bool, bool], set[int]] = {}  # by what competes for slots, until one is given
        for request in self.waiting:
            stage = request.work.stage
            kind = stage is None, is_long(stage)
            if kind not in takers:
                takers[kind] = {
                    i for i in range(len(self.workers)) if self._takes(stage, i, idle=i in idle, goes_on=i in going_on)
                }
            if not takers[kind]:
                continue
            free = [i for i, worker in enumerate(self.workers) if worker.free_slots(stage) > 0]
            answered_in_s = {i: self._answered_in_s(request, i) for i in free}
            index = min(free, key=lambda i: (answered_in_s[i], self.workers[i].running))
            worker = self.workers[index]
            if index not in takers[kind]:  # it is soon to end its step
                worker.competing(stage)[request.work.id] = request
                promised.append((index, request))
                continue
            if worker.running and self._clock() + MARGIN * answered_in_s[index] > request.deadline:
                late.append(request)
            elif not self._makes_late(request, index, spare_s, begins=index in idle):
                self._end_silence(worker)
                worker.competing(stage)[request.work.id] = request
                if index in idle:
                    worker.begin()
                takers.clear()
                given.append((index, request))
        for index, request in promised:
            self.workers[index].take_back(request.work.id)
        self.waiting.take([request for _, request in given])
        self.waiting.remove(late)
        return Schedule(given, late)

    def _takes(self, stage: str | None, index: int, *, idle: bool, goes_on: bool) -> bool:
        """Return whether a worker is to have one more image now: in the step that it begins, or in its next.

        idle, goes_on: as the worker was before it was given any
        """
        worker = self.workers[index]
        if worker.free_slots(stage) <= 0:
            return False
        if idle and len(worker.competing(stage)) < worker.slots:
            return True
        return goes_on or self._ends_in_s(index) <= LEAD_S

    def _ends_in_s(self, index: int) -> float:
        """Estimate the seconds until a worker ends the step that it takes now; below 0 where it should have ended."""
        worker = self.workers[index]
        return worker.step_s() - (self._clock() - worker.last_heard) if worker.running else 0.0

    def _answered_in_s(self, request: ImageRequest, index: int) -> float:
        """Estimate when an image is answered that a worker has or is given now, which is some way into its step.

        A step that should have ended a while ago is taken to last as long again.
        """
        worker, ends_in_s = self.workers[index], self._ends_in_s(index)
        return worker.left_s(request) - worker.step_s() + max(ends_in_s, -ends_in_s - LEAD_S, 0.0)

    def _makes_late(
        self,
        newcomer: ImageRequest,
        index: int,
        spare_s: dict[int, list[tuple[ImageRequest, float]]],
        *,
        begins: bool,
    ) -> bool:
        """Return whether an image of a worker keeps its deadline now and would not beside a newcomer.

        spare_s: of each worker's images that stay and are in time, as estimated before; filled in where it is not
                 there, and brought up to date where nobody would be late
        begins:  the newcomer is in the step of now
        """
        worker = self.workers[index]
        if index not in spare_s:
            staying = [other for other in worker.staged.values() if begins or not worker.ends_now(other)]
            spare_s[index] = [(other, spare) for other in staying if (spare := self._spare_s(other, index)) is not None]
        after: list[tuple[ImageRequest, float]] = []
        for other, had_s in spare_s[index]:
            shared = steps_left(other) - (not begins and other.work.id in worker.begun)
            steps = min(shared, steps_left(newcomer))
            batches = 0.0 if newcomer.model is other.model else steps * newcomer.model.batch_s()
            if (left_s := had_s - MARGIN * (added_s(newcomer, steps) + batches)) < 0:
                return True
            after.append((other, left_s))
        if newcomer.work.stage is not None and (own_s := self._spare_s(newcomer, index)) is not None:
            after.append((newcomer, own_s))
        spare_s[index] = after
        return False

    def _spare_s(self, request: ImageRequest, index: int) -> float | None:
        """Estimate the seconds that others may add to an image of a worker, or None for one that is late already."""
        had_s, answered_in_s = request.deadline - self._clock(), self._answered_in_s(request, index)
        return had_s - MARGIN * answered_in_s if answered_in_s <= had_s else None

    def update(
        self, index: int, report: StepReport | Cancelled | LoadProgress | Loaded | Upgraded
    ) -> list[tuple[ImageRequest, Outcome | Exception]]:
        """Take in what a worker reports, and return the images that it has answered, without those finished before."""
        worker = self.workers[index]
        worker.last_heard = self._clock()
        match report:
            case Cancelled(ids):
                worker.leaving.difference_update(ids)
                worker.begin()  # it says so between two steps
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

"""Let one more request in, or refuse it: by how many images wait, and by the time that others add to its own."""

import math
from collections import Counter
from typing import NamedTuple

from unperturb.service.engine.registry import Model
from unperturb.service.engine.scheduled_worker import is_long
from unperturb.service.engine.scheduler import Scheduler
from unperturb.service.errors import NotReadyError


class Admission(NamedTuple):
    """Limit what is let in; its checks raise NotReadyError, with the seconds after which to try again.

    max_queue:     images that may wait for a slot
    patience:      how many times its own time others may add to a newcomer's, as estimated; where one image in
                   `default_stage` takes longer, that is its time here
    default_stage: the stage of an image that names none
    """

    max_queue: int
    patience: float
    default_stage: str

    def check_queue_length(self, scheduler: Scheduler, *, stage: str | None, images: int) -> None:
        """Refuse images that would make the queue too long."""
        free_slots = sum(max(0, worker.free_slots(stage)) for worker in scheduler.workers)
        waiting = max(0, len(scheduler.waiting) - free_slots)  # who waits while a slot is free will have it
        if waiting + max(0, images - max(0, free_slots - len(scheduler.waiting))) > self.max_queue:
            raise NotReadyError(
                f"{waiting} images are waiting, and at most {self.max_queue} may; try again",
                retry_after_s=max(1, math.ceil(_added_s(scheduler, None, stage, None))),
            )

    def check_added_time(
        self, scheduler: Scheduler, *, model: Model, stage: str | None, client: str, left_s: float, patient: bool
    ) -> None:
        """Refuse a request to whose time others would add too much; its own images are not held against it.

        left_s: seconds to its deadline; patient: the client chose that itself, and waits as long
        """
        added_s, alone_s = _added_s(scheduler, model, stage, client), model.alone_s(stage)
        limit_s = self.patience * max(alone_s, model.alone_s(self.default_stage))
        if alone_s < left_s:  # otherwise it would be late with nobody beside it, too
            limit_s = left_s - alone_s if patient else min(limit_s, left_s - alone_s)
        if added_s > limit_s:
            raise NotReadyError(
                f"images in progress would take about {added_s:.2f} s, at most {limit_s:.2f} s may; try again",
                retry_after_s=max(1, math.ceil(added_s - limit_s)),
            )


def _added_s(scheduler: Scheduler, model: Model | None, stage: str | None, client: str | None) -> float:
    """Estimate the seconds that those before it add to a newcomer.

    One of many steps waits for all of them where it finds no free slot. To one of a single step or none those of many
    leave slots: it waits in turn with its like, and beside as many steps of those that have begun.
    """
    cost_s = 0.0 if model is None else model.alone_s(stage)
    before = Counter((one.model, one.work.stage) for one in scheduler.waiting.ahead_of(client, cost_s))
    if not is_long(stage):
        before = Counter({kind: count for kind, count in before.items() if not is_long(kind[1])})
    alike = sum(count for (_, its_stage), count in before.items() if (its_stage is None) == (stage is None))
    if is_long(stage):
        full = alike >= sum(max(0, worker.free_slots(stage)) for worker in scheduler.workers)
        turns = 0
    else:
        slots = sum(worker.slots_beside_long(stage) for worker in scheduler.workers)
        full, turns = not slots, alike // max(1, slots)
    begun = Counter((one.model, one.work.stage) for worker in scheduler.workers for one in worker.images)
    seconds = (
        count * other.added_s(its_stage, its_stage if full else stage, model or other, turns=turns)
        for (other, its_stage), count in (begun + before).items()
    )
    return sum(seconds) / len(scheduler.workers)

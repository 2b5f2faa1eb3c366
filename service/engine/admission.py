"""Whether one more request is let in: by how many images wait, and by the time that others add to its own."""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from unperturb.service.engine.handle import WorkerHandle
from unperturb.service.engine.registry import Model
from unperturb.service.engine.requests import ImageRequest
from unperturb.service.errors import NotReadyError


class Admission(NamedTuple):
    """The limits; they raise NotReadyError, with the seconds after which to try again.

    max_queue: images that may wait for a slot
    patience:  how many times its own time others may add to a newcomer's, as estimated; where one image in stage
               `default_stage` takes longer, that is its time here
    """

    max_queue: int
    patience: float
    default_stage: str

    def check_queue_length(
        self,
        workers: Sequence[WorkerHandle],
        jobs: Collection[ImageRequest],
        *,
        waiting: int,
        stage: str | None,
        images: int,
    ) -> None:
        """For the images that would wait."""
        room = sum(worker.room(stage) for worker in workers)
        if waiting + max(0, images - room) > self.max_queue:
            raise NotReadyError(
                f"{waiting} images are waiting, and at most {self.max_queue} may; try again",
                retry_after_s=max(1, math.ceil(_ahead_s(workers, jobs, None, stage))),
            )

    def check_added_time(
        self,
        workers: Sequence[WorkerHandle],
        jobs: Collection[ImageRequest],
        *,
        model: Model,
        stage: str | None,
        left_s: float,
    ) -> None:
        """For what others would add; a request's own images are not held against it."""
        wait_s, alone_s = _ahead_s(workers, jobs, model, stage), model.alone_s(stage)
        limit_s = self.patience * max(alone_s, model.alone_s(self.default_stage))
        if alone_s < left_s:  # otherwise it would be late with nobody beside it, too
            limit_s = min(limit_s, left_s - alone_s)
        if wait_s > limit_s:
            raise NotReadyError(
                f"images in progress would take about {wait_s:.2f} s, at most {limit_s:.2f} s may; try again",
                retry_after_s=max(1, math.ceil(wait_s - limit_s)),
            )


def _ahead_s(
    workers: Sequence[WorkerHandle], jobs: Collection[ImageRequest], model: Model | None, stage: str | None
) -> float:
    """Estimated seconds that those in progress add to a newcomer: all they take, where it finds no free slot."""
    full = all(worker.room(stage) <= 0 for worker in workers)
    return sum(job.model.added_s(job.stage, job.stage if full else stage, model or job.model) for job in jobs) / len(
        workers
    )

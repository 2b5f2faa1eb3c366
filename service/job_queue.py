"""The bounded queue in front of every worker: what may wait, and for how long, is decided here."""

import math
import threading
from collections import deque
from collections.abc import Iterable

from models.errors import DeadlineError, NotReadyError
from service.jobs import Job


class JobQueue:
    """First come, first served; jobs that need no steps may overtake, since they need no slot for long.

    max_jobs:   images that may wait
    max_wait_s: estimated seconds of work that may stand before a newcomer, queued or in slots
    workers:    how many devices share the work
    """

    def __init__(self, *, max_jobs: int, max_wait_s: float, workers: int) -> None:
        self.max_jobs, self.max_wait_s, self.workers = max_jobs, max_wait_s, workers
        self._waiting: deque[Job] = deque()
        self._taken: set[Job] = set()
        self._idle = 0
        self._closed: str | None = None
        self._changed = threading.Condition(threading.RLock())  # guards all of the above

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def in_slots(self) -> int:
        """Images that workers have taken and not yet finished."""
        return len(self._taken)

    def put(self, jobs: list[Job]) -> None:
        """All of the jobs of one request, or none; NotReadyError as for `refuse_if_full`."""
        with self._changed:
            self._drop_gone()
            self.refuse_if_full(len(jobs))
            self._waiting.extend(jobs)
            self._changed.notify_all()

    def refuse_if_full(self, images: int) -> None:
        """NotReadyError, with the seconds after which to try again, past the count or the work, or when closed."""
        with self._changed:
            if self._closed is not None:
                raise NotReadyError(self._closed)
            ahead_s = sum(job.seconds_left for job in (*self._waiting, *self._taken)) / self.workers
            if len(self._waiting) + images > self.max_jobs:
                raise NotReadyError(
                    f"{len(self._waiting)} images are waiting, and at most {self.max_jobs} may; try again",
                    retry_after_s=max(1, math.ceil(ahead_s)),
                )
            if ahead_s > self.max_wait_s:
                raise NotReadyError(
                    f"the work ahead takes about {ahead_s:.1f} s, at most {self.max_wait_s:g} s may wait; try again",
                    retry_after_s=max(1, math.ceil(ahead_s - self.max_wait_s)),
                )

    def take(self, free: int, *, busy: bool) -> list[Job] | None:
        """Up to `free` jobs with steps, and as many without; None when closed and there is nothing left.

        A worker that is not `busy` waits for a job; one that is leaves a job for each worker that waits.
        """
        with self._changed:
            if not busy:
                self._idle += 1
                self._changed.wait_for(lambda: self._waiting or self._closed is not None)
                self._idle -= 1
                if not self._waiting:
                    return None
            spare = len(self._waiting) - (self._idle if busy else 0)
            taken: list[Job] = []
            room = {True: free, False: max(free, 1)}
            for job in self._waiting:
                if len(taken) >= spare:
                    break
                if room[job.stage is not None] > 0:
                    room[job.stage is not None] -= 1
                    taken.append(job)
            for job in taken:
                self._waiting.remove(job)
            self._taken.update(taken)
        return taken

    def finished(self, jobs: Iterable[Job]) -> None:
        """These have left their slots."""
        with self._changed:
            self._taken.difference_update(jobs)

    def close(self, reason: str) -> None:
        """Take no more; what waits is still served."""
        with self._changed:
            self._closed = self._closed or reason
            self._changed.notify_all()

    def fail_all(self, error: Exception) -> None:
        """Take no more, and answer everything that waits or is in a slot with `error`."""
        with self._changed:
            self._closed = str(error)
            left = [*self._waiting, *self._taken]
            self._waiting.clear()
            self._taken.clear()
            self._changed.notify_all()
        for job in left:
            job.answer(error)

    def _drop_gone(self) -> None:
        over = [job for job in self._waiting if job.over]
        for job in over:
            self._waiting.remove(job)
            job.answer(DeadlineError("the deadline passed while the image was waiting"))

"""One worker as the scheduler knows it: what it was given, what it is in the midst of, and how long that takes."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from unperturb.service.engine.messages import Loaded
from unperturb.service.engine.registry import Model
from unperturb.service.engine.requests import ImageRequest
from unperturb.service.engine.stages import shape

KEPT = 4  # one slot in so many is for images of one step: those of many steps hold theirs for long


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

    @property
    def goes_on(self) -> bool:
        """Return whether it has images after the step that it takes now, and so begins the next one at once."""
        return not all(self.ends_now(request) for request in self.images)

    def free_slots(self, stage: str | None) -> int:
        """Return how many more images in a stage it can take into its next step."""
        staying = [request for request in self.competing(stage).values() if not self.ends_now(request)]
        free = self.slots - len(staying)
        if not is_long(stage):
            return free
        return min(free, self.slots - self.slots // KEPT - sum(is_long(one.work.stage) for one in staying))

    def slots_beside_long(self, stage: str | None) -> int:
        """Return how many images in a stage of one step or none it can take into each step beside those of many."""
        return self.slots - sum(is_long(request.work.stage) for request in self.competing(stage).values())

    def step_s(self) -> float:
        """Estimate the seconds of the step that it takes now, and of the ends that come with it."""
        begun = [request for request in self.images if request.work.id in self.begun]
        ending = {request.model for request in begun if self.ends_now(request)}
        batches = {request.model: 1 + (request.model in ending) for request in begun}
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


def is_long(stage: str | None) -> bool:
    """Return whether an image in a stage takes more than one step."""
    return shape(stage)[0] > 1


def steps_left(request: ImageRequest) -> int:
    """Return how many more steps an image is there for: one, where only its end is left."""
    return max(1, shape(request.work.stage)[0] - request.step)


def added_s(other: ImageRequest, steps: int) -> float:
    """Estimate the seconds that one image adds to another's next steps."""
    return min(steps, steps_left(other)) * other.model.step_s(other.work.stage)

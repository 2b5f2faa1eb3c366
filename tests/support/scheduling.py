"""What tests of the scheduler are made of: images on their way, a model whose costs are known, a clock of one's own."""

import math

import numpy as np

from unperturb.models.checkpoints.store import read_card, resolve
from unperturb.service.engine.cost import Cost
from unperturb.service.engine.messages import Work
from unperturb.service.engine.registry import Model
from unperturb.service.engine.requests import ImageRequest

BLACK = np.zeros((3, 8, 8), dtype=np.uint8)
STAGE = "published"  # of many steps


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def timed_model() -> Model:
    """A model of 0.1 ms a pass forward, whatever the batch: a worker is always about to end a step."""
    return Model(1, "a", "a", read_card(resolve("small")), cost=Cost(per_pass_s=0.0001))


def of(model: Model, id: int, stage: str | None = STAGE, client: str = "", deadline: float = math.inf) -> ImageRequest:
    work = Work(id, model.number, BLACK, stage, 0, False, 0.0)
    return ImageRequest(work, model, lambda _: None, client, deadline)

"""The scheduler and admission under a flood, simulated: workers that take as long as their cost says, and no server."""

import heapq
import itertools
import math
import random

import numpy as np
import pytest

from tests.support.engines import OUTCOME
from tests.support.scheduling import Clock, of
from unperturb.models.checkpoints.store import read_card, resolve
from unperturb.service.engine.admission import Admission
from unperturb.service.engine.cost import Cost
from unperturb.service.engine.messages import Outcome, StepReport
from unperturb.service.engine.registry import Model
from unperturb.service.engine.requests import ImageRequest
from unperturb.service.engine.scheduler import Scheduler
from unperturb.service.engine.stages import passes
from unperturb.service.errors import NotReadyError

STAGE, SLOTS, WORKERS = "default", 4, 2
MODEL = Model(1, "a", "a", read_card(resolve("small")), cost=Cost(0.011, 0.053 / passes(STAGE)))
WHOLE_STEP_S = MODEL.cost.seconds(2, SLOTS * passes(STAGE))
CAPACITY = WORKERS * SLOTS / WHOLE_STEP_S


class Simulation:
    """Two workers, and clients whose images come at Poisson times; all in seconds of a clock of its own."""

    def __init__(self, seed: int) -> None:
        self.random, self.clock = random.Random(seed), Clock()
        self.scheduler = Scheduler([SLOTS] * WORKERS, clock=self.clock)
        self.admission = Admission(256, 15.0, STAGE)
        self.given: list[list[ImageRequest]] = [[] for _ in range(WORKERS)]
        self.taken: list[list[ImageRequest]] = [[] for _ in range(WORKERS)]
        self.ends: list[float] = [math.inf] * WORKERS
        self.came: dict[int, float] = {}
        self.waited: dict[str, list[float]] = {}
        self.refused: dict[str, int] = {}
        self.steps: list[int] = []

    def run(self, rates: dict[str, float], *, seconds: float) -> None:
        """Let each client's images come at its rate, and answer all that are let in."""
        arrivals: list[tuple[float, str]] = []
        for client, rate in rates.items():
            self.waited[client], self.refused[client], moment = [], 0, 0.0
            while (moment := moment + self.random.expovariate(rate)) < seconds:
                arrivals.append((moment, client))
        heapq.heapify(arrivals)
        for id in itertools.count(1):
            while arrivals and min(self.ends) <= arrivals[0][0]:
                self.end(int(np.argmin(self.ends)))
            if not arrivals:
                break
            self.clock.now, client = heapq.heappop(arrivals)
            self.arrive(of(MODEL, id, STAGE, client))
        while min(self.ends) < math.inf:
            self.end(int(np.argmin(self.ends)))

    def arrive(self, request: ImageRequest) -> None:
        try:
            self.admission.check_added_time(
                self.scheduler, model=MODEL, stage=STAGE, client=request.client, left_s=30.0, patient=False
            )
        except NotReadyError:
            self.refused[request.client] += 1
            return
        self.came[request.work.id] = self.clock.now
        self.scheduler.add([request])
        self.schedule()

    def end(self, index: int) -> None:
        self.clock.now, done = self.ends[index], self.taken[index]
        self.begin(index)  # with what it was given before
        ended: list[tuple[int, Outcome | Exception]] = [(request.work.id, OUTCOME) for request in done]
        self.scheduler.update(index, StepReport(1, tuple(id for id, _ in ended), 0.0, None, ended, 0))
        for request in done:
            self.waited[request.client].append(self.clock.now - self.came[request.work.id])
        self.schedule()

    def schedule(self) -> None:
        for index, request in self.scheduler.schedule().given:
            self.given[index].append(request)
        for index, end in enumerate(self.ends):
            if end == math.inf:
                self.begin(index)

    def begin(self, index: int) -> None:
        self.taken[index], self.given[index] = self.given[index][:SLOTS], self.given[index][SLOTS:]
        count = len(self.taken[index])
        self.ends[index] = self.clock.now + MODEL.cost.seconds(2, count * passes(STAGE)) if count else math.inf
        self.steps += [count] * (count > 0)


@pytest.mark.parametrize("seed", range(2))
def test_client_below_its_share_waits_for_a_step_or_two_whatever_another_asks_for(seed: int) -> None:
    flooded = Simulation(seed)
    flooded.run({"modest": 0.45 * CAPACITY, "other": 5 * CAPACITY}, seconds=20.0)
    assert flooded.refused["modest"] == 0
    assert flooded.refused["other"] > 4 * len(flooded.waited["other"])
    assert np.percentile(flooded.waited["modest"], 99) < 3 * WHOLE_STEP_S
    assert np.mean(flooded.steps) > 0.95 * SLOTS


@pytest.mark.parametrize("seed", range(2))
def test_at_four_fifths_of_capacity_nobody_is_refused_and_few_wait_for_long(seed: int) -> None:
    loaded = Simulation(seed)
    loaded.run({"all": 0.8 * CAPACITY}, seconds=20.0)
    assert loaded.refused["all"] == 0
    assert np.percentile(loaded.waited["all"], 99) < 8 * MODEL.alone_s(STAGE)

"""The queue in which every client gets an equal share."""

import random

import pytest

from tests.support.scheduling import of, timed_model
from unperturb.models.checkpoints.store import read_card, resolve
from unperturb.service.engine.cost import Cost
from unperturb.service.engine.fair_queue import CREDIT_S, FairQueue
from unperturb.service.engine.registry import Model
from unperturb.service.engine.stages import passes


@pytest.fixture
def timed() -> Model:
    return timed_model()


def test_client_with_few_images_does_not_wait_behind_all_of_one_with_many(timed: Model) -> None:
    queue = FairQueue()
    for id in range(6):
        queue.add(of(timed, id, client="many"))
    for id in (10, 11):
        queue.add(of(timed, id, client="few"))
    assert [request.work.id for request in queue] == [0, 10, 1, 11, 2, 3, 4, 5]


def test_client_that_had_less_goes_first_by_its_credit_and_no_more() -> None:
    model = Model(1, "a", "a", read_card(resolve("small")), cost=Cost(per_pass_s=CREDIT_S / passes("default")))
    queue = FairQueue()
    for id in range(6):
        queue.add(of(model, id, "default", client="busy"))
    for request in list(queue)[:4]:
        queue.take([request])
    for id in range(10, 14):
        queue.add(of(model, id, "default", client="new"))
    assert [request.work.id for request in queue] == [10, 4, 11, 5, 12, 13]


@pytest.mark.parametrize("names", [["light"], [f"light {i}" for i in range(5)]], ids=["one", "five"])
def test_credit_is_used_up_whoever_is_answered_and_however_many_have_it(names: list[str]) -> None:
    """Clients whose images are answered one after another, as the dispatcher does it, delay another by CREDIT_S."""
    model = Model(1, "a", "a", read_card(resolve("small")), cost=Cost(per_pass_s=0.1 / passes("default")))
    queue, heavy = FairQueue(), of(model, 0, "default", client="heavy")
    for _ in range(100):  # what it has had before
        queue.add(earlier := of(model, 0, "default", client="heavy"))
        queue.take([earlier])
        queue.remove([earlier])
    queue.add(heavy)
    light = [of(model, 1 + i, "default", client=name) for i, name in enumerate(names)]
    for request in light:
        queue.add(request)
    served = 0
    while (first := next(iter(queue))) is not heavy:
        queue.take([first])
        queue.remove([first])  # it has been answered
        queue.add(of(model, 10 + served, "default", client=first.client))
        served += 1
        assert served <= CREDIT_S / 0.1 + 2 * len(names)
    assert served >= CREDIT_S / 0.1 / 2


def test_strangers_that_come_once_cannot_keep_a_client_from_its_share_for_ever() -> None:
    model = Model(1, "a", "a", read_card(resolve("small")), cost=Cost(per_pass_s=0.1 / passes("default")))
    queue, heavy = FairQueue(), of(model, 0, "default", client="heavy")
    for _ in range(100):
        queue.add(earlier := of(model, 0, "default", client="heavy"))
        queue.take([earlier])
    queue.add(heavy)
    for served in range(round(2 * CREDIT_S / 0.1)):
        queue.add(of(model, 1 + served, "default", client=f"stranger {served}"))
        first = next(iter(queue))
        queue.take([first])
        if first is heavy:
            break
    assert first is heavy


def test_work_that_was_dropped_counts_for_its_client_no_more(timed: Model) -> None:
    queue = FairQueue()
    dropped = [of(timed, id, client="a") for id in range(10)]
    for request in [*dropped, *(of(timed, id, "default", client="b") for id in range(10, 20))]:
        queue.add(request)
    queue.remove(dropped[1:])
    queue.add(of(timed, 20, "default", client="a"))
    order = [request.work.id for request in queue]
    assert order.index(20) == order.index(0) + 1  # behind its own one that is left
    queue.remove(dropped[:1])
    queue.add(of(timed, 21, "default", client="c"))
    queue.add(of(timed, 22, "default", client="a"))
    order = [request.work.id for request in queue]
    assert order.index(21) < order.index(22)  # 20 still counts


def test_clients_that_always_wait_get_equal_work_within_one_image_of_each(timed: Model) -> None:
    """Golestani 1994, theorem 1: two backlogged clients differ by at most the sum of their largest costs."""
    generator = random.Random(0)
    costs = {stage: timed.alone_s(stage) for stage in ("vote", "default", "published")}
    for _ in range(50):
        queue, served = FairQueue(), {"a": 0.0, "b": 0.0}
        arrivals = [client for client in served for _ in range(60)]
        generator.shuffle(arrivals)
        for id, client in enumerate(arrivals):
            queue.add(of(timed, id, generator.choice(list(costs)), client))
        while {request.client for request in queue} == {"a", "b"}:
            first = next(iter(queue))
            queue.take([first])
            served[first.client] += first.cost_s
            assert abs(served["a"] - served["b"]) <= 2 * max(costs.values()) + 1e-9

"""The scheduler: who runs where, who waits, and whose silence counts; no process, no thread."""

from collections.abc import Callable
from functools import partial

import pytest

from tests.support.engines import OUTCOME
from tests.support.scheduling import STAGE, Clock, of, timed_model
from unperturb.models.checkpoints.store import read_card, resolve
from unperturb.models.purifiers.reverse_attack import PRESETS
from unperturb.service.engine.cost import Cost
from unperturb.service.engine.messages import Cancelled, Loaded, LoadProgress, Outcome, StepReport
from unperturb.service.engine.registry import Model
from unperturb.service.engine.requests import ImageRequest
from unperturb.service.engine.scheduled_worker import WorkerState
from unperturb.service.engine.scheduler import LEAD_S, MARGIN, Scheduler

Request = Callable[..., ImageRequest]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(1, "a", "a", read_card(resolve("small")))


@pytest.fixture
def request_of(model: Model) -> Request:
    return partial(of, model)


@pytest.fixture
def timed() -> Model:
    return timed_model()


def report(
    *ended: int,
    stepped: tuple[int, ...] = (),
    model: int = 1,
    pace: float | None = None,
    result: Outcome | Exception = OUTCOME,
) -> StepReport:
    return StepReport(model, stepped, 0.1, pace, [(id, result) for id in ended], 7)


def scheduled(scheduler: Scheduler) -> list[tuple[int, int]]:
    return [(index, request.work.id) for index, request in scheduler.schedule().given]


def test_images_go_to_the_worker_with_the_fewest_and_the_rest_waits_in_turn(request_of: Request, clock: Clock) -> None:
    scheduler = Scheduler([2, 2], clock=clock)
    scheduler.add(request_of(id) for id in range(6))
    assert scheduled(scheduler) == [(0, 0), (1, 1), (0, 2), (1, 3)]
    assert [request.work.id for request in scheduler.waiting] == [4, 5]
    assert scheduler.running == 4
    assert scheduled(scheduler) == []


def test_images_without_steps_do_not_take_the_slots_of_those_with(request_of: Request) -> None:
    scheduler = Scheduler([2])
    (worker,) = scheduler.workers
    scheduler.add(request_of(i, None) for i in range(4))  # two now, and two with the next step
    scheduler.schedule()
    assert worker.free_slots(None) == 0
    assert worker.free_slots(STAGE) == 2
    scheduler.add(request_of(i, STAGE) for i in range(4, 6))
    scheduler.schedule()
    assert worker.free_slots(STAGE) == 0
    scheduler.update(0, report(0, 1, 4))
    assert worker.free_slots(None) == 2
    assert worker.free_slots(STAGE) == 1


def test_worker_in_a_step_is_given_as_many_images_for_the_next_as_it_has_slots(request_of: Request) -> None:
    scheduler = Scheduler([2])
    (worker,) = scheduler.workers
    scheduler.add(request_of(id, "default") for id in range(6))
    assert scheduled(scheduler) == [(0, id) for id in range(4)]
    assert worker.begun == {0, 1}
    assert scheduled(scheduler) == []
    scheduler.update(0, report(0, 1, stepped=(0, 1)))
    assert worker.begun == {2, 3}
    assert scheduled(scheduler) == [(0, 4), (0, 5)]
    scheduler.update(0, report(2, stepped=(2,)))  # it had begun before the other one came
    assert worker.begun == {3, 4}
    assert scheduler.running == 3


def test_image_in_its_last_step_leaves_its_slot_to_the_next_one_and_no_earlier(request_of: Request) -> None:
    scheduler, steps = Scheduler([1]), PRESETS[STAGE].loop.steps
    scheduler.add([request_of(0), request_of(1)])
    assert scheduled(scheduler) == [(0, 0)]
    for _ in range(steps - 2):
        scheduler.update(0, report(stepped=(0,)))
        assert scheduled(scheduler) == []
    scheduler.update(0, report(stepped=(0,)))
    assert scheduled(scheduler) == [(0, 1)]
    scheduler.update(0, report(0, stepped=(0,)))
    assert [request.step for request in scheduler.workers[0].images] == [0]


def test_image_goes_to_the_worker_that_would_answer_it_first(timed: Model, clock: Clock) -> None:
    scheduler = Scheduler([4, 4], clock=clock)
    alone_s = timed.alone_s("default")
    scheduler.add([of(timed, 0, "default")])
    assert scheduled(scheduler) == [(0, 0)]
    clock.now = 0.5 * alone_s
    scheduler.add([of(timed, 1, "default")])
    assert scheduled(scheduler) == [(1, 1)]
    scheduler.add(of(timed, id, "default") for id in (2, 3))
    assert scheduled(scheduler) == [(0, 2), (1, 3)]  # the first has done half of its step
    scheduler.update(0, report(0, stepped=(0,)))
    assert scheduler.finish([*scheduler.workers[1].images]) == [(1, 1), (1, 3)]
    clock.now = 0.6 * alone_s
    scheduler.add([of(timed, 4, "default")])
    assert scheduled(scheduler) == [(1, 4)]
    assert scheduler.workers[1].begun == set()  # its step of those that have gone is not over


def test_worker_that_ends_its_step_is_given_a_whole_one_though_another_ends_soon_too(clock: Clock) -> None:
    model = Model(1, "a", "a", read_card(resolve("small")), cost=Cost(per_batch_s=0.02, per_pass_s=0.01))
    scheduler = Scheduler([4, 4], clock=clock)
    scheduler.add([of(model, 0, "default")])
    assert scheduled(scheduler) == [(0, 0)]
    clock.now = 2 * LEAD_S
    scheduler.add([of(model, 1, "default")])
    assert scheduled(scheduler) == [(1, 1)]
    clock.now = model.alone_s("default") - LEAD_S / 2
    scheduler.add(of(model, id, "default") for id in range(2, 12))
    given = scheduled(scheduler)
    assert [index for index, _ in given] == [0] * 4
    assert given[0] == (0, 2)
    assert scheduler.running == 6  # what the other one is soon to have is not given to it yet
    assert len(scheduler.waiting) == 6
    assert scheduled(scheduler) == []


def test_who_has_had_less_may_still_go_first_until_shortly_before_the_step_ends(clock: Clock) -> None:
    model = Model(1, "a", "a", read_card(resolve("small")), cost=Cost(per_pass_s=0.1))
    scheduler = Scheduler([2], clock=clock)
    scheduler.add(of(model, id, "default", client="many") for id in range(6))
    assert scheduled(scheduler) == [(0, 0), (0, 1)]
    step_s = 2 * model.alone_s("default")
    clock.now = step_s - 2 * LEAD_S
    scheduler.add([of(model, 6, "default", client="few")])
    assert scheduled(scheduler) == []
    clock.now = step_s - LEAD_S / 2
    assert scheduled(scheduler) == [(0, 6), (0, 2)]  # not 3, which has waited for longer
    assert scheduler.workers[0].begun == {0, 1}


def test_worker_that_goes_on_with_an_image_is_given_others_at_once(clock: Clock) -> None:
    model = Model(1, "a", "a", read_card(resolve("small")), cost=Cost(per_pass_s=0.1))
    scheduler = Scheduler([4], clock=clock)
    scheduler.add([of(model, 0)])
    assert scheduled(scheduler) == [(0, 0)]
    scheduler.add([of(model, 1, "default")])
    assert scheduled(scheduler) == [(0, 1)]  # after its step it does not ask
    for _ in range(PRESETS[STAGE].loop.steps - 1):
        scheduler.update(0, report(stepped=(0,)))
    scheduler.update(0, report(1, stepped=(1,)))
    scheduler.add([of(model, 2, "default")])
    assert scheduled(scheduler) == []


def test_image_waits_for_a_worker_that_ends_its_step_before_one_that_goes_on(clock: Clock) -> None:
    slow = Model(1, "a", "a", read_card(resolve("small")), cost=Cost(per_pass_s=0.1))
    scheduler = Scheduler([4, 4], clock=clock)
    scheduler.add([of(slow, 0), of(slow, 1, "default")])
    assert scheduled(scheduler) == [(0, 0), (1, 1)]
    clock.now = slow.alone_s("default") - 2 * LEAD_S
    scheduler.update(0, report(stepped=(0,)))  # its next step is as long as this one
    scheduler.add([of(slow, 2, "default")])
    assert scheduled(scheduler) == []
    scheduler.update(1, report(1, stepped=(1,)))
    assert scheduled(scheduler) == [(1, 2)]


def test_deadline_is_judged_by_what_is_left_of_the_step_that_a_worker_takes(clock: Clock) -> None:
    model = Model(1, "a", "a", read_card(resolve("small")), cost=Cost(per_pass_s=0.1))
    alone_s = model.alone_s("default")
    scheduler = Scheduler([1], clock=clock)
    scheduler.add([of(model, 0, "default", deadline=1.1 * alone_s)])
    assert scheduled(scheduler) == [(0, 0)]
    clock.now = alone_s - LEAD_S / 2
    in_time = of(model, 1, "default", deadline=clock.now + MARGIN * alone_s + LEAD_S)
    scheduler.add([in_time])
    assert scheduler.schedule() == ([(0, in_time)], [])  # the other one ends before it begins
    scheduler = Scheduler([1], clock=clock)
    scheduler.add([of(model, 0, "default")])
    scheduler.schedule()
    clock.now += alone_s - LEAD_S / 2
    late = of(model, 1, "default", deadline=clock.now + MARGIN * alone_s - LEAD_S)
    scheduler.add([late])
    assert scheduler.schedule() == ([], [late])


def test_worker_whose_step_is_overdue_is_not_the_one_that_answers_first(clock: Clock) -> None:
    model = Model(1, "a", "a", read_card(resolve("small")), cost=Cost(per_pass_s=0.1))
    step_s = model.alone_s("default")
    scheduler = Scheduler([1, 1], clock=clock)
    scheduler.add([of(model, 0, "default")])
    scheduler.schedule()
    clock.now = 2.5 * step_s
    scheduler.add([of(model, 1, "default")])
    assert scheduled(scheduler) == [(1, 1)]
    clock.now = 3.5 * step_s - LEAD_S / 2
    scheduler.add([of(model, 2, "default")])
    assert scheduled(scheduler) == [(1, 2)]


def test_newcomer_waits_for_the_rest_of_the_step_that_a_worker_takes(clock: Clock) -> None:
    model = Model(1, "a", "a", read_card(resolve("small")), cost=Cost(per_batch_s=0.001, per_pass_s=0.0001))
    scheduler = Scheduler([4], clock=clock)
    scheduler.add([of(model, 0, "default")])
    scheduler.schedule()
    (worker,) = scheduler.workers
    alone_s = model.alone_s("default")
    assert worker.step_s() == pytest.approx(alone_s)
    newcomer = of(model, 1, "default")
    assert worker.left_s(newcomer) == pytest.approx(2 * alone_s)
    scheduler.add([newcomer])
    scheduler.schedule()
    assert worker.left_s(newcomer) == pytest.approx(2 * alone_s)  # it has its slot, and has not begun
    scheduler.update(0, report(0, stepped=(0,)))
    assert worker.left_s(newcomer) == pytest.approx(alone_s)


def test_images_of_many_steps_leave_a_quarter_of_the_slots_to_those_of_one(request_of: Request, clock: Clock) -> None:
    scheduler = Scheduler([8, 8], clock=clock)
    scheduler.add(request_of(id) for id in range(20))
    given = scheduled(scheduler)
    assert [[index for index, _ in given].count(index) for index in (0, 1)] == [6, 6]
    scheduler.add(request_of(id, "default") for id in range(20, 26))
    assert scheduled(scheduler) == [(0, 20), (1, 21), (0, 22), (1, 23)]  # past the long ones that wait
    scheduler.update(1, report(1, 3))  # two long ones end, and two short ones begin
    assert scheduled(scheduler) == [(1, 12), (1, 13), (1, 24), (1, 25)]  # the oldest first
    scheduler.update(0, report(0))
    assert scheduled(scheduler) == [(0, 14)]


def test_image_without_steps_does_not_wait_behind_those_with(request_of: Request) -> None:
    scheduler = Scheduler([1])
    scheduler.add([request_of(1), request_of(2), request_of(3, None)])
    assert scheduled(scheduler) == [(0, 1), (0, 3)]
    assert [request.work.id for request in scheduler.waiting] == [2]


def test_report_gives_each_result_to_its_request_and_frees_the_slot(request_of: Request) -> None:
    scheduler, error = Scheduler([2]), ValueError("broken")
    first, second, third = (request_of(id) for id in range(3))
    scheduler.add([first, second, third])
    scheduler.schedule()
    assert scheduler.update(0, report()) == []
    assert scheduler.update(0, report(1, result=error)) == [(second, error)]
    assert scheduled(scheduler) == [(0, 2)]
    assert scheduler.update(0, report(0, 2)) == [(first, OUTCOME), (third, OUTCOME)]
    assert scheduler.empty
    assert scheduler.workers[0].memory == 7


def test_finished_images_free_their_slots_and_leave_the_queue(request_of: Request) -> None:
    scheduler = Scheduler([1, 1])
    requests = [request_of(id) for id in range(4)]
    scheduler.add(requests)
    scheduler.schedule()
    assert scheduler.finish(requests[1:3]) == [(1, 1)]  # the other one waits: no worker has to know
    assert scheduled(scheduler) == [(1, 3)]
    assert scheduler.update(1, report(1)) == []  # it had ended before it was taken back
    assert scheduler.finish(requests[1:3]) == []


def test_clear_drops_what_waits_and_what_runs(request_of: Request) -> None:
    scheduler = Scheduler([1])
    requests = [request_of(id) for id in range(3)]
    scheduler.add(requests)
    scheduler.schedule()
    assert scheduler.clear() == requests
    assert scheduler.empty
    assert scheduler.clear() == []


def test_pace_is_that_of_the_model_that_stepped(request_of: Request, model: Model) -> None:
    scheduler, before = Scheduler([1]), model.pace
    scheduler.add([request_of(1)])
    scheduler.schedule()
    scheduler.update(0, report(model=2, pace=5.0))
    assert model.pace == before
    scheduler.update(0, report(pace=5.0))
    assert model.pace > before


def test_silence_counts_from_the_first_image_and_from_each_report(request_of: Request, clock: Clock) -> None:
    scheduler = Scheduler([2], clock=clock)
    clock.now = 100.0
    assert [worker.state for worker in scheduler.workers] == [WorkerState.IDLE]
    assert scheduler.stalled(WorkerState.STEPPING, 1.0) is None
    scheduler.add([request_of(1)])
    scheduler.schedule()
    assert [worker.state for worker in scheduler.workers] == [WorkerState.STEPPING]
    assert scheduler.stalled(WorkerState.STEPPING, 1.0) is None
    clock.now = 101.5
    scheduler.add([request_of(2)])  # more work is no sign of life
    scheduler.schedule()
    assert scheduler.stalled(WorkerState.STEPPING, 1.0) == 0
    scheduler.update(0, report())
    assert scheduler.stalled(WorkerState.STEPPING, 1.0) is None


def test_worker_that_hangs_is_found_though_its_images_leave_it_one_after_another(
    request_of: Request, clock: Clock
) -> None:
    scheduler, limit_s = Scheduler([2], clock=clock), 60.0
    for id in range(3):  # the next one comes after the last has gone at its deadline
        assert scheduler.stalled(WorkerState.STEPPING, limit_s) is None
        request = request_of(id)
        scheduler.add([request])
        scheduler.schedule()
        clock.now += 30.0
        assert scheduler.finish([request]) == [(0, id)]
    assert scheduler.stalled(WorkerState.STEPPING, limit_s) == 0
    scheduler.update(0, Cancelled((0, 1)))
    assert not scheduler.is_alone(1, 0.0)  # one is left
    scheduler.update(0, Cancelled((2,)))
    assert scheduler.is_alone(1, 0.0)


def test_loading_may_last_as_long_as_it_goes_on(request_of: Request, model: Model, clock: Clock) -> None:
    scheduler = Scheduler([1, 1], clock=clock)
    scheduler.add([request_of(1)])
    scheduler.schedule()
    scheduler.load(model)
    assert {worker.state for worker in scheduler.workers} == {WorkerState.LOADING}
    for _ in range(3):
        clock.now += 0.9
        for index in range(2):
            scheduler.update(index, LoadProgress(model.number, 1, 9))
        assert scheduler.stalled(WorkerState.LOADING, 1.0) is None
    clock.now += 2.0
    scheduler.update(0, Loaded(model.number, Cost()))
    assert scheduler.workers[0].state is WorkerState.STEPPING
    assert not scheduler.is_loaded(model)
    assert scheduler.stalled(WorkerState.LOADING, 1.0) == 1
    scheduler.update(1, Loaded(model.number, Cost(), "it does not run"))
    assert scheduler.is_loaded(model)
    assert [answer.refused for answer in scheduler.take_loaded(model)] == [None, "it does not run"]
    assert not scheduler.is_loaded(model)


def test_image_that_would_be_late_gets_no_slot_unless_the_worker_is_idle(timed: Model, clock: Clock) -> None:
    alone_s = timed.alone_s(STAGE)
    scheduler = Scheduler([4], clock=clock)
    hopeless = of(timed, 0, deadline=0.5 * alone_s)
    scheduler.add([hopeless])
    assert scheduler.schedule() == ([(0, hopeless)], [])  # nothing else to do: the estimate may be wrong
    late, possible = of(timed, 1, deadline=2.4 * alone_s), of(timed, 2, deadline=2.6 * alone_s)
    scheduler.add([late, possible])
    assert scheduler.schedule() == ([(0, possible)], [late])
    assert not scheduler.waiting


def test_newcomer_waits_while_it_would_make_another_late(timed: Model, clock: Clock) -> None:
    alone_s = timed.alone_s(STAGE)
    scheduler = Scheduler([4], clock=clock)
    tight, newcomer = of(timed, 0, deadline=1.2 * alone_s), of(timed, 1)
    scheduler.add([tight, newcomer])
    assert scheduler.schedule() == ([(0, tight)], [])
    for _ in range(PRESETS[STAGE].loop.steps - 1):
        scheduler.update(0, report(stepped=(0,)))
    assert scheduler.schedule() == ([(0, newcomer)], [])  # one step together is in time


def test_short_neighbours_delay_a_long_image_by_all_of_their_work_and_no_longer(timed: Model, clock: Clock) -> None:
    scheduler = Scheduler([16], clock=clock)
    long, short = of(timed, 0), [of(timed, id, "default") for id in range(1, 5)]
    scheduler.add([long, *short])
    scheduler.schedule()
    (worker,) = scheduler.workers
    alone_s = {stage: timed.alone_s(stage) for stage in (STAGE, "default")}
    assert worker.left_s(long) == pytest.approx(alone_s[STAGE] + 4 * alone_s["default"])
    steps = PRESETS[STAGE].loop.steps
    assert worker.left_s(short[0]) == pytest.approx(4 * alone_s["default"] + alone_s[STAGE] / steps)


def test_short_images_take_what_time_a_long_one_has_to_spare_and_then_wait(timed: Model, clock: Clock) -> None:
    scheduler = Scheduler([16], clock=clock)
    long = of(timed, 0, deadline=MARGIN * (timed.alone_s(STAGE) + 3.5 * timed.alone_s("default")))
    scheduler.add([long, *(of(timed, id, "default") for id in range(1, 9))])
    assert scheduled(scheduler) == [(0, id) for id in range(4)]  # nobody before it, then three
    assert scheduled(scheduler) == []
    assert len(scheduler.waiting) == 5
    scheduler.update(0, report(1, 2, 3))
    clock.now = MARGIN * (3 * timed.alone_s("default") + timed.step_s(STAGE))  # as slow as was feared
    assert scheduled(scheduler) == []
    scheduler.update(0, report(0))
    assert scheduled(scheduler) == [(0, id) for id in range(4, 9)]


def test_another_models_images_cost_a_long_one_their_batches_too(timed: Model, clock: Clock) -> None:
    other = Model(2, "b", "b", timed.card, cost=Cost(per_batch_s=1.0, per_pass_s=0.0001))
    scheduler = Scheduler([16], clock=clock)
    long = of(timed, 0, deadline=MARGIN * timed.alone_s(STAGE) + 1.0)
    scheduler.add([long, of(other, 1, "default"), of(timed, 2, "default")])
    assert scheduled(scheduler) == [(0, 0), (0, 2)]

"""Who is let in, and who is refused: by how many wait, and by the time that others add."""

from functools import partial

import pytest

from tests.support.scheduling import STAGE, Clock, of, timed_model
from unperturb.service.engine.admission import Admission
from unperturb.service.engine.registry import Model
from unperturb.service.engine.scheduler import Scheduler
from unperturb.service.errors import NotReadyError


@pytest.fixture
def timed() -> Model:
    return timed_model()


def test_admission_counts_free_slots_before_the_queue(timed: Model) -> None:
    scheduler, admission = Scheduler([2]), Admission(1, 1.0, STAGE)
    admission.check_queue_length(scheduler, stage=STAGE, images=3)
    with pytest.raises(NotReadyError, match="0 images are waiting, and at most 1 may"):
        admission.check_queue_length(scheduler, stage=STAGE, images=4)
    scheduler.add(of(timed, id) for id in range(3))
    scheduler.schedule()
    admission.check_queue_length(scheduler, stage=None, images=1)
    with pytest.raises(NotReadyError, match="1 images are waiting"):
        admission.check_queue_length(scheduler, stage=STAGE, images=1)


def test_admission_counts_only_what_goes_before_the_newcomer(timed: Model) -> None:
    scheduler, admission = Scheduler([1]), Admission(100, 5.0, STAGE)
    scheduler.add(of(timed, id, client="many") for id in range(20))
    scheduler.schedule()
    check = partial(admission.check_added_time, scheduler, model=timed, stage=STAGE, left_s=30.0, patient=False)
    with pytest.raises(NotReadyError, match="images in progress would take about"):
        check(client="many")
    check(client="few")


def test_admission_of_a_short_image_counts_the_steps_of_long_ones_that_it_is_beside(timed: Model) -> None:
    scheduler, admission = Scheduler([4], clock=Clock()), Admission(100, 15.0, "default")
    scheduler.add(of(timed, id) for id in range(40))  # three begin
    assert len(scheduler.schedule().given) == 3
    check = partial(admission.check_added_time, scheduler, model=timed, stage="default", left_s=30.0, patient=False)
    step_s, alone_s = timed.step_s(STAGE), timed.alone_s("default")
    waiting = 0
    while 3 * (waiting + 1) * step_s + waiting * alone_s <= 15.0 * alone_s:  # a slot for each step
        check(client="")
        scheduler.add([of(timed, 100 + waiting, "default")])
        waiting += 1
    with pytest.raises(NotReadyError):
        check(client="")
    assert waiting >= 2
    with pytest.raises(NotReadyError, match="images in progress would take about"):
        check(stage=STAGE, client="")


def test_deadline_that_could_not_be_kept_alone_is_no_reason_to_be_let_in(timed: Model) -> None:
    scheduler, admission = Scheduler([1]), Admission(100, 5.0, STAGE)
    scheduler.add(of(timed, id) for id in range(20))
    scheduler.schedule()
    alone_s = timed.alone_s(STAGE)
    for left_s, patient in ((30.0 * alone_s, True), (0.9 * alone_s, True), (0.9 * alone_s, False)):
        check = partial(admission.check_added_time, scheduler, model=timed, stage=STAGE, client="", patient=patient)
        if left_s > alone_s:
            check(left_s=left_s)
        else:
            with pytest.raises(NotReadyError):
                check(left_s=left_s)
    admission.check_added_time(Scheduler([1]), model=timed, stage=STAGE, client="", left_s=0.01, patient=True)  # idle
